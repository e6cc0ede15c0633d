"""Launching the read of all tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.cached import Cached
from kvmix_kernels.layout import AXIS_TOKEN
from kvmix_kernels.triton.common import check_grids, device_of, model_dtype, strides
from kvmix_kernels.triton.kernels.fields import next_power_of_2
from kvmix_kernels.triton.kernels.read import dequantize_kernel


def dequantize(cached: Sequence[Tensor], start: Tensor | None, length: int, format: list[int]) -> Tensor:
    """The op `dequantize`."""
    one = Cached.of(cached, format)
    fmt, (qdata, scale, zero_point, residual) = one
    B, H, _, D = residual.shape
    out = residual.new_empty(B, H, length, D)
    if out.numel() == 0:
        return out
    check_grids(one)
    DP = next_power_of_2(D)
    tokens = max(1, 4096 // DP)
    blocks = -(-length // tokens)
    group = 1 if fmt.is_raw else layout.channel_group(fmt, D) if fmt.axis == AXIS_TOKEN else fmt.group_size
    with device_of(residual):
        dequantize_kernel[(B * H * blocks,)](
            qdata, scale, zero_point, residual, residual if start is None else start, out,
            *strides(one),
            H, length, fmt.tile, fmt.sink, fmt.window, fmt.ring, blocks,
            ON_DEVICE=start is not None, BITS=fmt.bits, AXIS=fmt.axis, GROUP=group, D=D, BLOCK=layout.plane_block(fmt), DP=DP, TOKENS=tokens,
            DTYPE=model_dtype(torch.float32), num_warps=4,
        )  # fmt: skip
    return out
