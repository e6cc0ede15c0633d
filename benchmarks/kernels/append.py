"""What the cache update costs: `append_` of one token, and its share of a decode step.

    python -m benchmarks.kernels.append

The share is that of append's mean time (a tile is flushed every 128th step) in the time of
append and attention together, at 8k tokens. The gate is `tests/kernels/test_triton_storage.py`;
here the buffers after a flush are compared with the reference once more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.kernels.decode_attention import formats
from benchmarks.kernels.rows import Rows
from kvmix_kernels import ops
from kvmix_kernels.triton import attention, storage
from kvmix_kernels.triton.timing import Case, Timing, decode_inputs, graph_time

CASES = ("b64 h8x4 n8192 d128", "b16 h32x1 n4096 d128", "b1 h8x4 n131072 d128", "b1 h8x4 n8192 d128")
PROVIDERS = ("k2v2 g128 w128", "k4v4 g128 w128", "k2v2 g32 w128")


def step_arguments(args: list[object]) -> list[object]:
    """Arguments of `append_` from those of `attend` for the same step."""
    _, keys, values, *buffers = args[:11]
    return [*buffers, keys, values, None, args[12], args[13], *args[15:]]


def agrees(case: Case, provider: str) -> bool:
    """Whether a flush writes what the reference writes."""
    small = case._replace(batch=min(case.batch, 2), tokens=min(case.tokens, 1024))
    # the last of the 128 tokens of a tile leaves the window with this token
    args = decode_inputs(small._replace(tokens=small.tokens - 1), *formats(provider, case.head_dim))
    step = step_arguments(args)
    expected = [part.clone() for part in step[:8]]
    ops._append_(*expected, *step[8:])
    storage.append_(*step)
    return all(torch.equal(a, b) for a, b in zip(step[:8], expected, strict=True))


def main() -> int:
    """Run all cases; 1 if any provider was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of the rows")
    folder = parser.parse_args().output
    rows = Rows("append", folder)
    wrong = 0
    for name in CASES:
        case = Case.parse(name)
        for provider in PROVIDERS:
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
    return wrong


if __name__ == "__main__":
    sys.exit(main())
