"""Writing a cache: the step's tokens into the raw window, full tiles into packed storage.

The arithmetic is that of `reference.quantize`, in the same order and rounding, so codes, scales
and offsets are the same bits. One program handles one group of tokens (keys per channel) or one
block of tokens (values per token). The tokens are read from memory once: a second look at a group of
keys, after its range is known, hits the cache. What bounds these kernels is instructions, not memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvmix_kernels import layout
from kvmix_kernels.triton.ahead import Kernel
from kvmix_kernels.triton.kernels.fields import (
    ORDERED,
    RAW_BITS,
    ROTATED,
    TIERED,
    TILED,
    as_form,
    as_offset,
    constexpr_function,
    cut_column,
    digit_above,
    digit_bits,
    digit_channels,
    digit_count,
    digit_plane,
    fold_copies,
    is_cut,
    middle,
    narrow_step,
    next_power_of_2,
    orthonormal,
    packed_end_of,
    plane_words,
    rotate,
    stored,
    turn,
    turns,
    word_at,
    words_per_token,
)
from kvmix_kernels.triton.kernels.forms import Form, Packing

ROUNDER = tl.constexpr(8388608.0)
"""2**23: adding and subtracting it rounds a smaller positive float32 to an integer, half to even."""

SIGNED_ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2**23: likewise numbers of either sign."""

BYTE_SCALES = tl.constexpr(layout.BYTE_SCALES)
LARGEST_BYTE = tl.constexpr(0xF7)
"""61440; larger bytes are no finite float16."""


@triton.jit
def _stored(x, SCALE_DTYPE: tl.constexpr):
    """float32 x, finite in the stored dtype, rounded to it (and kept as float32)."""
    if SCALE_DTYPE == 0:
        return x.to(tl.float16).to(tl.float32)
    if SCALE_DTYPE == 1:
        # bfloat16 by hand, half to even: the interpreter's own conversion truncates
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    return x


@triton.jit
def _divided(x, DIVISOR: tl.constexpr):
    """Finite x by a small odd number, correctly rounded.

    One correction is enough, also below the smallest normal number: the remainder is exact, and the
    quotient is never close to the middle of two floats.
    """
    quotient = x * (1.0 / DIVISOR)
    rest = tl.fma(quotient, tl.zeros_like(x) - DIVISOR, x)
    return tl.fma(rest, tl.zeros_like(x) + 1.0 / DIVISOR, quotient)


@triton.jit
def _product(x, FACTOR: tl.constexpr):
    """x times a constant, rounded before anything else happens to it: no plain product, which might be contracted."""
    return tl.fma(x, tl.zeros_like(x) + FACTOR, tl.zeros_like(x))


@triton.jit
def _narrowed(low, high, MARGIN: tl.constexpr):
    """The range without a share of it at either end."""
    if MARGIN > 0:
        cut = _product(high, MARGIN) - _product(low, MARGIN)
        low += cut
        high -= cut
    return low, high


@triton.jit
def _steps(low, high, BITS: tl.constexpr):
    return _divided(high, 2**BITS - 1) - _divided(low, 2**BITS - 1)


@triton.jit
def _half_bits(x):
    """The bits of positive x as float16, at most the largest finite one."""
    return tl.minimum(x, 65504.0).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _as_bytes(step, low, SYMMETRIC: tl.constexpr):
    """`reference.scales.store` for scales of a byte, as int32."""
    bits = _half_bits(step)
    byte = (bits + 0x3F + ((bits >> 7) & 1)) >> 7
    least = _half_bits(_product(tl.abs(low), 4 / 127))
    byte = tl.minimum(tl.maximum(byte, (least + 0x7F) >> 7), LARGEST_BYTE)
    zero = byte
    if not SYMMETRIC:
        wide = narrow_step(byte.to(tl.uint8)).to(tl.float32)
        quarters = tl.div_rn(low * 4, tl.where(byte > 0, wide, 1.0))
        quarters = tl.where(
            byte > 0, quarters, tl.where(low > 0, 127.0, tl.where(low < 0, -128.0, tl.zeros_like(low)))
        )
        quarters = tl.minimum(tl.maximum(quarters, -128.0), 127.0)
        zero = (quarters + SIGNED_ROUNDER).to(tl.int32, bitcast=True) - 0x4B400000
    return byte, zero


