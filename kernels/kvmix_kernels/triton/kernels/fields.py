"""Reading packed words inside a kernel: which bits of which word belong to which channel.

All shapes come from `kvmix_kernels.layout`. Two ways to read are offered.

`codes` reads single channels as integers; every geometry, not fast.

`field` serves the fast attention path. A field masked in place inside a 16-bit word *is* a
half-precision subnormal: bits that start at position p read as code * 2**(p - 24), exactly, and
tensor cores take subnormals at full speed. The caller folds 2**-p into the other operand. Only
positions below 10 work, so higher fields are first shifted down by 8.

A plane with fewer than 16 words per token is *folded*: R copies of its words lie side by side,
copy r shifted right by r fields (for a cut digit by r pieces), which makes fields of R * words channels,
wide enough for a dot.

BITS are those of whole codes where a function takes a DIGIT beside them, and those of one digit elsewhere. In the
same way KEPT and HIGH are the channels of the lowest digit and of those above it, D those of one digit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

from kvmix_kernels import layout
from kvmix_kernels.triton.kernels import forms
from kvmix_kernels.triton.kernels.forms import Stored

constexpr_function = triton.constexpr_function

INTERPRET = bool(knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter: no inline assembly, and no bfloat16 dots."""

RAW_BITS = tl.constexpr(layout.RAW_BITS)
TIERED = tl.constexpr(layout.TIERED)
ROTATED = tl.constexpr(forms.ROTATED)
ORDERED = tl.constexpr(forms.ORDERED)
TILED = tl.constexpr(forms.TILED)

MIN_DOT = layout.FIELD_CHANNELS
"""Smallest inner dimension of a half-precision dot."""


# what kernels call at compile time has to be wrapped, all the way down
words_per_token = constexpr_function(layout.words_per_token)
is_cut = constexpr_function(layout.is_cut)
cut_column = constexpr_function(layout.cut_column)
_plane_words = constexpr_function(layout.plane_words)
_copies = constexpr_function(layout.fold_copies)
_digits = constexpr_function(layout.digits)
_hadamard_block = constexpr_function(layout.hadamard_block)


@constexpr_function
def next_power_of_2(n):
    """Smallest power of two that is at least n (and at least 1)."""
    return 1 << max(0, n - 1).bit_length()


@constexpr_function
def digit_count(bits):
    """Digits of a code."""
    return len(_digits(bits))


@constexpr_function
def digit_bits(bits, digit):
    """Bits of a digit."""
    return _digits(bits)[digit].bits


@constexpr_function
def digit_above(bits, digit):
    """Bits of the digits below it."""
    return _digits(bits)[digit].above


@constexpr_function
def digit_plane(bits, digit):
    """Its first plane."""
    return _digits(bits)[digit].first


@constexpr_function
def digit_channels(kept, high, digit):
    """Its channels."""
    return kept if digit == 0 else high


@constexpr_function
def digit_factor(bits, digit):
    """What a digit counts, in units of the highest: a power of two that is at most 1."""
    return 2.0 ** (_digits(bits)[digit].above - _digits(bits)[-1].above)


@constexpr_function
def top_digit(bits):
    """What the highest digit counts."""
    return 2.0 ** _digits(bits)[-1].above


@constexpr_function
def plane_words(bits, head_dim, index):
    """Words per token of a plane."""
    return _plane_words(bits, head_dim)[index]


@constexpr_function
def code_words(bits, kept, high, index):
    """Words per token of a plane of whole codes."""
    return _plane_words(bits, kept, high)[index]


@constexpr_function
def plane_first(bits, kept, high, index):
    """Words per token of the planes before it."""
    return sum(_plane_words(bits, kept, high)[:index])


@constexpr_function
def fold_copies(bits, head_dim, index):
    """Copies of a plane's words side by side; all planes of a code get equally wide fields."""
    words = _plane_words(bits, head_dim)
    return _copies(bits, head_dim) * words[0] // words[index]


@constexpr_function
def fold_channels(bits, head_dim):
    """Channels of one folded field."""
    return _copies(bits, head_dim) * _plane_words(bits, head_dim)[0]


@constexpr_function
def fold_width(bits, head_dim):
    """Folded channels padded to what a dot takes."""
    return max(MIN_DOT, next_power_of_2(_copies(bits, head_dim) * _plane_words(bits, head_dim)[0]))


@constexpr_function
def fold_fields(bits, head_dim):
    """Number of folded fields of a token."""
    return layout.WORD_BITS // layout.DIGITS[bits][0][0] // _copies(bits, head_dim)


