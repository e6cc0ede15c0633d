"""How fast a GPU reads what decode attention reads, and nothing else is done: what its access pattern allows.

    python -m benchmarks.kernels.floor

Codes, scales and offsets of `b64 h8x4 n8192 d128` in groups of 128, keys and values, each program its own
range, 128 tokens at a time. Prints a time for every number of programs and warps; no rows, because nothing
is compared.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from kvmix_kernels.triton.timing import graph_time

HEADS = 512
TOKENS = 8192
STEP = 128
HEAD_SIZE = 128
SCALES = 256
"""32-bit words of scales and offsets for STEP tokens of keys and values."""


@triton.jit
def read_kernel(
    k_ptr, v_ptr, scale_ptr, out_ptr, STEPS: tl.constexpr, WORDS: tl.constexpr, SCALES: tl.constexpr
):
    """Combine all words of a program's range, so that none can be left out."""
    pid = tl.program_id(0)
    word = tl.arange(0, WORDS)
    place = tl.arange(0, SCALES)
    seen = tl.zeros([WORDS], tl.int32)
    scales = tl.zeros([SCALES], tl.int32)
    for step in range(STEPS):
        at = pid * STEPS + step
        seen ^= tl.load(k_ptr + at * WORDS + word)
        seen ^= tl.load(v_ptr + at * WORDS + word)
        scales ^= tl.load(scale_ptr + at * SCALES + place)
    tl.store(out_ptr + pid * (WORDS + SCALES) + word, seen)
    tl.store(out_ptr + pid * (WORDS + SCALES) + WORDS + place, scales)


def main() -> None:
    """Print the times."""
    steps = HEADS * TOKENS // STEP
    random = functools.partial(torch.randint, -(1 << 31), (1 << 31) - 1, dtype=torch.int32, device="cuda")
    for bits in (2, 4):
        words = STEP * HEAD_SIZE * bits // 32
        # two sets take turns, so that none stays in L2
        sets = [(random((steps * words,)), random((steps * words,)), random((steps * SCALES,))) for _ in "ab"]
        size = sum(tensor.numel() * tensor.element_size() for tensor in sets[0])
        for programs in (512, 1024, 2048):
            out = random((programs * (words + SCALES),))
            for warps in (1, 4):
                calls = [
                    functools.partial(
                        read_kernel[(programs,)], *one, out, steps // programs, words, SCALES, num_warps=warps
                    )
                    for one in sets
                ]
                time = graph_time(calls).median
                speed = size / time / 1e6
                print(f"{bits} bits, {programs} programs of {warps} warps: {time:.1f} us, {speed:.2f} TB/s")


if __name__ == "__main__":
    main()
