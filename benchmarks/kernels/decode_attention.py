"""One decode step of attention over a packed cache against the fastest 16-bit attention.

    python -m benchmarks.kernels.decode_attention [--case ...] [--provider k2v2,g128 ...]

Every provider is timed in one run on one GPU by CUDA-graph replay (median), on random inputs that
take turns where they would fit into the L2 cache. First the result is compared with the reference
on the same inputs, with scratch memory poisoned; a provider that fails gets no row.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.rows import Rows, copy_bandwidth
from kvmix_fx.plan import KVPlan, LayerPlan, ModelGeometry
from kvmix_fx.plan.text import LayerText, parse_layer
from kvmix_kernels import layout, ops
from kvmix_kernels.layout import TensorFormat, make_format
from kvmix_kernels.triton import attention, configs
from kvmix_kernels.triton.timing import Case, Timing, decode_inputs, graph_time, input_sets, nbytes

CASES = (
    "b64 h8x4 n8192 d128",
    "b16 h32x1 n4096 d128",
    "b1 h8x4 n131072 d128",
    "b1 h32x1 n131072 d128",
    "b64 h8x4 n8192 d64",
    "b64 h4x8 n8192 d256",
    "b1 h8x4 n512 d128",
    "b1 h8x4 n1024 d128",
    "b1 h8x4 n2048 d128",
    "b64 h8x4 n512 d128",
    "b64 h8x4 n1024 d128",
    "b64 h8x4 n2048 d128",
)
PROVIDERS = (
    "k2v2 g128", "k3v3 g128", "k4v4 g128", "k4v2 g128", "k2v4 g128", "k3v2 g128",
    "k3v4 g128", "k2v2 g64", "k4v4 g64", "k2v2 g32", "k4v4 g32",
    "k2v2 g128 w128", "k3v3 g128 w128", "k4v4 g128 w128", "k2v2 g128 padded",
    "k2v2 g128 added", "k3v3 g128 padded", "k4v4 g128 padded", "k2v2 g128 capped", "k4v4 g128 capped",
    "tiers 25/75", "tiers 50/50", "tiers 25/50/25", "tiers 25/75 g32", "tiers 25/75 w128",
    "tiers 25/75 padded", "tiers 25/75 tile", "mixkvq", "kitty",
)  # fmt: skip
RAW_CONFIGS = tuple(
    configs.AttendConfig(warps=warps, programs=programs, rest_tokens=tokens, rest_stages=stages)
    for warps, tokens, stages in ((4, 64, 3), (4, 128, 2), (2, 32, 3))
    for programs in (264, 1056)
)
RAW = make_format(16)
LIMIT = 2e-2
SOFTCAP = 50.0
"""Gemma 2's."""
MASKS = ("padded", "added")
"""Words of a provider's name that say how attention is masked."""
TIERS = "tiers"
"""First word of providers whose keys have tiers of channels, such as "tiers 25/75 w128"."""
BY_TILE = "tile"
"""Another word of theirs: every tile has an order of its own."""
CAPPED = "capped"
"""Another: its scores are."""


def formats(provider: str, head_dim: int) -> tuple[TensorFormat, TensorFormat]:
    """Formats of "k2v2 g64 w128" (bits, groups, recent window, by default 0) or "tiers 25/75 g64 w128".

    "tiers 25/75 tile" has an order in every tile; "mixkvq" and "kitty" are the presets, without a window.
    """
    words = [word for word in provider.split() if word not in (*MASKS, CAPPED)]
    text = " ".join(words)
    if words[0] == TIERS:
        order = "tile" if BY_TILE in words else "prompt"
        more = [word for word in words[2:] if word != BY_TILE]
        return _tiered(words[1], parse_layer(" ".join(["k4v2", *more])), head_dim, order)
    if words[0] in ("mixkvq", "kitty"):
        plan = KVPlan.preset(words[0], ModelGeometry(1, 1, head_dim), window=0, sink_length=0)
        return plan.layers[0].formats(head_dim)
    return LayerPlan.parse(text, head_dim, window=0, tile=128).formats(head_dim)


