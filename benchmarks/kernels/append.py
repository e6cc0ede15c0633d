"""What the cache update costs: `append_` of one token, and its share of a decode step.

    python -m benchmarks.kernels.append

The share is that of append's mean time (a tile is flushed every 128th step) in the time of
append and attention together, at 8k tokens. "prompt" appends all tokens to an empty cache, as the
first step over a fixed cache does: its share is that of the copy bandwidth, bytes read plus written.
The gate is `tests/kernels/test_triton_storage.py`; here the buffers after a flush and after a prompt
are compared with the reference once more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.kernels.decode_attention import formats
from benchmarks.kernels.rows import Rows, copy_bandwidth
from kvmix_kernels import ops
from kvmix_kernels.triton import attention, storage
from kvmix_kernels.triton.timing import Case, Timing, decode_inputs, graph_time, nbytes, random_cache

CASES = ("b64 h8x4 n8192 d128", "b16 h32x1 n4096 d128", "b1 h8x4 n131072 d128", "b1 h8x4 n8192 d128")
PROVIDERS = (
    "k2v2 g128 w128", "k4v4 g128 w128", "k2v2 g32 w128",
    "tiers 25/75 w128", "tiers 25/75 tile w128", "mixkvq",
)  # fmt: skip
PROMPTS = ("b1 h8x4 n4096 d128", "b16 h8x4 n8192 d128")


def step_arguments(args: list[object]) -> list[object]:
    """Arguments of `append_` from those of `attend` for the same step."""
    query, *new, keys, values, _, start, length, _, key_format, value_format = args[:11]
    return [keys, values, *new, None, start, length, key_format, value_format, query]


def prompt_arguments(case: Case, provider: str) -> list[object]:
    """Arguments of `append_` for a prompt; heads behind tokens in memory, as models have them."""
    formats_ = formats(provider, case.head_dim)
    shape = (case.batch, case.tokens, case.heads, case.head_dim)
    keys, values = (torch.randn(shape, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for _ in "kv")
    caches = [random_cache(case, fmt, case.tokens, torch.bfloat16).tensors for fmt in formats_]
    start = torch.zeros((), dtype=torch.int64, device="cuda")
    step = [*caches, keys, values, None, start, case.tokens, *(fmt.encode() for fmt in formats_)]
    if formats_[0].by_tile:
        shape = (case.batch, case.tokens, case.heads * case.group, case.head_dim)
        step.append(torch.randn(shape, dtype=torch.bfloat16, device="cuda").transpose(1, 2))
    return step


def equal_to_the_reference(args: list[object]) -> bool:
    """Whether `append_` leaves the buffers, which it writes, as the reference does."""
    expected = [[part.clone() for part in cache] for cache in args[:2]]
    ops._append_(*expected, *args[2:])
    storage.append_(*args)
    pairs = (
        pair for got, want in zip(args[:2], expected, strict=True) for pair in zip(got, want, strict=True)
    )
    return all(torch.equal(a, b) for a, b in pairs)


def prompt_row(rows: Rows, case: Case, provider: str, bandwidth: float) -> bool:
    """Time a prompt if its buffers are those of the reference; False if not."""
    small = prompt_arguments(case._replace(batch=1, tokens=1024), provider)
    if not equal_to_the_reference(small):
        print(f"{case.name:24} kvmix {provider:22} prompt WRONG", flush=True)
        return False
    step = prompt_arguments(case, provider)
    timing = graph_time([lambda: storage.append_(*step)])
    moved = nbytes(step)
    rows.add(
        case.name,
        f"kvmix {provider} prompt",
        timing,
        nbytes=moved,
        copy_share=moved / timing.median / bandwidth,
    )
    return True


def agrees(case: Case, provider: str) -> bool:
    """Whether a flush writes what the reference writes."""
    small = case._replace(batch=min(case.batch, 2), tokens=min(case.tokens, 1024))
    # the last of the 128 tokens of a tile leaves the window with this token
    args = decode_inputs(small._replace(tokens=small.tokens - 1), *formats(provider, case.head_dim))
    step = step_arguments(args)
    return equal_to_the_reference(step)


def main() -> int:
    """Run all cases; 1 if any provider was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of the rows")
    parser.add_argument("--provider", action="append", choices=PROVIDERS, help="repeatable; default: all")
    parser.add_argument("--case", action="append", choices=CASES + PROMPTS, help="repeatable; default: all")
    options = parser.parse_args()
    folder = options.output
    chosen, providers = options.case or CASES + PROMPTS, options.provider or PROVIDERS
    rows = Rows("append", folder)
    wrong = 0
    for name in filter(chosen.__contains__, CASES):
        case = Case.parse(name)
        for provider in providers:
            if not agrees(case, provider):
                print(f"{name:24} kvmix {provider:22} WRONG", flush=True)
                wrong = 1
                continue
            times = {}
            for kind, tokens in (("plain", case.tokens), ("flush", case.tokens - 1)):
                args = decode_inputs(case._replace(tokens=tokens), *formats(provider, case.head_dim))
                step = step_arguments(args)
                times[kind] = graph_time([lambda step=step: storage.append_(*step)])
            attend = graph_time([lambda args=args: attention.attend(*args)])
            mean = Timing(*((127 * a + b) / 128 for a, b in zip(times["plain"], times["flush"], strict=True)))
            share = mean.median / (mean.median + attend.median)
            rows.add(name, f"kvmix {provider} no flush", times["plain"])
            rows.add(name, f"kvmix {provider} flush", times["flush"])
            rows.add(name, f"kvmix {provider} mean", mean, step_share=share)
            print(
                f"{'':24} share of append + attend: {share:.1%} (attend {attend.median:.1f} us)", flush=True
            )
            torch.cuda.empty_cache()
    bandwidth = copy_bandwidth()
    for name in filter(chosen.__contains__, PROMPTS):
        for provider in providers:
            wrong |= not prompt_row(rows, Case.parse(name), provider, bandwidth)
            torch.cuda.empty_cache()
    return wrong


if __name__ == "__main__":
    sys.exit(main())
