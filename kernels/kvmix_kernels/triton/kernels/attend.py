"""Split-KV attention over the segments of a cache.

A row of the score tile is a token and a column is one query row of one query head; the query
heads of a group share every load. Each program yields a partial output with its running maximum
and sum for one share of the tokens; `merge.combine_kernel` merges them.

Two kinds of program run in one launch: those of `bulk` take tokens that are packed in both tensors, values with
scales per token (`launch_plan.has_bulk_path` says which); those of `rest` take all others. The number of tokens
may live on the device; programs share the live tokens evenly.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from kvmix_kernels.triton.ahead import Kernel
from kvmix_kernels.triton.kernels.bulk import attend_bulk
from kvmix_kernels.triton.kernels.fields import as_form, packed_end_of, stored
from kvmix_kernels.triton.kernels.forms import Kept, Mask, Places, Scores, Steps
from kvmix_kernels.triton.kernels.masks import LOWEST
from kvmix_kernels.triton.kernels.rest import attend_rest

NO_PAGES = tl.constexpr(0)


@triton.jit
def nothing(stats_ptr, N: tl.constexpr):
    """The share of a program without tokens."""
    column = tl.arange(0, N)
    tl.store(stats_ptr + column, tl.zeros([N], tl.float32) + LOWEST)
    tl.store(stats_ptr + N + column, tl.zeros([N], tl.float32))


@Kernel
@triton.jit(
    do_not_specialize=[
        "length", "new_count", "rows", "query_length", "k_tile", "k_sink", "k_window", "k_ring",
        "v_tile", "v_sink", "v_window", "v_ring", "bulk_splits", "splits", "parts", "column_blocks", "kv_heads",
    ]
)  # fmt: skip
def attend_kernel(
    query_ptr, new_k_ptr, new_v_ptr, k_buffers, v_buffers, mask_ptr, start_ptr, shifts_ptr, offset_ptr, partial_ptr, stats_ptr,
    beside,
    query_sb, query_sh, query_sl, new_k_sb, new_k_sh, new_k_sl, new_v_sb, new_v_sh, new_v_sl,
    k_strides, v_strides, mask_sb, mask_sh, mask_sl, mask_ss, beside_sizes,
    kv_heads, rows, query_length, length, new_count,
    k_tile, k_sink, k_window, k_ring, v_tile, v_sink, v_window, v_ring,
    bulk_splits, splits, parts, column_blocks, room, scale, cap,
    BULK: tl.constexpr, ON_DEVICE: tl.constexpr, NEW: tl.constexpr,
    MASK: tl.constexpr, MASK_SHARED: tl.constexpr, CAPPED: tl.constexpr,
    K_FORM: tl.constexpr, V_FORM: tl.constexpr, REST_PACKED: tl.constexpr, N: tl.constexpr,
    UNIT: tl.constexpr, BULK_TOKENS: tl.constexpr, BULK_SPREAD: tl.constexpr, BULK_STAGES: tl.constexpr,
    PART: tl.constexpr, SINGLE: tl.constexpr, V_ALIGN: tl.constexpr, BULK_PRECISION: tl.constexpr,
    REST_TOKENS: tl.constexpr, REST_STAGES: tl.constexpr, REST_DTYPE: tl.constexpr, REST_PRECISION: tl.constexpr,
    PORTABLE: tl.constexpr, WARPS: tl.constexpr, EARLY: tl.constexpr, SKIP: tl.constexpr = False, KEPT: tl.constexpr = False,
):  # fmt: skip
    """Partial attention of one share of the tokens, for N query rows of one KV head.

    Grid: bulk splits, fastest, x column blocks x KV heads x batch, and behind all of these the other
    splits likewise: short programs last, or they would delay long ones. Writes
    partial [batch * heads, column blocks, parts, N, DV] and stats [.., parts, 2, N], the first `splits` of the
    parts. EARLY: once all programs have started, the next kernel may take its place beside them.

    Beside a high tier: SKIP leaves packed tokens out that are in it; KEPT stores weights of raw tokens behind the
    packed ones, as `Kept`. `beside`: bytes of packed tokens, weights, maxima; `beside_sizes`: strides of the first
    (batch, head), of the others first and count of a head.
    """
    K: tl.constexpr = as_form(K_FORM)
    V: tl.constexpr = as_form(V_FORM)
    S: tl.constexpr = Scores(MASK, MASK_SHARED, CAPPED, SKIP, False, KEPT)
    P: tl.constexpr = Steps(
        UNIT,
        BULK_TOKENS,
        BULK_SPREAD,
        PART,
        SINGLE,
        V_ALIGN,
        BULK_STAGES,
        BULK_PRECISION,
        PORTABLE,
        WARPS,
        NO_PAGES,
    )
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
    place = owner.to(tl.int64) * parts + split
    partial_ptr += place * (N * V.D)
    stats_ptr += place * (2 * N)

    column = block * N + tl.arange(0, N) % (N // BULK_SPREAD)
    column_ok = column < rows
    query_head = head * (rows // query_length) + column // query_length
    query_ptr += batch * query_sb + query_head * query_sh + (column % query_length) * query_sl
    mask_at = column
    if MASK != 0:
        mask_ptr += batch * mask_sb
        if not MASK_SHARED:
            first_head = head * (rows // query_length) + block * N // query_length
            mask_ptr += first_head * mask_sh + (block * N % query_length).to(tl.int64) * mask_sl
            mask_at = (column // query_length - block * N // query_length) * mask_sh
            mask_at += (column % query_length - block * N % query_length) * mask_sl

    skip_ptr = beside[0]
    if SKIP:
        skip_ptr += batch * beside_sizes[0] + head * beside_sizes[1]
    mask = Mask(mask_ptr, mask_at, mask_ss, column_ok, skip_ptr)
    k = stored(k_buffers, k_strides, batch, head, k_tile)
    v = stored(v_buffers, v_strides, batch, head, v_tile)
    k_end = packed_end_of(live, k_tile, k_sink, k_window)
    v_end = packed_end_of(live, v_tile, v_sink, v_window)

    bulk_begin = 0
    bulk_tokens = 0
    if BULK:
        # whole groups of keys whose values are packed, too
        skipped = (tl.maximum(k_sink, v_sink) - k_sink + UNIT - 1) // UNIT
        bulk_groups = tl.maximum((tl.minimum(k_end, v_end) - k_sink) // UNIT - skipped, 0)
        bulk_begin = k_sink + skipped * UNIT
        bulk_tokens = bulk_groups * UNIT
        if split < bulk_splits:
            share = (bulk_groups + bulk_splits - 1) // bulk_splits
            first = split * share
            groups = tl.minimum(share, bulk_groups - first)
            if groups <= 0:
                nothing(stats_ptr, N)
            else:
                begin = bulk_begin + first * UNIT
                offset_ptr += (owner.to(tl.int64) * bulk_splits + split) * (room * N)
                attend_bulk(
                    query_ptr, k, v, mask, shifts_ptr, offset_ptr, offset_ptr + (room - K.D) * N, partial_ptr, stats_ptr,
                    begin, begin - k_sink, begin - v_sink, groups, scale, cap, k, K, V, S, N, P,
                )  # fmt: skip

    if split >= bulk_splits:
        new_k_ptr += batch * new_k_sb + head * new_k_sh
        new_v_ptr += batch * new_v_sb + head * new_v_sh
        count = live + new_count - bulk_tokens
        share = (count + splits - bulk_splits - 1) // (splits - bulk_splits)
        share = (share + REST_TOKENS - 1) // REST_TOKENS * REST_TOKENS
        first = (split - bulk_splits) * share
        kept = Kept(beside[1], beside[2], 0, rows)
        if KEPT:
            weights = (owner.to(tl.int64) * beside_sizes[3] + beside_sizes[2]) * rows
            tops = (owner.to(tl.int64) * beside_sizes[5] + beside_sizes[4]) * N
            kept = Kept(beside[1] + weights, beside[2] + tops, k_end - bulk_tokens, rows)
        if first >= count:
            nothing(stats_ptr, N)
        else:
            attend_rest(
                query_ptr, k, v, Places(live, k_end, k_sink, k_ring), Places(live, v_end, v_sink, v_ring),
                new_k_ptr, new_v_ptr, new_k_sl, new_v_sl, mask, k, kept, partial_ptr, stats_ptr,
                first, tl.minimum(first + share, count), bulk_begin, bulk_tokens, scale, cap, K, V, S, N,
                NEW, REST_PACKED, REST_TOKENS, REST_STAGES, REST_DTYPE, REST_PRECISION,
            )  # fmt: skip
