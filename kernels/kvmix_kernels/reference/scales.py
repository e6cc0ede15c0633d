"""Scales and offsets as they are stored, and the orthonormal rotation of a head: the specification.

A byte as scale is an unsigned float of 5 bits of exponent and 3 of mantissa: shifted left by 7 it is the
float16. The offset beside it counts quarters of the scale, so a group far from 0 for its range needs a
larger scale.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.cached import SCALE_DTYPES, ZERO_DTYPES
from kvmix_kernels.layout import BYTE_SCALES, TensorFormat

LARGEST_BYTE = 0xF7
"""61440; larger bytes are no finite float16."""


def store(step: Tensor, low: Tensor, fmt: TensorFormat) -> tuple[Tensor, Tensor]:
    """Scales for steps of this size and offsets for code 0 at `low`, in the dtypes that are kept."""
    if fmt.scale_dtype != BYTE_SCALES:
        stored = SCALE_DTYPES[fmt.scale_dtype]
        limit = torch.finfo(stored).max
        return step.clamp(max=limit).to(stored), low.clamp(-limit, limit).to(stored)
    # a group that lies further from 0 than an offset reaches gets steps that make it reach
    bits = step.clamp(max=65504).to(torch.float16).view(torch.int16).to(torch.int32)
    # to the nearest of 3 bits of mantissa, half to even
    byte = (bits + 0x3F + ((bits >> 7) & 1)) >> 7
    least = (low.abs() * (4 / 127)).clamp(max=65504).to(torch.float16).view(torch.int16).to(torch.int32)
    byte = torch.maximum(byte, (least + 0x7F) >> 7).clamp(max=LARGEST_BYTE)
    scale = byte.to(torch.uint8)
    if fmt.symmetric:
        return scale, low.new_zeros(low.shape, dtype=torch.int8)
    wide = load_scale(scale, fmt, low.dtype)
    zero = torch.round(low * 4 / wide).nan_to_num_(0, 127, -128).clamp_(-128, 127)
    return scale, zero.to(ZERO_DTYPES[fmt.scale_dtype])


def load_scale(scale: Tensor, fmt: TensorFormat, dtype: torch.dtype) -> Tensor:
    """Stored scales as numbers."""
    if fmt.scale_dtype != BYTE_SCALES:
        return scale.to(dtype)
    return (scale.to(torch.int16) << 7).view(torch.float16).to(dtype)


def load_zero(step: Tensor, zero_point: Tensor, fmt: TensorFormat) -> Tensor:
    """Stored offsets as numbers, beside their scales `step`; of symmetric formats what they have instead."""
    if fmt.symmetric:
        return step * (-(2**fmt.bits - 1) / 2)
    if fmt.scale_dtype != BYTE_SCALES:
        return zero_point.to(step.dtype)
    return step * (zero_point.to(step.dtype) / 4)


def rotate(x: Tensor) -> Tensor:
    """X [..., D] times the orthonormal Hadamard matrix of Sylvester, block by block; its own inverse.

    Blocks are of `layout.hadamard_block(D)` channels. Sums and differences of what lies 1, 2, 4, ... channels
    apart, then one product: an order in which kernels get the same bits.
    """
    size = layout.hadamard_block(x.shape[-1])
    turned, step = x, 1
    while step < size:
        first, second = turned.unflatten(-1, (-1, 2, step)).unbind(-2)
        turned = torch.stack([first + second, first - second], -2).flatten(-3)
        step *= 2
    return turned * size**-0.5


@cache
def _hadamard(size: int) -> Tensor:
    return rotate(torch.eye(size, dtype=torch.float64))


def rotate_sums(x: Tensor) -> Tensor:
    """`rotate` as one product: faster, with other last bits. For what is not packed."""
    size = layout.hadamard_block(x.shape[-1])
    matrix = _hadamard(size).to(dtype=x.dtype, device=x.device)
    return (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2)
