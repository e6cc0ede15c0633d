"""Merging the partial outputs of all shares of the tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from kvmix_kernels.triton.ahead import Kernel
from kvmix_kernels.triton.kernels.fields import rotate
from kvmix_kernels.triton.kernels.masks import LOG2E, LOWEST, exp, rounded_product


@triton.jit
def _summed(
    partial_ptr, stats_ptr, begin, end, top, channel, MASK: tl.constexpr, N: tl.constexpr, DV: tl.constexpr,
    CHANNELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sum of exp(m_i - top) o_i over shares begin..end-1 of one row."""
    out = tl.zeros([CHANNELS], tl.float32)
    for i in range(begin, end, CHUNK):
        part = i + tl.arange(0, CHUNK)
        part_top = tl.load(stats_ptr + part * (2 * N), mask=part < end, other=LOWEST)
        part_total = tl.load(stats_ptr + part * (2 * N) + N, mask=part < end, other=0.0)
        # a share without tokens wrote no output
        used = part_total != 0.0
        value = tl.load(
            partial_ptr + part[:, None] * (N * DV) + channel[None, :],
            mask=used[:, None] & (channel < DV)[None, :],
            other=0.0,
        )
        weight = tl.where(used, exp(part_top - top, MASK), 0.0)
        out += tl.sum(rounded_product(value, weight[:, None]), 0)
    return out


@triton.jit
def merge_row(
    pid, partial_ptr, stats_ptr, out_ptr, sums_ptr, sinks_ptr, bulk_splits, splits, column_blocks, rows, kv_heads, query_length,
    SINKS: tl.constexpr, MASK: tl.constexpr, N: tl.constexpr, DV: tl.constexpr, CHANNELS: tl.constexpr,
    MAX_SPLITS: tl.constexpr, CHUNK: tl.constexpr, ROTATED: tl.constexpr, SUMS: tl.constexpr, first_channel=0,
):  # fmt: skip
    """What a program of `combine_kernel` does; `pid` is the number of its row, of 64 bits."""
    row = pid % rows
    first = (pid // rows * column_blocks + row // N) * splits
    column = row % N
    stats_ptr += first * (2 * N) + column
    partial_ptr += first * (N * DV) + column * DV
    split = tl.arange(0, MAX_SPLITS)
    channel = first_channel + tl.arange(0, CHANNELS)
    tops = tl.load(stats_ptr + split * (2 * N), mask=split < splits, other=LOWEST)
    totals = tl.load(stats_ptr + split * (2 * N) + N, mask=split < splits, other=0.0)
    top = tl.max(tops, 0)
    if SINKS:
        head = pid // rows % kv_heads * (rows // query_length) + row // query_length
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        if MASK != 2:
            sink *= LOG2E
        top = tl.maximum(top, sink)
    # several lanes have the same sums, and none may be contracted with a product of its own
    total = tl.sum(rounded_product(exp(tops - top, MASK), totals), 0)
    if SINKS:
        total += exp(sink - top, MASK)
    if ROTATED:
        turned = _summed(partial_ptr, stats_ptr, 0, bulk_splits, top, channel, MASK, N, DV, CHANNELS, CHUNK)
        out = _summed(partial_ptr, stats_ptr, bulk_splits, splits, top, channel, MASK, N, DV, CHANNELS, CHUNK)
        out += rotate(turned, DV, 0)
    else:
        out = _summed(partial_ptr, stats_ptr, 0, splits, top, channel, MASK, N, DV, CHANNELS, CHUNK)
    out = out / tl.where(total == 0.0, 1.0, total)
    if SUMS:
        tl.store(sums_ptr + pid * 2, top)
        tl.store(sums_ptr + pid * 2 + 1, total)
    tl.store(out_ptr + pid * DV + channel, out.to(out_ptr.dtype.element_ty), mask=channel < DV)


@Kernel
@triton.jit(do_not_specialize=["bulk_splits", "splits", "column_blocks", "rows", "kv_heads", "query_length"])
def combine_kernel(
    partial_ptr,
    stats_ptr,
    out_ptr,
    sums_ptr,
    sinks_ptr,
    bulk_splits,
    splits,
    column_blocks,
    rows,
    kv_heads,
    query_length,
    SINKS: tl.constexpr,
    MASK: tl.constexpr,
    N: tl.constexpr,
    DV: tl.constexpr,
    CHANNELS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROTATED: tl.constexpr,
    EARLY: tl.constexpr,
    SUMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Merge the partial outputs of one query row: sum of exp(m_i - m) o_i over that of l_i.

    Grid: PARTS, of CHANNELS channels each, fastest, x query rows of a KV head x KV heads x batch; one warp each, as
    its sums then stay in registers.
    Output [batch * heads, rows, DV]. ROTATED: the first `bulk_splits` shares are sums of rotated values, which are
    rotated back once they are one sum. SINKS: each query head has a score more, in
    natural units, [kv_heads * query heads of a group]. EARLY: this kernel is started before
    `attend_kernel` ends, and waits for it. SUMS: m and the sum of weights against it, a sink's included, are
    stored as well, as [batch * heads, rows, 2].
    """
    if EARLY:
        gdc_wait()
    merge_row(
        (tl.program_id(0) // PARTS).to(tl.int64), partial_ptr, stats_ptr, out_ptr, sums_ptr, sinks_ptr,
        bulk_splits, splits, column_blocks, rows, kv_heads, query_length,
        SINKS, MASK, N, DV, CHANNELS, MAX_SPLITS, CHUNK, ROTATED, SUMS, tl.program_id(0) % PARTS * CHANNELS,
    )  # fmt: skip