def _tiered(shares: str, more: LayerText, head_dim: int, order: str) -> tuple[TensorFormat, TensorFormat]:
    """Keys with so many percent of the channels at 4, 2 and 0 bits; values rotated, symmetric, of 2 bits."""
    window = more.window or 0
    channels = [head_dim * int(share) // 100 for share in shares.split("/")]
    keys = make_format(
        4, "channel", more.group_size or 128, 128, 0, window, "byte",
        tiers=tuple(zip((4, 2, 0), channels, strict=False)), order=order,
    )  # fmt: skip
    return keys, make_format(
        2, "token", layout.WHOLE_HEAD, 128, 0, window, "byte", symmetric=True, rotation=True
    )


def inputs(case: Case, provider: str) -> list[object]:
    """Arguments of `attend`; "capped" in the provider caps scores, "padded" and "added" hide padding.

    Up to an eighth of the tokens is padding on the left, other ones in every sequence, told by a boolean
    mask or by one to be added.
    """
    args = decode_inputs(case, *formats(provider, case.head_dim))
    kind = provider.split()[-1]
    if kind in MASKS:
        first = torch.arange(case.batch, device="cuda") * (case.tokens // 8) // max(1, case.batch - 1)
        seen = (torch.arange(case.tokens + 1, device="cuda") >= first[:, None])[:, None, None]
        args[5] = seen
        if kind == "added":
            lowest = torch.finfo(torch.bfloat16).min
            args[5] = torch.zeros(seen.shape, dtype=torch.bfloat16, device="cuda").masked_fill(~seen, lowest)
    return [*args, SOFTCAP] if CAPPED in provider.split() else args


def poisoned_attend(args: list[object]) -> torch.Tensor:
    """The op with NaN in all memory that it allocates."""
    empty = torch.empty

    def poisoned(*size: object, **options: object) -> torch.Tensor:
        out = empty(*size, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    with mock.patch.object(torch, "empty", poisoned):
        return attention.attend(*args)


def _row(a: object, b: int) -> object:
    """Sequence `b` of an argument of the op."""
    if isinstance(a, tuple):
        return tuple(_row(x, b) for x in a)
    return a[b : b + 1] if isinstance(a, torch.Tensor) and a.dim() >= 3 else a


def error(args: list[object]) -> float:
    """Relative error of the op against the reference in float32 on the first and last sequence."""
    out = poisoned_attend(args).float()
    worst = 0.0
    for b in {0, out.shape[0] - 1}:
        part = [_row(a, b) for a in args]
        expected = ops._attend(part[0].float(), *part[1:])
        worst = max(worst, ((out[b : b + 1] - expected).norm() / expected.norm()).item())
    return worst if worst == worst else float("inf")


def baselines(case: Case) -> dict[str, Timing]:
    """Times of 16-bit attention over as many tokens; query heads are folded into rows, which is fastest."""
    shape = (case.batch, case.heads, case.tokens + 1, case.head_dim)
    one = 4 * case.batch * case.heads * case.tokens * case.head_dim
    sets = []
    for _ in range(input_sets(one)):
        q = torch.randn(
            case.batch, case.heads, case.group, case.head_dim, dtype=torch.bfloat16, device="cuda"
        )
        sets.append((q, *(torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))))
    times = {}
    for name, backend in (
        ("sdpa-flash", SDPBackend.FLASH_ATTENTION),
        ("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        try:
            with sdpa_kernel(backend):
                calls = [functools.partial(F.scaled_dot_product_attention, *three) for three in sets]
                times[name] = graph_time(calls)
        except RuntimeError as problem:
            print(f"{case.name}: {name} does not run: {str(problem)[:80]}", file=sys.stderr)
    del sets, calls
    raw = [decode_inputs(case, RAW, RAW) for _ in range(input_sets(one))]
    split = []
    for config in RAW_CONFIGS:
        calls = [functools.partial(attention.attend, *args, config=config) for args in raw]
        split.append(graph_time(calls))
    times["triton-16bit"] = min(split)
    return times


def measure(case: Case, provider: str) -> tuple[Timing, float, int] | str:
    """(time, effective bits, bytes read), or why there is none."""
    k, v = formats(provider, case.head_dim)
    args = inputs(case, provider)
    found = error(args)
    if not found < LIMIT:
        return f"WRONG: relative error {found:.3g} against the reference"
    size = nbytes(args)
    sets = [args] + [inputs(case, provider) for _ in range(input_sets(size) - 1)]
    timing = graph_time([functools.partial(attention.attend, *one) for one in sets])
    elements = case.batch * case.heads * case.head_dim
    raw = sum(case.tokens - fmt.packed_tiles(case.tokens) * fmt.tile for fmt in (k, v)) * elements * 16
    packed = sum(
        fmt.packed_tiles(case.tokens) * fmt.tile * layout.bits_per_packed_element(fmt, case.head_dim)
        for fmt in (k, v)
    )
    bits = packed * elements + raw
    return timing, bits / (2 * case.tokens * elements), int(bits / 8)


def compile_only(cases: Iterable[str], providers: Iterable[str]) -> int:
    """Fill the kernel cache; 1 if any provider was wrong."""
    wrong = 0
    for case in map(Case.parse, cases):
        raw = decode_inputs(case._replace(tokens=min(case.tokens, 8192)), RAW, RAW)
        for config in RAW_CONFIGS:
            attention.attend(*raw, config=config)
        for provider in providers:
            if formats(provider, case.head_dim)[0].group_size <= case.tokens:
                wrong |= not error(inputs(case, provider)) < LIMIT
    return wrong


def main() -> int:
    """Run the chosen cases; 1 if any provider was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append")
    parser.add_argument("--provider", action="append", help='such as "k2v2 g128"; repeatable')
    parser.add_argument("--output", type=Path, help="folder of the rows")
    parser.add_argument("--compile-only", action="store_true", help="and check; several processes can share")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.compile_only:
        return compile_only(options.case or CASES, options.provider or PROVIDERS)
    bandwidth = copy_bandwidth()
    print(f"device copy {bandwidth / 1e6:.2f} TB/s")
    rows = Rows("decode_attention", options.output)
    wrong = 0
    for name in options.case or CASES:
        case = Case.parse(name)
        times = baselines(case)
        best = min(times, key=lambda key: times[key].median)
        full = 4 * case.batch * case.heads * case.tokens * case.head_dim
        for provider, timing in times.items():
            rows.add(
                name, provider, timing, effective_bits=16.0, nbytes=full,
                copy_share=full / timing.median / bandwidth,
            )  # fmt: skip
        for provider in options.provider or PROVIDERS:
            if formats(provider, case.head_dim)[0].group_size > case.tokens:
                continue
            result = measure(case, provider)
            torch.cuda.empty_cache()
            if isinstance(result, str):
                print(f"{name:24} kvmix {provider:22} {result}", flush=True)
                wrong = 1
                continue
            timing, bits, size = result
            rows.add(
                name, f"kvmix {provider}", timing, (best, times[best].median), effective_bits=bits,
                nbytes=size, copy_share=size / timing.median / bandwidth,
            )  # fmt: skip
    return wrong


if __name__ == "__main__":
    sys.exit(main())
