"""Rounding to groups and packing into words: the specification.

Affine min-max quantization (KIVI, arXiv 2402.02750): per group, scale = (max - min) / (2^b - 1),
zero_point = min, code = round((x - zero_point) / scale) half to even, x ~ code * scale + zero_point.
Codes are computed from the scale and offset *as stored*, so their rounding adds no bias.

Non-finite elements and masked tokens never widen a group. +inf stores the group's largest code,
-inf and NaN its smallest: later tokens and the neighbours in the group stay what they were.
Scales and offsets saturate at the largest finite value of their dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.cached import Cached, as_packed
from kvmix_kernels.layout import AXIS_CHANNEL, TensorFormat
from kvmix_kernels.reference.scales import load_scale, load_zero, rotate, store


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 stays (for oracles); everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def quantize(
    x: Tensor, valid: Tensor | None, fmt: TensorFormat, order: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Round whole tiles to codes.

    Args:
        x: [B, H, n * tile, D], floating point.
        valid: tokens that may set a group's range, bool [B, n * tile]; None for all.
        fmt: a packed format.
        order: for tiers, which channel each packed one is, [B, H, D] or of each tile [B, H, n, D].

    Returns:
        codes int16 [B, H, n * tile, D] (with tiers in their order, without dropped channels and those apart);
        scale [B, H, *layout.scale_grid] and zero_point [B, H, *layout.zero_grid].
    """
    B, H, L, D = x.shape
    dtype = compute_dtype(x)
    x = x.to(dtype)
    if fmt.rotation:
        # one number that is not finite would be in all of them
        x = rotate(x.masked_fill(~x.isfinite(), 0))
    if order is not None:
        x = in_order(x, order)
    if fmt.axis == AXIS_CHANNEL:
        grouped, dim = x.reshape(B, H, L // fmt.group_size, fmt.group_size, D), 3
    else:
        group = layout.channel_group(fmt, D)
        grouped, dim = x.reshape(B, H, L, D // group, group), 4
    usable = grouped.isfinite()
    if valid is not None and fmt.axis == AXIS_CHANNEL:
        usable &= valid.view(B, 1, L // fmt.group_size, fmt.group_size, 1)
    low = grouped.masked_fill(~usable, torch.inf).amin(dim, keepdim=True)
    high = grouped.masked_fill(~usable, -torch.inf).amax(dim, keepdim=True)
    empty = low > high
    low, high = low.masked_fill(empty, 0), high.masked_fill(empty, 0)

    top, margin = _per_channel(fmt, x)
    if fmt.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    if any(tier.span < 100 for tier in fmt.tiers):
        cut = margin * high - margin * low
        low, high = low + cut, high - cut
    # divided before subtracting: high - low may overflow where the scale does not
    step = high / top - low / top
    if len(fmt.tiers) > 1:
        kept = fmt.channels(D)[0]
        usable[..., D - fmt.apart_channels :] = False  # they have no mean either
        # summed in float64, whose order does not show
        finite = grouped[..., kept:].masked_fill(~usable[..., kept:], 0).double()
        counted = usable[..., kept:].sum(dim, keepdim=True).clamp(min=1)
        mean = finite.sum(dim, keepdim=True) / counted
        low = torch.cat([low[..., :kept], mean.to(low.dtype)], -1)
        step = torch.cat([step[..., :kept], torch.zeros_like(step[..., kept:])], -1)
    scale, zero_point = store(step, low, fmt)
    step = load_scale(scale, fmt, dtype)
    codes = torch.round((grouped - load_zero(step, zero_point, fmt)) / step)
    codes = torch.minimum(codes.nan_to_num_(nan=0.0, posinf=255, neginf=0).clamp_(min=0), top)
    codes.masked_fill_((step == 0).expand_as(codes), 0)
    grid = layout.scale_grid(fmt, D, L // fmt.tile)
    codes = codes.to(torch.int16).view(B, H, L, D)
    if len(fmt.tiers) > 1:
        codes = codes[..., : fmt.channels(D)[0]]
    zeros = layout.zero_grid(fmt, D, L // fmt.tile)
    return codes, scale.reshape(B, H, *grid), zero_point.reshape(B, H, *grid)[..., : zeros[1]]


def _per_channel(fmt: TensorFormat, like: Tensor) -> tuple[Tensor, Tensor]:
    """Largest code, and what is cut off at either end of the range, of each packed channel (or of all)."""
    counts = [tier.channels for tier in fmt.tiers] if len(fmt.tiers) > 1 else [1]
    repeats = torch.tensor(counts, device=like.device)
    top = like.new_tensor([max(1, 2**tier.bits - 1) for tier in fmt.tiers])
    margin = like.new_tensor([(100 - tier.span) / 200 for tier in fmt.tiers])
    return top.repeat_interleave(repeats), margin.repeat_interleave(repeats)


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """X [B, H, n, D] with its channels in the order [B, H, D], or of each tile [B, H, tiles, D]."""
    return x.gather(3, _of_tokens(order, x.shape[2]).expand(x.shape))


def out_of_order(x: Tensor, order: Tensor) -> Tensor:
    """The inverse of `in_order`."""
    return torch.empty_like(x).scatter_(3, _of_tokens(order, x.shape[2]).expand(x.shape), x)


def _of_tokens(order: Tensor, count: int) -> Tensor:
    if order.dim() == 3:
        return order.long().unsqueeze(2)
    return order.long().repeat_interleave(count // max(1, order.shape[2]), 2)


def order_of_tiles(x: Tensor, valid: Tensor | None, total: Tensor | None, fmt: TensorFormat) -> Tensor:
    """The order of channels of each tile: int64 [B, H, n, D].

    For ORDER_TILE the most important channel is that of the largest product of range and sizes of queries
    (MixKVQ, arXiv 2512.19206); where no query was seen, that of the largest range. For ORDER_TILE_KEYS it is
    that of the largest sum of sizes (Kitty, arXiv 2511.18643). Of equals the first.

    Args:
        x: keys of whole tiles, [B, H, n * tile, D].
        valid: as for `quantize`.
        total: for ORDER_TILE, the sums of the sizes of all queries until each tile is packed, float64
            [B, H, n, D].
        fmt: a format whose tiles have orders.
    """
    B, H, L, D = x.shape
    if fmt.order == layout.ORDER_TILE:
        assert total is not None
        size = total.float().masked_fill((total == 0).all(3, keepdim=True), 1)
        score = ranges(x, valid, fmt._replace(group_size=fmt.tile)) * size
    else:
        tiles = x.to(compute_dtype(x)).reshape(B, H, L // fmt.tile, fmt.tile, D)
        usable = tiles.isfinite()
        if valid is not None:
            usable &= valid.view(B, 1, L // fmt.tile, fmt.tile, 1)
        # summed in float64, whose order does not show
        score = tiles.masked_fill(~usable, 0).double().abs().sum(3).float()
    return as_packed(score.nan_to_num(0).argsort(dim=3, descending=True, stable=True), fmt)


def query_size(query: Tensor, heads: int) -> Tensor:
    """Sums of the sizes of queries [B, Hq, n, D] of each KV head, float64 [B, H, D]."""
    size = torch.linalg.vector_norm(query.unflatten(1, (heads, -1)), 1, (2, 3), dtype=torch.float64)
    return size.nan_to_num(0, 0, 0)


def choose_order(x: Tensor, valid: Tensor | None, query: Tensor, fmt: TensorFormat) -> Tensor:
    """Channels by how much of the scores they make, the most important first: int32 [B, H, D].

    The score of a channel is the sum of the sizes of the queries in it times the mean range of the keys in a
    group, for each KV head by itself: rounding errors grow with the range and count with the query's size.

    Args:
        x: keys of whole tiles, [B, H, n * tile, D].
        valid: as for `quantize`.
        query: queries, [B, Hq, Lq, D]; those of padding are 0.
        fmt: a format with tiers.
    """
    return order_by(ranges(x, valid, fmt), query, fmt)


def ranges(x: Tensor, valid: Tensor | None, fmt: TensorFormat) -> Tensor:
    """Largest less smallest number of each group of tokens, float32 [B, H, groups, D]; 0 if none counts."""
    B, H, L, D = x.shape
    grouped = x.float().reshape(B, H, L // fmt.group_size, fmt.group_size, D)
    usable = grouped.isfinite()
    if valid is not None:
        usable = usable & valid[:, :L].view(B, 1, L // fmt.group_size, fmt.group_size, 1)
    low = grouped.masked_fill(~usable, torch.inf).amin(3)
    high = grouped.masked_fill(~usable, -torch.inf).amax(3)
    return (high - low).masked_fill(low > high, 0)


def order_by(spread: Tensor, query: Tensor, fmt: TensorFormat) -> Tensor:
    """The order for keys with these `ranges`, as `choose_order` returns it."""
    # one pass and no copy, also over the queries of a long prompt
    grouped = query.unflatten(1, (spread.shape[1], -1))
    size = torch.linalg.vector_norm(grouped, 1, (2, 3), dtype=compute_dtype(query))
    size = size.nan_to_num(0, 0, 0).float()
    important = (spread.mean(2) * size).argsort(dim=2, descending=True, stable=True)
    return as_packed(important, fmt).to(torch.int32)


def pack(codes: Tensor, bits: int, block: int = 1, above: int | None = None) -> Tensor:
    """Codes [..., n, D] of `bits` bits to int16 words [..., n, words_per_token].

    `block` is `layout.plane_block`; it divides n. `above`: channels of the higher digits, if they are fewer.
    """
    D = codes.shape[-1]
    wide = codes.to(torch.int32)
    packed = [wide.new_zeros(*codes.shape[:-1], count) for count in layout.plane_words(bits, D, above)]
    for plane, position, count, low, channel in layout.bit_fields(bits, D, above):
        words = packed[plane]
        field = wide[..., channel : channel + words.shape[-1]]
        words |= ((field >> low) & (2**count - 1)) << position
    together = join_planes(packed, block)
    # to two's complement by hand: converting 32768..65535 to int16 is undefined in C
    return torch.where(together >= 1 << 15, together - (1 << 16), together).to(torch.int16)


def unpack(words: Tensor, bits: int, head_dim: int, block: int = 1, above: int | None = None) -> Tensor:
    """Inverse of `pack`: int16 words [..., n, words_per_token] to int16 codes [..., n, D]."""
    planes = split_planes(words, layout.plane_words(bits, head_dim, above), block)
    codes = words.new_empty(*words.shape[:-1], head_dim)
    parts = [torch.empty_like(plane) for plane in planes[1:]]
    done = 0
    for plane, position, count, low, channel in layout.bit_fields(bits, head_dim, above):
        end = channel + planes[plane].shape[-1]
        target = codes[..., channel:end]
        # a code of which a plane before this one has bits gets the others added
        field = target if end > done else parts[plane - 1]
        # one shift by a number per field: a broadcast shift by a tensor does not vectorize
        torch.bitwise_right_shift(planes[plane], position, out=field)
        # the mask removes the copies of the sign bit that an arithmetic shift brings in
        field.bitwise_and_(2**count - 1)
        if low:
            field <<= low
        if end <= done:
            target += field
        done = max(done, end)
    return codes


def join_planes(planes: list[Tensor], block: int) -> Tensor:
    """Words of each plane, [..., n, words], as the rows of `qdata`: block by block, plane by plane."""
    if len(planes) == 1:
        return planes[0]
    together = torch.cat([p.unflatten(-2, (-1, block)).flatten(-2) for p in planes], -1)
    return together.unflatten(-1, (block, -1)).flatten(-3, -2)


def split_planes(rows: Tensor, words: tuple[int, ...], block: int) -> list[Tensor]:
    """Inverse of `join_planes`: rows of whole blocks as words of each plane, [..., n, words]."""
    if len(words) == 1:
        return [rows]
    blocks = rows.unflatten(-2, (-1, block)).flatten(-2)
    parts = blocks.split([block * count for count in words], -1)
    return [p.unflatten(-1, (block, -1)).flatten(-3, -2) for p in parts]


def apart(cached: Cached) -> list[tuple[slice, Tensor]]:
    """Which packed channels have a buffer of their own, and that buffer."""
    found: list[tuple[slice, Tensor]] = []
    begin = cached.head_dim - cached.format.apart_channels
    for count, buffer in zip(cached.format.apart_counts, cached.apart, strict=True):
        if buffer is not None:
            found.append((slice(begin, begin + count), buffer))
        begin += count
    return found


def keep_apart(cached: Cached, tokens: Tensor, first: int, last: int) -> None:
    """Store what is apart of packed rows first..last-1, tokens [B, H, last - first, D] in their order."""
    for channels, buffer in apart(cached):
        buffer[:, :, first:last] = tokens[..., channels]


def dequantize(cached: Cached, first: int, last: int) -> Tensor:
    """Packed rows first..last-1 as numbers, [B, H, last - first, D] in the compute dtype.

    `first` must start a group of tokens when the format groups along tokens.
    """
    fmt, head_dim = cached.format, cached.head_dim
    qdata, scale, zero_point = cached.tensors[:3]
    B, H = qdata.shape[:2]
    count = last - first
    dtype = torch.float32
    kept, above = fmt.channels(head_dim)
    block = layout.plane_block(fmt)
    begin, end = first // block * block, -(-last // block) * block
    codes = unpack(qdata[:, :, begin:end], fmt.code, kept, block, above)
    codes = codes[:, :, first - begin : last - begin].to(dtype)
    if kept < head_dim:
        codes = torch.nn.functional.pad(codes, (0, head_dim - kept))
    if fmt.axis == AXIS_CHANNEL:
        G = fmt.group_size
        groups = slice(first // G, -(-last // G))
        step = load_scale(scale[:, :, groups], fmt, dtype)
        offset = load_zero(step, zero_point[:, :, groups], fmt)
        if count % G:
            step = step.repeat_interleave(G, 2)[:, :, :count]
            offset = offset.repeat_interleave(G, 2)[:, :, :count]
            tokens = torch.addcmul(offset, codes, step)
        else:
            codes = codes.view(B, H, count // G, G, head_dim)
            tokens = torch.addcmul(offset.unsqueeze(3), codes, step.unsqueeze(3)).view(B, H, count, head_dim)
    else:
        group = layout.channel_group(fmt, head_dim)
        step = load_scale(scale[:, :, first:last], fmt, dtype)
        offset = load_zero(step, zero_point[:, :, first:last], fmt)
        codes = codes.view(B, H, count, head_dim // group, group)
        tokens = torch.addcmul(offset.unsqueeze(4), codes, step.unsqueeze(4)).view(B, H, count, head_dim)
    for channels, buffer in apart(cached):
        tokens[..., channels] = buffer[:, :, first:last].to(dtype)
    if fmt.by_tile:
        assert cached.order is not None
        tiles = torch.arange(first, last, device=tokens.device) // fmt.tile
        tokens = out_of_order(tokens, cached.order.index_select(2, tiles))
    elif cached.order is not None:
        tokens = out_of_order(tokens, cached.order)
    return rotate(tokens) if fmt.rotation else tokens
