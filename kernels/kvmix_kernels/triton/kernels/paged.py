"""Attention and reading over pages, which a table of numbers on the device tells of (`paged.tables`).

Nothing here depends on what the host knows of the sequences: a launch fits all that its grid has room for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmix_kernels.paged import tables
from kvmix_kernels.triton.kernels.attend import nothing
from kvmix_kernels.triton.kernels.bulk import attend_bulk
from kvmix_kernels.triton.kernels.fields import (
    ORDERED,
    RAW_BITS,
    ROTATED,
    TILED,
    as_form,
    packed_values,
    rotate,
    stored,
)
from kvmix_kernels.triton.kernels.forms import Mask, Pages, Scores, Steps
from kvmix_kernels.triton.kernels.masks import LOWEST, capped

ROW = tl.constexpr(tables.ROW)
FIRST = tl.constexpr(tables.FIRST)
COUNT = tl.constexpr(tables.COUNT)
PAST = tl.constexpr(tables.PAST)
BEGIN = tl.constexpr(tables.BEGIN)
TAIL = tl.constexpr(tables.TAIL)
SINKS = tl.constexpr(tables.SINKS)
PAGES = tl.constexpr(tables.PAGES)
KEYS = tl.constexpr(tables.KEYS)
NO_MASK = tl.constexpr(0)
SHARED = tl.constexpr(True)


@triton.jit
def _query(query_ptr, channel, column_ok, D: tl.constexpr, DTYPE: tl.constexpr):
    """Queries [channels, N]."""
    ok = column_ok[None, :] & (channel < D)[:, None]
    return tl.load(query_ptr[None, :] + channel[:, None], mask=ok, other=0.0).to(DTYPE)


@triton.jit
def _added(
    score, value, top, total, out, scale, cap, ok, CAPPED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """(top, total, out) with some tokens more: products of keys and queries [tokens, N], values [channels, tokens]."""
    score = score * scale
    if CAPPED:
        score = capped(score, cap)
    score = tl.where(ok[:, None], score, -float("inf"))
    new_top = tl.maximum(top, tl.max(score, 0))
    fade = tl.exp2(top - new_top)
    weight = tl.exp2(score - new_top[None, :])
    total = total * fade + tl.sum(weight, 0)
    out = tl.dot(value, weight.to(DTYPE), out * fade[None, :], input_precision=PRECISION)
    return new_top, total, out


@triton.jit
def _store_share(
    partial_ptr, stats_ptr, top, total, out, column_ok, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr
):
    column = tl.arange(0, N)
    channel = tl.arange(0, DP)
    at = partial_ptr + column[None, :] * D + channel[:, None]
    tl.store(at, out, mask=(channel < D)[:, None] & column_ok[None, :])
    tl.store(stats_ptr + column, top)
    tl.store(stats_ptr + N + column, total)


@triton.jit
def _rows(x, row, channel, ok, X: tl.constexpr, DTYPE: tl.constexpr):
    """Rows of one page as numbers, in the channels that they are packed in."""
    if X.BITS == RAW_BITS:
        value = tl.load(x.residual + row * X.D + channel, mask=ok, other=0.0)
    else:
        value = packed_values(x, row, channel, ok, 0, X)
    return value.to(DTYPE)


@triton.jit
def _attend_pages(
    query_ptr, k, v, pages, count, column_ok, partial_ptr, stats_ptr, scale, cap,
    K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, CAPPED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A share of packed pages in formats without a bulk path: tokens become numbers."""
    token = tl.arange(0, TOKENS)
    k_channel = tl.arange(0, K.DP)
    v_channel = tl.arange(0, V.DP)
    order = k_channel
    if K.TURNED == ORDERED:
        # an order of the plan is that of all pages
        order = tl.load(k.order + k_channel, mask=k_channel < K.D, other=0).to(tl.int32)
    if K.TURNED != TILED:
        ok = column_ok[None, :] & (k_channel < K.D)[:, None]
        fixed = tl.load(query_ptr[None, :] + order[:, None], mask=ok, other=0.0)
        if K.TURNED == ROTATED:
            fixed = rotate(fixed.to(tl.float32), K.D, 0)
        fixed = fixed.to(DTYPE)
    top = tl.zeros([N], tl.float32) + LOWEST
    total = tl.zeros([N], tl.float32)
    out = tl.zeros([V.DP, N], tl.float32)
    for place in range(count):
        page = tl.load(pages.table + place).to(tl.int64)
        k_at = stored(pages.k_buffers, pages.k_strides, page, pages.head, k.tile)
        v_at = stored(pages.v_buffers, pages.v_strides, page, pages.head, v.tile)
        for block in range(PAGE // TOKENS):
            row = block * TOKENS + token
            if K.TURNED == TILED:
                own = k_at.order + block * TOKENS // k.tile * K.D + k_channel
                own = tl.load(own, mask=k_channel < K.D, other=0).to(tl.int32)
                ok = column_ok[None, :] & (k_channel < K.D)[:, None]
                query = tl.load(query_ptr[None, :] + own[:, None], mask=ok, other=0.0).to(DTYPE)
            else:
                query = fixed
            keys = _rows(k_at, row[:, None], k_channel[None, :], (k_channel < K.D)[None, :], K, DTYPE)
            values = _rows(v_at, row[None, :], v_channel[:, None], (v_channel < V.D)[:, None], V, DTYPE)
            score = tl.dot(keys, query, input_precision=PRECISION)
            top, total, out = _added(
                score, values, top, total, out, scale, cap, place * PAGE + row >= pages.hidden,
                CAPPED, DTYPE, PRECISION,
            )  # fmt: skip
    _store_share(partial_ptr, stats_ptr, top, total, out, column_ok, V.D, V.DP, N)


@triton.jit
def _raw_at(index, firsts, begin, past, ring, tail_ptr, sinks_ptr, new_ptr, D: tl.constexpr):
    """Pointers of raw tokens by their number: sinks, then those in the tail, then the step's own."""
    position = begin + index - firsts
    at = tl.where(position < past, tail_ptr + position % ring * D, new_ptr)
    at = tl.where(index < firsts, sinks_ptr + index * D, at)
    if D % 8 == 0:
        # not seen through the choice: all three begin at multiples of 16 bytes
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def _attend_raw(
    query_ptr, k_tail_ptr, v_tail_ptr, k_sinks_ptr, v_sinks_ptr, new_k_ptr, new_v_ptr, first, end, firsts, begin,
    past, ring, column_ok, partial_ptr, stats_ptr, scale, cap,
    K: tl.constexpr, V: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, CAPPED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Raw tokens first..end-1 of a sequence, its own of this step the last of all."""
    token = tl.arange(0, TOKENS)
    k_channel = tl.arange(0, K.DP)
    v_channel = tl.arange(0, V.DP)
    query = _query(query_ptr, k_channel, column_ok, K.D, DTYPE)
    top = tl.zeros([N], tl.float32) + LOWEST
    total = tl.zeros([N], tl.float32)
    out = tl.zeros([V.DP, N], tl.float32)
    for start in tl.range(first, end, TOKENS, num_stages=STAGES):
        index = start + token
        ok = index < end
        at = _raw_at(index, firsts, begin, past, ring, k_tail_ptr, k_sinks_ptr, new_k_ptr, K.D)
        keys = tl.load(
            at[:, None] + k_channel[None, :], mask=ok[:, None] & (k_channel < K.D)[None, :], other=0.0
        )
        at = _raw_at(index, firsts, begin, past, ring, v_tail_ptr, v_sinks_ptr, new_v_ptr, V.D)
        values = tl.load(
            at[None, :] + v_channel[:, None], mask=ok[None, :] & (v_channel < V.D)[:, None], other=0.0
        )
        score = tl.dot(keys.to(DTYPE), query, input_precision=PRECISION)
        top, total, out = _added(
            score, values.to(DTYPE), top, total, out, scale, cap, ok, CAPPED, DTYPE, PRECISION
        )
    _store_share(partial_ptr, stats_ptr, top, total, out, column_ok, V.D, V.DP, N)


@triton.jit(
    do_not_specialize=[
        "heads", "rows", "k_tile", "v_tile", "sink", "ring", "bulk_splits", "splits", "column_blocks", "room",
        "scratch",
    ]
)  # fmt: skip
def decode_kernel(
    query_ptr, new_k_ptr, new_v_ptr, k_buffers, v_buffers, k_tails_ptr, v_tails_ptr, k_sinks_ptr, v_sinks_ptr,
    requests_ptr, pages_ptr, shifts_ptr, offset_ptr, partial_ptr, stats_ptr,
    query_sb, query_sh, new_k_sb, new_k_sh, new_v_sb, new_v_sh, k_strides, v_strides, tails_sb, sinks_sb,
    heads, rows, k_tile, v_tile, sink, ring, bulk_splits, splits, column_blocks, room, scratch, scale, cap,
    BULK: tl.constexpr, CAPPED: tl.constexpr, K_FORM: tl.constexpr, V_FORM: tl.constexpr, N: tl.constexpr,
    PAGE: tl.constexpr, UNIT: tl.constexpr, TOKENS: tl.constexpr, SPREAD: tl.constexpr, STAGES: tl.constexpr, PART: tl.constexpr,
    SINGLE: tl.constexpr, BULK_PRECISION: tl.constexpr, RAW_TOKENS: tl.constexpr, RAW_STAGES: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, PORTABLE: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Partial attention of the one token of each of many sequences to a share of what it attends to.

    Grid: bulk splits, fastest, x column blocks x KV heads x sequences, which share the packed pages, and behind
    all of these the other splits likewise, for raw tokens. What is written is that of `attend.attend_kernel`,
    in units of log 2.
    """
    K: tl.constexpr = as_form(K_FORM)
    V: tl.constexpr = as_form(V_FORM)
    pid = tl.program_id(0)
    bulk_programs = tl.num_programs(0) // splits * bulk_splits
    if pid < bulk_programs:
        split = pid % bulk_splits
        owner = pid // bulk_splits
    else:
        split = bulk_splits + (pid - bulk_programs) % (splits - bulk_splits)
        owner = (pid - bulk_programs) // (splits - bulk_splits)
    block = owner % column_blocks
    head = (owner // column_blocks % heads).to(tl.int64)
    request_ptr = requests_ptr + owner // column_blocks // heads * ROW
    place = owner.to(tl.int64) * splits + split
    partial_ptr += place * (N * V.D)
    stats_ptr += place * (2 * N)
    column = block * N + tl.arange(0, N) % (N // SPREAD)
    column_ok = column < rows

    begin = tl.load(request_ptr + BEGIN)
    past = tl.load(request_ptr + PAST)
    own = tl.load(request_ptr + FIRST).to(tl.int64)
    count = tl.load(request_ptr + COUNT)
    query_ptr += own * query_sb + (head * rows + column) * query_sh
    if split < bulk_splits:
        packed = begin // PAGE
        share = (packed + bulk_splits - 1) // bulk_splits
        first = split * share
        taken = tl.minimum(share, packed - first)
        if taken <= 0:
            nothing(stats_ptr, N)
        else:
            k = stored(k_buffers, k_strides, 0, head, k_tile)
            v = stored(v_buffers, v_strides, 0, head, v_tile)
            table = pages_ptr + tl.load(request_ptr + PAGES) + first
            pages = Pages(
                table, tl.where(split == 0, sink, 0), head, k_buffers, k_strides, v_buffers, v_strides
            )
            if BULK:
                S: tl.constexpr = Scores(NO_MASK, SHARED, CAPPED, False, False, False)
                P: tl.constexpr = Steps(
                    UNIT, TOKENS, SPREAD, PART, SINGLE, UNIT, STAGES, BULK_PRECISION, PORTABLE, WARPS, PAGE
                )
                mask = Mask(query_ptr, column, 0, column_ok, query_ptr)
                offset_ptr += (owner.to(tl.int64) * bulk_splits + split) * (scratch * N)
                attend_bulk(
                    query_ptr, k, v, mask, shifts_ptr, offset_ptr, offset_ptr + room * N, partial_ptr, stats_ptr,
                    0, 0, 0, taken * (PAGE // UNIT), scale, cap, pages, K, V, S, N, P,
                )  # fmt: skip
            else:
                _attend_pages(
                    query_ptr, k, v, pages, taken, column_ok, partial_ptr, stats_ptr, scale, cap,
                    K, V, N, PAGE, TOKENS, CAPPED, DTYPE, PRECISION,
                )  # fmt: skip
    else:
        firsts = tl.minimum(sink, begin)
        tokens = tl.where(count > 0, firsts + past - begin + count, 0)
        share = (tokens + splits - bulk_splits - 1) // (splits - bulk_splits)
        share = (share + RAW_TOKENS - 1) // RAW_TOKENS * RAW_TOKENS
        first = (split - bulk_splits) * share
        if first >= tokens:
            nothing(stats_ptr, N)
        else:
            tail = tl.load(request_ptr + TAIL).to(tl.int64) * tails_sb + head * ring * K.D
            v_tail = tl.load(request_ptr + TAIL).to(tl.int64) * tails_sb + head * ring * V.D
            sinks = tl.load(request_ptr + SINKS).to(tl.int64) * sinks_sb + head * sink * K.D
            v_sinks = tl.load(request_ptr + SINKS).to(tl.int64) * sinks_sb + head * sink * V.D
            _attend_raw(
                query_ptr, k_tails_ptr + tail, v_tails_ptr + v_tail, k_sinks_ptr + sinks, v_sinks_ptr + v_sinks,
                new_k_ptr + own * new_k_sb + head * new_k_sh, new_v_ptr + own * new_v_sb + head * new_v_sh,
                first, tl.minimum(first + share, tokens), firsts, begin, past, ring, column_ok,
                partial_ptr, stats_ptr, scale, cap, K, V, N, RAW_TOKENS, RAW_STAGES, CAPPED, DTYPE, PRECISION,
            )  # fmt: skip


@triton.jit
def _gather(
    buffers, strides, tail_ptr, sinks_ptr, new_ptr, new_sl, table, out_ptr, out_sl, first, begin, past, total, sink,
    ring, head, tile, X: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Tokens first..first + TOKENS - 1 of a sequence and head, as numbers."""
    token = tl.arange(0, TOKENS)
    position = (first + token)[:, None]
    channel = tl.arange(0, X.DP)[None, :]
    ok = channel < X.D
    out_ptr += position.to(tl.int64) * out_sl
    if first < begin:
        page = tl.load(table + first // PAGE).to(tl.int64)
        x = stored(buffers, strides, page, head, tile)
        row = (first % PAGE + token)[:, None]
        own = channel
        if X.BITS == RAW_BITS:
            value = tl.load(x.residual + row * X.D + channel, mask=ok, other=0.0).to(tl.float32)
        else:
            value = packed_values(x, row, channel, ok & (row >= 0), 0, X)
        if X.TURNED == ROTATED:
            value = rotate(value, X.D, 1)
        elif X.TURNED == ORDERED:
            own = tl.load(x.order + channel, mask=ok, other=0).to(tl.int32)
        elif X.TURNED == TILED:
            own = tl.load(x.order + row // tile * X.D + channel, mask=ok & (row >= 0), other=0).to(tl.int32)
        is_sink = position < sink
        tl.store(out_ptr + own, value.to(out_ptr.dtype.element_ty), mask=ok & (position >= sink))
        raw = tl.load(sinks_ptr + position * X.D + channel, mask=ok & is_sink, other=0.0)
        tl.store(out_ptr + channel, raw.to(out_ptr.dtype.element_ty), mask=ok & is_sink)
    else:
        fresh = position >= past
        raw_ok = ok & (position < total)
        old = tl.load(tail_ptr + position % ring * X.D + channel, mask=raw_ok & (position < past), other=0.0)
        new_at = new_ptr + (position - past).to(tl.int64) * new_sl + channel
        new = tl.load(new_at, mask=raw_ok & fresh, other=0.0)
        value = tl.where(fresh, new.to(tl.float32), old.to(tl.float32))
        tl.store(out_ptr + channel, value.to(out_ptr.dtype.element_ty), mask=raw_ok)


@triton.jit(do_not_specialize=["heads", "blocks", "k_tile", "v_tile", "sink", "ring"])
def gather_kernel(
    new_k_ptr, new_v_ptr, k_buffers, v_buffers, k_tails_ptr, v_tails_ptr, k_sinks_ptr, v_sinks_ptr,
    requests_ptr, pages_ptr, out_k_ptr, out_v_ptr,
    new_k_sb, new_k_sh, new_v_sb, new_v_sh, k_strides, v_strides, tails_sb, sinks_sb, heads, blocks, k_tile, v_tile,
    sink, ring, K_FORM: tl.constexpr, V_FORM: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """All tokens of some sequences, stored and the step's own, side by side: [tokens, heads, D], as numbers.

    Grid: blocks of TOKENS tokens, which divide a page, fastest, x heads x sequences.
    """
    K: tl.constexpr = as_form(K_FORM)
    V: tl.constexpr = as_form(V_FORM)
    pid = tl.program_id(0)
    head = (pid // blocks % heads).to(tl.int64)
    request_ptr = requests_ptr + pid // blocks // heads * ROW
    past = tl.load(request_ptr + PAST)
    total = past + tl.load(request_ptr + COUNT)
    first = pid % blocks * TOKENS
    if first < total:
        begin = tl.load(request_ptr + BEGIN)
        own = tl.load(request_ptr + FIRST).to(tl.int64)
        tail = tl.load(request_ptr + TAIL).to(tl.int64) * tails_sb
        sinks = tl.load(request_ptr + SINKS).to(tl.int64) * sinks_sb
        table = pages_ptr + tl.load(request_ptr + PAGES)
        at = tl.load(request_ptr + KEYS).to(tl.int64) * heads + head
        _gather(
            k_buffers, k_strides, k_tails_ptr + tail + head * ring * K.D, k_sinks_ptr + sinks + head * sink * K.D,
            new_k_ptr + own * new_k_sb + head * new_k_sh, new_k_sb, table, out_k_ptr + at * K.D, heads * K.D,
            first, begin, past, total, sink, ring, head, k_tile, K, PAGE, TOKENS,
        )  # fmt: skip
        _gather(
            v_buffers, v_strides, v_tails_ptr + tail + head * ring * V.D, v_sinks_ptr + sinks + head * sink * V.D,
            new_v_ptr + own * new_v_sb + head * new_v_sh, new_v_sb, table, out_v_ptr + at * V.D, heads * V.D,
            first, begin, past, total, sink, ring, head, v_tile, V, PAGE, TOKENS,
        )  # fmt: skip
