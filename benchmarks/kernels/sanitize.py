"""Start every kernel once in each of its forms: what a memory checker is run over.

    python -m benchmarks.kernels.sanitize                   # compiles; results against the reference
    python -m benchmarks.kernels.sanitize --tools           # then also under every tool of compute-sanitizer
    make sanitize                                           # the same

Without the caching allocator every tensor is an allocation of its own, so that a step past its end is
seen. Shapes are small and odd: tokens beyond whole tiles, a window, a batch of ragged masks, sequences of
other lengths over pages, a step that exchanges tokens of a high tier. With `--tools` forms run side by
side, as many as there are cores; exit status 1 if a result or a tool's verdict is bad.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from benchmarks.kernels.append import equal_to_the_reference, step_arguments
from benchmarks.kernels.decode_attention import formats
from kvmix_kernels import layout, ops
from kvmix_kernels.cached import Cached, allocate
from kvmix_kernels.layout import TensorFormat, make_format, make_high, with_high
from kvmix_kernels.paged import attend as by_pages
from kvmix_kernels.paged import reference
from kvmix_kernels.paged.pages import LayerShape, PagePool, page_layout
from kvmix_kernels.paged.step import Request, Step
from kvmix_kernels.paged.tables import tables_for
from kvmix_kernels.tokens import append as tokens_append
from kvmix_kernels.tokens import attend as tokens_attend
from kvmix_kernels.tokens import ops as ops_of_tokens
from kvmix_kernels.triton import attention, paged, reading, storage, tiers
from kvmix_kernels.triton.timing import Case, decode_inputs, random_cache

LIMIT = 2e-2
FORMS: tuple[tuple[int, int, int, int, str, str], ...] = (
    # bits of keys and values, head size, group, axis of keys and of values
    (2, 2, 128, 128, "channel", "token"),
    (3, 3, 128, 128, "channel", "token"),
    (4, 4, 128, 128, "channel", "token"),
    (8, 8, 128, 64, "channel", "token"),
    (4, 2, 64, 32, "channel", "token"),
    (1, 3, 80, 16, "channel", "token"),
    (2, 4, 256, 128, "channel", "token"),
    (2, 2, 128, 64, "token", "token"),
    (2, 2, 64, 64, "token", "channel"),
    (16, 16, 96, 32, "token", "token"),
)
"""The fast path at several widths and head sizes, the general path, raw tokens."""

TIERS = (
    (128, "tiers 25/75"), (64, "tiers 25/75"), (256, "tiers 25/75"), (128, "tiers 25/50/25 g32"),
    (128, "tiers 25/75 tile"), (128, "mixkvq"), (64, "kitty"),
)  # fmt: skip
"""Head sizes, and providers of `decode_attention` with tiers, scales of a byte and rotated values."""

PAGED = ("k2v2 g128", "k4v2 g32", "k3v3 g128", "tiers 25/75 tile_keys", "k2v2 per token g64")
"""Formats of pages, of heads of 128 channels."""

TOKENS = {
    "k2v2 g128": make_high(25, balanced=True),
    "tiers 25/75": make_high(25, policy="mean"),
    "k4v2 g32": make_high(0, 40, policy="last", evicting=True),
    "k4v4 g64": make_high(25, bits=4, policy="norm"),
    "k2v2 per token g64": make_high(25),
}
"""Formats with a high tier of tokens, of heads of 128 channels."""

STEPS = ((131, 3, 0), (1, 300, 40), (1, 1, 1), (90, 1, 1))
"""Tokens of each of three sequences in one step after another."""

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

SOFTCAPS = (0.0, 1.0, 0.0, 0.0)
"""One for each of the masks."""


def masks(case: Case) -> list[torch.Tensor | None]:
    """None, left padding of another length in every row, the same added to scores, and one for each head."""
    seen = torch.ones(case.batch, 1, 1, case.tokens + 1, dtype=torch.bool, device="cuda")
    for row in range(case.batch):
        seen[row, ..., : 17 * row] = False
    added = torch.zeros(seen.shape, dtype=torch.bfloat16, device="cuda").masked_fill(
        ~seen, torch.finfo(torch.bfloat16).min
    )
    own = torch.rand(case.batch, case.heads * case.group, 1, case.tokens + 1, device="cuda") < 0.9
    return [None, seen, added, own]


def check(case: Case, k: TensorFormat, v: TensorFormat) -> list[str]:
    """What differs from the reference."""
    wrong = []
    args = decode_inputs(case, k, v)
    for mask, softcap in zip(masks(case), SOFTCAPS, strict=True):
        args[5] = mask
        got = attention.attend(*args, softcap).float()
        expected = ops._attend(args[0].float(), *args[1:], softcap)
        # `not <` also when either is not a number
        if not (got - expected).norm() / expected.norm() < LIMIT:
            wrong.append(f"attend, mask {None if mask is None else (mask.dtype, *mask.shape)}")
    args[5] = None
    given = (*args, 0.0, torch.linspace(-4, 4, case.heads * case.group, device="cuda").bfloat16())
    for got, want in zip(attention.attend_lse(*given), ops._attend_lse(*given), strict=True):
        if not (got.float() - want.float()).norm() / want.float().norm() < LIMIT:
            wrong.append("attend_lse with learned sinks")
    step = step_arguments(args)
    if not equal_to_the_reference(step):
        wrong.append("append_")
    prompt = [
        torch.randn(case.batch, case.tokens, heads, case.head_dim, dtype=torch.bfloat16, device="cuda")
        for heads in (case.heads, case.heads, case.heads * case.group)
    ]
    new_keys, new_values, query = (x.transpose(1, 2) for x in prompt)
    caches = (random_cache(case, fmt, case.tokens, torch.bfloat16).tensors for fmt in (k, v))
    start = torch.zeros((), dtype=torch.int64, device="cuda")
    step = [*caches, new_keys, new_values, None, start, case.tokens, k.encode(), v.encode()]
    # an order from the prompt stays as it is where the host does not know that there is none yet
    step.append(query if k.by_tile else None)
    if not equal_to_the_reference(step):
        wrong.append("append_ of a prompt")
    places = torch.arange(case.head_dim, device="cuda")
    for fmt in (k, v):
        shape = (case.batch, case.tokens, case.heads, case.head_dim)
        x = torch.randn(shape, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        got, want = storage.quantize_pack(x, None, fmt.encode()), ops._quantize_pack(x, None, fmt.encode())
        if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
            wrong.append("quantize_pack")
        if fmt.order:
            # what chooses an order from queries: its sums may differ from the reference's in their last bits
            hint = torch.randn(case.batch, case.heads * case.group, *x.shape[2:], device="cuda").bfloat16()
            given = hint if fmt.asks_queries else None
            order = Cached.of(storage.quantize_pack(x, None, fmt.encode(), given), fmt.encode()).order
            if order is None or not torch.equal(order.long().sort(-1).values, places.expand(order.shape)):
                wrong.append("order of channels")
        part = (got, None, case.tokens, fmt.encode())
        # the last rounding may differ
        if not torch.allclose(reading.dequantize(*part), ops._dequantize(*part), rtol=1e-2, atol=1e-2):
            wrong.append("dequantize")
    return wrong


def check_pages(name: str) -> list[str]:
    """What differs from the reference, which keeps pages of its own, in steps of several sequences."""
    heads, group, size = 2, 4, 128
    if name.startswith("tiers"):
        k = make_format(4, "channel", 128, 128, 4, 32, "byte", tiers=((4, 32), (2, 96)), order="tile_keys")
        v = make_format(2, "token", 0, 128, 4, 32, "byte", rotation=True, symmetric=True)
    else:
        k, v = (fmt._replace(sink=4, window=32) for fmt in formats(name, size))
    laid = page_layout({0: LayerShape(k, v, heads, size, size)}, torch.bfloat16, 128)
    plain, pool = (
        PagePool(laid, torch.full((12 * laid.tail_nbytes,), 255, dtype=torch.uint8, device=device))
        for device in ("cpu", "cuda")
    )
    first = len(STEPS[0]) * laid.blocks_per_tail
    sinks, pages = (
        [first, first + 1, first + 2],
        [[first + 3 + 3 * j + i for j in range(4)] for i in range(3)],
    )
    past, wrong = [0, 0, 0], []
    for counts in STEPS:
        begins = [sum(counts[:i]) for i in range(3)]
        requests = [
            Request(begins[i], n, past[i], laid.raw_from(past[i]), pages[i], i, sinks[i])
            for i, n in enumerate(counts)
            if n
        ]
        step = Step(laid, requests, "cpu")
        tables = tables_for(Step(laid, requests, "cuda"), torch.device("cuda"))
        q, *new = (torch.randn(sum(counts), n, size).bfloat16() for n in (heads * group, heads, heads))
        moved = [x.cuda() for x in (q, *new)]
        if tables.singles:
            want = reference.attend(plain, 0, step, q.float(), *new, size**-0.5, 0.0, None)
            at = [request.first for request in step.requests if request.count == 1]
            got = paged.attend_singles(pool, 0, tables, *moved, size**-0.5).cpu().float()[: len(at)]
            if not (got - want[at]).norm() / want[at].norm() < LIMIT:
                wrong.append(f"attention over pages, {counts}")
        if tables.runs:
            found = paged.gather(pool, 0, tables, *moved[1:])
            for role, tensor in enumerate(found):
                parts = [
                    part
                    for run in tables.runs
                    for part in (
                        reference.stored(plain, 0, run, role).transpose(0, 1).float(),
                        new[role][run.first : run.first + run.count].float(),
                    )
                ]
                if not torch.allclose(tensor.cpu().float(), torch.cat(parts), rtol=1e-2, atol=1e-2):
                    wrong.append(f"gather, {counts}")
        by_pages.store(plain, 0, step, *new)
        paged.store(pool, 0, tables, *moved[1:])
        if not torch.equal(plain.storage, pool.storage.cpu()):
            wrong.append(f"pages, {counts}")
        past = [a + b for a, b in zip(past, counts, strict=True)]
    return wrong


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, but for the last bits of sums; what was never written is so in both."""
    return torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-6, equal_nan=True)