@constexpr_function
def field_first(bits, head_dim, group, field):
    """Group of a folded field's first channel."""
    return field * fold_channels(bits, head_dim) // group


@constexpr_function
def field_end(bits, head_dim, group, field):
    """The group behind that of a folded field's last channel."""
    return ((field + 1) * fold_channels(bits, head_dim) - 1) // group + 1


@constexpr_function
def field_sum(bits, head_dim, group, field, of):
    """Place of (field, group `of`) among the pairs of a field and a group that it has channels of."""
    before = [
        field_end(bits, head_dim, group, f) - field_first(bits, head_dim, group, f) for f in range(field)
    ]
    return sum(before) + of - field_first(bits, head_dim, group, field)


@constexpr_function
def digit_sums(bits, head_dim, group, digit):
    """How many pairs of a field and a group the digits before this one have."""
    widths = [d.bits for d in _digits(bits)[:digit]]
    last = head_dim // group
    return sum(field_sum(width, head_dim, group, fold_fields(width, head_dim), last) for width in widths)


@constexpr_function
def _field_place(bits, head_dim, field):
    """(position in the word, how far the word is shifted right first), so that the field may be read as a subnormal."""
    if is_cut(bits):
        cut, shift = cut_column(_copies(bits, head_dim)), _cut_shift(bits, head_dim)
        if field == cut.code:
            return cut.narrow - (bits - cut.high), shift
        if field > cut.code:
            return bits * (field - cut.code - 1), 0
        position = bits * field
        return (position, 0) if position + bits <= 10 else (position - shift, shift)
    position = field * bits * _copies(bits, head_dim)
    return (position, 0) if position + bits <= 10 else (position - 8, 8)


@constexpr_function
def _cut_shift(bits, head_dim):
    """How far the wide plane is shifted right for its bits of the cut code to follow those of the narrow one."""
    cut = cut_column(_copies(bits, head_dim))
    return bits * cut.code - cut.narrow


@constexpr_function
def field_factor(bits, head_dim, field):
    """Multiplier 2**-p that cancels the field's position p."""
    return 2.0 ** -_field_place(bits, head_dim, field)[0]


@constexpr_function
def _is_shifted(bits, head_dim, field):
    return _field_place(bits, head_dim, field)[1] != 0


@constexpr_function
def _shift(bits, head_dim, field):
    return _field_place(bits, head_dim, field)[1]


@constexpr_function
def _field_mask(bits, head_dim, field):
    return ((1 << bits) - 1) << _field_place(bits, head_dim, field)[0]


@constexpr_function
def _is_cut(bits, head_dim, field):
    return is_cut(bits) and field == cut_column(_copies(bits, head_dim)).code


@constexpr_function
def _is_narrow(bits, head_dim, field):
    return is_cut(bits) and field > cut_column(_copies(bits, head_dim)).code


@constexpr_function
def _cut_mask(bits, head_dim):
    """The bits of the cut code that the wide plane holds, once it is shifted."""
    cut = cut_column(_copies(bits, head_dim))
    return ((1 << cut.high) - 1) << cut.narrow


@constexpr_function
def _both_halves(mask):
    return f"0x{mask << 16 | mask:08x}"


@constexpr_function
def _shift_asm(target, source, right):
    return f"shr.b32 {target}, {source}, {right};" if right >= 0 else f"shl.b32 {target}, {source}, {-right};"


@constexpr_function
def _field_asm(bits, head_dim, field):
    """PTX for a register of two tokens' words ($1; of a cut digit the narrow plane's is $2)."""
    mask = _both_halves(_field_mask(bits, head_dim, field))
    if _is_cut(bits, head_dim, field):
        # the table 0xd8 is "second where the third is set, else first"
        shift = _shift_asm("t", "$1", _shift(bits, head_dim, field))
        select = _both_halves(_cut_mask(bits, head_dim))
        return f"{{ .reg .b32 t; {shift} lop3.b32 t, $2, t, {select}, 0xd8; and.b32 $0, t, {mask}; }}"
    if _is_narrow(bits, head_dim, field):
        return f"and.b32 $0, $2, {mask};"
    if _is_shifted(bits, head_dim, field):
        return f"{{ .reg .b32 t; {_shift_asm('t', '$1', _shift(bits, head_dim, field))} and.b32 $0, t, {mask}; }}"
    return f"and.b32 $0, $1, {mask};"


