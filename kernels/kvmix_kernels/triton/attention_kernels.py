"""Split-KV attention over the segments of a cache, as Triton kernels.

A row of the score tile is a token and a column is one query row of one query head; the query
heads of a group share every load. Each program yields a partial output with its running maximum
and sum for one share of the tokens; `combine_kernel` merges them.

Two kinds of program run in one launch:

*bulk*   tokens packed in both tensors, keys with one scale per channel, values with scales per
         token. Codes go to the tensor cores as they lie (see `fields.field`). Scales multiply the
         query (once per group of tokens) and the probabilities, offsets become one number per
         group and per token. Everything is normalized, so half precision can not overflow.
*rest*   anything else: sink, recent window, the step's own tokens, and all tokens of formats
         that have no bulk path. Reads each token wherever it lies.

The number of tokens may live on the device; programs share the live tokens evenly.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvmix_kernels.triton.fields import (
    field,
    field_end,
    field_factor,
    field_first,
    field_sum,
    fold,
    fold_channels,
    fold_copies,
    fold_fields,
    fold_width,
    next_power_of_2,
    packed_end_of,
    plane_words,
    stored_values,
    word_at,
    words_per_token,
)

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Start of a running maximum. Finite, so that a row that attends to nothing has weights of 0."""

TINY = tl.constexpr(1e-30)

