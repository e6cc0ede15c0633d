"""Reading packed words inside a kernel: which bits of which word belong to which channel.

All shapes come from `kvmix_kernels.layout`. Two ways to read are offered.

`codes` reads single channels as integers; every geometry, not fast.

`field` serves the fast attention path. A field masked in place inside a 16-bit word *is* a
half-precision subnormal: bits that start at position p read as code * 2**(p - 24), exactly, and
tensor cores take subnormals at full speed. The caller folds 2**-p into the other operand. Only
positions below 10 work, so higher fields are first shifted down by 8.

A plane with fewer than 16 words per token is *folded*: R copies of its words lie side by side,
copy r shifted right by r fields, which makes fields of R * words channels, wide enough for a dot.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from kvmix_kernels import layout

constexpr_function = triton.constexpr_function

INTERPRET = bool(knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter: no inline assembly, and no bfloat16 dots."""

# what kernels call at compile time has to be wrapped, all the way down
words_per_token = constexpr_function(layout.words_per_token)
_planes = constexpr_function(layout.planes)

MIN_DOT = 16
"""Smallest inner dimension of a half-precision dot."""


@constexpr_function
def next_power_of_2(n):
    """Smallest power of two that is at least n (and at least 1)."""
    return 1 << max(0, n - 1).bit_length()


@constexpr_function
def plane_width(bits, index):
    """Bits per field of a plane."""
    return layout.PLANES[bits][index]


@constexpr_function
def plane_first(bits, head_dim, index):
    """First word of a plane."""
    return _planes(bits, head_dim)[index][1]


@constexpr_function
def plane_words(bits, head_dim, index):
    """Words per token of a plane."""
    return _planes(bits, head_dim)[index][2]


@constexpr_function
def plane_above(bits, head_dim, index):
    """How far a plane's field is shifted left within the code."""
    return _planes(bits, head_dim)[index][3]


@constexpr_function
def _copies(bits, head_dim):
    width, _, words, _ = _planes(bits, head_dim)[0]
    copies = 1
    while copies * 2 * words <= MIN_DOT and copies * 2 * width <= layout.WORD_BITS:
        copies *= 2
    return copies


@constexpr_function
def fold_copies(bits, head_dim, index):
    """Copies of a plane's words side by side; all planes of a code get equally wide fields."""
    words = _planes(bits, head_dim)[0][2] // _planes(bits, head_dim)[index][2]
    return _copies(bits, head_dim) * words


@constexpr_function
def fold_channels(bits, head_dim):
    """Channels of one folded field."""
    return _copies(bits, head_dim) * _planes(bits, head_dim)[0][2]


@constexpr_function
def fold_width(bits, head_dim):
    """Folded channels padded to what a dot takes."""
    return max(MIN_DOT, next_power_of_2(_copies(bits, head_dim) * _planes(bits, head_dim)[0][2]))


@constexpr_function
def fold_fields(bits, head_dim):
    """Number of folded fields of a token."""
    return layout.WORD_BITS // layout.PLANES[bits][0] // _copies(bits, head_dim)


@constexpr_function
def _position(bits, head_dim, field):
    return field * layout.PLANES[bits][0] * _copies(bits, head_dim)


@constexpr_function
def _low_position(bits, head_dim, field):
    """Where the field lies once it may be read as a subnormal."""
    position = _position(bits, head_dim, field)
    return position if position + bits <= 10 else position - 8


@constexpr_function
def field_factor(bits, head_dim, field):
    """Multiplier 2**-p that cancels the field's position p."""
    return 2.0 ** -_low_position(bits, head_dim, field)


@constexpr_function
def _is_shifted(bits, head_dim, field):
    return _low_position(bits, head_dim, field) != _position(bits, head_dim, field)


@constexpr_function
def _field_mask(bits, head_dim, field):
    return ((1 << bits) - 1) << _low_position(bits, head_dim, field)


@constexpr_function
def _both_halves(mask):
    return f"0x{mask << 16 | mask:08x}"


@constexpr_function
def _field_asm(bits, head_dim, field):
    mask = _both_halves(((1 << bits) - 1) << _low_position(bits, head_dim, field))
    if _low_position(bits, head_dim, field) == _position(bits, head_dim, field):
        return f"and.b32 $0, $1, {mask};"
    return f"{{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, {mask}; }}"


@constexpr_function
def _field3_asm(head_dim, field):
    """Two planes: the high two bits move up by one, the low bit is selected in below them.

    Neighbouring fields would overlap, so every second one is selected at once (by the lop3, whose
    table 0xd8 is "second where the third is set, else first"); the assembler shares what repeats.
    """
    low = _low_position(3, head_dim, field)
    shifted = low != _position(3, head_dim, field)
    a, b = ("shr.b32 t, $1, 7;", "shr.b32 u, $2, 8;") if shifted else ("shl.b32 t, $1, 1;", "mov.b32 u, $2;")
    select = _both_halves(sum(1 << p for p in range(low % 4, 8, 4)))
    return f"{{ .reg .b32 t, u; {a} {b} lop3.b32 t, t, u, {select}, 0xd8; and.b32 $0, t, {_both_halves(7 << low)}; }}"