@triton.jit
def _store_scales(scale_ptr, zero_ptr, at, step, low, ok, SCALE_DTYPE: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Store scales for steps and offsets of code 0, in the dtypes of the cache."""
    if SCALE_DTYPE == BYTE_SCALES:
        scale, zero = _as_bytes(step, low, SYMMETRIC)
    else:
        LIMIT: tl.constexpr = (
            65504.0
            if SCALE_DTYPE == 0
            else 3.3895313892515355e38
            if SCALE_DTYPE == 1
            else 3.4028234663852886e38
        )
        scale = _stored(tl.minimum(step, LIMIT), SCALE_DTYPE)
        zero = _stored(tl.minimum(tl.maximum(low, -LIMIT), LIMIT), SCALE_DTYPE)
    scale = scale.to(scale_ptr.dtype.element_ty)
    zero = zero.to(zero_ptr.dtype.element_ty)
    tl.store(scale_ptr + at, scale, mask=ok)
    if not SYMMETRIC:
        tl.store(zero_ptr + at, zero, mask=ok)
    return scale, zero


@triton.jit
def _numbers(scale, zero, X: tl.constexpr):
    """(steps, offsets) as float32 of scales and offsets as they are stored."""
    step = narrow_step(scale).to(tl.float32)
    if X.SYMMETRIC:
        # no plain product: it might be contracted with a subtraction
        offset = _product(step, -middle(X.BITS))
    else:
        offset = as_offset(zero, step)
    return step, offset


@triton.jit
def _divisor(step, top, SCALE_DTYPE: tl.constexpr):
    """(unit, largest distance, -divisor, 1 / divisor), where the divisor is the step times the unit.

    `top` is the largest code. The unit is a power of two that keeps all of it normal; float16 needs none.
    """
    unit = tl.zeros_like(step) + 1.0
    if SCALE_DTYPE != 0 and SCALE_DTYPE != BYTE_SCALES:
        unit = tl.where(
            step < 8.7e-19, 1.8446744073709552e19, tl.where(step > 1.2e18, 5.421010862427522e-20, 1.0)
        )
    # without a range the largest distance is 0, and its quotient has to stay 0
    divisor = tl.where(step > 0.0, step * unit, 1.0)
    if SCALE_DTYPE == 2:
        inverse = tl.div_rn(tl.zeros_like(step) + 1.0, divisor)
    else:
        # correct to a few units will do: no quotient by so short a number is close to the middle of two floats
        inverse = 1.0 / divisor
    return unit, step * unit * top, -divisor, inverse


@triton.jit
def _code_bits(x, zero, unit, largest, minus_divisor, inverse, SCALE_DTYPE: tl.constexpr):
    """Codes as the low 24 bits of an int32.

    One correction step makes the product with the inverse the correctly rounded quotient
    (Markstein, IBM J. Res. Dev. 34, 1990), at a third of a division's cost.
    """
    x = x - zero
    if SCALE_DTYPE != 0 and SCALE_DTYPE != BYTE_SCALES:
        x = x * unit
    # in this order a NaN ends as 0; `largest` may be rounded, its quotient still rounds to the largest code
    x = tl.minimum(tl.maximum(x, 0.0), largest)
    quotient = x * inverse
    rest = tl.fma(quotient, tl.broadcast_to(minus_divisor, x.shape), x)
    quotient = tl.fma(rest, tl.broadcast_to(inverse, x.shape), quotient)
    return (quotient + ROUNDER).to(tl.int32, bitcast=True)


@constexpr_function
def _meets(field, words, group, index):
    """Whether a field's channels and a group have any in common."""
    return field * words < (index + 1) * group and (field + 1) * words > index * group


@constexpr_function
def _lies_in(field, words, group, index):
    """Whether all of a field's channels are in a group."""
    return field * words >= index * group and (field + 1) * words <= (index + 1) * group


@triton.jit
def _load_tokens(
    new_ptr, new_stride, ring_ptr, at, fresh_from, first_slot, ring, channel, ok,
    D: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, FROM_RING: tl.constexpr,
):  # fmt: skip
    """COUNT tiles of tokens as float32, each STEP channels after the one before.

    `at` counts tokens from the one at `new_ptr`; those before `fresh_from` are in the ring.
    """
    new = new_ptr + at.to(tl.int64)[:, None] * new_stride + channel[None, :]
    tiles = ()
    if FROM_RING:
        fresh = (at >= fresh_from)[:, None]
        old = ring_ptr + ((first_slot + at) % ring)[:, None] * D + channel[None, :]
        for i in tl.static_range(COUNT):
            x = tl.load(new + i * STEP, mask=ok[None, :] & fresh, other=0.0).to(tl.float32)
            kept = tl.load(old + i * STEP, mask=ok[None, :] & ~fresh, other=0.0).to(tl.float32)
            tiles = tiles + (tl.where(fresh, x, kept),)
    else:
        for i in tl.static_range(COUNT):
            if channel.shape[0] == STEP:
                # no mask: with one, registers are set to zero before every load
                x = tl.load(new + i * STEP)
            else:
                x = tl.load(new + i * STEP, mask=ok[None, :], other=0.0)
            tiles = tiles + (x.to(tl.float32),)
    return tiles


@triton.jit
def _column_pieces(codes, OWN: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr, COPIES: tl.constexpr):
    """Wide and narrow piece of a column of a cut digit (see `layout`), whose codes are FIRST, FIRST + STEP, ..."""
    WIDE: tl.constexpr = cut_column(COPIES)[0]
    NARROW: tl.constexpr = cut_column(COPIES)[1]
    CUT: tl.constexpr = cut_column(COPIES)[2]
    LOW: tl.constexpr = OWN - cut_column(COPIES)[3]
    cut = codes[FIRST + CUT * STEP]
    wide = cut >> LOW << (OWN * CUT)
    for f in tl.static_range(CUT):
        wide += codes[FIRST + f * STEP] << (OWN * f)
    narrow = (cut & ((1 << LOW) - 1)) << (NARROW - LOW)
    for f in tl.static_range(CUT + 1, 8 // COPIES):
        narrow += codes[FIRST + f * STEP] << (OWN * (f - CUT - 1))
    return wide & ((1 << WIDE) - 1), narrow & ((1 << NARROW) - 1)


@triton.jit
def _store_cut(
    qdata_ptr, codes, row, word, row_ok, ok, X: tl.constexpr, DIGIT: tl.constexpr,
    FIELDS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The two planes of a cut digit. A field has as many channels as the wide plane has words, or as the narrow."""
    OWN: tl.constexpr = digit_bits(X.BITS, DIGIT)
    PLANE: tl.constexpr = digit_plane(X.BITS, DIGIT)
    at = qdata_ptr + word_at(row, X.BITS, X.KEPT, X.HIGH, PLANE, X.BLOCK)[:, None] + word[None, :]
    low_at = qdata_ptr + word_at(row, X.BITS, X.KEPT, X.HIGH, PLANE + 1, X.BLOCK)[:, None]
    COPIES: tl.constexpr = fold_copies(OWN, X.KEPT, 0)
    WIDE: tl.constexpr = cut_column(COPIES)[0]
    NARROW: tl.constexpr = cut_column(COPIES)[1]
    # a thread has the columns of one wide word, or of two that lie half a plane from each other
    HALVES: tl.constexpr = FIELDS // 8
    low = tl.zeros_like(codes[0])
    for h in tl.static_range(HALVES):
        high = tl.zeros_like(codes[0])
        for r in tl.static_range(COPIES):
            wide, narrow = _column_pieces(codes, OWN, r * HALVES + h, COPIES * HALVES, COPIES)
            high += wide << (r * WIDE)
            low += narrow << ((2 * r + h) * NARROW)
        tl.store(at + h * WORDS, high.to(tl.int16), mask=ok)
    if HALVES == 2:
        tl.store(low_at + word[None, :], low.to(tl.int16), mask=ok)
    else:
        HALF: tl.constexpr = WORDS // 2
        low = tl.where((word < HALF)[None, :], low, low << NARROW)
        low = tl.sum(tl.reshape(low, [low.shape[0], 2, HALF]), 1)
        tl.store(low_at + tl.arange(0, HALF)[None, :], low.to(tl.int16), mask=row_ok[:, None])


@triton.jit
def _own_bits(code, BITS: tl.constexpr, DIGIT: tl.constexpr):
    """A digit of codes, in the low bits. What is above them may stay where it is cut off with the word's."""
    if digit_count(BITS) == 1:
        return code
    return (code >> digit_above(BITS, DIGIT)) & ((1 << digit_bits(BITS, DIGIT)) - 1)


@triton.jit
def _store_plane(
    qdata_ptr, codes, row, word, row_ok, ok, X: tl.constexpr, DIGIT: tl.constexpr,
    FIELDS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The plane of a digit. A field has as many channels as the plane has words, or half or twice as many."""
    BITS: tl.constexpr = X.BITS
    OWN: tl.constexpr = digit_bits(BITS, DIGIT)
    OWN_WORDS: tl.constexpr = plane_words(OWN, digit_channels(X.KEPT, X.HIGH, DIGIT), 0)
    at = qdata_ptr + word_at(row, BITS, X.KEPT, X.HIGH, digit_plane(BITS, DIGIT), X.BLOCK)[:, None]
    if OWN_WORDS >= WORDS:
        HALVES: tl.constexpr = OWN_WORDS // WORDS
        for h in tl.static_range(HALVES):
            packed = _own_bits(codes[h], BITS, DIGIT)
            for f in tl.static_range(1, FIELDS // HALVES):
                packed += _own_bits(codes[f * HALVES + h], BITS, DIGIT) << (f * OWN)
            tl.store(at + h * WORDS + word[None, :], packed.to(tl.int16), mask=ok)
    else:
        HALF: tl.constexpr = WORDS // 2
        packed = _own_bits(codes[0], BITS, DIGIT)
        for f in tl.static_range(1, FIELDS):
            packed += _own_bits(codes[f], BITS, DIGIT) << (2 * f * OWN)
        packed = tl.where((word < HALF)[None, :], packed, packed << OWN)
        packed = tl.sum(tl.reshape(packed, [packed.shape[0], 2, HALF]), 1)
        tl.store(at + tl.arange(0, HALF)[None, :], packed.to(tl.int16), mask=row_ok[:, None])


@triton.jit
def _store_words(qdata_ptr, codes, row, word, row_ok, word_ok, P: tl.constexpr):
    """Pack every field's codes into words and store them; what is above a word's 16 bits is cut off.

    `row` is [tokens], counted from `qdata_ptr`.
    """
    ok = row_ok[:, None] & word_ok[None, :]
    for d in tl.static_range(digit_count(P.X.BITS)):
        if is_cut(digit_bits(P.X.BITS, d)):
            _store_cut(qdata_ptr, codes, row, word, row_ok, ok, P.X, d, P.FIELDS, P.WORDS)
        else:
            _store_plane(qdata_ptr, codes, row, word, row_ok, ok, P.X, d, P.FIELDS, P.WORDS)


@triton.jit
def _load_rotated(
    new_ptr,
    new_stride,
    ring_ptr,
    at,
    fresh_from,
    first,
    ring,
    word,
    word_ok,
    P: tl.constexpr,
    FROM_RING: tl.constexpr,
):
    """What `_load_tokens` loads, field by field, after rotation; what is not finite counts as 0."""
    D: tl.constexpr = P.X.D
    fields = ()
    if D == P.FIELDS * P.WORDS_P:
        # a power of two: steps within fields, then between them
        loaded = _load_tokens(
            new_ptr, new_stride, ring_ptr, at, fresh_from, first, ring, word, word_ok, D, P.WORDS, P.FIELDS, FROM_RING
        )  # fmt: skip
        for f in tl.static_range(P.FIELDS):
            x = tl.where(tl.abs(loaded[f]) < float("inf"), loaded[f], 0.0)
            for step in tl.static_range(turns(P.WORDS)):
                x = turn(x, step, 1)
            fields = fields + (x,)
        for step in tl.static_range(turns(P.FIELDS)):
            turned = ()
            for f in tl.static_range(P.FIELDS):
                if f & (1 << step) == 0:
                    turned = turned + (fields[f] + fields[f + (1 << step)],)
                else:
                    turned = turned + (fields[f - (1 << step)] - fields[f],)
            fields = turned
        scaled = ()
        for f in tl.static_range(P.FIELDS):
            scaled = scaled + (orthonormal(fields[f], D),)
        fields = scaled
    else:
        channel = tl.arange(0, next_power_of_2(D))
        x = _load_tokens(
            new_ptr, new_stride, ring_ptr, at, fresh_from, first, ring, channel, channel < D, D, D, 1, FROM_RING
        )[0]  # fmt: skip
        x = rotate(tl.where(tl.abs(x) < float("inf"), x, 0.0), D, 1)
        for f in tl.static_range(P.FIELDS):
            place = tl.minimum(f * P.WORDS + word, D - 1)
            fields = fields + (tl.gather(x, tl.broadcast_to(place[None, :], [P.TOKENS, P.WORDS_P]), 1),)
    return fields


@triton.jit
def _pack_group(
    new_ptr, new_stride, ring_ptr, qdata_ptr, scale_ptr, zero_ptr, fresh_from, first, ring,
    P: tl.constexpr, FROM_RING: tl.constexpr,
):  # fmt: skip
    """Codes of a group of tokens by the scales and offsets at the pointers."""
    X: tl.constexpr = P.X
    D: tl.constexpr = X.D
    WORDS: tl.constexpr = P.WORDS
    token = tl.arange(0, P.TOKENS)
    # few neighbours in a thread: see `_flush`
    word = tl.max_contiguous(tl.arange(0, P.WORDS_P), min(2, P.WORDS_P))
    word_ok = word < WORDS
    zeros = ()
    divisors = ()
    for f in tl.static_range(P.FIELDS):
        scale = tl.load(scale_ptr + f * WORDS + word, mask=word_ok, other=0)
        zero = scale
        if not X.SYMMETRIC:
            zero = tl.load(zero_ptr + f * WORDS + word, mask=word_ok, other=0)
        step, zero = _numbers(scale, zero, X)
        zeros = zeros + (zero[None, :],)
        divisors = divisors + (_divisor(step[None, :], 2**X.BITS - 1, P.SCALE_DTYPE),)
    for start in range(0, X.GROUP, P.TOKENS):
        at = start + token
        if X.GROUP % P.TOKENS != 0:
            at = tl.minimum(at, X.GROUP - 1)
        fields = _load_tokens(
            new_ptr, new_stride, ring_ptr, at, fresh_from, first, ring, word, word_ok,
            D, WORDS, P.FIELDS, FROM_RING,
        )  # fmt: skip
        codes = ()
        for f in tl.static_range(P.FIELDS):
            codes = codes + (_code_bits(fields[f], zeros[f], *divisors[f], P.SCALE_DTYPE),)
        _store_words(qdata_ptr, codes, first + at, word, at >= 0, word_ok, P)


@triton.jit
def _places(order_ptr, scale_ptr, zero_ptr, X: tl.constexpr):
    """Where in the order each channel is: its inverse, by way of the group's scales and offsets, which are written later."""
    channel = _channels(X)
    channel_ok = channel < X.D
    packed = tl.load(order_ptr + channel, mask=channel_ok, other=0).to(tl.int32)
    # in two parts, as both may be bytes; as float32 first, for the interpreter's bfloat16
    low = (channel % 128).to(tl.float32).to(scale_ptr.dtype.element_ty)
    high = (channel // 128).to(tl.float32).to(zero_ptr.dtype.element_ty)
    tl.store(scale_ptr + packed, low, mask=channel_ok)
    tl.store(zero_ptr + packed, high, mask=channel_ok)
    tl.debug_barrier()
    low = tl.load(scale_ptr + channel, mask=channel_ok, other=0).to(tl.float32)
    high = tl.load(zero_ptr + channel, mask=channel_ok, other=0).to(tl.float32)
    # no scale is written before all places are read
    tl.debug_barrier()
    # an order that is none must not write beyond the row
    place = tl.minimum(tl.maximum((high * 128 + low).to(tl.int32), 0), X.D - 1)
    return tl.where(channel_ok, place, channel)


@triton.jit
def _word_weights(place, X: tl.constexpr, DIGIT: tl.constexpr):
    """What a channel's digit counts in each word of its plane: float16 [channels, words], with as many as a dot takes."""
    OWN: tl.constexpr = digit_bits(X.BITS, DIGIT)
    CHANNELS: tl.constexpr = digit_channels(X.KEPT, X.HIGH, DIGIT)
    WORDS: tl.constexpr = plane_words(OWN, CHANNELS, 0)
    word = tl.arange(0, max(16, next_power_of_2(WORDS)))
    field = tl.minimum(place // WORDS, 16 // OWN - 1)
    # a digit keeps its place in the code
    weight = (1 << (field * OWN)).to(tl.float32) * 2.0 ** -digit_above(X.BITS, DIGIT)
    weight = tl.where(place < CHANNELS, weight, 0.0)
    return tl.where((place % WORDS)[:, None] == word[None, :], weight[:, None], 0.0).to(tl.float16)


@triton.jit
def _store_digit(qdata_ptr, code, weight, row, X: tl.constexpr, DIGIT: tl.constexpr):
    """The plane of a digit of codes, int16 [tokens, channels], by `_word_weights`."""
    OWN: tl.constexpr = digit_bits(X.BITS, DIGIT)
    WORDS: tl.constexpr = plane_words(OWN, digit_channels(X.KEPT, X.HIGH, DIGIT), 0)
    # half-precision numbers, subnormal, whose sums are exact: they have 16 bits
    digit = (code & (((1 << OWN) - 1) << digit_above(X.BITS, DIGIT))).to(tl.float16, bitcast=True)
    packed = (tl.dot(digit, weight) * 16777216.0).to(tl.int32)
    word = tl.arange(0, weight.shape[1])
    at = qdata_ptr + word_at(row, X.BITS, X.KEPT, X.HIGH, digit_plane(X.BITS, DIGIT), X.BLOCK)[:, None]
    tl.store(at + word[None, :], packed.to(tl.int16), mask=(row >= 0)[:, None] & (word < WORDS)[None, :])


@triton.jit
def _pack_ordered(
    new_ptr, new_stride, ring_ptr, qdata_ptr, place, step, zero, fresh_from, first, ring,
    P: tl.constexpr, FROM_RING: tl.constexpr,
):  # fmt: skip
    """Codes of a group of tokens whose channels have places in an order, by float32 steps and offsets.

    A word is a sum of digits times powers of 4, so words in any order are a product of the codes, as tokens lie, with
    a matrix that has one number in a row.
    """
    X: tl.constexpr = P.X
    channel = _channels(X)
    top = tl.where(place < X.HIGH, 15.0, 3.0)
    divisor = _divisor(step[None, :], top[None, :], P.SCALE_DTYPE)
    weights = ()
    for d in tl.static_range(digit_count(X.BITS)):
        weights = weights + (_word_weights(place, X, d),)
    # copied asynchronously, tokens would come from L2 again
    for start in tl.range(0, X.GROUP, P.TOKENS, num_stages=1):
        at = tl.minimum(start + tl.arange(0, P.TOKENS), X.GROUP - 1)
        x = _load_tokens(
            new_ptr, new_stride, ring_ptr, at, fresh_from, first, ring, channel, channel < X.D, X.D, X.D, 1, FROM_RING
        )[0]  # fmt: skip
        code = _code_bits(x, zero[None, :], *divisor, P.SCALE_DTYPE).to(tl.int16)
        # with an index range in it, codes are computed as tokens are loaded, few channels to a thread, and not as the
        # product takes them
        code = tl.where((tl.arange(0, X.DP) < X.D)[None, :], code, 0)
        for d in tl.static_range(digit_count(X.BITS)):
            _store_digit(qdata_ptr, code, weights[d], first + at, X, d)


@triton.jit
def _copy_exact(
    new_ptr, new_stride, ring_ptr, exact_ptr, order_ptr, fresh_from, first, ring, held,
    P: tl.constexpr, FROM_RING: tl.constexpr,
):  # fmt: skip
    """The raw channels of a group of tokens, as bfloat16; zeros if it is not held."""
    X: tl.constexpr = P.X
    raw = tl.arange(0, next_power_of_2(X.RAW))
    raw_ok = raw < X.RAW
    place = tl.load(order_ptr + (X.D - X.APART) + raw, mask=raw_ok, other=0).to(tl.int32)
    for start in range(0, X.GROUP, P.TOKENS):
        at = tl.minimum(start + tl.arange(0, P.TOKENS), X.GROUP - 1)
        x = _load_tokens(
            new_ptr, new_stride, ring_ptr, at, fresh_from, first, ring, place, raw_ok, X.D, X.RAW, 1, FROM_RING
        )[0]  # fmt: skip
        # what is no number stays so
        x = tl.where(held & (x == x), _stored(x, 1), tl.where(held, x, 0.0))
        exact_at = exact_ptr + (first + at)[:, None] * X.RAW + raw[None, :]
        tl.store(exact_at, x.to(tl.bfloat16), mask=raw_ok[None, :] & (at >= 0)[:, None])


@triton.jit
def _channels(X: tl.constexpr):
    # whole tokens to a warp: each thread then has few channels and all its tokens of them
    return tl.max_contiguous(tl.arange(0, next_power_of_2(X.D)), max(1, next_power_of_2(X.D) // 32))


@triton.jit
def _group_range(
    new_ptr, new_stride, ring_ptr, valid_ptr, valid_stride, hidden_below, fresh_from, first, ring, sink, rows_held,
    X: tl.constexpr, TOKENS: tl.constexpr, VALID: tl.constexpr, FROM_RING: tl.constexpr,
):  # fmt: skip
    """(smallest, largest) number of a group of tokens in each channel, 0 where none counts.

    Then, where channels are dropped, the sum of what counts and how many there are.
    """
    D: tl.constexpr = X.D
    GROUP: tl.constexpr = X.GROUP
    DP: tl.constexpr = next_power_of_2(D)
    LANES: tl.constexpr = 16 if TOKENS > 16 else TOKENS
    token = tl.arange(0, TOKENS)
    channel = _channels(X)
    channel_ok = channel < D
    nothing = tl.where(first < rows_held, 0.0, float("nan"))
    low = tl.zeros([LANES, DP], tl.float32) + float("inf")
    high = tl.zeros([LANES, DP], tl.float32) - float("inf")
    if X.KEPT < D:
        total = tl.zeros([LANES, DP], tl.float64)
        counted = tl.zeros([LANES, DP], tl.int32)
    for start in range(0, GROUP, TOKENS):
        at = start + token
        if GROUP % TOKENS != 0:
            # copies of the last token change nothing
            at = tl.minimum(at, GROUP - 1)
        x = _load_tokens(
            new_ptr, new_stride, ring_ptr, at, fresh_from, first, ring, channel, channel_ok,
            D, D, 1, FROM_RING,
        )[0]  # fmt: skip
        factor = nothing + tl.zeros_like(x)
        if VALID != 0:
            entry = tl.load(
                valid_ptr + (sink + first + at) * valid_stride, mask=first + at < rows_held, other=0
            )
            if VALID == 1:
                seen = entry != 0
            else:
                seen = entry.to(tl.float32) > hidden_below
            factor = tl.where(seen[:, None], factor, float("nan"))
        x = tl.fma(x, factor, x)
        if X.KEPT < D:
            once = (x == x) & (start + token < GROUP)[:, None]
            counts = tl.reshape(once.to(tl.int32), [TOKENS // LANES, LANES, DP])
            counted += tl.sum(counts, 0)
            finite = tl.where(once, x, 0.0).to(tl.float64)
            total += tl.sum(tl.reshape(finite, [TOKENS // LANES, LANES, DP]), 0)
        x = tl.reshape(x, [TOKENS // LANES, LANES, DP])
        low = tl.minimum(low, tl.min(x, 0))
        high = tl.maximum(high, tl.max(x, 0))
    low = tl.min(low, 0)
    high = tl.max(high, 0)
    empty = low > high
    low = tl.where(empty, 0.0, low)
    high = tl.where(empty, 0.0, high)
    if X.KEPT < D:
        summed = tl.sum(total, 0)
        count = tl.sum(counted, 0)
    else:
        summed = low
        count = low
    return low, high, summed, count


@triton.jit
def _flush(
    new_ptr, new_stride, x, valid_ptr, valid_stride, hidden_below, tile_index, part, rows_held, live, sink, ring,
    P: tl.constexpr, VALID: tl.constexpr, FROM_RING: tl.constexpr,
):  # fmt: skip
    """Quantize and pack part `part` of a tile; zeros in tiles from row `rows_held` on. x is a `Stored`, P a `Packing`.

    A part is a group of tokens for AXIS 0 and a block of TOKENS tokens for AXIS 1. A field is a tile
    [TOKENS, words]; all fields of a word are in one thread, so packing needs no exchange (but for the
    narrow plane of a cut digit where the fields are as wide as the wide one).

    Minimum and maximum ignore a NaN, so what must not count in a range is made one: x + 0 * x for
    whatever is not finite, x + NaN * x for whatever is hidden.
    """
    X: tl.constexpr = P.X
    BITS: tl.constexpr = X.BITS
    AXIS: tl.constexpr = X.AXIS
    GROUP: tl.constexpr = X.GROUP
    D: tl.constexpr = X.D
    SCALE_DTYPE: tl.constexpr = P.SCALE_DTYPE
    FIELDS: tl.constexpr = P.FIELDS
    WORDS: tl.constexpr = P.WORDS
    WORDS_P: tl.constexpr = P.WORDS_P
    TOKENS: tl.constexpr = P.TOKENS
    tile = x.tile
    scale_ptr = x.scale
    zero_ptr = x.zero
    order_ptr = x.order
    token = tl.arange(0, TOKENS)
    # a tile is held in full or not at all; if not, one token is read throughout and none counts, so that
    # scales and codes are 0
    held = tile_index * tile < rows_held
    new_stride = tl.where(held, new_stride, 0).to(tl.int64)
    nothing = tl.where(held, 0.0, float("nan"))
    if AXIS == 0:
        first = tile_index * tile + part * GROUP
    else:
        first = tile_index * tile + part * TOKENS
    fresh_from = live - sink - first
    new_ptr += -fresh_from.to(tl.int64) * new_stride
    ring_ptr = x.residual + sink * D
    if X.TURNED == TILED:
        order_ptr += tile_index * D
    if AXIS == 0:
        channel = _channels(X)
        channel_ok = channel < D
        low, high, total, counted = _group_range(
            new_ptr, new_stride, ring_ptr, valid_ptr, valid_stride, hidden_below, fresh_from, first, ring, sink, rows_held,
            X, TOKENS, VALID, FROM_RING,
        )  # fmt: skip
        scale_ptr += first // GROUP * D
        zero_ptr += first // GROUP * D
        if BITS == TIERED:
            place = _places(order_ptr, scale_ptr, zero_ptr, X)
            low_4, high_4 = _narrowed(low, high, P.MARGIN_HIGH)
            low_2, high_2 = _narrowed(low, high, P.MARGIN)
            wide = place < X.HIGH
            step = tl.where(wide, _steps(low_4, high_4, 4), _steps(low_2, high_2, 2))
            low = tl.where(wide, low_4, low_2)
            if X.KEPT < D:
                mean = (total / tl.maximum(counted, 1).to(tl.float64)).to(tl.float32)
                step = tl.where(place < X.KEPT, step, 0.0)
                low = tl.where(place < X.KEPT, low, tl.where(place < D - X.APART, mean, 0.0))
            scale, zero = _store_scales(
                scale_ptr, zero_ptr, place, step, low, channel_ok, SCALE_DTYPE, X.SYMMETRIC
            )
            step, zero = _numbers(scale, zero, X)
            _pack_ordered(
                new_ptr, new_stride, ring_ptr, x.qdata, place, step, zero, fresh_from, first, ring, P, FROM_RING
            )  # fmt: skip
        else:
            low, high = _narrowed(low, high, P.MARGIN)
            step = _steps(low, high, BITS)
            _store_scales(scale_ptr, zero_ptr, channel, step, low, channel_ok, SCALE_DTYPE, X.SYMMETRIC)
            # read back by the threads that pack
            tl.debug_barrier()
            _pack_group(
                new_ptr, new_stride, ring_ptr, x.qdata, scale_ptr, zero_ptr, fresh_from, first, ring, P, FROM_RING
            )  # fmt: skip
        if X.RAW > 0:
            _copy_exact(
                new_ptr, new_stride, ring_ptr, x.exact, order_ptr, fresh_from, first, ring, held, P, FROM_RING
            )  # fmt: skip
    else:
        # how many words a thread holds side by side. For keys few: it computes for each of its channels what
        # a code needs (not 1, by which Triton puts a warp's threads along the tokens). For values many: it
        # computes the same for each of its tokens. Rotated ones all that it can: what it holds needs no exchange.
        NEIGHBOURS: tl.constexpr = WORDS_P if X.TURNED == ROTATED else max(16 // FIELDS, WORDS_P // 8)
        word = tl.max_contiguous(tl.arange(0, WORDS_P), NEIGHBOURS)
        word_ok = word < WORDS
        row_ok = part * TOKENS + token < tile
        at = tl.minimum(token, tile - 1 - part * TOKENS)
        if X.TURNED == ROTATED:
            fields = _load_rotated(
                new_ptr, new_stride, ring_ptr, at, fresh_from, first, ring, word, word_ok, P, FROM_RING
            )  # fmt: skip
        else:
            fields = _load_tokens(
                new_ptr, new_stride, ring_ptr, at, fresh_from, first, ring, word, word_ok,
                D, WORDS, FIELDS, FROM_RING,
            )  # fmt: skip
        zeros = ()
        divisors = ()
        for g in tl.static_range(D // GROUP):
            low = tl.zeros([TOKENS, WORDS_P], tl.float32) + float("inf")
            high = tl.zeros([TOKENS, WORDS_P], tl.float32) - float("inf")
            for f in tl.static_range(FIELDS):
                if _meets(f, WORDS, GROUP, g):
                    factor = nothing + tl.zeros_like(low)
                    if WORDS != WORDS_P:
                        factor = tl.where(word_ok[None, :], factor, float("nan"))
                    if not _lies_in(f, WORDS, GROUP, g):
                        factor = tl.where(((f * WORDS + word) // GROUP == g)[None, :], factor, float("nan"))
                    number = tl.fma(fields[f], factor, fields[f])
                    low = tl.minimum(low, number)
                    high = tl.maximum(high, number)
            low = tl.min(low, 1)
            high = tl.max(high, 1)
            empty = low > high
            low = tl.where(empty, 0.0, low)
            high = tl.where(empty, 0.0, high)
            if X.SYMMETRIC:
                high = tl.maximum(high, -low)
                low = -high
            low, high = _narrowed(low, high, P.MARGIN)
            group_at = (first + token) * (D // GROUP) + g
            scale, zero = _store_scales(
                scale_ptr, zero_ptr, group_at, _steps(low, high, BITS), low, row_ok, SCALE_DTYPE, X.SYMMETRIC
            )
            step, zero = _numbers(scale, zero, X)
            zeros = zeros + (zero[:, None],)
            divisors = divisors + (_divisor(step[:, None], 2**BITS - 1, SCALE_DTYPE),)
        codes = ()
        for f in tl.static_range(FIELDS):
            code = tl.zeros([TOKENS, WORDS_P], tl.int32)
            for g in tl.static_range(D // GROUP):
                if _meets(f, WORDS, GROUP, g):
                    group_code = _code_bits(fields[f], zeros[g], *divisors[g], SCALE_DTYPE)
                    if _lies_in(f, WORDS, GROUP, g):
                        code = group_code
                    else:
                        code = tl.where(((f * WORDS + word) // GROUP == g)[None, :], group_code, code)
            codes = codes + (code,)
        _store_words(x.qdata, codes, first + token, word, row_ok, word_ok, P)


ALL_TILES = tl.constexpr(0)
RING_TILES = tl.constexpr(1)
"""Tiles of which some tokens are in the ring."""
FRESH_TILES = tl.constexpr(2)
"""Tiles of new tokens alone."""


@triton.jit
def _append_one(
    new_ptr, buffers, strides, valid_ptr, new_sb, new_sh, new_sl, valid_sb, valid_ss, hidden_below, batch, heads, live, count, tile, sink, window, ring, parts,
    P: tl.constexpr, ROWS: tl.constexpr, VALID: tl.constexpr, FLUSH: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """This program's share of one tensor: parts of the tiles that are due, and rows of new tokens."""
    BITS: tl.constexpr = P.X.BITS
    D: tl.constexpr = P.X.D
    DP: tl.constexpr = P.X.DP
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    end = live + count
    if BITS != RAW_BITS:
        old = tl.maximum(live - sink - window, 0) // tile
        due = tl.maximum(end - sink - window, 0) // tile
        if FLUSH != ALL_TILES:
            # the first tile of which no token is in the ring
            fresh = tl.maximum(live - sink + tile - 1, 0) // tile
            if FLUSH == RING_TILES:
                due = tl.minimum(due, fresh)
            else:
                old = tl.maximum(old, fresh)
        jobs = parts * tl.maximum(due - old, 0)
        for job in range(pid, batch * heads * jobs, programs):
            b = (job // jobs // heads).to(tl.int64)
            h = (job // jobs % heads).to(tl.int64)
            _flush(
                new_ptr + b * new_sb + h * new_sh, new_sl, stored(buffers, strides, b, h, tile),
                valid_ptr + b * valid_sb, valid_ss, hidden_below,
                old + job % jobs // parts, job % parts, due * tile, live, sink, ring,
                P, VALID, FLUSH != FRESH_TILES,
            )  # fmt: skip
    if WRITE:
        channel = tl.arange(0, DP)
        total = batch * heads * count
        for first in range(pid * ROWS, total, programs * ROWS):
            row = first + tl.arange(0, ROWS)
            index = row % count
            b = (row // count // heads).to(tl.int64)
            h = (row // count % heads).to(tl.int64)
            position = live + index
            if BITS == RAW_BITS:
                ok = row < total
                slot = position
            else:
                ok = (row < total) & (
                    (position < sink) | (position >= packed_end_of(end, tile, sink, window))
                )
                slot = tl.where(position < sink, position, sink + (position - sink) % ring)
            ok = ok[:, None] & (channel < D)[None, :]
            source = b * new_sb + h * new_sh + index.to(tl.int64) * new_sl
            target = slot.to(tl.int64) * D
            x = tl.load(new_ptr + source[:, None] + channel[None, :], mask=ok, other=0.0)
            raw_ptr = stored(buffers, strides, b, h, tile).residual
            tl.store(
                raw_ptr[:, None] + target[:, None] + channel[None, :],
                x.to(raw_ptr.dtype.element_ty),
                mask=ok,
            )


@Kernel
@triton.jit(
    do_not_specialize=[
        "batch", "heads", "count", "length", "k_tile", "k_sink", "k_window", "k_ring", "k_parts",
        "v_tile", "v_sink", "v_window", "v_ring", "v_parts",
    ]
)  # fmt: skip
def append_kernel(
    keys_ptr, values_ptr, k_buffers, v_buffers, valid_ptr, start_ptr,
    keys_sb, keys_sh, keys_sl, values_sb, values_sh, values_sl, k_strides, v_strides,
    valid_sb, valid_ss, hidden_below, batch, heads, count, length,
    k_tile, k_sink, k_window, k_ring, k_parts, v_tile, v_sink, v_window, v_ring, v_parts,
    ON_DEVICE: tl.constexpr, VALID: tl.constexpr, FLUSH: tl.constexpr, WRITE: tl.constexpr,
    K_FORM: tl.constexpr, K_SCALE: tl.constexpr, K_FIELDS: tl.constexpr, K_WORDS: tl.constexpr, K_WORDS_P: tl.constexpr,
    K_TOKENS: tl.constexpr, K_MARGIN: tl.constexpr, K_MARGIN_HIGH: tl.constexpr, K_ROWS: tl.constexpr,
    V_FORM: tl.constexpr, V_SCALE: tl.constexpr, V_FIELDS: tl.constexpr, V_WORDS: tl.constexpr, V_WORDS_P: tl.constexpr,
    V_TOKENS: tl.constexpr, V_MARGIN: tl.constexpr, V_MARGIN_HIGH: tl.constexpr, V_ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Append `count` tokens to keys and values and flush what left the window.

    Grid: as many programs as fill the GPU; most steps of one token flush nothing and are over at once. With
    `start` on the device a step that would pass the capacity `length` writes nothing. EARLY: started
    before the kernel ahead ends, it waits for it, and lets the next one do the same.
    """
    K: tl.constexpr = Packing(
        as_form(K_FORM), K_SCALE, K_FIELDS, K_WORDS, K_WORDS_P, K_TOKENS, K_MARGIN, K_MARGIN_HIGH,
    )  # fmt: skip
    V: tl.constexpr = Packing(
        as_form(V_FORM), V_SCALE, V_FIELDS, V_WORDS, V_WORDS_P, V_TOKENS, V_MARGIN, V_MARGIN_HIGH,
    )  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    live = length
    fits = True
    if ON_DEVICE:
        live = tl.load(start_ptr).to(tl.int32)
        fits = live + count <= length
    if fits:
        _append_one(
            keys_ptr, k_buffers, k_strides, valid_ptr, keys_sb, keys_sh, keys_sl, valid_sb, valid_ss, hidden_below,
            batch, heads, live, count, k_tile, k_sink, k_window, k_ring, k_parts,
            K, K_ROWS, VALID, FLUSH, WRITE,
        )  # fmt: skip
        _append_one(
            values_ptr, v_buffers, v_strides, valid_ptr, values_sb, values_sh, values_sl, valid_sb, valid_ss, hidden_below,
            batch, heads, live, count, v_tile, v_sink, v_window, v_ring, v_parts,
            V, V_ROWS, VALID, FLUSH, WRITE,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["heads", "count", "tiles", "slots", "tile", "sink", "window", "ring", "parts", "jobs"]
)
def pack_kernel(
    x_ptr, buffers, valid_ptr, x_sb, x_sh, x_sl, valid_sb, valid_ss, hidden_below, heads, count, tiles, slots, tile, sink, window, ring, parts, jobs,
    VALID: tl.constexpr, ROWS: tl.constexpr, FORM: tl.constexpr, SCALE: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr,
    WORDS_P: tl.constexpr, TOKENS: tl.constexpr, MARGIN: tl.constexpr, MARGIN_HIGH: tl.constexpr,
):  # fmt: skip
    """Fill the buffers of one tensor but for its order from its tokens x; what holds no token becomes 0.

    Grid: jobs (parts of tiles, then blocks of residual slots), fastest, x heads x batch.
    """
    P: tl.constexpr = Packing(as_form(FORM), SCALE, FIELDS, WORDS, WORDS_P, TOKENS, MARGIN, MARGIN_HIGH)
    X: tl.constexpr = P.X
    D: tl.constexpr = X.D
    pid = tl.program_id(0)
    job = pid % jobs
    sequence = (pid // jobs // heads).to(tl.int64)
    at = (pid // jobs).to(tl.int64)
    x_ptr += sequence * x_sb + (at - sequence * heads) * x_sh
    end = packed_end_of(count, tile, sink, window)
    if X.BITS != RAW_BITS:
        if job < tiles * parts:
            # buffers are dense, head after head
            if X.AXIS == 0:
                grid_rows = tiles * (tile // X.GROUP) * D
            else:
                grid_rows = tiles * tile * (D // X.GROUP)
            words = tiles * tile * words_per_token(X.BITS, X.KEPT, X.HIGH)
            order = tiles * D if X.TURNED == TILED else D
            strides = (0, words, 0, grid_rows, 0, 0, 0, order, 0, tiles * tile * X.RAW)
            index = job // parts
            _flush(
                x_ptr, x_sl, stored(buffers, strides, 0, at, tile), valid_ptr + sequence * valid_sb, valid_ss,
                hidden_below, index, job % parts, end - sink, 0, sink, ring, P, VALID, False,
            )  # fmt: skip
    if job >= tiles * parts:
        slot = (job - tiles * parts) * ROWS + tl.arange(0, ROWS)
        channel = tl.arange(0, X.DP)
        if X.BITS == RAW_BITS:
            position = slot
            held = slot < count
        else:
            # the newest token that belongs to this slot of the ring
            newest = count - 1 - sink
            behind = newest - (newest - (slot - sink) + ring) % ring
            position = tl.where(slot < sink, slot, sink + behind)
            held = (slot < sink) & (slot < count) | (slot >= sink) & (behind >= 0) & (position >= end)
        ok = (slot < slots)[:, None] & (channel < D)[None, :]
        x = tl.load(
            x_ptr + position.to(tl.int64)[:, None] * x_sl + channel[None, :],
            mask=ok & held[:, None],
            other=0.0,
        )
        residual_ptr = buffers[3] + at * slots * D
        tl.store(
            residual_ptr + slot[:, None] * D + channel[None, :], x.to(residual_ptr.dtype.element_ty), mask=ok
        )


@triton.jit(do_not_specialize=["heads", "groups"])
def ranges_kernel(
    x_ptr, valid_ptr, out_ptr, x_sb, x_sh, x_sl, valid_sb, valid_ss, heads, groups,
    VALID: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """`reference.quantize.ranges`. Grid: groups of tokens, fastest, x heads x batch."""
    X: tl.constexpr = Form(TIERED, 0, GROUP, D, 1, DP, D, D, False, ORDERED)
    pid = tl.program_id(0).to(tl.int64)
    first = (pid % groups) * GROUP
    batch = pid // groups // heads
    x_ptr += batch * x_sb + (pid // groups % heads) * x_sh + first * x_sl
    low, high, _, _ = _group_range(
        x_ptr, x_sl.to(tl.int64), x_ptr, valid_ptr + batch * valid_sb, valid_ss, 0.0, 0, first, 1, 0, groups * GROUP,
        X, TOKENS, VALID, False,
    )  # fmt: skip
    channel = _channels(X)
    tl.store(out_ptr + pid * D + channel, high - low, mask=channel < D)


@triton.jit
def _key_sizes(
    new_ptr, new_stride, ring_ptr, valid_ptr, valid_stride, hidden_below, fresh_from, first, ring, sink,
    X: tl.constexpr, TOKENS: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """Sums of the sizes of a tile's keys in each channel, of what counts."""
    channel = _channels(X)
    total = tl.zeros([next_power_of_2(X.D)], tl.float64)
    for start in range(0, X.GROUP, TOKENS):
        token = start + tl.arange(0, TOKENS)
        at = tl.minimum(token, X.GROUP - 1)
        x = _load_tokens(
            new_ptr, new_stride, ring_ptr, at, fresh_from, first, ring, channel, channel < X.D, X.D, X.D, 1, True
        )[0]  # fmt: skip
        counts = token < X.GROUP
        if VALID != 0:
            entry = tl.load(valid_ptr + (sink + first + at) * valid_stride)
            counts &= (entry != 0) if VALID == 1 else (entry.to(tl.float32) > hidden_below)
        size = tl.abs(x)
        total += tl.sum(tl.where(counts[:, None] & (size < float("inf")), size, 0.0).to(tl.float64), 0)
    return total


@triton.jit
def _query_sizes(
    query_ptr, query_sh, query_sl, valid_ptr, valid_stride, hidden_below, live, begin, end, group,
    D: tl.constexpr, TOKENS: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """`reference.quantize.query_size` of new tokens begin..end-1 that are no padding, of one KV head."""
    channel = tl.arange(0, next_power_of_2(D))
    total = tl.zeros([next_power_of_2(D)], tl.float64)
    for start in range(begin, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        counts = token < end
        if VALID != 0:
            entry = tl.load(valid_ptr + (live + token) * valid_stride, mask=counts, other=0)
            counts &= (entry != 0) if VALID == 1 else (entry.to(tl.float32) > hidden_below)
        at = query_ptr + token.to(tl.int64)[:, None] * query_sl + channel[None, :]
        for head in range(group):
            q = tl.load(
                at + head * tl.cast(query_sh, tl.int64),
                mask=counts[:, None] & (channel < D)[None, :],
                other=0.0,
            )
            total += tl.sum(tl.abs(q.to(tl.float32)).to(tl.float64), 0)
    return tl.where(total < float("inf"), total, 0.0)


@triton.jit
def _flushed_at(tile_index, tile, sink, window):
    """`TensorFormat.flushed_at`."""
    return sink + window + (tile_index + 1) * tile


@triton.jit(do_not_specialize=["heads", "group", "count", "length", "tile", "sink", "window", "most"])
def see_kernel(
    query_ptr, seen_ptr, totals_ptr, valid_ptr, start_ptr, query_sb, query_sh, query_sl, seen_sb, seen_sh,
    valid_sb, valid_ss, hidden_below, heads, group, count, length, tile, sink, window, most,
    ON_DEVICE: tl.constexpr, VALID: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Sizes of new queries between the lengths at which tiles are due, totals [batch * heads, most + 1, D].

    Grid: stretches, fastest, x heads x batch: up to the first tile that is due, to the next, to the end. The first
    brings what was seen before; a cache that starts anew has seen nothing, whatever it held.
    """
    pid = tl.program_id(0)
    stretch = pid % (most + 1)
    owner = pid // (most + 1)
    batch = (owner // heads).to(tl.int64)
    live = length
    if ON_DEVICE:
        live = tl.load(start_ptr).to(tl.int32)
        count = tl.where(live + count <= length, count, 0)
    old = tl.maximum(live - sink - window, 0) // tile
    begin = tl.where(stretch == 0, 0, _flushed_at(old + stretch - 1, tile, sink, window) - live)
    end = tl.where(stretch == most, count, _flushed_at(old + stretch, tile, sink, window) - live)
    total = _query_sizes(
        query_ptr + batch * query_sb + (owner % heads).to(tl.int64) * group * query_sh, query_sh, query_sl,
        valid_ptr + batch * valid_sb, valid_ss, hidden_below, live, tl.minimum(begin, count), tl.minimum(end, count),
        group, D, TOKENS, VALID,
    )  # fmt: skip
    channel = tl.arange(0, next_power_of_2(D))
    seen_ptr += batch * seen_sb + (owner % heads).to(tl.int64) * seen_sh
    before = tl.where((stretch == 0) & (live > 0), D, 0)
    total += tl.load(seen_ptr + channel, mask=channel < before, other=0.0)
    tl.store(totals_ptr + pid.to(tl.int64) * D + channel, total, mask=channel < D)


@triton.jit
def _store_order(order_ptr, score, D: tl.constexpr, RAW: tl.constexpr):
    """Channels by falling score; the first RAW go behind all others. What is no number counts as 0."""
    channel = tl.arange(0, next_power_of_2(D))
    score = tl.where(score == score, tl.minimum(score, 3.4028234663852886e38), 0.0)
    score = tl.where(channel < D, score, -1.0)
    # how many come before a channel is its place
    SOME: tl.constexpr = min(32, next_power_of_2(D))
    for begin in tl.static_range(0, next_power_of_2(D), SOME):
        some = begin + tl.arange(0, SOME)
        own = tl.gather(score, some, 0)
        before = score[None, :] > own[:, None]
        before |= (score[None, :] == own[:, None]) & (channel[None, :] < some[:, None])
        place = tl.sum(before.to(tl.int32), 1) - RAW
        place = tl.where(place < 0, place + D, place)
        tl.store(order_ptr + place, some.to(order_ptr.dtype.element_ty), mask=some < D)


@triton.jit(
    do_not_specialize=["heads", "group", "count", "length", "sink", "window", "ring", "most", "totals_sh"]
)
def order_kernel(
    keys_ptr, query_ptr, residual_ptr, order_ptr, seen_ptr, totals_ptr, valid_ptr, start_ptr,
    keys_sb, keys_sh, keys_sl, query_sb, query_sh, query_sl, residual_sb, residual_sh, order_sb, order_sh,
    seen_sb, seen_sh, totals_sh, valid_sb, valid_ss, hidden_below, heads, group, count, length, sink, window, ring, most,
    ON_DEVICE: tl.constexpr, VALID: tl.constexpr, BY_QUERIES: tl.constexpr, ALONE: tl.constexpr, TILE: tl.constexpr,
    D: tl.constexpr, APART: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """`reference.quantize.order_of_tiles` of the tiles that are due.

    Grid: tiles that may be due, fastest, x heads x batch. With BY_QUERIES, `totals` has what was seen until each
    is due; ALONE: of one new token, which is added to what was seen here.
    """
    pid = tl.program_id(0)
    index = pid % most
    owner = pid // most
    batch = (owner // heads).to(tl.int64)
    head = (owner % heads).to(tl.int64)
    X: tl.constexpr = Form(TIERED, 0, TILE, D, 1, next_power_of_2(D), D, D, False, 0)
    live = length
    fits = True
    if ON_DEVICE:
        live = tl.load(start_ptr).to(tl.int32)
        fits = live + count <= length
    channel = _channels(X)
    channel_ok = channel < D
    valid_ptr += batch * valid_sb
    total = tl.zeros([next_power_of_2(D)], tl.float64)
    if BY_QUERIES:
        if ALONE:
            seen_at = seen_ptr + batch * seen_sb + head * seen_sh + channel
            total = tl.load(seen_at, mask=channel < tl.where(live > 0, D, 0), other=0.0)
            if fits:
                total += _query_sizes(
                    query_ptr + batch * query_sb + head * group * query_sh, query_sh, query_sl,
                    valid_ptr, valid_ss, hidden_below, live, 0, 1, group, D, 1, VALID,
                )  # fmt: skip
                tl.store(seen_at, total, mask=channel_ok)
        else:
            total = tl.load(
                totals_ptr + owner.to(tl.int64) * totals_sh + index * D + channel, mask=channel_ok, other=0.0
            )
    due = tl.maximum(live + count - sink - window, 0) // TILE
    tile_index = tl.maximum(live - sink - window, 0) // TILE + index
    if fits & (tile_index < due):
        first = tile_index * TILE
        fresh_from = live - sink - first
        new_ptr = keys_ptr + batch * keys_sb + head * keys_sh - fresh_from.to(tl.int64) * keys_sl
        ring_ptr = residual_ptr + batch * residual_sb + head * residual_sh + sink * D
        if BY_QUERIES:
            low, high, _, _ = _group_range(
                new_ptr, keys_sl, ring_ptr, valid_ptr, valid_ss, hidden_below, fresh_from, first, ring, sink,
                due * TILE, X, TOKENS, VALID, True,
            )  # fmt: skip
            size = tl.where(tl.max(total, 0) > 0, total, 1.0).to(tl.float32)
            score = (high - low) * size
        else:
            score = _key_sizes(
                new_ptr, keys_sl, ring_ptr, valid_ptr, valid_ss, hidden_below, fresh_from, first, ring, sink,
                X, TOKENS, VALID,
            ).to(tl.float32)  # fmt: skip
        _store_order(
            order_ptr + batch * order_sb + head * order_sh + tile_index.to(tl.int64) * D, score, D, APART
        )