PEAK = tl.constexpr(16384.0)
"""Largest half-precision operand after normalization."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

MAX_LOOK = tl.constexpr(128)
"""Numbers that a program reads at a time before its loop, for each group of PART."""


@triton.jit
def _exp(x, MASK: tl.constexpr):
    # an additive mask may hold the lowest finite number, which must not be scaled: scores then
    # stay in natural units, otherwise they are in units of log 2
    if MASK == 2:
        x = x * LOG2E
    return tl.exp2(x)


@triton.jit
def _capped(score, cap):
    """cap * tanh(score / cap), for a cap in the units of the scores."""
    # of a large score the exponential is infinite, and what remains of the fraction is 0
    return cap - 2.0 * cap / (1.0 + tl.exp2(score * (2.0 * LOG2E / cap)))


@triton.jit
def _masked_scores(
    score, mask_ptr, mask_at, mask_stride, position, ok, column_ok, MASK: tl.constexpr, SHARED: tl.constexpr
):
    """Scores [tokens, columns] under the mask. SHARED: all columns have the same mask.

    `position` and `ok` are [tokens]; `mask_at` is the offset of each column from the first.
    """
    if MASK == 0:
        return tl.where(ok[:, None], score, -float("inf"))
    # a shared mask is loaded as a vector: the compiler then moves the mask to where the scores are, not the
    # scores to where a tile of the mask is
    if SHARED:
        entry_ptr = mask_ptr + position.to(tl.int64) * mask_stride
    else:
        # one number an entry instead of two for an address
        entry_ptr = mask_ptr + ((position * mask_stride)[:, None] + mask_at[None, :])
        ok = ok[:, None] & column_ok[None, :]
    if MASK == 1:
        seen = tl.load(entry_ptr, mask=ok, other=0) != 0
        if SHARED:
            seen = seen[:, None]
        return tl.where(seen, score, -float("inf"))
    added = tl.load(entry_ptr, mask=ok, other=0.0).to(tl.float32)
    if SHARED:
        added = added[:, None]
        ok = ok[:, None]
    return tl.where(ok, score + added, -float("inf"))


@triton.jit
def _reach(mask_ptr, mask_stride, first_position, tokens, MASK: tl.constexpr, LOOK: tl.constexpr):
    """(how many tokens from the first are hidden, up to where the mask changes anything) of a shared mask."""
    unseen = tokens
    changed = tokens * 0
    for part in tl.range(0, tokens, LOOK, num_stages=1):
        token = part + tl.arange(0, LOOK)
        entry_ptr = mask_ptr + (first_position + token).to(tl.int64) * mask_stride
        # behind the last token, what changes nothing
        if MASK == 1:
            entry = tl.load(entry_ptr, mask=token < tokens, other=1)
            seen = entry != 0
            plain = seen
        else:
            entry = tl.load(entry_ptr, mask=token < tokens, other=0.0)
            seen = entry != -float("inf")
            plain = entry == 0
        unseen = tl.minimum(unseen, tl.min(tl.where(seen, token, tokens), 0))
        changed = tl.maximum(changed, tl.max(tl.where(plain, 0, token + 1), 0))
    return unseen, changed


@triton.jit
def _load_words(
    base_ptr,
    first,
    token,
    column,
    BITS: tl.constexpr,
    D: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """A plane's words at broadcastable indices, folded copies side by side but not yet shifted.

    `token` counts from row `first`, a multiple of ALIGN.
    """
    WORDS: tl.constexpr = plane_words(BITS, D, PLANE)
    COPIES: tl.constexpr = fold_copies(BITS, D, PLANE)
    word = column
    if COPIES > 1:
        # two threads of a copy that read the same 16 bytes are slow; pieces of 8 go through L1, which serves both
        PIECE: tl.constexpr = min(4, WORDS & -WORDS)
        if column.shape[0] == 1:
            word = tl.max_contiguous(column % WORDS, [1, PIECE])
        else:
            word = tl.max_contiguous(column % WORDS, [PIECE, 1])
    if ALIGN % BLOCK == 0:
        # places from the first are the same in every step
        base_ptr += first * words_per_token(BITS, D)
        at = word_at(token, BITS, D, PLANE, BLOCK) + word
    else:
        at = word_at(first + token, BITS, D, PLANE, BLOCK) + word
    if fold_width(BITS, D) == WORDS * COPIES:
        return tl.load(base_ptr + at)
    return tl.load(base_ptr + at, mask=(token >= 0) & (column < WORDS * COPIES), other=0)


@triton.jit
def _sweep(
    k_qdata_ptr,
    k_scale_ptr,
    v_qdata_ptr,
    v_scale_ptr,
    v_zero_ptr,
    mask_ptr,
    shifts_ptr,
    mask_at,
    mask_stride,
    column_ok,
    first_position,
    first_k_row,
    first_v_row,
    begin,
    steps,
    queries,
    offset_ptr,
    restore,
    headroom,
    cap,
    k_unit,
    v_unit,
    top,
    total,
    shifts,
    outs,
    K_BITS: tl.constexpr,
    K_GROUP: tl.constexpr,
    D: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BITS: tl.constexpr,
    V_GROUP: tl.constexpr,
    DV: tl.constexpr,
    V_BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    MASKED: tl.constexpr,
    MASK_SHARED: tl.constexpr,
    CAPPED: tl.constexpr,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    SPREAD: tl.constexpr,
    V_ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """`steps` steps of TOKENS tokens from group `begin` of the share; returns (top, total, shifts, outs) after them.

    MASKED: whether the mask is read; if not, it must change nothing in these steps. SPREAD: over how many sets
    of columns the groups of a step are spread; each has the queries once, sees its group alone and is summed
    up by itself. A step has as many groups or one.
    """
    KF: tl.constexpr = fold_fields(K_BITS, D)
    KC: tl.constexpr = fold_channels(K_BITS, D)
    KW: tl.constexpr = fold_width(K_BITS, D)
    VF: tl.constexpr = fold_fields(V_BITS, DV)
    VW: tl.constexpr = fold_width(V_BITS, DV)
    VG: tl.constexpr = DV // V_GROUP
    STEPS: tl.constexpr = max(1, K_GROUP // TOKENS)
    SLOTS: tl.constexpr = max(1, TOKENS // K_GROUP)
    # rows that a step may begin with are multiples of it
    K_ALIGN: tl.constexpr = min(TOKENS, K_GROUP)
    ALIGN: tl.constexpr = min(K_ALIGN, V_ALIGN)
    K_HALF: tl.constexpr = k_scale_ptr.dtype.element_ty == tl.float16
    V_HALF: tl.constexpr = v_scale_ptr.dtype.element_ty == tl.float16
    k_column = tl.arange(0, KW)
    v_column = tl.arange(0, VW)
    token = tl.arange(0, TOKENS)
    k_column_ok = k_column < KC
    first_group = first_k_row // K_GROUP
    column = tl.arange(0, N)
    slot = column // (N // SPREAD)
    own = (token // K_GROUP)[:, None] == slot[None, :]

    k_shift = tl.load(shifts_ptr + k_column[None, :])
    k_low_shift = tl.load(shifts_ptr + KW + k_column[None, :])
    v_shift = tl.load(shifts_ptr + 2 * KW + v_column[:, None])
    v_low_shift = tl.load(shifts_ptr + 2 * KW + VW + v_column[:, None])

    for i in tl.range(0, steps, num_stages=STAGES):
        step_group = begin + i // STEPS * SLOTS
        first = begin * K_GROUP + i * TOKENS
        k_first = first_k_row + first
        v_first = first_v_row + first
        v_row = v_first + token
        k_word = _load_words(
            k_qdata_ptr, k_first, token[:, None], k_column[None, :], K_BITS, D, 0, K_BLOCK, K_ALIGN
        )
        k_low = k_word
        if K_BITS == 3:
            k_low = _load_words(
                k_qdata_ptr, k_first, token[:, None], k_column[None, :], K_BITS, D, 1, K_BLOCK, K_ALIGN
            )
        v_word = _load_words(
            v_qdata_ptr, v_first, token[None, :], v_column[:, None], V_BITS, DV, 0, V_BLOCK, ALIGN
        )
        v_low = v_word
        if V_BITS == 3:
            v_low = _load_words(
                v_qdata_ptr, v_first, token[None, :], v_column[:, None], V_BITS, DV, 1, V_BLOCK, ALIGN
            )
        # of each column, if the columns have several groups
        if SPREAD > 1:
            own_group = step_group + tl.minimum(slot, SLOTS - 1)
            step_ptr = k_scale_ptr + (first_group + own_group)[None, :] * D + k_column[:, None]
        else:
            step_ptr = k_scale_ptr + (first_group + step_group) * D + k_column[:, None]

        # scores
        k_word = fold(k_word, k_shift, K_BITS, D, 0, PORTABLE)
        if K_BITS == 3:
            k_low = fold(k_low, k_low_shift, K_BITS, D, 1, PORTABLE)
        score = tl.zeros([TOKENS, N], tl.float32)
        for f in tl.static_range(KF):
            if KC == KW:
                step = tl.load(step_ptr + f * KC)
            else:
                step = tl.load(step_ptr + f * KC, mask=k_column_ok[:, None], other=0.0)
            if not K_HALF:
                step = (step.to(tl.float32) * k_unit).to(tl.float16)
            score = tl.dot(field(k_word, k_low, f, K_BITS, D, PORTABLE), queries[f] * step, score)
        if SPREAD > 1:
            offset = tl.load(offset_ptr + own_group * N + column)
        else:
            offset = tl.load(offset_ptr + step_group * N + column)

        # online softmax
        if MASK != 2 and not CAPPED:
            if MASKED:
                # what is hidden stays at minus infinity: `restore` is positive
                score = _masked_scores(
                    score, mask_ptr, mask_at, mask_stride, first_position + first + token, token >= 0, column_ok,
                    MASK, MASK_SHARED,
                )  # fmt: skip
            if SPREAD > 1:
                score = tl.where(own, score, -float("inf"))
            new_top = tl.maximum(top, tl.max(score, 0) * restore + (offset - headroom))
            weight = tl.exp2(score * restore[None, :] + (offset - new_top)[None, :])
        else:
            score = score * restore[None, :] + offset[None, :]
            if CAPPED:
                score = _capped(score, cap)
            if MASKED:
                score = _masked_scores(
                    score, mask_ptr, mask_at, mask_stride, first_position + first + token, token >= 0, column_ok,
                    MASK, MASK_SHARED,
                )  # fmt: skip
            if SPREAD > 1:
                score = tl.where(own, score, -float("inf"))
            new_top = tl.maximum(top, tl.max(score, 0) - headroom)
            weight = _exp(score - new_top[None, :], MASK)
        fade = _exp(top - new_top, MASK)
        top = new_top
        # sums over tokens stay apart by the token's place among 8: no exchange between threads
        total = total * fade[None, :] + tl.sum(tl.reshape(weight, [TOKENS // 8, 8, N]), 0)

        v_word = fold(v_word, v_shift, V_BITS, DV, 0, PORTABLE)
        if V_BITS == 3:
            v_low = fold(v_low, v_low_shift, V_BITS, DV, 1, PORTABLE)
        half = weight.to(tl.float16)
        new_shifts = ()
        scaled = ()
        for g in tl.static_range(VG):
            v_step = tl.load(v_scale_ptr + v_row * VG + g)
            if not V_HALF:
                v_step = (v_step.to(tl.float32) * v_unit).to(tl.float16)
            v_zero = tl.load(v_zero_ptr + v_row * VG + g).to(tl.float32)
            shift = tl.sum(tl.reshape(weight * v_zero[:, None], [TOKENS // 8, 8, N]), 0)
            new_shifts = new_shifts + (shifts[g] * fade[None, :] + shift,)
            scaled = scaled + (half * v_step[:, None],)
        shifts = new_shifts
        new_outs = ()
        for f in tl.static_range(VF):
            tile = field(v_word, v_low, f, V_BITS, DV, PORTABLE)
            for g in tl.static_range(field_first(V_BITS, DV, V_GROUP, f), field_end(V_BITS, DV, V_GROUP, f)):
                out = outs[field_sum(V_BITS, DV, V_GROUP, f, g)] * fade[None, :]
                new_outs = new_outs + (tl.dot(tile, scaled[g], out),)
        outs = new_outs
    return top, total, shifts, outs


@triton.jit
def _bulk(
    query_ptr,
    k_qdata_ptr,
    k_scale_ptr,
    k_zero_ptr,
    v_qdata_ptr,
    v_scale_ptr,
    v_zero_ptr,
    mask_ptr,
    shifts_ptr,
    offset_ptr,
    partial_ptr,
    stats_ptr,
    query_at,
    mask_at,
    mask_stride,
    column_ok,
    first_position,
    first_k_row,
    first_v_row,
    groups,
    scale,
    cap,
    K_BITS: tl.constexpr,
    K_GROUP: tl.constexpr,
    D: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BITS: tl.constexpr,
    V_GROUP: tl.constexpr,
    DV: tl.constexpr,
    V_BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    MASK_SHARED: tl.constexpr,
    CAPPED: tl.constexpr,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    SPREAD: tl.constexpr,
    PART: tl.constexpr,
    SINGLE: tl.constexpr,
    V_ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """One share of the packed tokens: `groups` groups of K_GROUP tokens; at `offset_ptr` is room for N numbers of each.

    PART: groups whose offsets are multiplied with the queries at a time. SINGLE: no share has more.
    """
    KF: tl.constexpr = fold_fields(K_BITS, D)
    KC: tl.constexpr = fold_channels(K_BITS, D)
    KW: tl.constexpr = fold_width(K_BITS, D)
    VF: tl.constexpr = fold_fields(V_BITS, DV)
    VC: tl.constexpr = fold_channels(V_BITS, DV)
    VW: tl.constexpr = fold_width(V_BITS, DV)
    VG: tl.constexpr = DV // V_GROUP
    # tells the compiler that rows can be copied in wide pieces, and how those of a block lie
    first_k_row = first_k_row // K_GROUP * K_GROUP
    first_v_row = first_v_row // V_ALIGN * V_ALIGN

    k_column = tl.arange(0, KW)
    v_column = tl.arange(0, VW)
    k_column_ok = k_column < KC
    first_group = first_k_row // K_GROUP

    # over all groups of the share: the largest scales and q . offset, which is kept in memory: in registers,
    # small groups would spill
    largest = tl.zeros([N], tl.float32) + TINY
    largest_k = tl.zeros([PART, KW], tl.float32)
    # a loop of one turn is none: what is read at first is then on its way together
    for part in tl.range(0, PART if SINGLE else groups, PART, num_stages=1):
        group = part + tl.arange(0, PART)
        offsets = tl.zeros([PART, N], tl.float32)
        for f in tl.static_range(KF):
            q = tl.load(
                query_ptr + query_at[None, :] + f * KC + k_column[:, None],
                mask=column_ok[None, :] & k_column_ok[:, None],
                other=0.0,
            ).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(q), 0))
            at = (first_group + group)[:, None] * D + f * KC + k_column[None, :]
            at_ok = (group < groups)[:, None] & k_column_ok[None, :]
            k_steps = tl.load(k_scale_ptr + at, mask=at_ok, other=0.0)
            largest_k = tl.maximum(largest_k, k_steps.to(tl.float32))
            zero = tl.load(k_zero_ptr + at, mask=at_ok, other=0.0).to(tl.float32)
            offsets = tl.dot(zero, q, offsets, input_precision=PRECISION)
        tl.store(offset_ptr + group[:, None] * N + tl.arange(0, N)[None, :], offsets * scale)
    tl.debug_barrier()
    LOOK: tl.constexpr = PART * min(MAX_LOOK, K_GROUP * next_power_of_2(VG))
    v_top = TINY
    for part in tl.range(
        0, LOOK if SINGLE and K_GROUP * VG <= MAX_LOOK else groups * K_GROUP * VG, LOOK, num_stages=1
    ):
        place = part + tl.arange(0, LOOK)
        v_steps = tl.load(
            v_scale_ptr + first_v_row * VG + place, mask=place < groups * K_GROUP * VG, other=0.0
        )
        v_top = tl.maximum(v_top, tl.max(v_steps.to(tl.float32), 0))
    k_top = tl.maximum(tl.max(tl.max(largest_k, 1), 0), TINY)

    # half-precision scales are used as they are; wider ones may not fit and are divided by the largest
    K_HALF: tl.constexpr = k_scale_ptr.dtype.element_ty == tl.float16
    V_HALF: tl.constexpr = v_scale_ptr.dtype.element_ty == tl.float16
    k_unit = 1.0 / k_top
    v_unit = 1.0 / v_top
    # the largest product of query (or probability) and scale is PEAK, or below it for small scales
    k_peak = tl.minimum(PEAK * k_unit, PEAK) if K_HALF else PEAK
    v_peak = tl.minimum(PEAK * v_unit, PEAK) if V_HALF else PEAK
    shrink = k_peak / largest
    queries = ()
    for f in tl.static_range(KF):
        q = tl.load(
            query_ptr + query_at[None, :] + f * KC + k_column[:, None],
            mask=column_ok[None, :] & k_column_ok[:, None],
            other=0.0,
        ).to(tl.float32)
        queries = queries + ((q * shrink[None, :] * field_factor(K_BITS, D, f)).to(tl.float16),)
    # undoes 2**-24 of the subnormals and the peak
    restore = largest * (scale * 16777216.0 / k_peak)
    if not K_HALF:
        restore = restore * k_top
    # probabilities are exp(score - top) with top so far below the running maximum that they peak at v_peak
    headroom = tl.log2(v_peak)
    if MASK == 2:
        headroom = headroom * LN2

    top = tl.zeros([N], tl.float32) + LOWEST
    total = tl.zeros([8, N], tl.float32)
    shifts = ()
    for g in tl.static_range(VG):
        shifts = shifts + (tl.zeros([8, N], tl.float32),)
    # a field that has channels of several groups is summed up with the scales of each
    outs = ()
    for f in tl.static_range(field_sum(V_BITS, DV, V_GROUP, VF, VG)):
        outs = outs + (tl.zeros([VW, N], tl.float32),)

    # groups that no query sees are left out, the mask is read up to the last token that it changes
    skipped = 0
    masked = 0
    if MASK != 0:
        masked = groups
        if MASK_SHARED:
            unseen, changed = _reach(
                mask_ptr, mask_stride, first_position, groups * K_GROUP, MASK, PART * min(MAX_LOOK // 2, K_GROUP)
            )  # fmt: skip
            skipped = unseen // K_GROUP
            masked = tl.maximum((changed + K_GROUP - 1) // K_GROUP, skipped)
    STEPS: tl.constexpr = max(1, K_GROUP // TOKENS)
    full = (groups - skipped) // SPREAD
    if MASK != 0:
        masked = tl.minimum((masked - skipped + SPREAD - 1) // SPREAD, full)
        top, total, shifts, outs = _sweep(
            k_qdata_ptr, k_scale_ptr, v_qdata_ptr, v_scale_ptr, v_zero_ptr, mask_ptr, shifts_ptr, mask_at,
            mask_stride, column_ok, first_position, first_k_row, first_v_row, skipped, masked * STEPS,
            queries, offset_ptr, restore, headroom, cap, k_unit, v_unit, top, total, shifts, outs,
            K_BITS, K_GROUP, D, K_BLOCK, V_BITS, V_GROUP, DV, V_BLOCK, MASK, True, MASK_SHARED, CAPPED, N, TOKENS, SPREAD,
            V_ALIGN, STAGES, PORTABLE,
        )  # fmt: skip
    if MASK == 0 or MASK_SHARED:
        top, total, shifts, outs = _sweep(
            k_qdata_ptr, k_scale_ptr, v_qdata_ptr, v_scale_ptr, v_zero_ptr, mask_ptr, shifts_ptr, mask_at,
            mask_stride, column_ok, first_position, first_k_row, first_v_row, skipped + masked * SPREAD,
            (full - masked) * STEPS,
            queries, offset_ptr, restore, headroom, cap, k_unit, v_unit, top, total, shifts, outs,
            K_BITS, K_GROUP, D, K_BLOCK, V_BITS, V_GROUP, DV, V_BLOCK, MASK, False, MASK_SHARED, CAPPED, N, TOKENS, SPREAD,
            V_ALIGN, STAGES, PORTABLE,
        )  # fmt: skip
    if SPREAD > 1:
        # groups that do not fill a step
        top, total, shifts, outs = _sweep(
            k_qdata_ptr, k_scale_ptr, v_qdata_ptr, v_scale_ptr, v_zero_ptr, mask_ptr, shifts_ptr, mask_at,
            mask_stride, column_ok, first_position, first_k_row, first_v_row, skipped + full * SPREAD,
            groups - skipped - full * SPREAD,
            queries, offset_ptr, restore, headroom, cap, k_unit, v_unit, top, total, shifts, outs,
            K_BITS, K_GROUP, D, K_BLOCK, V_BITS, V_GROUP, DV, V_BLOCK, MASK, MASK != 0, MASK_SHARED, CAPPED, N, K_GROUP, SPREAD,
            V_ALIGN, 1, PORTABLE,
        )  # fmt: skip

    ROWS: tl.constexpr = N // SPREAD
    row = tl.arange(0, ROWS)
    sums = tl.sum(total, 0)
    if SPREAD > 1:
        whole_top = tl.max(tl.reshape(top, [SPREAD, ROWS]), 0)
        share = _exp(tl.reshape(top, [SPREAD, ROWS]) - whole_top[None, :], MASK)
        sums = tl.sum(tl.reshape(sums, [SPREAD, ROWS]) * share, 0)
        share = tl.reshape(share, [N])
        top = whole_top
    unit = 16777216.0
    if not V_HALF:
        unit = unit * v_top
    for f in tl.static_range(VF):
        for g in tl.static_range(field_first(V_BITS, DV, V_GROUP, f), field_end(V_BITS, DV, V_GROUP, f)):
            summed = outs[field_sum(V_BITS, DV, V_GROUP, f, g)] * (unit * field_factor(V_BITS, DV, f))
            summed += tl.sum(shifts[g], 0)[None, :]
            if g == field_first(V_BITS, DV, V_GROUP, f):
                out = summed
            else:
                out = tl.where((f * VC + v_column < g * V_GROUP)[:, None], out, summed)
        if SPREAD > 1:
            out = tl.sum(tl.reshape(out * share[None, :], [VW, SPREAD, ROWS]), 1)
            ok = (v_column < VC)[:, None]
        else:
            ok = (v_column < VC)[:, None] & column_ok[None, :]
        tl.store(partial_ptr + row[None, :] * DV + f * VC + v_column[:, None], out, mask=ok)
    tl.store(stats_ptr + row, top)
    tl.store(stats_ptr + N + row, sums)


@triton.jit
def _rest(
    query_ptr,
    new_k_ptr,
    new_v_ptr,
    k_qdata_ptr,
    k_scale_ptr,
    k_zero_ptr,
    k_residual_ptr,
    v_qdata_ptr,
    v_scale_ptr,
    v_zero_ptr,
    v_residual_ptr,
    mask_ptr,
    partial_ptr,
    stats_ptr,
    query_at,
    mask_at,
    mask_stride,
    column_ok,
    new_k_stride,
    new_v_stride,
    begin,
    end,
    gap_at,
    gap,
    live,
    k_end,
    k_sink,
    k_ring,
    v_end,
    v_sink,
    v_ring,
    scale,
    cap,
    K_BITS: tl.constexpr,
    K_AXIS: tl.constexpr,
    K_GROUP: tl.constexpr,
    D: tl.constexpr,
    K_BLOCK: tl.constexpr,
    DP: tl.constexpr,
    V_BITS: tl.constexpr,
    V_AXIS: tl.constexpr,
    V_GROUP: tl.constexpr,
    DV: tl.constexpr,
    V_BLOCK: tl.constexpr,
    DVP: tl.constexpr,
    NEW: tl.constexpr,
    PACKED: tl.constexpr,
    MASK: tl.constexpr,
    MASK_SHARED: tl.constexpr,
    CAPPED: tl.constexpr,
    N: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tokens begin..end-1 of those outside the bulk; token i is at position i, or i + gap behind gap_at."""
    channel = tl.arange(0, DP)
    v_channel = tl.arange(0, DVP)
    token = tl.arange(0, TOKENS)
    q = tl.load(
        query_ptr + query_at[None, :] + channel[:, None],
        mask=column_ok[None, :] & (channel < D)[:, None],
        other=0.0,
    ).to(DTYPE)
    top = tl.zeros([N], tl.float32) + LOWEST
    total = tl.zeros([N], tl.float32)
    out = tl.zeros([DVP, N], tl.float32)
    for first in tl.range(begin, end, TOKENS, num_stages=STAGES):
        index = first + token
        ok = index < end
        position = tl.where(index < gap_at, index, index + gap)
        k = stored_values(
            k_qdata_ptr, k_scale_ptr, k_zero_ptr, k_residual_ptr, new_k_ptr, new_k_stride,
            position[:, None], channel[None, :], ok[:, None] & (channel < D)[None, :],
            live, k_end, k_sink, k_ring, K_BITS, K_AXIS, K_GROUP, D, K_BLOCK, NEW, PACKED, DTYPE,
        )  # fmt: skip
        v = stored_values(
            v_qdata_ptr, v_scale_ptr, v_zero_ptr, v_residual_ptr, new_v_ptr, new_v_stride,
            position[None, :], v_channel[:, None], ok[None, :] & (v_channel < DV)[:, None],
            live, v_end, v_sink, v_ring, V_BITS, V_AXIS, V_GROUP, DV, V_BLOCK, NEW, PACKED, DTYPE,
        )  # fmt: skip
        score = tl.dot(k, q, input_precision=PRECISION) * scale
        if CAPPED:
            score = _capped(score, cap)
        score = _masked_scores(
            score,
            mask_ptr,
            mask_at,
            mask_stride,
            position,
            ok,
            column_ok,
            MASK,
            MASK_SHARED,
        )
        new_top = tl.maximum(top, tl.max(score, 0))
        fade = _exp(top - new_top, MASK)
        weight = _exp(score - new_top[None, :], MASK)
        total = total * fade + tl.sum(weight, 0)
        top = new_top
        out = tl.dot(v, weight.to(DTYPE), out * fade[None, :], input_precision=PRECISION)
    column = tl.arange(0, N)
    tl.store(
        partial_ptr + column[None, :] * DV + v_channel[:, None],
        out,
        mask=(v_channel < DV)[:, None] & column_ok[None, :],
    )
    tl.store(stats_ptr + column, top)
    tl.store(stats_ptr + N + column, total)


