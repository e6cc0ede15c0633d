"""Decode attention over pages, read through a table: one query token of each of many sequences.

A program has one KV head of one sequence and a share of its pages, which it reads where they lie. It yields the
softmax over them alone, with its log-sum-exp; the launcher merges shares and raw tokens. Codes are unpacked in
registers (`fields.packed_values`), so every format that a page can have is read alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmix_kernels.triton.kernels.fields import RAW_BITS, TILED, as_form, packed_values, stored

LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _rows(x, row, channel, ok, X: tl.constexpr, DTYPE: tl.constexpr):
    """Rows of one page as numbers, in the channels that they are packed in."""
    if X.BITS == RAW_BITS:
        value = tl.load(x.residual + row * X.D + channel, mask=ok, other=0.0)
    else:
        value = packed_values(x, row, channel, ok, 0, X)
    return value.to(DTYPE)


@triton.jit
def _queries(query_ptr, query_sh, order_ptr, column, channel, ok, TURNED: tl.constexpr, DTYPE: tl.constexpr):
    """Queries [N, channels] as keys are packed: in their order, if they have one."""
    own = channel
    if TURNED != 0:
        own = tl.load(order_ptr + channel).to(tl.int32)
    return tl.load(query_ptr + column * query_sh + own, mask=ok, other=0.0).to(DTYPE)


@triton.jit(do_not_specialize=["heads", "splits", "sink", "k_tile", "v_tile"])
def paged_kernel(
    query_ptr, k_buffers, v_buffers, pages_ptr, starts_ptr, out_ptr, lse_ptr, query_sb, query_sh, k_strides, v_strides,
    heads, splits, sink, k_tile, v_tile, scale, cap, K_FORM: tl.constexpr, V_FORM: tl.constexpr,
    ROWS: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr, PAGE: tl.constexpr, CAPPED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax of one query token over a share of a sequence's pages.

    Grid: splits, fastest, x KV heads x sequences. ROWS query heads share a KV head, padded to N. Sequence b has
    the pages pages[starts[b]:starts[b + 1]]; the first `sink` rows of its first one do not count. Steps of TOKENS
    tokens divide a PAGE and a tile. out [sequences, heads * ROWS, splits, D] in the packed values' own channels,
    lse [sequences, heads * ROWS, splits]; minus infinity and zeros for a share without pages.
    """
    K: tl.constexpr = as_form(K_FORM)
    V: tl.constexpr = as_form(V_FORM)
    pid = tl.program_id(0).to(tl.int64)
    split = pid % splits
    head = pid // splits % heads
    owner = pid // splits // heads
    first = tl.load(starts_ptr + owner)
    count = tl.load(starts_ptr + owner + 1) - first
    share = (count + splits - 1) // splits
    begin = split * share
    end = tl.minimum(begin + share, count)

    column = tl.arange(0, N)[:, None]
    column_ok = column < ROWS
    token = tl.arange(0, TOKENS)
    k_channel = tl.arange(0, K.DP)[None, :]
    v_channel = tl.arange(0, V.DP)[None, :]
    query_ptr += owner * query_sb + head * ROWS * query_sh
    if K.TURNED != TILED:
        # an order of the plan is that of all pages
        order_ptr = stored(k_buffers, k_strides, 0, head, k_tile).order
        fixed = _queries(
            query_ptr, query_sh, order_ptr, column, k_channel, column_ok & (k_channel < K.D), K.TURNED, DTYPE
        )

    best = tl.zeros([N], tl.float32) + LOWEST
    total = tl.zeros([N], tl.float32)
    out = tl.zeros([N, V.DP], tl.float32)
    for place in range(begin, end):
        page = tl.load(pages_ptr + first + place).to(tl.int64)
        k = stored(k_buffers, k_strides, page, head, k_tile)
        v = stored(v_buffers, v_strides, page, head, v_tile)
        for block in range(PAGE // TOKENS):
            row = block * TOKENS + token
            if K.TURNED == TILED:
                own = k.order + block * TOKENS // k_tile * K.D
                query = _queries(
                    query_ptr,
                    query_sh,
                    own,
                    column,
                    k_channel,
                    column_ok & (k_channel < K.D),
                    K.TURNED,
                    DTYPE,
                )
            else:
                query = fixed
            keys = _rows(k, row[:, None], k_channel, k_channel < K.D, K, DTYPE)
            score = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
            if CAPPED:
                # cap * tanh(score / cap) by one exponential of a number that is not positive
                small = tl.exp2(tl.abs(score) * (-2.0 / LN2) / cap)
                size = cap * (1.0 - small) / (1.0 + small)
                score = tl.where(score < 0, -size, size)
            counts = place * PAGE + row >= sink
            score = tl.where(counts[None, :], score, -float("inf"))
            merged = tl.maximum(best, tl.max(score, 1))
            fade = tl.exp2(best - merged)
            weight = tl.exp2(score - merged[:, None])
            best = merged
            total = total * fade + tl.sum(weight, 1)
            values = _rows(v, row[:, None], v_channel, v_channel < V.D, V, DTYPE)
            out = out * fade[:, None] + tl.dot(weight.to(DTYPE), values, input_precision=PRECISION)

    used = total > 0
    out = out / tl.where(used, total, 1.0)[:, None]
    lse = tl.where(used, (best + tl.log2(tl.where(used, total, 1.0))) * LN2, -float("inf"))
    row = (owner * heads + head) * ROWS + tl.arange(0, N)
    tl.store(lse_ptr + row * splits + split, lse, mask=tl.arange(0, N) < ROWS)
    at = out_ptr + (row * splits + split)[:, None] * V.D + v_channel
    tl.store(at, out, mask=column_ok & (v_channel < V.D))
