"""Start every kernel once in each of its forms: what a memory checker is run over.

    python -m benchmarks.kernels.sanitize                     # compiles; results against the reference
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
        python -m benchmarks.kernels.sanitize
    compute-sanitizer --tool racecheck --error-exitcode 9 python -m benchmarks.kernels.sanitize

Without the caching allocator every tensor is an allocation of its own, so that a step past its end is
seen. Shapes are small and odd: tokens beyond whole tiles, a window, a batch of ragged masks.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.kernels.append import equal_to_the_reference, step_arguments
from benchmarks.kernels.decode_attention import formats
from kvmix_kernels import layout, ops
from kvmix_kernels.layout import TensorFormat, make_format
from kvmix_kernels.triton import attention, reading, storage
from kvmix_kernels.triton.timing import Case, decode_inputs

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
    (2, 2, 64, 64, "token", "channel"),
    (16, 16, 96, 32, "token", "token"),
)
"""The fast path at several widths and head sizes, the general path, raw tokens."""

TIERS = (
    (128, "tiers 25/75"), (64, "tiers 25/75"), (256, "tiers 25/75"), (128, "tiers 25/50/25 g32"),
    (128, "tiers 25/75 tile"), (128, "mixkvq"), (64, "kitty"),
)  # fmt: skip
"""Head sizes, and providers of `decode_attention` with tiers, scales of a byte and rotated values."""

SOFTCAPS = (0.0, 1.0, 0.0)
"""One for each of the masks."""


def masks(case: Case) -> list[torch.Tensor | None]:
    """None, left padding of another length in every row, and the same as an additive mask."""
    seen = torch.ones(case.batch, 1, 1, case.tokens + 1, dtype=torch.bool, device="cuda")
    for row in range(case.batch):
        seen[row, ..., : 17 * row] = False
    added = torch.zeros(seen.shape, dtype=torch.bfloat16, device="cuda").masked_fill(
        ~seen, torch.finfo(torch.bfloat16).min
    )
    return [None, seen, added]


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
            wrong.append(f"attend, mask {None if mask is None else mask.dtype}")
    step = step_arguments(args)
    if not equal_to_the_reference(step):
        wrong.append("append_")
    for fmt in (k, v):
        shape = (case.batch, case.tokens, case.heads, case.head_dim)
        x = torch.randn(shape, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        got, want = storage.quantize_pack(x, None, fmt.encode()), ops._quantize_pack(x, None, fmt.encode())
        if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
            wrong.append("quantize_pack")
        part = (got, None, case.tokens, fmt.encode())
        # the last rounding may differ
        if not torch.allclose(reading.dequantize(*part), ops._dequantize(*part), rtol=1e-2, atol=1e-2):
            wrong.append("dequantize")
    return wrong


def main() -> int:
    """Run all forms; 1 if any result was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--form", type=int, action="append", help="place in FORMS and TIERS; repeatable; default: all"
    )
    chosen = parser.parse_args().form
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
    torch.cuda.synchronize()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
