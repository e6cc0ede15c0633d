"""How much attention each token of a prompt gets: `tokens.scores.of_prompt`, without its scores in memory.

Two launches over the products of queries and keys, neither of which reads a value. The first finds the
logarithm of the sum of weights of each query row, the second adds up each key's weights over the rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmix_kernels.triton.kernels.masks import LOG2E, LOWEST, capped, exp


@triton.jit
def _tile(
    x_ptr, first, step, end, DTYPE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Tokens [N, DP] from `first` on; EDGE: there may be fewer before `end`."""
    token = tl.arange(0, N)
    channel = tl.arange(0, DP)
    at = x_ptr + tl.cast(first, tl.int64) * step + (token[:, None] * step + channel[None, :])
    if EDGE:
        ok = (first + token < end)[:, None]
        if D < DP:
            ok = ok & (channel < D)[None, :]
        return tl.load(at, mask=ok, other=0.0).to(DTYPE)
    if D < DP:
        return tl.load(at, mask=(channel < D)[None, :], other=0.0).to(DTYPE)
    return tl.load(at).to(DTYPE)


@triton.jit
def _scores(a, b, mask_ptr, mask_at, ok, scale, cap, MASK: tl.constexpr, CAPPED: tl.constexpr):
    """Scores [a, b] under the mask, and what they are to be multiplied by."""
    score = tl.dot(a, tl.trans(b), input_precision="ieee")
    # the factor of plain scores is left to the multiplication that subtracts the maximum
    unit = scale
    if CAPPED or MASK == 2:
        score = score * scale
        unit = 1.0
    if CAPPED:
        score = capped(score, cap)
    if MASK == 0:
        score = tl.where(ok, score, -float("inf"))
    elif MASK == 1:
        score = tl.where(tl.load(mask_ptr + mask_at, mask=ok, other=0) != 0, score, -float("inf"))
    elif MASK == 2:
        added = tl.load(mask_ptr + mask_at, mask=ok, other=0.0).to(tl.float32)
        score = tl.where(ok, score + added, -float("inf"))
    return score, unit


@triton.jit
def _relative(score, unit, base):
    """`score * unit - base` in one instruction, whatever the compiler makes of a product and a sum."""
    return tl.fma(score, tl.full(score.shape, unit, tl.float32), tl.broadcast_to(-base, score.shape))


