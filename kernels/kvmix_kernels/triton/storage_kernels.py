"""Writing a cache: the step's tokens into the raw window, full tiles into packed storage.

The arithmetic is that of `reference.quantize`, in the same order and rounding, so codes, scales
and offsets are the same bits. One program handles one group of tokens (keys per channel) or one
block of tokens (values per token). The tokens are read from memory once: a second look at a group of
keys, after its range is known, hits the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmix_kernels.triton.fields import constexpr_function, packed_end_of, plane_first, words_per_token

FINITE_BELOW = tl.constexpr(float("inf"))
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
def _range_to_scale(low, high, BITS: tl.constexpr, SCALE_DTYPE: tl.constexpr):
    TOP: tl.constexpr = 2**BITS - 1
    LIMIT: tl.constexpr = (
        65504.0 if SCALE_DTYPE == 0 else 3.3895313892515355e38 if SCALE_DTYPE == 1 else 3.4028234663852886e38
    )
    empty = low > high
    low = tl.where(empty, 0.0, low)
    high = tl.where(empty, 0.0, high)
    top = tl.zeros_like(low) + TOP
    scale = tl.minimum(tl.div_rn(high, top) - tl.div_rn(low, top), LIMIT)
    zero = tl.minimum(tl.maximum(low, -LIMIT), LIMIT)
    return _stored(scale, SCALE_DTYPE), _stored(zero, SCALE_DTYPE)


@triton.jit
def _divisor(step):
    """(unit, step * unit, 1 / (step * unit)); the unit is a power of two that keeps all of it normal."""
    unit = tl.where(
        step < 8.7e-19, 1.8446744073709552e19, tl.where(step > 1.2e18, 5.421010862427522e-20, 1.0)
    )
    divisor = step * unit
    return unit, divisor, tl.div_rn(tl.zeros_like(step) + 1.0, divisor)


@triton.jit
def _code_bits(x, step, zero, unit, divisor, inverse, BITS: tl.constexpr):
    """Codes as the low bits of an int32.

    One correction step makes the product with the inverse the correctly rounded quotient
    (Markstein, IBM J. Res. Dev. 34, 1990), at a third of a division's cost.
    """
    TOP: tl.constexpr = 2**BITS - 1
    x = (x - zero) * unit
    # clamped well outside the codes: otherwise an infinite quotient would become a NaN below
    quotient = tl.minimum(tl.maximum(x * inverse, -4.0), 1024.0)
    quotient = tl.fma(tl.fma(-quotient, divisor + tl.zeros_like(x), x), inverse + tl.zeros_like(x), quotient)
    # a NaN compares false everywhere and ends as code 0
    quotient = tl.where(quotient > 0.0, quotient, 0.0)
    quotient = tl.where(step > 0.0, tl.minimum(quotient, TOP), 0.0)
    return (quotient + ROUNDER).to(tl.int32, bitcast=True) & TOP


@triton.jit
def _load_tokens(
    new_ptr, new_stride, residual_ptr, position, channel, ok, live, sink, ring, D: tl.constexpr,
    FROM_RING: tl.constexpr,
):  # fmt: skip
    """Tokens at `position` as float32, from the step's own or from the ring; both index tiles broadcast."""
    index = (position - live).to(tl.int64)
    if FROM_RING:
        fresh = position >= live
        x = tl.load(new_ptr + index * new_stride + channel, mask=ok & fresh, other=0.0).to(tl.float32)
        slot = sink + (position - sink) % ring
        old = tl.load(residual_ptr + slot * D + channel, mask=ok & (position < live), other=0.0)
        return tl.where(fresh, x, old.to(tl.float32))
    return tl.load(new_ptr + index * new_stride + channel, mask=ok, other=0.0).to(tl.float32)


@constexpr_function
def _meets(field, words, group, index):
    """Whether a field's channels and a group have any in common."""
    return field * words < (index + 1) * group and (field + 1) * words > index * group


@constexpr_function
def _lies_in(field, words, group, index):
    """Whether all of a field's channels are in a group."""
    return field * words >= index * group and (field + 1) * words <= (index + 1) * group


