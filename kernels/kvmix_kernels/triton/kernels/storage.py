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

from kvmix_kernels.triton.kernels.fields import (
    RAW_BITS,
    constexpr_function,
    cut_column,
    digit_above,
    digit_bits,
    digit_count,
    digit_plane,
    fold_copies,
    is_cut,
    packed_end_of,
    plane_words,
    word_at,
    words_per_token,
)

ROUNDER = tl.constexpr(8388608.0)
"""2**23: adding and subtracting it rounds a smaller positive float32 to an integer, half to even."""


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
def _range_to_scale(low, high, BITS: tl.constexpr, SCALE_DTYPE: tl.constexpr):
    TOP: tl.constexpr = 2**BITS - 1
    LIMIT: tl.constexpr = (
        65504.0 if SCALE_DTYPE == 0 else 3.3895313892515355e38 if SCALE_DTYPE == 1 else 3.4028234663852886e38
    )
    empty = low > high
    low = tl.where(empty, 0.0, low)
    high = tl.where(empty, 0.0, high)
    scale = tl.minimum(_divided(high, TOP) - _divided(low, TOP), LIMIT)
    zero = tl.minimum(tl.maximum(low, -LIMIT), LIMIT)
    return _stored(scale, SCALE_DTYPE), _stored(zero, SCALE_DTYPE)


@triton.jit
def _divisor(step, BITS: tl.constexpr, SCALE_DTYPE: tl.constexpr):
    """(unit, largest distance, -divisor, 1 / divisor), where the divisor is the step times the unit.

    The unit is a power of two that keeps all of it normal; float16 needs none.
    """
    unit = tl.zeros_like(step) + 1.0
    if SCALE_DTYPE != 0:
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
    return unit, step * unit * (2**BITS - 1), -divisor, inverse


@triton.jit
def _code_bits(x, zero, unit, largest, minus_divisor, inverse, SCALE_DTYPE: tl.constexpr):
    """Codes as the low 24 bits of an int32.

    One correction step makes the product with the inverse the correctly rounded quotient
    (Markstein, IBM J. Res. Dev. 34, 1990), at a third of a division's cost.
    """
    x = x - zero
    if SCALE_DTYPE != 0:
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
    qdata_ptr, codes, row, word, row_ok, ok, OWN: tl.constexpr, PLANE: tl.constexpr,
    D: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The two planes of a cut digit. A field has as many channels as the wide plane has words, or as the narrow."""
    at = qdata_ptr + word_at(row, BITS, D, PLANE, BLOCK)[:, None] + word[None, :]
    low_at = qdata_ptr + word_at(row, BITS, D, PLANE + 1, BLOCK)[:, None]
    COPIES: tl.constexpr = fold_copies(OWN, D, 0)
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
    qdata_ptr, codes, row, word, row_ok, ok, DIGIT: tl.constexpr,
    D: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """The plane of a digit. A field has as many channels as the plane has words, or half or twice as many."""
    OWN: tl.constexpr = digit_bits(BITS, DIGIT)
    OWN_WORDS: tl.constexpr = plane_words(OWN, D, 0)
    at = qdata_ptr + word_at(row, BITS, D, digit_plane(BITS, DIGIT), BLOCK)[:, None]
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
def _store_words(
    qdata_ptr, codes, row, word, row_ok, word_ok,
    D: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Pack every field's codes into words and store them; what is above a word's 16 bits is cut off.

    `row` is [tokens], counted from `qdata_ptr`.
    """
    ok = row_ok[:, None] & word_ok[None, :]
    for d in tl.static_range(digit_count(BITS)):
        if is_cut(digit_bits(BITS, d)):
            _store_cut(
                qdata_ptr, codes, row, word, row_ok, ok, digit_bits(BITS, d), digit_plane(BITS, d),
                D, BITS, BLOCK, FIELDS, WORDS,
            )  # fmt: skip
        else:
            _store_plane(qdata_ptr, codes, row, word, row_ok, ok, d, D, BITS, BLOCK, FIELDS, WORDS)


