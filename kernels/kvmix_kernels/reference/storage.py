"""Filling and reading the buffers of one cached tensor: the specification.

All functions work on plain tensors and host lengths; `layout` says where each token lies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.cached import Cached
from kvmix_kernels.errors import CacheShapeError
from kvmix_kernels.layout import TensorFormat
from kvmix_kernels.reference import quantize as q

BLOCK_ELEMENTS = 1 << 21
"""Elements that are rounded at a time, over batch and heads: bounds the memory of a long prefill."""


def valid_tokens(mask: Tensor | None, batch: int) -> Tensor | None:
    """Which tokens the newest query attends to, bool [B, S], from a boolean or additive mask.

    The mask broadcasts to [B, Hq, Lq, S]. Padding is what no query may see; the last query sees
    every other token, so its row tells them apart.
    """
    if mask is None:
        return None
    row = mask[..., -1, :]
    if row.dtype != torch.bool:
        row = row > torch.finfo(row.dtype).min / 2
    while row.dim() < 3:
        row = row.unsqueeze(0)
    return row.any(1).expand(batch, -1)


def append(cached: Cached, x: Tensor, valid: Tensor | None, length: int, query: Tensor | None = None) -> None:
    """Store tokens `length`, `length + 1`, ... and flush every tile that left the window.

    Args:
        cached: large enough for the new length; written in place.
        x: new tokens, [B, H, Lq, D].
        valid: bool [B, at least length + Lq] over token positions, or None.
        length: tokens stored before.
        query: queries of this step, [B, Hq, Lq, D]. Where the format says so, an order of channels is chosen
            from them with the first tiles, and without them channels keep the order that they have; or orders
            of tiles from all of them so far, and without any from keys alone. Of attention across, whose
            queries are of other tokens, they choose the first order and none of a tile.
    """
    fmt, residual = cached.format, cached.residual
    if x.shape[:2] != residual.shape[:2] or x.shape[3] != residual.shape[3]:
        raise CacheShapeError(
            f"cannot append tokens of shape {list(x.shape)} to a cache with batch, heads and head size "
            f"{[*residual.shape[:2], residual.shape[3]]}"
        )
    end = length + x.shape[2]
    old, new = fmt.packed_tiles(length), fmt.packed_tiles(end)
    totals = see_queries(cached, valid, length, end, of_tokens(query, x))
    if new > old:
        order_from_prompt(cached, x, valid, length, query)
        per_tile = residual.shape[0] * residual.shape[1] * residual.shape[3] * fmt.tile
        step = max(1, BLOCK_ELEMENTS // max(1, per_tile))
        for tile in range(old, new, step):
            stop = min(new, tile + step)
            part = None if totals is None else totals[:, :, tile - old : stop - old]
            _flush(cached, x, valid, length, tile, stop, part)
    if length < fmt.sink and not fmt.is_raw:
        stop = min(fmt.sink, end)
        residual[:, :, length:stop] = x[:, :, : stop - length]
    begin = length if fmt.is_raw else max(length, fmt.packed_end(end))
    for start, stop, slot in runs(begin, end, fmt):
        residual[:, :, slot : slot + stop - start] = x[:, :, start - length : stop - length]


def of_tokens(query: Tensor | None, x: Tensor) -> Tensor | None:
    """The queries if they are of the tokens x, None if they are of others."""
    return None if query is None or query.shape[2] != x.shape[2] else query


def order_from_prompt(
    cached: Cached,
    x: Tensor,
    valid: Tensor | None,
    length: int,
    query: Tensor | None,
    ranges: Callable[[Tensor, Tensor | None, TensorFormat], Tensor] = q.ranges,
) -> None:
    """Choose the order of channels if it is the prompt's and `append` of these is to pack the first tiles.

    `ranges` does what `quantize.ranges` does.
    """
    fmt = cached.format
    end = length + x.shape[2]
    old, new = fmt.packed_tiles(length), fmt.packed_tiles(end)
    if fmt.order != layout.ORDER_PROMPT or old or not new or query is None:
        return
    first = _tokens(cached, x, length, fmt.sink, fmt.sink + new * fmt.tile)
    seen = None
    if valid is not None:
        seen = valid[:, fmt.sink : fmt.sink + new * fmt.tile]
        if of_tokens(query, x) is not None:
            query = query.masked_fill(~valid[:, length:end].view(len(query), 1, -1, 1), 0)
    assert cached.order is not None
    cached.order.copy_(q.order_by(ranges(first, seen, fmt), query, fmt))


def see_queries(
    cached: Cached, valid: Tensor | None, length: int, end: int, query: Tensor | None
) -> Tensor | None:
    """Add the sizes of a step's queries to those seen before, where the format has such a sum.

    Returns:
        What was seen until each tile that is due was, float64 [B, H, tiles, D]: it depends on tokens alone,
        not on the steps in which they came.
    """
    fmt, seen = cached.format, cached.seen
    if seen is None:
        return None
    if query is not None and valid is not None:
        query = query.masked_fill(~valid[:, length:end].view(len(query), 1, -1, 1), 0)
    # a cache that starts anew has seen nothing, whatever it held
    total, begin = seen.clone() if length else torch.zeros_like(seen), length
    totals: list[Tensor] = []
    for last in (*map(fmt.flushed_at, range(fmt.packed_tiles(length), fmt.packed_tiles(end))), end):
        if query is not None:
            total = total + q.query_size(query[:, :, begin - length : last - length], seen.shape[1])
        totals.append(total)
        begin = last
    seen.copy_(total)
    return torch.stack(totals, 2)[:, :, :-1]


def _flush(
    cached: Cached, x: Tensor, valid: Tensor | None, length: int, old: int, new: int, totals: Tensor | None
) -> None:
    """Pack tiles old..new-1, whose tokens are in the window or among the new ones."""
    fmt = cached.format
    first, last = fmt.sink + old * fmt.tile, fmt.sink + new * fmt.tile
    tokens = _tokens(cached, x, length, first, last)
    seen = None if valid is None else valid[:, first:last]
    order = cached.order
    if fmt.by_tile and order is not None:
        order[:, :, old:new] = q.order_of_tiles(tokens, seen, totals, fmt)
        order = order[:, :, old:new]
    codes, scale, zero_point = q.quantize(tokens, seen, fmt, order)
    cached.qdata[:, :, old * fmt.tile : new * fmt.tile] = q.pack(
        codes, fmt.code, layout.plane_block(fmt), fmt.channels(x.shape[3])[1]
    )
    per_tile = layout.scale_grid(fmt, x.shape[3], 1)[0]
    groups = slice(old * per_tile, new * per_tile)
    cached.scale[:, :, groups] = scale
    cached.zero_point[:, :, groups] = zero_point
    if fmt.apart and order is not None:
        q.keep_apart(cached, q.in_order(tokens, order), old * fmt.tile, new * fmt.tile)


def _tokens(cached: Cached, x: Tensor, length: int, first: int, last: int) -> Tensor:
    """Tokens first..last-1, none of them packed yet, from the raw ones and the new ones `x`."""
    tokens = x[:, :, max(0, first - length) : max(0, last - length)]
    if first < length:
        tokens = torch.cat([raw_tokens(cached, first, min(last, length)), tokens], 2)
    return tokens


def runs(begin: int, end: int, fmt: TensorFormat) -> list[tuple[int, int, int]]:
    """Raw positions begin..end-1 as (first, last + 1, slot) runs of consecutive slots."""
    if begin >= end:
        return []
    if fmt.is_raw:
        return [(begin, end, begin)]
    found = []
    if begin < fmt.sink:
        stop = min(fmt.sink, end)
        found.append((begin, stop, begin))
        begin = stop
    while begin < end:
        offset = (begin - fmt.sink) % fmt.ring
        stop = min(end, begin + fmt.ring - offset)
        found.append((begin, stop, fmt.sink + offset))
        begin = stop
    return found


def raw_tokens(cached: Cached, first: int, last: int) -> Tensor:
    """Raw tokens at positions first..last-1, none of them packed, [B, H, last - first, D]."""
    residual = cached.residual
    found = runs(first, last, cached.format)
    parts = [residual[:, :, slot : slot + stop - start] for start, stop, slot in found]
    if not parts:
        return residual[:, :, :0]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def read(cached: Cached, first: int, last: int, length: int) -> Tensor:
    """Tokens first..last-1 of `length`, as numbers in float32 (float64 stays), [B, H, n, D]."""
    fmt = cached.format
    dtype = q.compute_dtype(cached.residual)
    packed_end = fmt.packed_end(length)
    parts = []
    if first < fmt.sink or fmt.is_raw:
        stop = last if fmt.is_raw else min(last, fmt.sink)
        parts.append(raw_tokens(cached, first, stop).to(dtype))
        first = stop
    if first < min(last, packed_end):
        stop = min(last, packed_end)
        # groups of tokens start at multiples of the group size
        skip = (first - fmt.sink) % fmt.group_size if fmt.axis == layout.AXIS_CHANNEL else 0
        rows = q.dequantize(cached, first - fmt.sink - skip, stop - fmt.sink)
        parts.append(rows[:, :, skip:].to(dtype))
        first = stop
    if first < last:
        parts.append(raw_tokens(cached, first, last).to(dtype))
    if not parts:
        return cached.residual.new_zeros(*cached.residual.shape[:2], 0, cached.head_dim, dtype=dtype)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