@triton.jit
def _store_words(
    qdata_ptr, low, even, odd, row, word, ok, D: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Store packed words; for 3 bits `low` is the narrow plane, `even` and `odd` the halves of the wide one."""
    TOTAL: tl.constexpr = words_per_token(BITS, D)
    at = row[:, None] * TOTAL + word[None, :]
    ok = ok[:, None] & (word < WORDS)[None, :]
    if BITS == 3:
        tl.store(qdata_ptr + at, even.to(tl.int16), mask=ok)
        tl.store(qdata_ptr + at + WORDS, odd.to(tl.int16), mask=ok)
        tl.store(qdata_ptr + at + plane_first(BITS, D, 1), low.to(tl.int16), mask=ok)
    else:
        tl.store(qdata_ptr + at, low.to(tl.int16), mask=ok)


@triton.jit
def _flush(
    new_ptr, new_stride, qdata_ptr, scale_ptr, zero_ptr, residual_ptr, valid_ptr, valid_stride, hidden_below,
    tile_index, part, rows_held, live, tile, sink, ring,
    BITS: tl.constexpr, AXIS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SCALE_DTYPE: tl.constexpr,
    FIELDS: tl.constexpr, WORDS: tl.constexpr, WORDS_P: tl.constexpr, TOKENS: tl.constexpr,
    VALID: tl.constexpr, FROM_RING: tl.constexpr,
):  # fmt: skip
    """Quantize and pack part `part` of a tile; zeros in rows from `rows_held` on.

    A part is a group of tokens for AXIS 0 and a block of TOKENS tokens for AXIS 1. A field is a tile
    [TOKENS, words]; all fields of a word are in one thread, so packing needs no exchange.
    """
    token = tl.arange(0, TOKENS)
    # two channels a thread: reductions over tokens then stay mostly within threads
    word = tl.max_contiguous(tl.arange(0, WORDS_P), 2)
    word_ok = word < WORDS
    if AXIS == 0:
        LANES: tl.constexpr = 16 if TOKENS > 16 else TOKENS
        first = tile_index * tile + part * GROUP
        lows = ()
        highs = ()
        for f in tl.static_range(FIELDS):
            lows = lows + (tl.zeros([LANES, WORDS_P], tl.float32) + float("inf"),)
            highs = highs + (tl.zeros([LANES, WORDS_P], tl.float32) - float("inf"),)
        for at in range(0, GROUP, TOKENS):
            row = first + at + token
            held = (at + token < GROUP) & (row < rows_held)
            seen = held
            if VALID != 0:
                entry = tl.load(valid_ptr + (sink + row) * valid_stride, mask=held, other=0)
                if VALID == 1:
                    seen = held & (entry != 0)
                else:
                    seen = held & (entry.to(tl.float32) > hidden_below)
            new_lows = ()
            new_highs = ()
            for f in tl.static_range(FIELDS):
                x = _load_tokens(
                    new_ptr, new_stride, residual_ptr, (sink + row)[:, None], (f * WORDS + word)[None, :],
                    held[:, None] & word_ok[None, :], live, sink, ring, D, FROM_RING,
                )  # fmt: skip
                usable = seen[:, None] & (tl.abs(x) < FINITE_BELOW)
                low = tl.reshape(tl.where(usable, x, float("inf")), [TOKENS // LANES, LANES, WORDS_P])
                high = tl.reshape(tl.where(usable, x, -float("inf")), [TOKENS // LANES, LANES, WORDS_P])
                new_lows = new_lows + (tl.minimum(lows[f], tl.min(low, 0)),)
                new_highs = new_highs + (tl.maximum(highs[f], tl.max(high, 0)),)
            lows = new_lows
            highs = new_highs
        steps = ()
        zeros = ()
        for f in tl.static_range(FIELDS):
            field_step, field_zero = _range_to_scale(
                tl.min(lows[f], 0), tl.max(highs[f], 0), BITS, SCALE_DTYPE
            )
            group_at = first // GROUP * D + f * WORDS + word
            tl.store(scale_ptr + group_at, field_step.to(scale_ptr.dtype.element_ty), mask=word_ok)
            tl.store(zero_ptr + group_at, field_zero.to(zero_ptr.dtype.element_ty), mask=word_ok)
            steps = steps + (field_step,)
            zeros = zeros + (field_zero,)
        for at in range(0, GROUP, TOKENS):
            row = first + at + token
            row_ok = at + token < GROUP
            held = row_ok & (row < rows_held)
            packed = tl.zeros([TOKENS, WORDS_P], tl.int32)
            even = tl.zeros([TOKENS, WORDS_P], tl.int32)
            odd = tl.zeros([TOKENS, WORDS_P], tl.int32)
            for f in tl.static_range(FIELDS):
                x = _load_tokens(
                    new_ptr, new_stride, residual_ptr, (sink + row)[:, None], (f * WORDS + word)[None, :],
                    held[:, None] & word_ok[None, :], live, sink, ring, D, FROM_RING,
                )  # fmt: skip
                unit, divisor, inverse = _divisor(steps[f])
                code = _code_bits(
                    x,
                    steps[f][None, :],
                    zeros[f][None, :],
                    unit[None, :],
                    divisor[None, :],
                    inverse[None, :],
                    BITS,
                )
                packed, even, odd = _add_field(packed, even, odd, code, f, BITS)
            _store_words(qdata_ptr, packed, even, odd, row, word, row_ok, D, BITS, WORDS)
    else:
        row_ok = part * TOKENS + token < tile
        row = tile_index * tile + part * TOKENS + token
        held = (row_ok & (row < rows_held))[:, None] & word_ok[None, :]
        xs = ()
        for f in tl.static_range(FIELDS):
            x = _load_tokens(
                new_ptr, new_stride, residual_ptr, (sink + row)[:, None], (f * WORDS + word)[None, :],
                held, live, sink, ring, D, FROM_RING,
            )  # fmt: skip
            xs = xs + (x,)
        steps = ()
        zeros = ()
        for g in tl.static_range(D // GROUP):
            low = tl.zeros([TOKENS, WORDS_P], tl.float32) + float("inf")
            high = tl.zeros([TOKENS, WORDS_P], tl.float32) - float("inf")
            for f in tl.static_range(FIELDS):
                if _meets(f, WORDS, GROUP, g):
                    usable = held & (tl.abs(xs[f]) < FINITE_BELOW)
                    if not _lies_in(f, WORDS, GROUP, g):
                        usable = usable & ((f * WORDS + word) // GROUP == g)[None, :]
                    low = tl.minimum(low, tl.where(usable, xs[f], float("inf")))
                    high = tl.maximum(high, tl.where(usable, xs[f], -float("inf")))
            group_step, group_zero = _range_to_scale(tl.min(low, 1), tl.max(high, 1), BITS, SCALE_DTYPE)
            group_at = row * (D // GROUP) + g
            tl.store(scale_ptr + group_at, group_step.to(scale_ptr.dtype.element_ty), mask=row_ok)
            tl.store(zero_ptr + group_at, group_zero.to(zero_ptr.dtype.element_ty), mask=row_ok)
            steps = steps + (group_step,)
            zeros = zeros + (group_zero,)
        packed = tl.zeros([TOKENS, WORDS_P], tl.int32)
        even = tl.zeros([TOKENS, WORDS_P], tl.int32)
        odd = tl.zeros([TOKENS, WORDS_P], tl.int32)
        for f in tl.static_range(FIELDS):
            field_code = tl.zeros([TOKENS, WORDS_P], tl.int32)
            for g in tl.static_range(D // GROUP):
                if _meets(f, WORDS, GROUP, g):
                    unit, divisor, inverse = _divisor(steps[g])
                    code = _code_bits(
                        xs[f], steps[g][:, None], zeros[g][:, None], unit[:, None], divisor[:, None],
                        inverse[:, None], BITS,
                    )  # fmt: skip
                    if _lies_in(f, WORDS, GROUP, g):
                        field_code = code
                    else:
                        field_code = tl.where(((f * WORDS + word) // GROUP == g)[None, :], code, field_code)
            packed, even, odd = _add_field(packed, even, odd, field_code, f, BITS)
        _store_words(qdata_ptr, packed, even, odd, row, word, row_ok, D, BITS, WORDS)


@triton.jit
def _add_field(packed, even, odd, code, FIELD: tl.constexpr, BITS: tl.constexpr):
    """Put a field's codes into the words. Fields 2i and 2i + 1 of the narrow plane are field i of the wide one."""
    if BITS == 3:
        packed += (code & 1) << FIELD
        if FIELD % 2 == 0:
            even += (code >> 1) << FIELD
        else:
            odd += (code >> 1) << (FIELD - 1)
    else:
        packed += code << (FIELD * BITS)
    return packed, even, odd


@triton.jit
def _append_one(
    new_ptr, qdata_ptr, scale_ptr, zero_ptr, residual_ptr, valid_ptr,
    new_sb, new_sh, new_sl, qdata_sb, qdata_sh, scale_sb, scale_sh, residual_sb, residual_sh,
    valid_sb, valid_ss, hidden_below, batch, heads, live, count, tile, sink, window, ring, parts,
    BITS: tl.constexpr, AXIS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    SCALE_DTYPE: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr, WORDS_P: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, VALID: tl.constexpr, FLUSH: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """This program's share of one tensor: parts of the tiles that are due, and rows of new tokens."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    end = live + count
    if FLUSH and BITS != 16:
        old = tl.maximum(live - sink - window, 0) // tile
        due = tl.maximum(end - sink - window, 0) // tile
        jobs = parts * (due - old)
        for job in range(pid, batch * heads * jobs, programs):
            b = (job // jobs // heads).to(tl.int64)
            h = (job // jobs % heads).to(tl.int64)
            _flush(
                new_ptr + b * new_sb + h * new_sh, new_sl, qdata_ptr + b * qdata_sb + h * qdata_sh,
                scale_ptr + b * scale_sb + h * scale_sh, zero_ptr + b * scale_sb + h * scale_sh,
                residual_ptr + b * residual_sb + h * residual_sh, valid_ptr + b * valid_sb, valid_ss, hidden_below,
                old + job % jobs // parts, job % parts, due * tile, live, tile, sink, ring,
                BITS, AXIS, GROUP, D, SCALE_DTYPE, FIELDS, WORDS, WORDS_P, TOKENS, VALID, True,
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
            if BITS == 16:
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
    K_BITS: tl.constexpr, K_AXIS: tl.constexpr, K_GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    K_SCALE: tl.constexpr, K_FIELDS: tl.constexpr, K_WORDS: tl.constexpr, K_WORDS_P: tl.constexpr,
    K_TOKENS: tl.constexpr, K_ROWS: tl.constexpr,
    V_BITS: tl.constexpr, V_AXIS: tl.constexpr, V_GROUP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    V_SCALE: tl.constexpr, V_FIELDS: tl.constexpr, V_WORDS: tl.constexpr, V_WORDS_P: tl.constexpr,
    V_TOKENS: tl.constexpr, V_ROWS: tl.constexpr,
):  # fmt: skip
    """Append `count` tokens to keys and values and flush what left the window.

    Grid: as many programs as fill the GPU once; most steps flush nothing and are over at once. With
    `start` on the device a step that would pass the capacity `length` writes nothing.
    """
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
            K_BITS, K_AXIS, K_GROUP, D, DP, K_SCALE, K_FIELDS, K_WORDS, K_WORDS_P, K_TOKENS, K_ROWS,
            VALID, FLUSH, WRITE,
        )  # fmt: skip
        _append_one(
            values_ptr, v_qdata_ptr, v_scale_ptr, v_zero_ptr, v_residual_ptr, valid_ptr,
            values_sb, values_sh, values_sl, v_qdata_sb, v_qdata_sh, v_scale_sb, v_scale_sh,
            v_residual_sb, v_residual_sh, valid_sb, valid_ss, hidden_below,
            batch, heads, live, count, v_tile, v_sink, v_window, v_ring, v_parts,
            V_BITS, V_AXIS, V_GROUP, DV, DVP, V_SCALE, V_FIELDS, V_WORDS, V_WORDS_P, V_TOKENS, V_ROWS,
            VALID, FLUSH, WRITE,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["heads", "count", "tiles", "slots", "tile", "sink", "window", "ring", "parts", "jobs"]
)
def pack_kernel(
    x_ptr, qdata_ptr, scale_ptr, zero_ptr, residual_ptr, valid_ptr,
    x_sb, x_sh, x_sl, valid_sb, valid_ss, hidden_below, heads, count, tiles, slots, tile, sink, window, ring, parts, jobs,
    VALID: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, AXIS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, SCALE_DTYPE: tl.constexpr, FIELDS: tl.constexpr, WORDS: tl.constexpr,
    WORDS_P: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Fill the four buffers of one tensor from its tokens x; what holds no token becomes 0.

    Grid: jobs (parts of tiles, then blocks of residual slots), fastest, x heads x batch.
    """
    pid = tl.program_id(0).to(tl.int64)
    job = (pid % jobs).to(tl.int32)
    at = pid // jobs
    x_ptr += at // heads * x_sb + at % heads * x_sh
    end = packed_end_of(count, tile, sink, window)
    if BITS != 16:
        if job < tiles * parts:
            if AXIS == 0:
                grid_rows = tiles * (tile // GROUP) * D
            else:
                grid_rows = tiles * tile * (D // GROUP)
            index = job // parts
            _flush(
                x_ptr, x_sl, qdata_ptr + at * tiles * tile * words_per_token(BITS, D),
                scale_ptr + at * grid_rows, zero_ptr + at * grid_rows, residual_ptr,
                valid_ptr + at // heads * valid_sb, valid_ss, hidden_below, index, job % parts,
                end - sink, 0, tile, sink, ring,
                BITS, AXIS, GROUP, D, SCALE_DTYPE, FIELDS, WORDS, WORDS_P, TOKENS, VALID, False,
            )  # fmt: skip
    if job >= tiles * parts:
        slot = (job - tiles * parts) * ROWS + tl.arange(0, ROWS)
        channel = tl.arange(0, DP)
        if BITS == 16:
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
