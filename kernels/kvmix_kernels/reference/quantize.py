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
from kvmix_kernels.layout import AXIS_CHANNEL, TensorFormat

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., D] of `bits` bits to int16 words [..., words_per_token], field-major."""
    D = codes.shape[-1]
    wide = codes.to(torch.int32)
    words = []
    for width, _, count, shift in layout.planes(bits, D):
        field = (wide >> shift) & (2**width - 1)
        field = field.view(*codes.shape[:-1], layout.WORD_BITS // width, count)
        shifts = torch.arange(0, layout.WORD_BITS, width, device=codes.device, dtype=torch.int32)
        words.append((field << shifts[:, None]).sum(-2, dtype=torch.int32))
    packed = torch.cat(words, -1) if len(words) > 1 else words[0]
    # to two's complement by hand: converting 32768..65535 to int16 is undefined in C
    return torch.where(packed >= 1 << 15, packed - (1 << 16), packed).to(torch.int16)


def unpack(words: Tensor, bits: int, head_dim: int) -> Tensor:
    """Inverse of `pack`: int16 words [..., words_per_token] to int16 codes [..., D]."""
    codes: Tensor | None = None
    for width, first, count, shift in layout.planes(bits, head_dim):
        plane = words[..., first : first + count]
        field = words.new_empty(*words.shape[:-1], head_dim)
        # one shift by a number per field: a broadcast shift by a tensor does not vectorize
        for f in range(layout.WORD_BITS // width):
            torch.bitwise_right_shift(plane, f * width, out=field[..., f * count : (f + 1) * count])
        # the mask removes the copies of the sign bit that an arithmetic shift brings in
        field.bitwise_and_(2**width - 1)
        if shift:
            field <<= shift
        codes = field if codes is None else codes.add_(field)
    assert codes is not None
    return codes


def dequantize(
    qdata: Tensor, scale: Tensor, zero_point: Tensor, first: int, last: int, head_dim: int, fmt: TensorFormat
) -> Tensor:
    """Packed rows first..last-1 as numbers, [B, H, last - first, D] in the compute dtype.

    `first` must start a group of tokens when the format groups along tokens.
    """
    B, H = qdata.shape[:2]
    count = last - first
    dtype = torch.float32
    codes = unpack(qdata[:, :, first:last], fmt.bits, head_dim).to(dtype)
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
