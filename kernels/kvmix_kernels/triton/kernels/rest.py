"""Tokens wherever they lie: sink, window, the step's own, and all tokens of formats without a bulk path."""

from __future__ import annotations

import triton
import triton.language as tl

from kvmix_kernels.triton.kernels.fields import stored_values
from kvmix_kernels.triton.kernels.masks import LOWEST, capped, exp, under_mask


@triton.jit
def attend_rest(
    query_ptr, k, v, k_places, v_places, new_k_ptr, new_v_ptr, new_k_stride, new_v_stride, mask, partial_ptr,
    stats_ptr, begin, end, gap_at, gap, scale, cap, K: tl.constexpr, V: tl.constexpr, S: tl.constexpr, N: tl.constexpr,
    NEW: tl.constexpr, PACKED: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens begin..end-1 of those outside the bulk; token i is at position i, or i + gap behind gap_at.

    `query_ptr` is that of each column. K and V are `Form`s, S is a `Scores`.
    """
    channel = tl.arange(0, K.DP)
    v_channel = tl.arange(0, V.DP)
    token = tl.arange(0, TOKENS)
    q = tl.load(
        query_ptr[None, :] + channel[:, None],
        mask=mask.column_ok[None, :] & (channel < K.D)[:, None],
        other=0.0,
    ).to(DTYPE)
    top = tl.zeros([N], tl.float32) + LOWEST
    total = tl.zeros([N], tl.float32)
    out = tl.zeros([V.DP, N], tl.float32)
    for first in tl.range(begin, end, TOKENS, num_stages=STAGES):
        index = first + token
        ok = index < end
        position = tl.where(index < gap_at, index, index + gap)
        key = stored_values(
            k, new_k_ptr, new_k_stride, position[:, None], channel[None, :],
            ok[:, None] & (channel < K.D)[None, :], k_places, K, NEW, PACKED, DTYPE,
        )  # fmt: skip
        value = stored_values(
            v, new_v_ptr, new_v_stride, position[None, :], v_channel[:, None],
            ok[None, :] & (v_channel < V.D)[:, None], v_places, V, NEW, PACKED, DTYPE,
        )  # fmt: skip
        score = tl.dot(key, q, input_precision=PRECISION) * scale
        if S.CAPPED:
            score = capped(score, cap)
        score = under_mask(score, mask, position, ok, S)
        new_top = tl.maximum(top, tl.max(score, 0))
        fade = exp(top - new_top, S.KIND)
        weight = exp(score - new_top[None, :], S.KIND)
        total = total * fade + tl.sum(weight, 0)
        top = new_top
        out = tl.dot(value, weight.to(DTYPE), out * fade[None, :], input_precision=PRECISION)
    column = tl.arange(0, N)
    tl.store(
        partial_ptr + column[None, :] * V.D + v_channel[:, None],
        out,
        mask=(v_channel < V.D)[:, None] & mask.column_ok[None, :],
    )
    tl.store(stats_ptr + column, top)
    tl.store(stats_ptr + N + column, total)