def fold_shifts(bits: int, head_dim: int) -> list[int]:
    """Per plane (two rows) and column of a fold, how far its copy is shifted right."""
    rows = []
    for index in range(2):
        index = min(index, len(layout.PLANES[bits]) - 1)
        width, _, words, _ = layout.planes(bits, head_dim)[index]
        copies = fold_copies(bits, head_dim, index)
        rows += [column // words % copies * width for column in range(MIN_DOT)]
    return rows


@triton.jit
def fold(word, shift, COPIES: tl.constexpr, PORTABLE: tl.constexpr):
    """Shift copy r of the words right by r fields; `shift` broadcasts against `word`.

    The shifts come from memory: the compiler keeps words in registers as operands of a dot only if
    everything that they are combined with is a plain load.
    """
    if COPIES == 1:
        return word
    if PORTABLE:
        return (word >> shift).to(tl.int16)
    _, shift = tl.broadcast(word, shift)
    # bits that cross from the upper half land above the lower half's last field
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; and.b32 t, $2, 31; shr.b32 $0, $1, t; }",
        "=r,r,r",
        [word, shift],
        dtype=tl.int16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def field(word, low, FIELD: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, PORTABLE: tl.constexpr):
    """Folded field FIELD of a tile of words, as float16 code * 2**-24 / field_factor.

    `low` is the second plane's tile for 3 bits and ignored otherwise.
    """
    if BITS == 3:
        if PORTABLE:
            if _is_shifted(BITS, D, FIELD):
                high, single = word >> 7, low >> 8
            else:
                high, single = word << 1, low
            one: tl.constexpr = (_field_mask(BITS, D, FIELD) // 7) * 1
            bits = (high & (one * 6)) | (single & one)
            return bits.to(tl.int16).to(tl.float16, bitcast=True)
        return tl.inline_asm_elementwise(
            _field3_asm(D, FIELD), "=r,r,r", [word, low], dtype=tl.float16, is_pure=True, pack=2
        )
    if PORTABLE:
        moved = word
        if _is_shifted(BITS, D, FIELD):
            moved = word >> 8
        return (moved & _field_mask(BITS, D, FIELD)).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.inline_asm_elementwise(
        _field_asm(BITS, D, FIELD), "=r,r", [word], dtype=tl.float16, is_pure=True, pack=2
    )


@triton.jit
def _plane_codes(
    qdata_ptr,
    row,
    channel,
    ok,
    TOTAL: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    WORDS: tl.constexpr,
    ABOVE: tl.constexpr,
):
    word = tl.load(qdata_ptr + row * TOTAL + FIRST + channel % WORDS, mask=ok, other=0).to(tl.int32)
    return ((word >> (channel // WORDS * WIDTH)) & ((1 << WIDTH) - 1)) << ABOVE


@triton.jit
def codes(qdata_ptr, row, channel, ok, BITS: tl.constexpr, D: tl.constexpr):
    """Codes (int32) at broadcastable indices `row`, `channel`; 0 where not `ok`."""
    TOTAL: tl.constexpr = words_per_token(BITS, D)
    code = _plane_codes(
        qdata_ptr, row, channel, ok, TOTAL,
        plane_width(BITS, 0), plane_first(BITS, D, 0), plane_words(BITS, D, 0), plane_above(BITS, D, 0),
    )  # fmt: skip
    if BITS == 3:
        code += _plane_codes(
            qdata_ptr, row, channel, ok, TOTAL,
            plane_width(BITS, 1), plane_first(BITS, D, 1), plane_words(BITS, D, 1), plane_above(BITS, D, 1),
        )  # fmt: skip
    return code


@triton.jit
def stored_values(
    qdata_ptr,
    scale_ptr,
    zero_ptr,
    residual_ptr,
    new_ptr,
    new_stride,
    position,
    channel,
    ok,
    live,
    packed_end,
    sink,
    ring,
    BITS: tl.constexpr,
    AXIS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    NEW: tl.constexpr,
    PACKED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Tokens wherever they lie (packed, raw, or the step's own), as DTYPE; 0 where not `ok`.

    `position` and `channel` are broadcastable index tiles. Pointers are those of one head. PACKED
    says whether any asked-for token may be packed.
    """
    is_new = position >= live
    if BITS == 16:
        raw = ok & (position < live)
        slot = position
    else:
        raw = ok & (position < live) & ((position < sink) | (position >= packed_end))
        behind = position - sink
        slot = tl.where(position < sink, position, sink + behind % ring)
    out = tl.load(residual_ptr + slot * D + channel, mask=raw, other=0.0).to(DTYPE)
    if NEW:
        fresh = tl.load(
            new_ptr + (position - live).to(tl.int64) * new_stride + channel, mask=ok & is_new, other=0.0
        )
        out = tl.where(is_new, fresh.to(DTYPE), out)
    if BITS != 16 and PACKED:
        packed = ok & (position >= sink) & (position < packed_end)
        row = position - sink
        code = codes(qdata_ptr, row, channel, packed, BITS, D)
        if AXIS == 0:
            at = row // GROUP * D + channel
        else:
            at = row * (D // GROUP) + channel // GROUP
        step = tl.load(scale_ptr + at, mask=packed, other=0.0).to(tl.float32)
        offset = tl.load(zero_ptr + at, mask=packed, other=0.0).to(tl.float32)
        value = code.to(tl.float32) * step + offset
        out = tl.where(packed, value.to(DTYPE), out)
    return out


@triton.jit
def packed_end_of(live, tile, sink, window):
    """`TensorFormat.packed_end` on the device."""
    return sink + tl.maximum(live - sink - window, 0) // tile * tile