def check_tokens(name: str) -> list[str]:
    """What differs from the plain ops in two steps over a high tier, of which the first packs a tile."""
    high, size, scale = TOKENS[name], 128, 128**-0.5
    batch, heads, group, length = 2, 2, 4, 4 + 32 + 3 * 128 - 1
    k, v = (fmt._replace(sink=4, window=32) for fmt in formats(name, size))
    pair = with_high(k, high), with_high(v, high._replace(scored=0, balanced=0))
    encoded, capacity = [fmt.encode() for fmt in pair], length + 40

    def draw(count: int, heads: int) -> torch.Tensor:
        return torch.randn(batch, heads, count, size).bfloat16()

    caches = [
        allocate(
            *(batch, heads, size, layout.fixed_tiles(fmt, capacity), layout.fixed_slots(fmt, capacity)),
            *(fmt, torch.bfloat16, "cpu"),
        )
        for fmt in pair
    ]
    prompt = draw(length, heads), draw(length, heads)
    ops_of_tokens.append_tiers_(
        *(*(c.tensors for c in caches), *prompt, None, None, 0, *encoded),
        *(draw(length, heads * group), None, scale),
    )
    # on the CPU: what products of a matrix library write goes past initcheck, which then calls it unwritten
    fast = [c.map(lambda x: x.cuda()) for c in caches]
    wrong = []
    for count in range(length, length + 2):
        start = torch.tensor(count)
        q, *new = (draw(1, n) for n in (heads * group, heads, heads))
        want, of_want = tokens_attend.attend(q, *new, *caches, None, start, capacity, scale, 0.0, None)
        buffers, moved = [c.tensors for c in fast], [x.cuda() for x in (start, q, *new)]
        out, mass = tiers.attend_tiers(
            *(*moved[1:], *buffers, None, moved[0], capacity, scale, *encoded),
        )
        if not (out.cpu().float() - want.float()).norm() / want.float().norm() < LIMIT:
            wrong.append(f"attend_tiers, {count} tokens")
        if not torch.allclose(mass.cpu(), of_want, rtol=LIMIT, atol=1e-3):
            wrong.append(f"attention to tokens, {count} tokens")
        tokens_append.append(*caches, *new, None, start, capacity, q, mass.cpu(), scale, 0.0)
        tiers.append_tiers_(
            *(*buffers, *moved[2:], None, moved[0], capacity, *encoded, moved[1], mass, scale),
        )
        for one, other in zip(caches, fast, strict=True):
            low = len(one.format.low.buffer_names)
            pairs = zip(one.tensors[low:], other.tensors[low:], strict=True)
            if not all(_alike(a, b.cpu()) for a, b in pairs):
                wrong.append(f"append_tiers_, {count} tokens")
    return wrong


