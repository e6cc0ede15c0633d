"""Attention over the tokens of a high tier, beside `attend.attend_kernel`, and what both launches end with."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvmix_kernels.triton.kernels.fields import as_form, packed_end_of, stored
from kvmix_kernels.triton.kernels.forms import Kept, Mask, Places, Scores, Slots
from kvmix_kernels.triton.kernels.masks import LOG2E, LOWEST, exp, rounded_product
from kvmix_kernels.triton.kernels.merge import merge_row
from kvmix_kernels.triton.kernels.rest import attend_rest


@triton.jit(do_not_specialize=["query_rows", "query_heads", "query_length", "heads", "count"])
def balance_kernel(
    query_ptr, keys_ptr, factor_ptr, balanced_query_ptr, balanced_keys_ptr, query_sb, query_sh, query_sl, keys_sb, keys_sh, keys_sl,
    factor_sb, factor_sh, query_rows, query_heads, query_length, heads, count, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """`tokens.places.balanced_query` and `balanced_keys`, the same bits. Grid: rows of queries, then those of keys."""
    pid = tl.program_id(0)
    channel = tl.arange(0, DP)
    ok = channel < D
    if pid < query_rows:
        batch = (pid // query_length // query_heads).to(tl.int64)
        head = pid // query_length % query_heads
        factor_ptr += batch * factor_sb + head // (query_heads // heads) * factor_sh
        x_ptr = query_ptr + batch * query_sb + head * query_sh + pid % query_length * query_sl
        x = tl.load(x_ptr + channel, mask=ok, other=0.0).to(tl.float32)
        # a power of two: this is exact, however it is done
        x = x / tl.load(factor_ptr + channel, mask=ok, other=1.0)
        out_ptr = balanced_query_ptr + pid.to(tl.int64) * D + channel
        tl.store(out_ptr, x.to(out_ptr.dtype.element_ty), mask=ok)
    else:
        row = pid - query_rows
        batch = (row // count // heads).to(tl.int64)
        head = row // count % heads
        x_ptr = keys_ptr + batch * keys_sb + head * keys_sh + row % count * keys_sl
        x = tl.load(x_ptr + channel, mask=ok, other=0.0).to(tl.float32)
        x = x * tl.load(factor_ptr + batch * factor_sb + head * factor_sh + channel, mask=ok, other=1.0)
        out_ptr = balanced_keys_ptr + row.to(tl.int64) * D + channel
        tl.store(out_ptr, x.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(
    do_not_specialize=[
        "kv_heads", "rows", "query_length", "length", "count", "tile", "sink", "window", "low_splits", "splits",
    ]
)  # fmt: skip
def high_kernel(
    query_ptr, k_buffers, v_buffers, positions_ptr, mask_ptr, start_ptr, weights_ptr, tops_ptr, partial_ptr, stats_ptr,
    query_sb, query_sh, query_sl, k_strides, v_strides, positions_sb, positions_sh, mask_sb, mask_sh, mask_sl, mask_ss,
    kv_heads, rows, query_length, length, count, tile, sink, window, low_splits, splits, kept_count, tops_count,
    scale, cap,
    ON_DEVICE: tl.constexpr, MASK: tl.constexpr, MASK_SHARED: tl.constexpr, CAPPED: tl.constexpr, KEPT: tl.constexpr,
    K_FORM: tl.constexpr, V_FORM: tl.constexpr, PACKED: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Partial attention of one share of the `count` slots, for up to N query rows of one KV head.

    Grid: splits of the slots, fastest, x KV heads x batch. Writes the parts behind the first `low_splits` of
    `splits`, as `attend_kernel` does, and weights of all slots (`Kept`). EARLY: this kernel is started beside
    the end of `attend_kernel`, from which it needs nothing; its last program waits for it, so that who waits for
    this kernel waits for both.
    """
    K: tl.constexpr = as_form(K_FORM)
    V: tl.constexpr = as_form(V_FORM)
    S: tl.constexpr = Scores(MASK, MASK_SHARED, CAPPED, False, True, KEPT)
    if EARLY:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    own = splits - low_splits
    split = pid % own
    owner = pid // own
    head = (owner % kv_heads).to(tl.int64)
    batch = (owner // kv_heads).to(tl.int64)
    live = length
    if ON_DEVICE:
        live = tl.minimum(tl.load(start_ptr).to(tl.int32), length)
    place = owner.to(tl.int64) * splits + low_splits + split
    partial_ptr += place * (N * V.D)
    stats_ptr += place * (2 * N)

    column = tl.arange(0, N)
    query_head = head * (rows // query_length) + column // query_length
    query_ptr += batch * query_sb + query_head * query_sh + (column % query_length) * query_sl
    mask_at = column
    if MASK != 0:
        mask_ptr += batch * mask_sb
        if not MASK_SHARED:
            mask_ptr += head * (rows // query_length) * mask_sh
            mask_at = column // query_length * mask_sh + column % query_length * mask_sl
    mask = Mask(mask_ptr, mask_at, mask_ss, column < rows, mask_ptr)
    end = packed_end_of(live, tile, sink, window)
    slots = Slots(positions_ptr + batch * positions_sb + head * positions_sh, count, split, own, sink, end)
    kept = Kept(
        weights_ptr + owner.to(tl.int64) * kept_count * rows, tops_ptr + owner.to(tl.int64) * tops_count * N, 0, rows
    )  # fmt: skip
    k = stored(k_buffers, k_strides, batch, head, 1)
    v = stored(v_buffers, v_strides, batch, head, 1)
    turns = tl.cdiv(tl.cdiv(count, TOKENS) - split, own)
    # every slot is a token of the tier's own format: raw, or packed from the first on
    attend_rest(
        query_ptr, k, v, Places(count, count, 0, 1), Places(count, count, 0, 1), query_ptr, query_ptr, 0, 0,
        mask, slots, kept, partial_ptr, stats_ptr, 0, turns * TOKENS, 0, 0, scale, cap, K, V, S, N,
        False, PACKED, TOKENS, STAGES, DTYPE, PRECISION,
    )  # fmt: skip
    if EARLY:
        if pid == tl.num_programs(0) - 1:
            gdc_wait()


@triton.jit
def _mass(
    weights_ptr, tops_ptr, token, step, ok, top, factor, rows,
    MASK: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The attention of all rows to tokens of which weights were stored."""
    row = tl.arange(0, R)
    seen = ok[:, None] & (row < rows)[None, :]
    weight = tl.load(weights_ptr + token[:, None] * rows + row[None, :], mask=seen, other=0.0).to(tl.float32)
    was = tl.load(tops_ptr + step[:, None] * N + row[None, :], mask=seen, other=LOWEST)
    return tl.sum(rounded_product(weight * exp(was - top[None, :], MASK), factor[None, :]), 1)


@triton.jit(
    do_not_specialize=[
        "bulk_splits", "splits", "rows", "kv_heads", "query_length", "length", "new_count", "slots", "tile", "sink",
        "window", "ring", "merging", "high_tops",
    ]
)  # fmt: skip
def finish_kernel(
    partial_ptr, stats_ptr, out_ptr, sinks_ptr, start_ptr, weights_ptr, tops_ptr, mass_ptr,
    bulk_splits, splits, rows, kv_heads, query_length, length, new_count, slots, tile, sink, window, ring, merging, high_tops, tops_count,
    SINKS: tl.constexpr, MASK: tl.constexpr, N: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, CHANNELS: tl.constexpr,
    MAX_SPLITS: tl.constexpr, CHUNK: tl.constexpr, ROTATED: tl.constexpr, EARLY: tl.constexpr, ON_DEVICE: tl.constexpr,
    BULK: tl.constexpr, HIGH_TOKENS: tl.constexpr, REST_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `merge.combine_kernel` does, and the attention that tokens got which are or may come into the high tier.

    Grid: `merging` programs of the first kind, one a query row, then those of the other: blocks of tokens, fastest, x
    KV heads x batch. mass [batch * heads, slots + ring + new_count] has slots, ring slots and the step's own tokens;
    weights are in the same order but for raw tokens, which begin with the first behind the packed ones.
    """
    pid = tl.program_id(0)
    if EARLY:
        gdc_wait()
    if pid < merging:
        merge_row(
            pid.to(tl.int64), partial_ptr, stats_ptr, out_ptr, stats_ptr, sinks_ptr,
            bulk_splits, splits, 1, rows, kv_heads, query_length,
            SINKS, MASK, N, DV, CHANNELS, MAX_SPLITS, CHUNK, ROTATED, False,
        )  # fmt: skip
    else:
        count = slots + ring + new_count
        blocks = tl.cdiv(count, BLOCK)
        owner = ((pid - merging) // blocks).to(tl.int64)
        place = (pid - merging) % blocks * BLOCK + tl.arange(0, BLOCK)
        # the largest score of each row, and one over the sum of its weights
        row = tl.arange(0, R)
        split = tl.arange(0, MAX_SPLITS)
        at = stats_ptr + (owner * splits + split)[:, None] * (2 * N) + row[None, :]
        seen = (split < splits)[:, None] & (row < rows)[None, :]
        tops = tl.load(at, mask=seen, other=LOWEST)
        totals = tl.load(at + N, mask=seen, other=0.0)
        top = tl.max(tops, 0)
        if SINKS:
            query_head = owner % kv_heads * (rows // query_length) + row // query_length
            learned = tl.load(sinks_ptr + query_head, mask=row < rows, other=0.0).to(tl.float32)
            if MASK != 2:
                learned *= LOG2E
            top = tl.maximum(top, learned)
        total = tl.sum(rounded_product(totals, exp(tops - top[None, :], MASK)), 0)
        if SINKS:
            total += exp(learned - top, MASK)
        factor = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))

        live = length
        if ON_DEVICE:
            live = tl.minimum(tl.load(start_ptr).to(tl.int32), length)
        end = packed_end_of(live, tile, sink, window)
        # ring slot r has the token whose place behind the first raw one, plus the packed ones, is r
        turned = (end - sink) % ring
        behind = (place - slots - turned + ring) % ring
        raw = tl.where(place < slots + ring, behind, place - slots - ring + live - end)
        is_raw = (place >= slots) & (place < count) & ((place >= slots + ring) | (end + raw < live))
        # new tokens that are sinks compete with nobody
        is_raw &= raw >= 0
        weights_ptr += owner * count * rows
        tops_ptr += owner * tops_count * N
        # of raw tokens, steps are counted from the first token that the others' programs take
        first = end
        if BULK:
            first = sink
        token = tl.where(place < slots, place, slots + raw)
        step = tl.where(place < slots, place // HIGH_TOKENS, high_tops + (raw + first) // REST_TOKENS)
        found = _mass(
            weights_ptr, tops_ptr, token, step, (place < slots) | is_raw, top, factor, rows, MASK, N, R
        )
        tl.store(mass_ptr + owner * count + place, found, mask=place < count)