@constexpr_function
def merges(bits, kept, high):
    """Whether the digits of tiers can be read as one: fields of both have the same channels, as far as there are high ones."""
    if bits != layout.TIERED:
        return False
    channels = fold_channels(2, kept)
    # the bits of both, above each other, must be where a subnormal has them
    last = 2 * _copies(2, kept) * (high // channels - 1)
    return fold_channels(2, high) == channels and high % channels == 0 and last + 4 <= 10


@constexpr_function
def summed_digits(bits, kept, high):
    """Digits that products are summed up of one by one."""
    return 1 if merges(bits, kept, high) else digit_count(bits)


@constexpr_function
def _high_shift(kept, high, field):
    """How far the folded words of the high digit are shifted right for a field to lie above the low digit's."""
    return 2 * field * (_copies(2, high) - _copies(2, kept)) - 2


@constexpr_function
def _high_mask(kept, field):
    return 3 << (2 * field * _copies(2, kept) + 2)


@constexpr_function
def _merged_asm(kept, field):
    """PTX for registers of two tokens' words of the low digit ($1) and the high one ($2), and how far it is turned."""
    low, above = _both_halves(_field_mask(2, kept, field)), _both_halves(_high_mask(kept, field))
    # one funnel shift, which takes the shift modulo 32, so a negative one moves left; what crosses from one half to
    # the other is masked. The table 0xea is "first and second, or third"
    turned = f"shf.r.wrap.b32 t, $2, $2, $3; and.b32 t, t, {above};"
    return f"{{ .reg .b32 t; {turned} lop3.b32 $0, $1, {low}, t, 0xea; }}"


@constexpr_function
def shifts_first(bits, kept, high, digit):
    """Where the rows of a digit begin in the table of `fold_shifts`; behind the last digit, its size."""
    return sum(
        2 * fold_width(d.bits, digit_channels(kept, high, i)) for i, d in enumerate(_digits(bits)[:digit])
    )


def fold_shifts(bits: int, kept: int, high: int) -> list[int]:
    """Per digit, of its planes (two rows) and column of a fold, how far its copy is shifted right."""
    rows = []
    for number, digit in enumerate(layout.digits(bits)):
        channels = digit_channels(kept, high, number)
        words_of = layout.plane_words(digit.bits, channels)
        for index in range(2):
            index = min(index, len(words_of) - 1)
            words, copies = words_of[index], fold_copies(digit.bits, channels, index)
            step = layout.WORD_BITS // copies if layout.is_cut(digit.bits) else digit.bits
            rows += [column // words % copies * step for column in range(fold_width(digit.bits, channels))]
    return rows


@triton.jit
def fold(word, shift, BITS: tl.constexpr, D: tl.constexpr, PLANE: tl.constexpr, PORTABLE: tl.constexpr):
    """Shift copy r of a plane's words right by r fields; `shift` broadcasts against `word`.

    The shifts come from memory: the compiler keeps words in registers as operands of a dot only if
    everything that they are combined with is a plain load.
    """
    if fold_copies(BITS, D, PLANE) == 1:
        return word
    # a register has two words side by side, which an odd number of words puts into two copies
    if PORTABLE or plane_words(BITS, D, PLANE) % 2 == 1:
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

    `low` is the narrow plane's tile of a cut digit and ignored otherwise.
    """
    if PORTABLE:
        moved = word
        if _is_narrow(BITS, D, FIELD):
            moved = low
        elif _is_shifted(BITS, D, FIELD):
            if _shift(BITS, D, FIELD) > 0:
                moved = word >> _shift(BITS, D, FIELD)
            else:
                moved = word << -_shift(BITS, D, FIELD)
        if _is_cut(BITS, D, FIELD):
            moved = (moved & _cut_mask(BITS, D)) | (low & ~_cut_mask(BITS, D))
        return (moved & _field_mask(BITS, D, FIELD)).to(tl.int16).to(tl.float16, bitcast=True)
    if is_cut(BITS):
        return tl.inline_asm_elementwise(
            _field_asm(BITS, D, FIELD), "=r,r,r", [word, low], dtype=tl.float16, is_pure=True, pack=2
        )
    return tl.inline_asm_elementwise(
        _field_asm(BITS, D, FIELD), "=r,r", [word], dtype=tl.float16, is_pure=True, pack=2
    )


@triton.jit
def merged_field(
    word, above, shift, FIELD: tl.constexpr, KEPT: tl.constexpr, HIGH: tl.constexpr, PORTABLE: tl.constexpr
):  # fmt: skip
    """`field` of both digits of tiers at once, where they merge.

    `word` is folded; `above` are words of the high digit that are not, whose copies are to be shifted by `shift`.
    """
    turn = shift + _high_shift(KEPT, HIGH, FIELD)
    # a register has two words side by side, which an odd number of words puts into two copies
    if PORTABLE or plane_words(2, HIGH, 0) % 2 == 1:
        above = fold(above, shift, 2, HIGH, 0, PORTABLE)
        turn -= shift
    if PORTABLE:
        if _high_shift(KEPT, HIGH, FIELD) > 0:
            above = above >> turn
        else:
            above = above << -turn
        both = (word & _field_mask(2, KEPT, FIELD)) | (above & _high_mask(KEPT, FIELD))
        code = both.to(tl.int16).to(tl.float16, bitcast=True)
    else:
        _, turn = tl.broadcast(word, turn)
        code = tl.inline_asm_elementwise(
            _merged_asm(KEPT, FIELD), "=r,r,r,r", [word, above, turn], dtype=tl.float16, is_pure=True, pack=2
        )
    return code


@triton.jit
def word_at(
    row, BITS: tl.constexpr, KEPT: tl.constexpr, HIGH: tl.constexpr, PLANE: tl.constexpr, BLOCK: tl.constexpr
):
    """Offset of the first word of a plane of the token in this row."""
    TOTAL: tl.constexpr = words_per_token(BITS, KEPT, HIGH)
    WORDS: tl.constexpr = code_words(BITS, KEPT, HIGH, PLANE)
    if TOTAL == WORDS:
        return row * TOTAL
    first = row & -BLOCK
    if (TOTAL - WORDS) % 8 != 0:
        # tells the compiler that rows of the other planes are aligned for copies of 16 bytes
        first = row // BLOCK * BLOCK
    return row * WORDS + first * (TOTAL - WORDS) + BLOCK * plane_first(BITS, KEPT, HIGH, PLANE)


@triton.jit
def _cut_digit(qdata_ptr, row, channel, ok, X: tl.constexpr, DIGIT: tl.constexpr):
    OWN: tl.constexpr = digit_bits(X.BITS, DIGIT)
    D: tl.constexpr = digit_channels(X.KEPT, X.HIGH, DIGIT)
    PLANE: tl.constexpr = digit_plane(X.BITS, DIGIT)
    WORDS: tl.constexpr = plane_words(OWN, D, 0)
    HALF: tl.constexpr = plane_words(OWN, D, 1)
    COLUMNS: tl.constexpr = fold_channels(OWN, D)
    WIDE: tl.constexpr = cut_column(_copies(OWN, D))[0]
    NARROW: tl.constexpr = cut_column(_copies(OWN, D))[1]
    CUT: tl.constexpr = cut_column(_copies(OWN, D))[2]
    LOW: tl.constexpr = OWN - cut_column(_copies(OWN, D))[3]
    column = channel % COLUMNS
    code = channel // COLUMNS
    wide_at = word_at(row, X.BITS, X.KEPT, X.HIGH, PLANE, X.BLOCK) + column % WORDS
    narrow_at = word_at(row, X.BITS, X.KEPT, X.HIGH, PLANE + 1, X.BLOCK) + column % HALF
    wide = tl.load(qdata_ptr + wide_at, mask=ok, other=0).to(tl.int32)
    narrow = tl.load(qdata_ptr + narrow_at, mask=ok, other=0).to(tl.int32)
    wide = (wide >> (column // WORDS * WIDE)) & ((1 << WIDE) - 1)
    narrow = (narrow >> (column // HALF * NARROW)) & ((1 << NARROW) - 1)
    high = wide >> (OWN * tl.minimum(code, CUT))
    whole = narrow >> (OWN * tl.maximum(code - CUT - 1, 0))
    cut = (wide >> (OWN * CUT) << LOW) | (narrow >> (NARROW - LOW))
    return tl.where(code == CUT, cut, tl.where(code < CUT, high, whole) & ((1 << OWN) - 1))


@triton.jit
def _digit(qdata_ptr, row, channel, ok, X: tl.constexpr, DIGIT: tl.constexpr):
    OWN: tl.constexpr = digit_bits(X.BITS, DIGIT)
    if is_cut(OWN):
        return _cut_digit(qdata_ptr, row, channel, ok, X, DIGIT)
    D: tl.constexpr = digit_channels(X.KEPT, X.HIGH, DIGIT)
    if D < X.D:
        ok = ok & (channel < D)
    WORDS: tl.constexpr = plane_words(OWN, D, 0)
    at = word_at(row, X.BITS, X.KEPT, X.HIGH, digit_plane(X.BITS, DIGIT), X.BLOCK) + channel % WORDS
    word = tl.load(qdata_ptr + at, mask=ok, other=0).to(tl.int32)
    # channels behind the digit's would shift by more than a word has, of which a compiler may make anything
    return (word >> (channel // WORDS * OWN & 31)) & ((1 << OWN) - 1)


@triton.jit
def codes(qdata_ptr, row, channel, ok, X: tl.constexpr):
    """Codes (int32) at broadcastable indices `row`, `channel`; 0 where not `ok`."""
    code = _digit(qdata_ptr, row, channel, ok, X, 0)
    for digit in tl.static_range(1, digit_count(X.BITS)):
        code |= _digit(qdata_ptr, row, channel, ok, X, digit) << digit_above(X.BITS, digit)
    return code


@constexpr_function
def _constant(value):
    """Constants that are part of a tuple; Triton 3.6 does not make them so by itself, and loses the names."""
    return value if INTERPRET else tl.constexpr(value)


@constexpr_function
def as_form(parameter):
    """The `Form` of a kernel's parameter."""
    return forms.Form(*[_constant(value) for value in parameter])


@triton.jit
def stored(buffers, strides, batch, head, tile):
    """The `Stored` of one head: of buffers and strides as `common` hands them over."""
    return Stored(
        buffers[0] + batch * strides[0] + head * strides[1],
        buffers[1] + batch * strides[2] + head * strides[3],
        buffers[2] + batch * strides[2] + head * strides[3],
        buffers[3] + batch * strides[4] + head * strides[5],
        buffers[4] + batch * strides[6] + head * strides[7],
        buffers[5] + batch * strides[8] + head * strides[9],
        tile,
    )


@triton.jit
def narrow_step(scale):
    """Scales as they are stored, as the narrowest float that holds them: a byte is the upper bits of a float16."""
    if scale.dtype == tl.uint8:
        step = (scale.to(tl.int16) << 7).to(tl.float16, bitcast=True)
    else:
        step = scale
    return step


@triton.jit
def four_steps(word, PORTABLE: tl.constexpr):
    """Scales of a byte, as float16, from 32-bit words of four: [n, ...] to [4 n, ...]."""
    if PORTABLE:
        a = ((word & 0xFF) << 7).to(tl.int16).to(tl.float16, bitcast=True)
        b = (((word >> 8) & 0xFF) << 7).to(tl.int16).to(tl.float16, bitcast=True)
        c = (((word >> 16) & 0xFF) << 7).to(tl.int16).to(tl.float16, bitcast=True)
        d = (((word >> 24) & 0xFF) << 7).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            """{ .reg .b32 t;
            prmt.b32 t, $4, 0, 0x4140; shl.b32 t, t, 7; mov.b32 {$0, $1}, t;
            prmt.b32 t, $4, 0, 0x4342; shl.b32 t, t, 7; mov.b32 {$2, $3}, t; }""",
            "=h,=h,=h,=h,r",
            [word],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=1,
        )
    four = tl.join(tl.join(a, c), tl.join(b, d))
    if len(word.shape) == 2:
        four = tl.reshape(tl.permute(four, (0, 2, 3, 1)), [4 * word.shape[0], word.shape[1]])
    else:
        four = tl.reshape(four, [4 * word.shape[0]])
    return four


@triton.jit
def as_offset(zero, step):
    """Offsets as they are stored beside scales `step`, as float32: bytes count quarters of the scale."""
    if zero.dtype == tl.int8:
        offset = step * (zero.to(tl.float32) * 0.25)
    else:
        offset = zero.to(tl.float32)
    return offset


@constexpr_function
def middle(bits):
    """What is in the middle of the codes of symmetric formats: that many steps below 0 lies code 0."""
    return (2**bits - 1) / 2


@triton.jit
def raw_values(
    x, new_ptr, new_stride, position, channel, ok, places, X: tl.constexpr, NEW: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Raw tokens (of the cache, or the step's own) as DTYPE; 0 where not `ok` and where tokens are packed."""
    live = places.live
    sink = places.sink
    is_new = position >= live
    if X.BITS == RAW_BITS:
        raw = ok & (position < live)
        slot = position
    else:
        raw = ok & (position < live) & ((position < sink) | (position >= places.end))
        behind = position - sink
        slot = tl.where(position < sink, position, sink + behind % places.ring)
    out = tl.load(x.residual + slot * X.D + channel, mask=raw, other=0.0).to(DTYPE)
    if NEW:
        fresh = tl.load(
            new_ptr + (position - live).to(tl.int64) * new_stride + channel, mask=ok & is_new, other=0.0
        )
        out = tl.where(is_new, fresh.to(DTYPE), out)
    return out


@triton.jit
def packed_values(x, position, channel, packed, sink, X: tl.constexpr):
    """Packed tokens as float32, in the channels that were packed (see `forms.Form`); 0 where not `packed`."""
    row = position - sink
    code = codes(x.qdata, row, channel, packed, X)
    if X.AXIS == 0:
        at = row // X.GROUP * X.D + channel
    else:
        at = row * (X.D // X.GROUP) + channel // X.GROUP
    step = narrow_step(tl.load(x.scale + at, mask=packed, other=0)).to(tl.float32)
    if X.SYMMETRIC:
        offset = step * -middle(X.BITS)
    else:
        offset = as_offset(tl.load(x.zero + at, mask=packed, other=0), step)
    value = code.to(tl.float32) * step + offset
    if X.RAW > 0:
        # so far they are 0
        raw = channel - (X.D - X.APART)
        value += tl.load(x.exact + row * X.RAW + raw, mask=packed & (raw >= 0), other=0.0).to(tl.float32)
    return value


@triton.jit
def stored_values(
    x, new_ptr, new_stride, position, channel, ok, places,
    X: tl.constexpr, NEW: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Tokens wherever they lie (packed, raw, or the step's own), as DTYPE; 0 where not `ok`.

    `x` is a `Stored`, `places` its `Places`, X its `Form`. `position` and `channel` are broadcastable index
    tiles. PACKED says whether any asked-for token may be packed, in channels that are the model's.
    """
    out = raw_values(x, new_ptr, new_stride, position, channel, ok, places, X, NEW, DTYPE)
    if X.BITS != RAW_BITS and PACKED:
        packed = ok & (position >= places.sink) & (position < places.end)
        value = packed_values(x, position, channel, packed, places.sink, X)
        out = tl.where(packed, value.to(DTYPE), out)
    return out


@constexpr_function
def turns(head_dim):
    """Steps of `rotate`."""
    return _hadamard_block(head_dim).bit_length() - 1


@constexpr_function
def turn_scale(head_dim):
    """What makes the matrix orthonormal."""
    return _hadamard_block(head_dim) ** -0.5


@triton.jit
def turn(x, STEP: tl.constexpr, AXIS: tl.constexpr):
    """Sum and difference of what lies 2**STEP apart along AXIS: one of the steps of `reference.scales.rotate`."""
    SIZE: tl.constexpr = x.shape[AXIS]
    # [.., pairs, 2, 2**STEP, ..]
    AHEAD: tl.constexpr = x.numel // SIZE if AXIS == 1 else 1
    BEHIND: tl.constexpr = x.numel // SIZE // AHEAD * 2**STEP
    bits = tl.reshape(x.to(tl.int32, bitcast=True), [AHEAD, SIZE >> (STEP + 1), 2, BEHIND])
    # the other of a pair is the sum of both less the own: exact in integers, and one shuffle, as the compiler sees
    other = tl.reshape(tl.sum(bits, 2, keep_dims=True) - bits, x.shape).to(tl.float32, bitcast=True)
    place = tl.arange(0, SIZE)
    if len(x.shape) == 2:
        place = tl.expand_dims(place, 1 - AXIS)
    sign = tl.where((place & (1 << STEP)) == 0, 1.0, -1.0)
    return tl.fma(x, tl.broadcast_to(sign, x.shape), other)


@triton.jit
def orthonormal(x, D: tl.constexpr):
    """The last step of `reference.scales.rotate`."""
    # no product that might be contracted with what follows
    return tl.fma(x, tl.zeros_like(x) + turn_scale(D), tl.zeros_like(x))


@triton.jit
def rotate(x, D: tl.constexpr, AXIS: tl.constexpr):
    """`reference.scales.rotate` of a tile whose channels, D and then padding, lie along AXIS; the same bits."""
    for step in tl.static_range(turns(D)):
        x = turn(x, step, AXIS)
    return orthonormal(x, D)


@triton.jit
def packed_end_of(live, tile, sink, window):
    """`TensorFormat.packed_end` on the device."""
    return sink + tl.maximum(live - sink - window, 0) // tile * tile