@triton.jit
def _sum_up(
    q, keys_ptr, keys_sl, mask_ptr, mask_sl, mask_ss, row, begin, end, length, top, total, scale, cap,
    MASK: tl.constexpr, CAPPED: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of weights of rows, continued over the keys `begin` to `end`; MASK -1: all are seen."""
    for first in tl.range(begin, end, N, num_stages=STAGES):
        k = _tile(keys_ptr, first, keys_sl, length, DTYPE, D, DP, N, MASK != -1)
        key = first + tl.arange(0, N)
        ok = (key < length)[None, :]
        if MASK == 0:
            ok = key[None, :] <= row[:, None]
        else:
            ok = ok & (row < length)[:, None]
        mask_at = row[:, None].to(tl.int64) * mask_sl + key[None, :] * mask_ss
        score, unit = _scores(q, k, mask_ptr, mask_at, ok, scale, cap, MASK, CAPPED)
        higher = tl.maximum(top, tl.max(score, 1) * unit)
        total = total * exp(top - higher, MASK) + tl.sum(
            exp(_relative(score, unit, higher[:, None]), MASK), 1
        )
        top = higher
    return top, total


@triton.jit(do_not_specialize=["owners", "heads", "group", "length", "begin"])
def rows_kernel(
    query_ptr, keys_ptr, mask_ptr, ahead_ptr, real_ptr, sinks_ptr, lse_ptr, query_sb, query_sh, query_sl, keys_sb, keys_sh, keys_sl,
    mask_sb, mask_sh, mask_sl, mask_ss, real_sb, owners, heads, group, length, begin, scale, cap,
    MASK: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of the rows from `begin` on, [batch x query heads, rows]; infinite for rows that do not count.

    Grid: batch x query heads, fastest, x blocks of M rows, those with most keys first. A score counts `scale`,
    in units of log 2 where no additive mask forbids it. Under an additive mask the maximum is written, and
    behind those of all rows log2 of the sum relative to it: one number can not hold both next to the lowest.
    ahead: whether a mask lets any query see what comes after it.
    """
    pid = tl.program_id(0)
    owner = pid % owners
    batch = (owner // heads).to(tl.int64)
    head = owner % heads
    rows = length - begin
    first = begin + (tl.cdiv(rows, M) - 1 - pid // owners) * M
    query_ptr += batch * query_sb + head.to(tl.int64) * query_sh
    keys_ptr += batch * keys_sb + (head // group).to(tl.int64) * keys_sh
    row = first + tl.arange(0, M)
    ok = row < length
    q = _tile(query_ptr, first, query_sl, length, DTYPE, D, DP, M, True)
    top = tl.full((M,), LOWEST, tl.float32)
    total = tl.zeros((M,), tl.float32)
    if MASK == 0:
        # every row sees the keys up to the first row's own
        free = (first + 1) // N * N
        top, total = _sum_up(
            q, keys_ptr, keys_sl, mask_ptr, 0, 0, row, 0, free, length, top, total, scale, cap,
            -1, CAPPED, DTYPE, D, DP, N, STAGES,
        )  # fmt: skip
        top, total = _sum_up(
            q, keys_ptr, keys_sl, mask_ptr, 0, 0, row, free, tl.minimum(first + M, length), length, top, total,
            scale, cap, 0, CAPPED, DTYPE, D, DP, N, STAGES,
        )  # fmt: skip
    else:
        mask_ptr += batch * mask_sb + head.to(tl.int64) * mask_sh
        end = length
        if tl.load(ahead_ptr) == 0:
            end = tl.minimum(first + M, length)
        top, total = _sum_up(
            q, keys_ptr, keys_sl, mask_ptr, mask_sl, mask_ss, row, 0, end, length, top, total, scale, cap,
            MASK, CAPPED, DTYPE, D, DP, N, STAGES,
        )  # fmt: skip
        ok = ok & (tl.load(real_ptr + batch * real_sb + row, mask=ok, other=0) != 0)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        if MASK != 2:
            sink *= LOG2E
        higher = tl.maximum(top, sink)
        total = total * exp(top - higher, MASK) + exp(sink - higher, MASK)
        top = higher
    # nothing seen, or nothing that is a number
    counts = ok & (total > 0)
    lse_ptr += owner.to(tl.int64) * rows + (row - begin)
    if MASK == 2:
        tl.store(lse_ptr, tl.where(counts, top, float("inf")), mask=row < length)
        sums_ptr = lse_ptr + tl.cast(owners, tl.int64) * rows
        tl.store(sums_ptr, tl.where(counts, tl.log2(total), 0.0), mask=row < length)
    else:
        tl.store(lse_ptr, tl.where(counts, top + tl.log2(total), float("inf")), mask=row < length)


@triton.jit
def _add_up(
    k, query_ptr, query_sl, mask_ptr, mask_sl, mask_ss, lse_ptr, sums_ptr, key, begin, end, length, total, scale, cap,
    MASK: tl.constexpr, CAPPED: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Weights of keys, continued over the rows `begin` to `end`; MASK -1: whole blocks that see all of the keys."""
    for first in tl.range(begin, end, N, num_stages=STAGES):
        q = _tile(query_ptr, first, query_sl, length, DTYPE, D, DP, N, MASK != -1)
        row = first + tl.arange(0, N)
        if MASK == -1:
            lse = tl.load(lse_ptr + row)
        else:
            # rows that are not there have weights of 0
            lse = tl.load(lse_ptr + row, mask=row < length, other=float("inf"))
        if MASK == 0:
            ok = key[:, None] <= row[None, :]
        else:
            ok = (key < length)[:, None] & (row < length)[None, :]
        mask_at = row[None, :].to(tl.int64) * mask_sl + key[:, None] * mask_ss
        score, unit = _scores(k, q, mask_ptr, mask_at, ok, scale, cap, MASK, CAPPED)
        score = _relative(score, unit, lse[None, :])
        if MASK == 2:
            score = score - tl.load(sums_ptr + row, mask=row < length, other=0.0)[None, :] / LOG2E
        if MASK > 0:
            # queries of padding may be no numbers, and do not count
            score = tl.where(score > LOWEST, score, -float("inf"))
        total += tl.sum(exp(score, MASK), 1)
    return total


@triton.jit(do_not_specialize=["owners", "heads", "group", "length", "begin"])
def columns_kernel(
    query_ptr, keys_ptr, mask_ptr, ahead_ptr, lse_ptr, out_ptr, query_sb, query_sh, query_sl, keys_sb, keys_sh, keys_sl,
    mask_sb, mask_sh, mask_sl, mask_ss, owners, heads, group, length, begin, scale, cap,
    MASK: tl.constexpr, CAPPED: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention that each key gets from the rows of one query head, [batch x query heads, length].

    Grid: batch x query heads, fastest, x blocks of M keys, those with most rows first. A program for each query
    head, not for each KV head: four times as many share a causal triangle better, and their sum is small.
    """
    pid = tl.program_id(0)
    owner = pid % owners
    batch = (owner // heads).to(tl.int64)
    head = owner % heads
    rows = length - begin
    first = pid // owners * M
    query_ptr += batch * query_sb + head.to(tl.int64) * query_sh
    keys_ptr += batch * keys_sb + (head // group).to(tl.int64) * keys_sh
    lse_ptr += owner.to(tl.int64) * rows - begin
    sums_ptr = lse_ptr + tl.cast(owners, tl.int64) * rows
    key = first + tl.arange(0, M)
    k = _tile(keys_ptr, first, keys_sl, length, DTYPE, D, DP, M, True)
    total = tl.zeros((M,), tl.float32)
    start = begin + tl.maximum(first - begin, 0) // N * N
    if MASK == 0:
        # rows from the first key's own on: some of the keys, all of them, and what is no whole block
        free = tl.minimum(begin + tl.cdiv(tl.maximum(first + M - 1 - begin, 0), N) * N, length)
        rest = tl.maximum(begin + rows // N * N, free)
        total = _add_up(
            k, query_ptr, query_sl, mask_ptr, 0, 0, lse_ptr, sums_ptr, key, start, free, length, total, scale, cap,
            0, CAPPED, DTYPE, D, DP, N, 1,
        )  # fmt: skip
        total = _add_up(
            k, query_ptr, query_sl, mask_ptr, 0, 0, lse_ptr, sums_ptr, key, free, rest, length, total, scale, cap,
            -1, CAPPED, DTYPE, D, DP, N, STAGES,
        )  # fmt: skip
        total = _add_up(
            k, query_ptr, query_sl, mask_ptr, 0, 0, lse_ptr, sums_ptr, key, rest, length, length, total, scale, cap,
            0, CAPPED, DTYPE, D, DP, N, 1,
        )  # fmt: skip
    else:
        mask_ptr += batch * mask_sb + head.to(tl.int64) * mask_sh
        if tl.load(ahead_ptr) != 0:
            start = begin
        total = _add_up(
            k, query_ptr, query_sl, mask_ptr, mask_sl, mask_ss, lse_ptr, sums_ptr, key, start, length, length, total,
            scale, cap, MASK, CAPPED, DTYPE, D, DP, N, STAGES,
        )  # fmt: skip
    tl.store(out_ptr + owner.to(tl.int64) * length + key, total, mask=key < length)
