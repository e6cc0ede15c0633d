"""The PTX that extracts fields, run by a small evaluator: no GPU shows the code a CPU never runs."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from kvmix_kernels import layout
from kvmix_kernels.reference import quantize
from kvmix_kernels.triton.kernels import fields

WORD = 0xFFFFFFFF


def run_ptx(text: str, *inputs: int) -> int:
    """Value of $0 after the 32-bit instructions of an inline assembly text."""
    registers = {f"${i + 1}": value for i, value in enumerate(inputs)}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in re.sub(r"[{}]|\.reg[^;]*;", "", text).split(";"):
        if not line.strip():
            continue
        operation, rest = line.split(maxsplit=1)
        target, *operands = (part.strip() for part in rest.split(","))
        a, b, c, table = (*(value(x) for x in operands), 0, 0, 0)[:4]
        match operation.split(".")[0]:
            case "and":
                out = a & b
            case "shr":
                out = a >> b
            case "shl":
                out = a << b
            case "shf":
                assert operation == "shf.r.wrap.b32"
                out = (b << 32 | a) >> (c & 31)
            case "prmt":
                both = (b << 32 | a).to_bytes(8, "little")
                out = sum(both[c >> 4 * i & 7] << 8 * i for i in range(4))
            case "lop3":
                bits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(32))
                out = sum((table >> bit & 1) << i for i, bit in enumerate(bits))
            case other:
                raise AssertionError(f"the evaluator does not know {other}")
        registers[target] = out & WORD
    return registers["$0"]


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 128])
@pytest.mark.parametrize("bits", layout.WIDTHS)
def test_fields_read_by_ptx_are_the_codes(bits: int, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(bits * 1000 + head_dim)
    codes = torch.randint(0, 2**bits, (2, head_dim), generator=generator, dtype=torch.int16)
    words = quantize.pack(codes, bits).to(torch.int32) & 0xFFFF  # [2, words]: two tokens fill a register
    planes = quantize.split_planes(words, layout.plane_words(bits, head_dim), 1)
    shifts = fields.fold_shifts(bits, head_dim, head_dim)
    found = torch.zeros_like(codes)
    for number, digit in enumerate(layout.digits(bits)):
        own = planes[digit.first : digit.first + len(layout.DIGITS[bits][number])]
        row = shifts[fields.shifts_first(bits, head_dim, head_dim, number) :]
        found += read_digit(own, row, digit.bits, head_dim) << digit.above
    assert torch.equal(found, codes)


def read_digit(planes: list[torch.Tensor], shifts: list[int], bits: int, head_dim: int) -> torch.Tensor:
    """A digit of two tokens, [2, head_dim], from its planes."""
    channels, width = fields.fold_channels(bits, head_dim), fields.fold_width(bits, head_dim)
    found = torch.full((2, head_dim), -1, dtype=torch.int16)
    for column in range(channels):
        registers = []
        for index, plane in enumerate(planes):
            pair = plane[:, column % plane.shape[1]].tolist()
            register = pair[1] << 16 | pair[0]
            if fields.fold_copies(bits, head_dim, index) > 1:
                # what `fold` does, crossing bits included
                register >>= shifts[width * index + column]
            registers.append(register)
        for field in range(fields.fold_fields(bits, head_dim)):
            out = run_ptx(fields._field_asm(bits, head_dim, field), *registers)
            halves = torch.tensor([out & 0xFFFF, out >> 16], dtype=torch.int32).to(torch.int16)
            numbers = (
                halves.view(torch.float16).double() * 2.0**24 * fields.field_factor(bits, head_dim, field)
            )
            found[:, field * channels + column] = numbers.to(torch.int16)
    return found


@pytest.mark.parametrize(
    ("kept", "high"), [(128, 16), (128, 32), (128, 64), (64, 16), (64, 32), (96, 32), (256, 64), (48, 24)]
)
def test_digits_of_tiers_that_merge_are_read_by_ptx_as_one(kept: int, high: int) -> None:
    if not fields.merges(layout.TIERED, kept, high):
        # fields of 12 channels, and of 32 and 16
        assert (kept, high) in ((96, 32), (256, 64))
        return
    codes = torch.randint(0, 4, (2, kept), dtype=torch.int16)
    codes[:, :high] = torch.randint(0, 16, (2, high), dtype=torch.int16)
    words = quantize.pack(codes, layout.TIERED, 1, high).to(torch.int32) & 0xFFFF
    planes = quantize.split_planes(words, layout.plane_words(layout.TIERED, kept, high), 1)
    shifts = fields.fold_shifts(layout.TIERED, kept, high)
    rows = shifts, shifts[fields.shifts_first(layout.TIERED, kept, high, 1) :]
    channels = fields.fold_channels(2, kept)
    for column in range(channels):
        pairs = [plane[:, column % plane.shape[1]].tolist() for plane in planes]
        low, above = (pair[1] << 16 | pair[0] for pair in pairs)
        for field in range(high // channels):
            turn = rows[1][column] + fields._high_shift(kept, high, field)
            # two numbers of 16 bits side by side, of which the lower one tells
            turns = (turn << 16 | turn & 0xFFFF) & 0xFFFFFFFF
            out = run_ptx(fields._merged_asm(kept, field), low >> rows[0][column], above, turns)
            halves = torch.tensor([out & 0xFFFF, out >> 16], dtype=torch.int32).to(torch.int16)
            found = halves.view(torch.float16).double() * 2.0**24 * fields.field_factor(2, kept, field)
            assert torch.equal(found.to(torch.int16), codes[:, field * channels + column])


def test_scales_of_a_byte_are_taken_from_words_of_four() -> None:
    code = inspect.getsource(fields.four_steps.fn)
    text = code[code.index('"""{') + 3 : code.index('}"""') + 1]
    stored = torch.tensor([0x01, 0x78, 0xF7, 0x9C], dtype=torch.int32)
    word = int.from_bytes(bytes(stored.tolist()), "little")
    for instructions, pair in zip(re.findall(r"prmt[^;]*; shl[^;]*;", text), ((0, 1), (2, 3)), strict=True):
        out = run_ptx(instructions.replace("$4", "$1").replace(" t", " $0"), word)
        assert [out & 0xFFFF, out >> 16] == (stored[list(pair)] << 7).tolist()


def test_words_taken_as_the_high_half_of_a_register_do_not_leak() -> None:
    # fold shifts both halves at once: bits of the upper one cross into the lower, above its last field
    full = run_ptx("shr.b32 $0, $1, $2;", 0xFFFF0000, 2)
    assert full & 0xFFFF == 0xC000
