"""Writing pages: tokens of a step into tails and sinks, and pages that it fills into packed storage.

What is due a table on the device says (`paged.tables`), so a launch fits every step. A page is packed as
`storage` packs tiles; its tokens are in the sequence's tail or among the step's own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvmix_kernels.paged import tables
from kvmix_kernels.triton.kernels.fields import (
    RAW_BITS,
    TIERED,
    TILED,
    as_form,
    next_power_of_2,
    stored,
    words_per_token,
)
from kvmix_kernels.triton.kernels.forms import Form, Packing, Stored
from kvmix_kernels.triton.kernels.paged import COUNT, FIRST, PAGES, PAST, ROW, SINKS, TAIL
from kvmix_kernels.triton.kernels.storage import _flush, _key_sizes, _load_tokens, _store_order

DUE = tl.constexpr(tables.DUE)


@triton.jit
def _from_start(x, page, X: tl.constexpr, PAGE: tl.constexpr):
    """Pointers as if all pages of the sequence lay in a row before this one."""
    row = page.to(tl.int64) * PAGE
    if X.AXIS == 0:
        grid = row // X.GROUP * X.D
    else:
        grid = row * (X.D // X.GROUP)
    order = x.order
    if X.TURNED == TILED:
        order -= row // x.tile * X.D
    return Stored(
        x.qdata - row * words_per_token(X.BITS, X.KEPT, X.HIGH), x.scale - grid, x.zero - grid, x.residual, order,
        x.exact - row * X.RAW, x.tile,
    )  # fmt: skip


@triton.jit
def _copy_page(
    new_ptr, new_sl, ring_ptr, out_ptr, page, part, parts, past, ring,
    X: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Part of a page in a format that stays raw."""
    channel = tl.arange(0, X.DP)
    for start in range(part * TOKENS, PAGE, parts * TOKENS):
        row = start + tl.arange(0, TOKENS)
        at = tl.minimum(row, PAGE - 1)
        fresh_from = past - page * PAGE
        x = _load_tokens(
            new_ptr - fresh_from.to(tl.int64) * new_sl, new_sl, ring_ptr, at, fresh_from, page * PAGE, ring,
            channel, channel < X.D, X.D, X.D, 1, True,
        )[0]  # fmt: skip
        out = out_ptr + at[:, None] * X.D + channel[None, :]
        tl.store(out, x.to(out_ptr.dtype.element_ty), mask=(row < PAGE)[:, None] & (channel < X.D)[None, :])