@triton.jit(
    do_not_specialize=[
        "length", "new_count", "rows", "query_length", "k_tile", "k_sink", "k_window", "k_ring",
        "v_tile", "v_sink", "v_window", "v_ring", "bulk_splits", "splits", "column_blocks", "kv_heads",
    ]
)  # fmt: skip
def attend_kernel(
    query_ptr,
    new_k_ptr,
    new_v_ptr,
    k_qdata_ptr,
    k_scale_ptr,
    k_zero_ptr,
    k_residual_ptr,
    v_qdata_ptr,
    v_scale_ptr,
    v_zero_ptr,
    v_residual_ptr,
    mask_ptr,
    start_ptr,
    shifts_ptr,
    offset_ptr,
    partial_ptr,
    stats_ptr,
    query_sb,
    query_sh,
    query_sl,
    new_k_sb,
    new_k_sh,
    new_k_sl,
    new_v_sb,
    new_v_sh,
    new_v_sl,
    k_qdata_sb,
    k_qdata_sh,
    k_scale_sb,
    k_scale_sh,
    k_residual_sb,
    k_residual_sh,
    v_qdata_sb,
    v_qdata_sh,
    v_scale_sb,
    v_scale_sh,
    v_residual_sb,
    v_residual_sh,
    mask_sb,
    mask_sh,
    mask_sl,
    mask_ss,
    kv_heads,
    rows,
    query_length,
    length,
    new_count,
    k_tile,
    k_sink,
    k_window,
    k_ring,
    v_tile,
    v_sink,
    v_window,
    v_ring,
    bulk_splits,
    splits,
    column_blocks,
    room,
    scale,
    cap,
    BULK: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    NEW: tl.constexpr,
    MASK: tl.constexpr,
    MASK_SHARED: tl.constexpr,
    CAPPED: tl.constexpr,
    K_BITS: tl.constexpr,
    K_AXIS: tl.constexpr,
    K_GROUP: tl.constexpr,
    D: tl.constexpr,
    K_BLOCK: tl.constexpr,
    DP: tl.constexpr,
    V_BITS: tl.constexpr,
    V_AXIS: tl.constexpr,
    V_GROUP: tl.constexpr,
    DV: tl.constexpr,
    V_BLOCK: tl.constexpr,
    DVP: tl.constexpr,
    REST_PACKED: tl.constexpr,
    N: tl.constexpr,
    BULK_TOKENS: tl.constexpr,
    BULK_SPREAD: tl.constexpr,
    BULK_STAGES: tl.constexpr,
    PART: tl.constexpr,
    SINGLE: tl.constexpr,
    V_ALIGN: tl.constexpr,
    BULK_PRECISION: tl.constexpr,
    REST_TOKENS: tl.constexpr,
    REST_STAGES: tl.constexpr,
    REST_DTYPE: tl.constexpr,
    REST_PRECISION: tl.constexpr,
    PORTABLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Partial attention of one share of the tokens, for N query rows of one KV head.

    Grid: bulk splits, fastest, x column blocks x KV heads x batch, and behind all of these the other
    splits likewise: short programs last, or they would delay long ones. Writes
    partial [batch * heads, column blocks, splits, N, DV] and stats [.., splits, 2, N]. EARLY: once all
    programs have started, `combine_kernel` may take its place beside them.
    """
    if EARLY:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    bulk_programs = tl.num_programs(0) // splits * bulk_splits
    if pid < bulk_programs:
        split = pid % bulk_splits
        owner = pid // bulk_splits
    else:
        split = bulk_splits + (pid - bulk_programs) % (splits - bulk_splits)
        owner = (pid - bulk_programs) // (splits - bulk_splits)
    block = owner % column_blocks
    head = (owner // column_blocks % kv_heads).to(tl.int64)
    batch = (owner // column_blocks // kv_heads).to(tl.int64)

    live = length
    if ON_DEVICE:
        live = tl.minimum(tl.load(start_ptr).to(tl.int32), length)
    place = owner.to(tl.int64) * splits + split
    partial_ptr += place * (N * DV)
    stats_ptr += place * (2 * N)

    column = block * N + tl.arange(0, N) % (N // BULK_SPREAD)
    column_ok = column < rows
    query_head = head * (rows // query_length) + column // query_length
    query_at = batch * query_sb + query_head * query_sh + (column % query_length) * query_sl
    mask_at = column
    if MASK != 0:
        mask_ptr += batch * mask_sb
        if not MASK_SHARED:
            first_head = head * (rows // query_length) + block * N // query_length
            mask_ptr += first_head * mask_sh + (block * N % query_length).to(tl.int64) * mask_sl
            mask_at = (column // query_length - block * N // query_length) * mask_sh
            mask_at += (column % query_length - block * N % query_length) * mask_sl

    k_qdata_ptr += batch * k_qdata_sb + head * k_qdata_sh
    k_scale_ptr += batch * k_scale_sb + head * k_scale_sh
    k_zero_ptr += batch * k_scale_sb + head * k_scale_sh
    v_qdata_ptr += batch * v_qdata_sb + head * v_qdata_sh
    v_scale_ptr += batch * v_scale_sb + head * v_scale_sh
    v_zero_ptr += batch * v_scale_sb + head * v_scale_sh

    k_end = packed_end_of(live, k_tile, k_sink, k_window)
    v_end = packed_end_of(live, v_tile, v_sink, v_window)

    bulk_begin = 0
    bulk_tokens = 0
    if BULK:
        # whole groups of keys whose values are packed, too
        skipped = (tl.maximum(k_sink, v_sink) - k_sink + K_GROUP - 1) // K_GROUP
        bulk_groups = tl.maximum((tl.minimum(k_end, v_end) - k_sink) // K_GROUP - skipped, 0)
        bulk_begin = k_sink + skipped * K_GROUP
        bulk_tokens = bulk_groups * K_GROUP
        if split < bulk_splits:
            share = (bulk_groups + bulk_splits - 1) // bulk_splits
            first = split * share
            groups = tl.minimum(share, bulk_groups - first)
            if groups <= 0:
                tl.store(stats_ptr + tl.arange(0, N), tl.zeros([N], tl.float32) + LOWEST)
                tl.store(stats_ptr + N + tl.arange(0, N), tl.zeros([N], tl.float32))
            else:
                begin = bulk_begin + first * K_GROUP
                offset_ptr += (owner.to(tl.int64) * bulk_splits + split) * (room * N)
                _bulk(
                    query_ptr, k_qdata_ptr, k_scale_ptr, k_zero_ptr, v_qdata_ptr, v_scale_ptr, v_zero_ptr,
                    mask_ptr, shifts_ptr, offset_ptr, partial_ptr, stats_ptr, query_at, mask_at, mask_ss, column_ok,
                    begin, begin - k_sink, begin - v_sink, groups, scale, cap,
                    K_BITS, K_GROUP, D, K_BLOCK, V_BITS, V_GROUP, DV, V_BLOCK, MASK, MASK_SHARED, CAPPED, N,
                    BULK_TOKENS, BULK_SPREAD, PART, SINGLE, V_ALIGN, BULK_STAGES, BULK_PRECISION, PORTABLE,
                )  # fmt: skip

    if split >= bulk_splits:
        new_k_ptr += batch * new_k_sb + head * new_k_sh
        new_v_ptr += batch * new_v_sb + head * new_v_sh
        k_residual_ptr += batch * k_residual_sb + head * k_residual_sh
        v_residual_ptr += batch * v_residual_sb + head * v_residual_sh
        count = live + new_count - bulk_tokens
        share = (count + splits - bulk_splits - 1) // (splits - bulk_splits)
        share = (share + REST_TOKENS - 1) // REST_TOKENS * REST_TOKENS
        first = (split - bulk_splits) * share
        if first >= count:
            tl.store(stats_ptr + tl.arange(0, N), tl.zeros([N], tl.float32) + LOWEST)
            tl.store(stats_ptr + N + tl.arange(0, N), tl.zeros([N], tl.float32))
        else:
            _rest(
                query_ptr, new_k_ptr, new_v_ptr, k_qdata_ptr, k_scale_ptr, k_zero_ptr, k_residual_ptr,
                v_qdata_ptr, v_scale_ptr, v_zero_ptr, v_residual_ptr, mask_ptr, partial_ptr, stats_ptr,
                query_at, mask_at, mask_ss, column_ok, new_k_sl, new_v_sl,
                first, tl.minimum(first + share, count), bulk_begin, bulk_tokens, live,
                k_end, k_sink, k_ring, v_end, v_sink, v_ring, scale, cap,
                K_BITS, K_AXIS, K_GROUP, D, K_BLOCK, DP, V_BITS, V_AXIS, V_GROUP, DV, V_BLOCK, DVP, NEW, REST_PACKED, MASK,
                MASK_SHARED, CAPPED, N,
                REST_TOKENS, REST_STAGES, REST_DTYPE, REST_PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "column_blocks", "rows"])
def combine_kernel(
    partial_ptr,
    stats_ptr,
    out_ptr,
    splits,
    column_blocks,
    rows,
    MASK: tl.constexpr,
    N: tl.constexpr,
    DV: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNEL_BLOCKS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Merge the partial outputs of one query row: sum of exp(m_i - m) o_i over that of l_i.

    Grid: blocks of CHANNELS channels, fastest, x query rows of a KV head x KV heads x batch. Output
    [batch * heads, rows, DV]. EARLY: this kernel is started before `attend_kernel` ends, and waits for it.
    """
    block = tl.program_id(0) % CHANNEL_BLOCKS
    pid = (tl.program_id(0) // CHANNEL_BLOCKS).to(tl.int64)
    row = pid % rows
    first = (pid // rows * column_blocks + row // N) * splits
    column = row % N
    stats_ptr += first * (2 * N) + column
    partial_ptr += first * (N * DV) + column * DV
    split = tl.arange(0, MAX_SPLITS)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    if EARLY:
        gdc_wait()
    tops = tl.load(stats_ptr + split * (2 * N), mask=split < splits, other=LOWEST)
    totals = tl.load(stats_ptr + split * (2 * N) + N, mask=split < splits, other=0.0)
    top = tl.max(tops, 0)
    total = tl.sum(_exp(tops - top, MASK) * totals, 0)
    out = tl.zeros([CHANNELS], tl.float32)
    for i in range(0, splits, CHUNK):
        part = i + tl.arange(0, CHUNK)
        part_top = tl.load(stats_ptr + part * (2 * N), mask=part < splits, other=LOWEST)
        part_total = tl.load(stats_ptr + part * (2 * N) + N, mask=part < splits, other=0.0)
        # a share without tokens wrote no output
        used = part_total != 0.0
        value = tl.load(
            partial_ptr + part[:, None] * (N * DV) + channel[None, :],
            mask=used[:, None] & (channel < DV)[None, :],
            other=0.0,
        )
        out += tl.sum(tl.where(used, _exp(part_top - top, MASK), 0.0)[:, None] * value, 0)
    out = out / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + pid * DV + channel, out.to(out_ptr.dtype.element_ty), mask=channel < DV)
