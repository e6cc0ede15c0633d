"""One decode step of attention over a packed cache against the fastest 16-bit attention.

    python -m benchmarks.kernels.decode_attention [--case ...] [--provider k2v2,g128 ...]

Every provider is timed in one run on one GPU by CUDA-graph replay (median), on random inputs that
take turns where they would fit into the L2 cache. First the result is compared with the reference
on the same inputs, with scratch memory poisoned; a provider that fails gets no row.

Words of a provider that change the work: "padded" and "added" mask padding; "capped" caps scores;
"sliding" takes the case's tokens for a sliding window, in front of which the cache holds as many
more as it ever does; "sinks" gives every query head a learned sink. 16-bit attention it is compared
with sees the window alone, and the sinks.

    python -m benchmarks.kernels.decode_attention --sliding
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterable
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
    "tiers 25/75 padded", "tiers 25/75 tile", "mixkvq", "kitty", "k2v2 per token g64", "k4v4 per token g64",
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
BY_TOKEN = ("per", "token")
"""Others: keys have scales per token, too."""
SLIDING, SINKS = "sliding", "sinks"
"""Others: the tokens are a sliding window; every query head has a learned sink."""
SLIDING_CASES = ("b64 h8x8 n4096 d64", "b16 h8x8 n4096 d64", "b1 h8x8 n4096 d64", "b64 h4x2 n1024 d256")
SLIDING_PROVIDERS = tuple(
    f"{bits} w32 {words}"
    for bits in ("k2v2 g64", "k4v2 g32", "k4v4 g64", "k8v8 g64")
    for words in (SLIDING, f"{SLIDING} {SINKS}", f"{SLIDING} {SINKS} added")
)
_WORK = (*MASKS, CAPPED, SLIDING, SINKS)


def formats(provider: str, head_dim: int) -> tuple[TensorFormat, TensorFormat]:
    """Formats of "k2v2 g64 w128" (bits, groups, recent window, by default 0) or "tiers 25/75 g64 w128".

    "k2v2 per token g64" has keys grouped as values are.
    "tiers 25/75 tile" has an order in every tile; "mixkvq" and "kitty" are the presets, without a window.
    """
    words = [word for word in provider.split() if word not in _WORK]
    if words[0] == TIERS:
        order = "tile" if BY_TILE in words else "prompt"
        more = [word for word in words[2:] if word != BY_TILE]
        return _tiered(words[1], parse_layer(" ".join(["k4v2", *more])), head_dim, order)
    if words[0] in ("mixkvq", "kitty"):
        plan = KVPlan.preset(words[0], ModelGeometry(1, 1, head_dim), window=0, sink_length=0)
        return plan.layers[0].formats(head_dim)
    text = " ".join(word for word in words if word not in BY_TOKEN)
    k, v = LayerPlan.parse(text, head_dim, window=0, tile=128).formats(head_dim)
    return (v._replace(tiers=k.tiers) if BY_TOKEN[1] in words else k), v


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
    """Arguments of `attend`, with the work that the provider's words add.

    Up to an eighth of the tokens is padding on the left, other ones in every sequence, told by a boolean
    mask or by one to be added. Tokens in front of a sliding window are told in the same two ways.
    """
    words = provider.split()
    k, v = formats(provider, case.head_dim)
    ahead = most_in_front(k) if SLIDING in words else 0
    args = decode_inputs(case._replace(tokens=case.tokens + ahead), k, v)
    first = None
    if SLIDING in words:
        first = torch.full((case.batch,), ahead, device="cuda")
    elif {*words} & {*MASKS}:
        first = torch.arange(case.batch, device="cuda") * (case.tokens // 8) // max(1, case.batch - 1)
    if first is not None:
        args[5] = _from(first, case.tokens + ahead + 1, added="added" in words)
    args.append(SOFTCAP if CAPPED in words else 0.0)
    if SINKS in words:
        args.append(sink_logits(case).flatten())
    return args


def sink_logits(case: Case) -> torch.Tensor:
    """Learned sinks [Hkv, G] that take about half of the weight, so that a forgotten one shows."""
    random = torch.randn(case.heads, case.group, device="cuda")
    return (random + math.log(case.tokens)).to(torch.bfloat16)


def most_in_front(fmt: TensorFormat) -> int:
    """The most tokens in front of a sliding window that a growing cache holds: whole tiles leave it."""
    return fmt.tile - 1


def _from(first: torch.Tensor, tokens: int, added: bool) -> torch.Tensor:
    """A mask [B, 1, 1, tokens] that hides what is before each sequence's first token."""
    seen = (torch.arange(tokens, device="cuda") >= first[:, None])[:, None, None]
    if not added:
        return seen
    lowest = torch.finfo(torch.bfloat16).min
    return torch.zeros(seen.shape, dtype=torch.bfloat16, device="cuda").masked_fill(~seen, lowest)


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


