"""Tokens wherever they lie: sink, window, the step's own, and all tokens of formats without a bulk path."""

from __future__ import annotations

import triton
import triton.language as tl

from kvmix_kernels.triton.kernels.fields import (
    ORDERED,
    RAW_BITS,
    ROTATED,
    TILED,
    packed_values,
    rotate,
    stored_values,
)
from kvmix_kernels.triton.kernels.masks import LOWEST, capped, exp, under_mask


@triton.jit
def _by_tile(
    score, key, query_ptr, k, tile, packed, column_ok, K: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Scores plus the products of queries and packed keys, each in the order of its tile."""
    channel = tl.arange(0, K.DP)
    first = tl.min(tl.where(packed, tile, 1 << 30), 0)
    for t in range(first, tl.max(tl.where(packed, tile, -1), 0) + 1):
        at = tl.load(k.order + t * K.D + channel, mask=channel < K.D, other=0).to(tl.int32)
        q = tl.load(
            query_ptr[None, :] + at[:, None],
            mask=column_ok[None, :] & (channel < K.D)[:, None],
            other=0.0,
        )
        own = tl.where((tile == t)[:, None], key, 0.0)
        score = tl.dot(own.to(DTYPE), q.to(DTYPE), score, input_precision=PRECISION)
    return score


@triton.jit
def attend_rest(
    query_ptr, k, v, k_places, v_places, new_k_ptr, new_v_ptr, new_k_stride, new_v_stride, mask, slots, kept, partial_ptr,
    stats_ptr, begin, end, gap_at, gap, scale, cap, K: tl.constexpr, V: tl.constexpr, S: tl.constexpr, N: tl.constexpr,
    NEW: tl.constexpr, PACKED: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens begin..end-1 of those outside the bulk; token i is at position i, or i + gap behind gap_at.

    Of a high tier they are turns, and tokens those of its `slots`.
    `query_ptr` is that of each column. K and V are `Form`s, S is a `Scores`. Packed tokens whose channels are not
    the model's are multiplied with queries turned likewise, and summed by themselves.
    """
    K_APART: tl.constexpr = PACKED and K.BITS != RAW_BITS and K.TURNED != 0
    V_APART: tl.constexpr = PACKED and V.BITS != RAW_BITS and V.TURNED != 0
    channel = tl.arange(0, K.DP)
    v_channel = tl.arange(0, V.DP)
    token = tl.arange(0, TOKENS)
    q = tl.load(
        query_ptr[None, :] + channel[:, None],
        mask=mask.column_ok[None, :] & (channel < K.D)[:, None],
        other=0.0,
    ).to(DTYPE)
    q_turned = q
    if K_APART:
        if K.TURNED == ORDERED:
            at = tl.load(k.order + channel, mask=channel < K.D, other=0)
            q_turned = tl.load(
                query_ptr[None, :] + at[:, None],
                mask=mask.column_ok[None, :] & (channel < K.D)[:, None],
                other=0.0,
            ).to(DTYPE)
        elif K.TURNED == ROTATED:
            q_turned = rotate(q.to(tl.float32), K.D, 0).to(DTYPE)
    top = tl.zeros([N], tl.float32) + LOWEST
    total = tl.zeros([N], tl.float32)
    out = tl.zeros([V.DP, N], tl.float32)
    turned = tl.zeros([V.DP, N], tl.float32)
    for first in tl.range(begin, end, TOKENS, num_stages=STAGES):
        step = first
        if S.PLACED:
            # what is empty is mostly behind: all programs get some of it
            step = first * slots.splits + slots.split * TOKENS
        index = step + token
        if S.PLACED:
            position = index
            seen_at = tl.load(slots.positions + index, mask=index < slots.count, other=-1)
            ok = (seen_at >= slots.sink) & (seen_at < slots.end)
        else:
            ok = index < end
            position = tl.where(index < gap_at, index, index + gap)
            seen_at = position
            if S.SKIP and PACKED:
                low = ok & (position >= k_places.sink) & (position < k_places.end)
                ok = ok & (tl.load(mask.skip + (position - k_places.sink), mask=low, other=0) == 0)
        key = stored_values(
            k, new_k_ptr, new_k_stride, position[:, None], channel[None, :],
            ok[:, None] & (channel < K.D)[None, :], k_places, K, NEW, PACKED and not K_APART, DTYPE,
        )  # fmt: skip
        value = stored_values(
            v, new_v_ptr, new_v_stride, position[None, :], v_channel[:, None],
            ok[None, :] & (v_channel < V.D)[:, None], v_places, V, NEW, PACKED and not V_APART, DTYPE,
        )  # fmt: skip
        score = tl.dot(key, q, input_precision=PRECISION)
        if K_APART:
            packed = ok & (position >= k_places.sink) & (position < k_places.end)
            key = packed_values(
                k, position[:, None], channel[None, :], packed[:, None] & (channel < K.D)[None, :], k_places.sink, K
            )  # fmt: skip
            if K.TURNED == TILED:
                score = _by_tile(
                    score, key, query_ptr, k, (position - k_places.sink) // k.tile, packed, mask.column_ok,
                    K, DTYPE, PRECISION,
                )  # fmt: skip
            else:
                score = tl.dot(key.to(DTYPE), q_turned, score, input_precision=PRECISION)
        score = score * scale
        if S.CAPPED:
            score = capped(score, cap)
        score = under_mask(score, mask, seen_at, ok, S)
        new_top = tl.maximum(top, tl.max(score, 0))
        fade = exp(top - new_top, S.KIND)
        weight = exp(score - new_top[None, :], S.KIND)
        total = total * fade + tl.sum(weight, 0)
        top = new_top
        if S.KEPT:
            column = tl.arange(0, N)
            at = index - kept.first
            inside = at >= 0
            if S.PLACED:
                inside &= index < slots.count
            else:
                inside &= index < end
            tl.store(
                kept.weights + at[:, None] * kept.rows + column[None, :],
                weight.to(tl.float16),
                mask=inside[:, None] & (column < kept.rows)[None, :],
            )
            tl.store(kept.tops + step // TOKENS * N + column, top)
        out = tl.dot(value, weight.to(DTYPE), out * fade[None, :], input_precision=PRECISION)
        if V_APART:
            packed = ok & (position >= v_places.sink) & (position < v_places.end)
            value = packed_values(
                v, position[None, :], v_channel[:, None], packed[None, :] & (v_channel < V.D)[:, None], v_places.sink, V
            )  # fmt: skip
            turned = tl.dot(
                value.to(DTYPE), weight.to(DTYPE), turned * fade[None, :], input_precision=PRECISION
            )
    column = tl.arange(0, N)
    if V_APART and V.TURNED == ROTATED:
        out += rotate(turned, V.D, 0)
    out_ok = (v_channel < V.D)[:, None] & mask.column_ok[None, :]
    tl.store(partial_ptr + column[None, :] * V.D + v_channel[:, None], out, mask=out_ok)
    if V_APART and V.TURNED == ORDERED:
        # other threads stored the channels that are added to
        tl.debug_barrier()
        at = tl.load(v.order + v_channel, mask=v_channel < V.D, other=0)
        out_ptr = partial_ptr + column[None, :] * V.D + at[:, None]
        tl.store(out_ptr, tl.load(out_ptr, mask=out_ok, other=0.0) + turned, mask=out_ok)
    tl.store(stats_ptr + column, top)
    tl.store(stats_ptr + N + column, total)