@triton.jit
def _flush(
    new_ptr, new_stride, qdata_ptr, scale_ptr, zero_ptr, residual_ptr, valid_ptr, valid_stride, hidden_below,
    tile_index, part, rows_held, live, tile, sink, ring,
    BITS: tl.constexpr, AXIS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    SCALE_DTYPE: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr, WORDS_P: tl.constexpr, TOKENS: tl.constexpr,
    VALID: tl.constexpr, FROM_RING: tl.constexpr,
):  # fmt: skip
    """Quantize and pack part `part` of a tile; zeros in tiles from row `rows_held` on.

    A part is a group of tokens for AXIS 0 and a block of TOKENS tokens for AXIS 1. A field is a tile
    [TOKENS, words]; all fields of a word are in one thread, so packing needs no exchange (but for the
    narrow plane of a cut digit where the fields are as wide as the wide one).

    Minimum and maximum ignore a NaN, so what must not count in a range is made one: x + 0 * x for
    whatever is not finite, x + NaN * x for whatever is hidden.
    """
    token = tl.arange(0, TOKENS)
    # how many words a thread holds side by side. For keys few: it computes for each of its channels what
    # a code needs (not 1, by which Triton puts a warp's threads along the tokens). For values many: it
    # computes the same for each of its tokens.
    NEIGHBOURS: tl.constexpr = max(16 // FIELDS, WORDS_P // 8) if AXIS == 1 else 2
    word = tl.max_contiguous(tl.arange(0, WORDS_P), NEIGHBOURS)
    word_ok = word < WORDS
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
    ring_ptr = residual_ptr + sink * D
    if AXIS == 0:
        LANES: tl.constexpr = 16 if TOKENS > 16 else TOKENS
        DP: tl.constexpr = FIELDS * WORDS_P
        # whole tokens to a warp: each thread then has few channels and all its tokens of them
        channel = tl.max_contiguous(tl.arange(0, DP), max(1, DP // 32))
        channel_ok = channel < D
        low = tl.zeros([LANES, DP], tl.float32) + float("inf")
        high = tl.zeros([LANES, DP], tl.float32) - float("inf")
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
            x = tl.reshape(tl.fma(x, factor, x), [TOKENS // LANES, LANES, DP])
            low = tl.minimum(low, tl.min(x, 0))
            high = tl.maximum(high, tl.max(x, 0))
        step, zero = _range_to_scale(tl.min(low, 0), tl.max(high, 0), BITS, SCALE_DTYPE)
        scale_ptr += first // GROUP * D
        zero_ptr += first // GROUP * D
        tl.store(scale_ptr + channel, step.to(scale_ptr.dtype.element_ty), mask=channel_ok)
        tl.store(zero_ptr + channel, zero.to(zero_ptr.dtype.element_ty), mask=channel_ok)
        # read back by the threads that pack
        tl.debug_barrier()
        zeros = ()
        divisors = ()
        for f in tl.static_range(FIELDS):
            step = tl.load(scale_ptr + f * WORDS + word, mask=word_ok, other=0.0).to(tl.float32)
            zero = tl.load(zero_ptr + f * WORDS + word, mask=word_ok, other=0.0).to(tl.float32)
            zeros = zeros + (zero[None, :],)
            divisors = divisors + (_divisor(step[None, :], BITS, SCALE_DTYPE),)
        for start in range(0, GROUP, TOKENS):
            at = start + token
            if GROUP % TOKENS != 0:
                at = tl.minimum(at, GROUP - 1)
            fields = _load_tokens(
                new_ptr, new_stride, ring_ptr, at, fresh_from, first, ring, word, word_ok,
                D, WORDS, FIELDS, FROM_RING,
            )  # fmt: skip
            codes = ()
            for f in tl.static_range(FIELDS):
                codes = codes + (_code_bits(fields[f], zeros[f], *divisors[f], SCALE_DTYPE),)
            _store_words(qdata_ptr, codes, first + at, word, at >= 0, word_ok, D, BITS, BLOCK, FIELDS, WORDS)
    else:
        row_ok = part * TOKENS + token < tile
        at = tl.minimum(token, tile - 1 - part * TOKENS)
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
                    x = tl.fma(fields[f], factor, fields[f])
                    low = tl.minimum(low, x)
                    high = tl.maximum(high, x)
            step, zero = _range_to_scale(tl.min(low, 1), tl.max(high, 1), BITS, SCALE_DTYPE)
            group_at = (first + token) * (D // GROUP) + g
            tl.store(scale_ptr + group_at, step.to(scale_ptr.dtype.element_ty), mask=row_ok)
            tl.store(zero_ptr + group_at, zero.to(zero_ptr.dtype.element_ty), mask=row_ok)
            zeros = zeros + (zero[:, None],)
            divisors = divisors + (_divisor(step[:, None], BITS, SCALE_DTYPE),)
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
        _store_words(qdata_ptr, codes, first + token, word, row_ok, word_ok, D, BITS, BLOCK, FIELDS, WORDS)


ALL_TILES = tl.constexpr(0)
RING_TILES = tl.constexpr(1)
"""Tiles of which some tokens are in the ring."""
FRESH_TILES = tl.constexpr(2)
"""Tiles of new tokens alone."""


@triton.jit
def _append_one(
    new_ptr, qdata_ptr, scale_ptr, zero_ptr, residual_ptr, valid_ptr,
    new_sb, new_sh, new_sl, qdata_sb, qdata_sh, scale_sb, scale_sh, residual_sb, residual_sh,
    valid_sb, valid_ss, hidden_below, batch, heads, live, count, tile, sink, window, ring, parts,
    BITS: tl.constexpr, AXIS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    DP: tl.constexpr, SCALE_DTYPE: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr, WORDS_P: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, VALID: tl.constexpr, FLUSH: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """This program's share of one tensor: parts of the tiles that are due, and rows of new tokens."""
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
                new_ptr + b * new_sb + h * new_sh, new_sl, qdata_ptr + b * qdata_sb + h * qdata_sh,
                scale_ptr + b * scale_sb + h * scale_sh, zero_ptr + b * scale_sb + h * scale_sh,
                residual_ptr + b * residual_sb + h * residual_sh, valid_ptr + b * valid_sb, valid_ss, hidden_below,
                old + job % jobs // parts, job % parts, due * tile, live, tile, sink, ring,
                BITS, AXIS, GROUP, D, BLOCK, SCALE_DTYPE, FIELDS, WORDS, WORDS_P, TOKENS, VALID, FLUSH != FRESH_TILES,
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
            target = b * residual_sb + h * residual_sh + slot.to(tl.int64) * D
            x = tl.load(new_ptr + source[:, None] + channel[None, :], mask=ok, other=0.0)
            tl.store(
                residual_ptr + target[:, None] + channel[None, :],
                x.to(residual_ptr.dtype.element_ty),
                mask=ok,
            )


@triton.jit(
    do_not_specialize=[
        "batch", "heads", "count", "length", "k_tile", "k_sink", "k_window", "k_ring", "k_parts",
        "v_tile", "v_sink", "v_window", "v_ring", "v_parts",
    ]
)  # fmt: skip
def append_kernel(
    keys_ptr, values_ptr, k_qdata_ptr, k_scale_ptr, k_zero_ptr, k_residual_ptr,
    v_qdata_ptr, v_scale_ptr, v_zero_ptr, v_residual_ptr, valid_ptr, start_ptr,
    keys_sb, keys_sh, keys_sl, values_sb, values_sh, values_sl,
    k_qdata_sb, k_qdata_sh, k_scale_sb, k_scale_sh, k_residual_sb, k_residual_sh,
    v_qdata_sb, v_qdata_sh, v_scale_sb, v_scale_sh, v_residual_sb, v_residual_sh,
    valid_sb, valid_ss, hidden_below, batch, heads, count, length,
    k_tile, k_sink, k_window, k_ring, k_parts, v_tile, v_sink, v_window, v_ring, v_parts,
    ON_DEVICE: tl.constexpr, VALID: tl.constexpr, FLUSH: tl.constexpr, WRITE: tl.constexpr,
    K_BITS: tl.constexpr, K_AXIS: tl.constexpr, K_GROUP: tl.constexpr, D: tl.constexpr, K_BLOCK: tl.constexpr,
    DP: tl.constexpr, K_SCALE: tl.constexpr, K_FIELDS: tl.constexpr, K_WORDS: tl.constexpr, K_WORDS_P: tl.constexpr,
    K_TOKENS: tl.constexpr, K_ROWS: tl.constexpr,
    V_BITS: tl.constexpr, V_AXIS: tl.constexpr, V_GROUP: tl.constexpr, DV: tl.constexpr, V_BLOCK: tl.constexpr,
    DVP: tl.constexpr, V_SCALE: tl.constexpr, V_FIELDS: tl.constexpr, V_WORDS: tl.constexpr, V_WORDS_P: tl.constexpr,
    V_TOKENS: tl.constexpr, V_ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Append `count` tokens to keys and values and flush what left the window.

    Grid: as many programs as fill the GPU; most steps of one token flush nothing and are over at once. With
    `start` on the device a step that would pass the capacity `length` writes nothing. EARLY: started
    before the kernel ahead ends, it waits for it, and lets the next one do the same.
    """
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
            keys_ptr, k_qdata_ptr, k_scale_ptr, k_zero_ptr, k_residual_ptr, valid_ptr,
            keys_sb, keys_sh, keys_sl, k_qdata_sb, k_qdata_sh, k_scale_sb, k_scale_sh,
            k_residual_sb, k_residual_sh, valid_sb, valid_ss, hidden_below,
            batch, heads, live, count, k_tile, k_sink, k_window, k_ring, k_parts,
            K_BITS, K_AXIS, K_GROUP, D, K_BLOCK, DP, K_SCALE, K_FIELDS, K_WORDS, K_WORDS_P, K_TOKENS, K_ROWS,
            VALID, FLUSH, WRITE,
        )  # fmt: skip
        _append_one(
            values_ptr, v_qdata_ptr, v_scale_ptr, v_zero_ptr, v_residual_ptr, valid_ptr,
            values_sb, values_sh, values_sl, v_qdata_sb, v_qdata_sh, v_scale_sb, v_scale_sh,
            v_residual_sb, v_residual_sh, valid_sb, valid_ss, hidden_below,
            batch, heads, live, count, v_tile, v_sink, v_window, v_ring, v_parts,
            V_BITS, V_AXIS, V_GROUP, DV, V_BLOCK, DVP, V_SCALE, V_FIELDS, V_WORDS, V_WORDS_P, V_TOKENS, V_ROWS,
            VALID, FLUSH, WRITE,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["heads", "count", "tiles", "slots", "tile", "sink", "window", "ring", "parts", "jobs"]
)
def pack_kernel(
    x_ptr, qdata_ptr, scale_ptr, zero_ptr, residual_ptr, valid_ptr,
    x_sb, x_sh, x_sl, valid_sb, valid_ss, hidden_below, heads, count, tiles, slots, tile, sink, window, ring, parts, jobs,
    VALID: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, AXIS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, DP: tl.constexpr, SCALE_DTYPE: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr,
    WORDS_P: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Fill the four buffers of one tensor from its tokens x; what holds no token becomes 0.

    Grid: jobs (parts of tiles, then blocks of residual slots), fastest, x heads x batch.
    """
    pid = tl.program_id(0)
    job = pid % jobs
    sequence = (pid // jobs // heads).to(tl.int64)
    at = (pid // jobs).to(tl.int64)
    x_ptr += sequence * x_sb + (at - sequence * heads) * x_sh
    end = packed_end_of(count, tile, sink, window)
    if BITS != RAW_BITS:
        if job < tiles * parts:
            if AXIS == 0:
                grid_rows = tiles * (tile // GROUP) * D
            else:
                grid_rows = tiles * tile * (D // GROUP)
            index = job // parts
            _flush(
                x_ptr, x_sl, qdata_ptr + at * tiles * tile * words_per_token(BITS, D),
                scale_ptr + at * grid_rows, zero_ptr + at * grid_rows, residual_ptr,
                valid_ptr + sequence * valid_sb, valid_ss, hidden_below, index, job % parts,
                end - sink, 0, tile, sink, ring,
                BITS, AXIS, GROUP, D, BLOCK, SCALE_DTYPE, FIELDS, WORDS, WORDS_P, TOKENS, VALID, False,
            )  # fmt: skip
    if job >= tiles * parts:
        slot = (job - tiles * parts) * ROWS + tl.arange(0, ROWS)
        channel = tl.arange(0, DP)
        if BITS == RAW_BITS:
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
        tl.store(
            residual_ptr + at * slots * D + slot[:, None] * D + channel[None, :],
            x.to(residual_ptr.dtype.element_ty),
            mask=ok,
        )