def baselines(case: Case, sinks: bool = False) -> dict[str, Timing]:
    """Times of 16-bit attention over as many tokens; query heads are folded into rows, which is fastest.

    With `sinks` each computes those too, by what it knows of the scores' sums, in one compiled kernel
    more; one that is wrong is left out.
    """
    shape = (case.batch, case.heads, case.tokens + 1, case.head_dim)
    one = 4 * case.batch * case.heads * case.tokens * case.head_dim
    sets = []
    for _ in range(input_sets(one)):
        q = torch.randn(
            case.batch, case.heads, case.group, case.head_dim, dtype=torch.bfloat16, device="cuda"
        )
        sets.append((q, *(torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))))
    sink = sink_logits(case)
    times = {}
    for name, call in (_with_sinks(sink) if sinks else WITHOUT_SINKS).items():
        try:
            if sinks and (wrong := _off(call(*sets[0]), eager_with_sinks(*sets[0], sink))) > LIMIT:
                print(f"{case.name}: {name} is off by {wrong:.3g}", file=sys.stderr)
                continue
            times[name] = graph_time([functools.partial(call, *three) for three in sets])
        except RuntimeError as problem:
            print(f"{case.name}: {name} does not run: {str(problem)[:80]}", file=sys.stderr)
    del sets
    raw = [decode_inputs(case, RAW, RAW) for _ in range(input_sets(one))]
    more = {"sink_logits": sink.flatten()} if sinks else {}
    split = []
    for config in RAW_CONFIGS:
        calls = [functools.partial(attention.attend, *args, config=config, **more) for args in raw]
        split.append(graph_time(calls))
    times[_named("triton-16bit", sinks)] = min(split)
    return times


def _sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


WITHOUT_SINKS = {
    "sdpa-flash": functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
}


def _named(baseline: str, sinks: bool) -> str:
    return f"{baseline} {SINKS}" if sinks else baseline


def _with_sinks(sink: torch.Tensor) -> dict[str, Callable[..., torch.Tensor]]:
    """The same backends with a learned sink, and attention as models with sinks write it out."""
    rescale = torch.compile(rescaled, dynamic=False)

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
        return rescale(out, lse, sink)

    def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
        return rescale(out, lse.reshape(q.shape[:3]), sink)

    eager = torch.compile(functools.partial(eager_with_sinks, sink=sink), dynamic=False)
    return {
        _named("sdpa-flash", True): flash,
        _named("sdpa-cudnn", True): cudnn,
        "compiled eager sinks": eager,
    }


def rescaled(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Attention [B, Hkv, G, D] that a sink [Hkv, G] joins afterwards; `lse` [B, Hkv, G] is of its scores."""
    return (out * torch.sigmoid(lse - sink.float())[..., None]).to(out.dtype)


def eager_with_sinks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Attention with a sink [Hkv, G] as a column of the scores; q is [B, Hkv, G, D]."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    column = sink[None, :, :, None].expand(q.shape[0], -1, -1, 1).to(scores.dtype)
    weights = torch.cat((scores, column), -1).softmax(-1, dtype=torch.float32)
    return weights[..., :-1].to(v.dtype) @ v


def _off(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out.float() - expected.float()).norm() / expected.float().norm()).item()


def measure(case: Case, provider: str) -> tuple[Timing, float, int] | str:
    """(time, effective bits of a token that is seen, bytes read), or why there is none."""
    k, v = formats(provider, case.head_dim)
    args = inputs(case, provider)
    found = error(args)
    if not found < LIMIT:
        return f"WRONG: relative error {found:.3g} against the reference"
    size = nbytes(args)
    sets = [args] + [inputs(case, provider) for _ in range(input_sets(size) - 1)]
    timing = graph_time([functools.partial(attention.attend, *one) for one in sets])
    elements = case.batch * case.heads * case.head_dim
    stored = case.tokens + (most_in_front(k) if SLIDING in provider.split() else 0)
    raw = sum(stored - fmt.packed_tiles(stored) * fmt.tile for fmt in (k, v)) * elements * 16
    packed = sum(
        fmt.packed_tiles(stored) * fmt.tile * layout.bits_per_packed_element(fmt, case.head_dim)
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
    parser.add_argument("--sliding", action="store_true", help="cases and providers of sliding windows")
    parser.add_argument("--output", type=Path, help="folder of the rows")
    parser.add_argument("--compile-only", action="store_true", help="and check; several processes can share")
    options = parser.parse_args()
    torch.manual_seed(0)
    cases = options.case or (SLIDING_CASES if options.sliding else CASES)
    providers = options.provider or (SLIDING_PROVIDERS if options.sliding else PROVIDERS)
    if options.compile_only:
        return compile_only(cases, providers)
    bandwidth = copy_bandwidth()
    print(f"device copy {bandwidth / 1e6:.2f} TB/s")
    rows = Rows("decode_attention", options.output)
    wrong = 0
    for name in cases:
        case = Case.parse(name)
        times, best = {}, {}
        for sinks in sorted({SINKS in provider.split() for provider in providers}):
            found = baselines(case, sinks)
            times |= found
            best[sinks] = min(found, key=lambda key: found[key].median)
        full = 4 * case.batch * case.heads * case.tokens * case.head_dim
        for provider, timing in times.items():
            rows.add(
                name, provider, timing, effective_bits=16.0, nbytes=full,
                copy_share=full / timing.median / bandwidth,
            )  # fmt: skip
        for provider in providers:
            if formats(provider, case.head_dim)[0].group_size > case.tokens:
                continue
            result = measure(case, provider)
            torch.cuda.empty_cache()
            if isinstance(result, str):
                print(f"{name:24} kvmix {provider:22} {result}", flush=True)
                wrong = 1
                continue
            timing, bits, size = result
            rival = best[SINKS in provider.split()]
            rows.add(
                name, f"kvmix {provider}", timing, (rival, times[rival].median), effective_bits=bits,
                nbytes=size, copy_share=size / timing.median / bandwidth,
            )  # fmt: skip
    return wrong


if __name__ == "__main__":
    sys.exit(main())
