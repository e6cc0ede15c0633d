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
from kvmix_kernels.cached import SCALE_DTYPES, Cached
from kvmix_kernels.layout import AXIS_CHANNEL, TensorFormat


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 stays (for oracles); everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def quantize(x: Tensor, valid: Tensor | None, fmt: TensorFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Round whole tiles to codes.

    Args:
        x: [B, H, n * tile, D], floating point.
        valid: tokens that may set a group's range, bool [B, n * tile]; None for all.
        fmt: a packed format.

    Returns:
        codes int16 [B, H, n * tile, D]; scale and zero_point [B, H, *layout.scale_grid].
    """
    B, H, L, D = x.shape
    dtype = compute_dtype(x)
    if fmt.axis == AXIS_CHANNEL:
        grouped, dim = x.reshape(B, H, L // fmt.group_size, fmt.group_size, D).to(dtype), 3
    else:
        group = layout.channel_group(fmt, D)
        grouped, dim = x.reshape(B, H, L, D // group, group).to(dtype), 4
    usable = grouped.isfinite()
    if valid is not None and fmt.axis == AXIS_CHANNEL:
        usable &= valid.view(B, 1, L // fmt.group_size, fmt.group_size, 1)
    low = grouped.masked_fill(~usable, torch.inf).amin(dim, keepdim=True)
    high = grouped.masked_fill(~usable, -torch.inf).amax(dim, keepdim=True)
    empty = low > high
    low, high = low.masked_fill(empty, 0), high.masked_fill(empty, 0)

    top = 2**fmt.bits - 1
    stored = SCALE_DTYPES[fmt.scale_dtype]
    limit = torch.finfo(stored).max
    # divided before subtracting: high - low may overflow where the scale does not
    scale = (high / top - low / top).clamp(max=limit).to(stored)
    zero_point = low.clamp(-limit, limit).to(stored)
    step = scale.to(dtype)
    codes = torch.round((grouped - zero_point.to(dtype)) / step)
    codes = codes.nan_to_num_(nan=0.0, posinf=top, neginf=0).clamp_(0, top)
    codes.masked_fill_((step == 0).expand_as(codes), 0)
    grid = layout.scale_grid(fmt, D, L // fmt.tile)
    return (
        codes.to(torch.int16).view(B, H, L, D),
        scale.reshape(B, H, *grid),
        zero_point.reshape(B, H, *grid),
    )


def pack(codes: Tensor, bits: int, block: int = 1) -> Tensor:
    """Codes [..., n, D] of `bits` bits to int16 words [..., n, words_per_token].

    `block` is `layout.plane_block`; it divides n.
    """
    D = codes.shape[-1]
    wide = codes.to(torch.int32)
    packed = [wide.new_zeros(*codes.shape[:-1], count) for count in layout.plane_words(bits, D)]
    for plane, position, count, above, channel in layout.bit_fields(bits, D):
        words = packed[plane]
        field = wide[..., channel : channel + words.shape[-1]]
        words |= ((field >> above) & (2**count - 1)) << position
    together = join_planes(packed, block)
    # to two's complement by hand: converting 32768..65535 to int16 is undefined in C
    return torch.where(together >= 1 << 15, together - (1 << 16), together).to(torch.int16)


def unpack(words: Tensor, bits: int, head_dim: int, block: int = 1) -> Tensor:
    """Inverse of `pack`: int16 words [..., n, words_per_token] to int16 codes [..., n, D]."""
    planes = split_planes(words, layout.plane_words(bits, head_dim), block)
    codes = words.new_empty(*words.shape[:-1], head_dim)
    parts = [torch.empty_like(plane) for plane in planes[1:]]
    done = 0
    for plane, position, count, above, channel in layout.bit_fields(bits, head_dim):
        end = channel + planes[plane].shape[-1]
        target = codes[..., channel:end]
        # a code of which a plane before this one has bits gets the others added
        field = target if end > done else parts[plane - 1]
        # one shift by a number per field: a broadcast shift by a tensor does not vectorize
        torch.bitwise_right_shift(planes[plane], position, out=field)
        # the mask removes the copies of the sign bit that an arithmetic shift brings in
        field.bitwise_and_(2**count - 1)
        if above:
            field <<= above
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


def dequantize(cached: Cached, first: int, last: int) -> Tensor:
    """Packed rows first..last-1 as numbers, [B, H, last - first, D] in the compute dtype.

    `first` must start a group of tokens when the format groups along tokens.
    """
    fmt, head_dim = cached.format, cached.head_dim
    qdata, scale, zero_point = cached.tensors[:3]
    B, H = qdata.shape[:2]
    count = last - first
    dtype = torch.float32
    block = layout.plane_block(fmt)
    begin, end = first // block * block, -(-last // block) * block
    codes = unpack(qdata[:, :, begin:end], fmt.bits, head_dim, block)[:, :, first - begin : last - begin].to(
        dtype
    )
    if fmt.axis == AXIS_CHANNEL:
        G = fmt.group_size
        groups = slice(first // G, -(-last // G))
        step, offset = scale[:, :, groups].to(dtype), zero_point[:, :, groups].to(dtype)
        if count % G:
            step = step.repeat_interleave(G, 2)[:, :, :count]
            offset = offset.repeat_interleave(G, 2)[:, :, :count]
            return torch.addcmul(offset, codes, step)
        codes = codes.view(B, H, count // G, G, head_dim)
        return torch.addcmul(offset.unsqueeze(3), codes, step.unsqueeze(3)).view(B, H, count, head_dim)
    group = layout.channel_group(fmt, head_dim)
    step, offset = scale[:, :, first:last].to(dtype), zero_point[:, :, first:last].to(dtype)
    codes = codes.view(B, H, count, head_dim // group, group)
    return torch.addcmul(offset.unsqueeze(4), codes, step.unsqueeze(4)).view(B, H, count, head_dim)