def under_tools(count: int) -> int:
    """All forms as they are, which compiles their kernels, then under each tool; 1 if any is not clean."""
    bad, began = 0, time.monotonic()

    def run(tool: str | None, form: int) -> tuple[int, str]:
        command = [sys.executable, "-m", "benchmarks.kernels.sanitize", "--form", str(form)]
        if tool:
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        return done.returncode, done.stdout + done.stderr

    for tool in (None, *TOOLS):
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            found = list(workers.map(partial(run, tool), range(count)))
        clean = sum(code == 0 for code, _ in found)
        bad += clean < count
        took = time.monotonic() - began
        print(f"{tool or 'results'}: {clean} of {count} forms clean, {took:.0f} s so far", flush=True)
        for form, (code, output) in enumerate(found):
            if code:
                print(f"  form {form}, exit status {code}:\n{output[-1500:]}", flush=True)
    return int(bad > 0)


def main() -> int:
    """Run all forms; 1 if any result was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--form",
        type=int,
        action="append",
        help="number of a form; repeatable; default: all",
    )
    parser.add_argument(
        "--tools", action="store_true", help="all forms, under each tool of compute-sanitizer"
    )
    options = parser.parse_args()
    if options.tools:
        return under_tools(len(FORMS) + len(TIERS) + len(PAGED) + len(TOKENS))
    chosen = options.form
    torch.manual_seed(0)
    failed = 0
    forms = []
    for k_bits, v_bits, head_dim, group, k_axis, v_axis in FORMS:
        size = layout.WHOLE_HEAD if group >= head_dim else group
        k = make_format(k_bits, k_axis, group if k_axis == "channel" else size, 128, 4, 32)
        v = make_format(v_bits, v_axis, size if v_axis == "token" else group, 128, 4, 32)
        forms.append((f"k{k_bits}v{v_bits} g{group}", head_dim, k, v))
    for head_dim, provider in TIERS:
        k, v = (fmt._replace(sink=4, window=32) for fmt in formats(provider, head_dim))
        forms.append((provider, head_dim, k, v))
    for index, (name, head_dim, k, v) in enumerate(forms):
        if chosen and index not in chosen:
            continue
        # the last of a tile's tokens leaves the window with this step, so that it flushes
        for tokens in (4 + 2 * 128 + 32 - 1, 77):
            case = Case(2, 2, 4, tokens, head_dim)
            wrong = check(case, k, v)
            failed += bool(wrong)
            print(f"{case.name} {name}: {', '.join(wrong) or 'right'}", flush=True)
    others = [("pages", check_pages, name) for name in PAGED]
    others += [("tokens", check_tokens, name) for name in TOKENS]
    for index, (kind, check_one, name) in enumerate(others, len(forms)):
        if not chosen or index in chosen:
            wrong = check_one(name)
            failed += bool(wrong)
            print(f"{kind} {name}: {', '.join(wrong) or 'right'}", flush=True)
    torch.cuda.synchronize()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