@triton.jit
def _pack_one(
    new_ptr, new_sb, new_sh, tails_ptr, tails_sb, buffers, strides, valid_ptr, numbers_ptr, requests_ptr, due_ptr,
    pages_ptr, heads, tile, parts, ring,
    P: tl.constexpr, PAGE: tl.constexpr, VALID: tl.constexpr, ORDERS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """This program's share of one tensor: parts of tiles, or with ORDERS the orders of tiles."""
    X: tl.constexpr = P.X
    jobs = parts * heads
    for job in range(tl.program_id(0), tl.load(numbers_ptr) * jobs, tl.num_programs(0)):
        at = due_ptr + job // jobs * DUE
        request_ptr = requests_ptr + tl.load(at) * ROW
        page = tl.load(at + 1)
        head = (job // parts % heads).to(tl.int64)
        block = tl.load(pages_ptr + tl.load(request_ptr + PAGES) + page).to(tl.int64)
        past = tl.load(request_ptr + PAST)
        own = new_ptr + tl.load(request_ptr + FIRST).to(tl.int64) * new_sb + head * new_sh
        tail_ptr = tails_ptr + tl.load(request_ptr + TAIL).to(tl.int64) * tails_sb + head * ring * X.D
        x = stored(buffers, strides, block, head, tile)
        part = job % parts
        if X.BITS == RAW_BITS:
            _copy_page(own, new_sb, tail_ptr, x.residual, page, part, parts, past, ring, X, PAGE, TOKENS)
        else:
            # the first page has the sinks, which widen no group
            seen_ptr = valid_ptr + tl.where(page > 0, PAGE, 0) - page * PAGE
            in_tile = part
            tile_index = page * (PAGE // tile)
            if ORDERS:
                tile_index += part
                first = tile_index * tile
                fresh_from = past - first
                T: tl.constexpr = Form(
                    TIERED, 0, P.TOKENS, X.D, 1, next_power_of_2(X.D), X.D, X.D, False, 0, 0
                )
                score = _key_sizes(
                    own - fresh_from.to(tl.int64) * new_sb, new_sb, tail_ptr, seen_ptr, 1, 0.0, fresh_from, first,
                    ring, 0, T, TOKENS, VALID,
                ).to(tl.float32)  # fmt: skip
                _store_order(x.order + part * X.D, score, X.D, X.APART)
            else:
                in_tile = part % (parts // (PAGE // tile))
                tile_index += part // (parts // (PAGE // tile))
                y = _from_start(x, page, X, PAGE)
                z = Stored(y.qdata, y.scale, y.zero, tail_ptr, y.order, y.exact, tile)
                _flush(
                    own, new_sb, z, seen_ptr, 1, 0.0, tile_index, in_tile, (page + 1) * PAGE, past, 0, ring,
                    P, VALID, True,
                )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "k_tile", "v_tile", "k_parts", "v_parts", "ring"])
def pack_pages_kernel(
    keys_ptr, values_ptr, k_buffers, v_buffers, k_tails_ptr, v_tails_ptr, valid_ptr, numbers_ptr, requests_ptr,
    due_ptr, pages_ptr, keys_sb, keys_sh, values_sb, values_sh, k_strides, v_strides, tails_sb, heads,
    k_tile, k_parts, v_tile, v_parts, ring,
    PAGE: tl.constexpr, VALID: tl.constexpr, K_ORDERS: tl.constexpr, V_ORDERS: tl.constexpr, TOKENS: tl.constexpr,
    K_FORM: tl.constexpr, K_SCALE: tl.constexpr, K_FIELDS: tl.constexpr, K_WORDS: tl.constexpr, K_WORDS_P: tl.constexpr,
    K_TOKENS: tl.constexpr, K_MARGIN: tl.constexpr, K_MARGIN_HIGH: tl.constexpr,
    V_FORM: tl.constexpr, V_SCALE: tl.constexpr, V_FIELDS: tl.constexpr, V_WORDS: tl.constexpr, V_WORDS_P: tl.constexpr,
    V_TOKENS: tl.constexpr, V_MARGIN: tl.constexpr, V_MARGIN_HIGH: tl.constexpr,
):  # fmt: skip
    """Pack the pages that are due, keys and values of one layer.

    Grid: as many programs as fill the GPU; most steps of one token a sequence fill few pages. `parts` programs
    share a page and head, as many for each of its tiles. valid: of the tokens of a first page, then of any other.
    K_ORDERS, V_ORDERS: instead, choose the orders of tiles (TOKENS at a time), where these are of tiles.
    """
    K: tl.constexpr = Packing(
        as_form(K_FORM), K_SCALE, K_FIELDS, K_WORDS, K_WORDS_P, K_TOKENS, K_MARGIN, K_MARGIN_HIGH,
    )  # fmt: skip
    V: tl.constexpr = Packing(
        as_form(V_FORM), V_SCALE, V_FIELDS, V_WORDS, V_WORDS_P, V_TOKENS, V_MARGIN, V_MARGIN_HIGH,
    )  # fmt: skip
    if K_ORDERS or not V_ORDERS:
        _pack_one(
            keys_ptr, keys_sb, keys_sh, k_tails_ptr, tails_sb, k_buffers, k_strides, valid_ptr, numbers_ptr,
            requests_ptr, due_ptr, pages_ptr, heads, k_tile, k_parts, ring, K, PAGE, VALID, K_ORDERS, TOKENS,
        )  # fmt: skip
    if V_ORDERS or not K_ORDERS:
        _pack_one(
            values_ptr, values_sb, values_sh, v_tails_ptr, tails_sb, v_buffers, v_strides, valid_ptr, numbers_ptr,
            requests_ptr, due_ptr, pages_ptr, heads, v_tile, v_parts, ring, V, PAGE, VALID, V_ORDERS, TOKENS,
        )  # fmt: skip


@triton.jit
def _keep(
    new_ptr, new_sl, tail_ptr, sinks_ptr, index, count, past, sink, ring, D: tl.constexpr, DP: tl.constexpr
):
    channel = tl.arange(0, DP)[None, :]
    ok = (index < count)[:, None] & (channel < D)
    position = past + index
    x = tl.load(new_ptr + index.to(tl.int64)[:, None] * new_sl + channel, mask=ok, other=0.0)
    last = (index >= count - ring)[:, None]
    tl.store(
        tail_ptr + (position % ring)[:, None] * D + channel, x.to(tail_ptr.dtype.element_ty), mask=ok & last
    )
    first = (position < sink)[:, None]
    tl.store(sinks_ptr + position[:, None] * D + channel, x.to(sinks_ptr.dtype.element_ty), mask=ok & first)


@triton.jit(do_not_specialize=["heads", "blocks", "sink", "ring"])
def keep_kernel(
    keys_ptr, values_ptr, k_tails_ptr, v_tails_ptr, k_sinks_ptr, v_sinks_ptr, requests_ptr,
    keys_sb, keys_sh, values_sb, values_sh, tails_sb, sinks_sb, heads, blocks, sink, ring,
    K_D: tl.constexpr, K_DP: tl.constexpr, V_D: tl.constexpr, V_DP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Keep a step's tokens raw: the last of each sequence in its tail, the first in its sinks.

    Grid: blocks of TOKENS tokens, fastest, x heads x sequences.
    """
    pid = tl.program_id(0)
    head = (pid // blocks % heads).to(tl.int64)
    request_ptr = requests_ptr + pid // blocks // heads * ROW
    count = tl.load(request_ptr + COUNT)
    start = pid % blocks * TOKENS
    if start < count:
        index = start + tl.arange(0, TOKENS)
        past = tl.load(request_ptr + PAST)
        own = tl.load(request_ptr + FIRST).to(tl.int64)
        tail = tl.load(request_ptr + TAIL).to(tl.int64) * tails_sb
        sinks = tl.load(request_ptr + SINKS).to(tl.int64) * sinks_sb
        _keep(
            keys_ptr + own * keys_sb + head * keys_sh, keys_sb, k_tails_ptr + tail + head * ring * K_D,
            k_sinks_ptr + sinks + head * sink * K_D, index, count, past, sink, ring, K_D, K_DP,
        )  # fmt: skip
        _keep(
            values_ptr + own * values_sb + head * values_sh, values_sb, v_tails_ptr + tail + head * ring * V_D,
            v_sinks_ptr + sinks + head * sink * V_D, index, count, past, sink, ring, V_D, V_DP,
        )  # fmt: skip
