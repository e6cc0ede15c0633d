"""Launching the read of all tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvmix_kernels.cached import Cached
from kvmix_kernels.triton.common import buffers, check_grids, check_places, device_of, model_dtype, strides
from kvmix_kernels.triton.kernels.fields import next_power_of_2
from kvmix_kernels.triton.kernels.read import dequantize_kernel
from kvmix_kernels.triton.launch_plan import form_plan


def dequantize(cached: Sequence[Tensor], start: Tensor | None, length: int, format: list[int]) -> Tensor:
    """The op `dequantize`."""
    one = Cached.of(cached, format)
    fmt, residual = one.format, one.residual
    B, H, _, D = residual.shape
    out = residual.new_empty(B, H, length, D)
    if out.numel() == 0:
        return out
    check_grids(one)
    check_places(length, D)
    tokens = max(1, 4096 // next_power_of_2(D))
    blocks = -(-length // tokens)
    with device_of(residual):
        dequantize_kernel[(B * H * blocks,)](
            buffers(one), strides(one), residual if start is None else start, out,
            H, length, fmt.tile, fmt.sink, fmt.window, fmt.ring, blocks,
            ON_DEVICE=start is not None, FORM=form_plan(fmt, D), TOKENS=tokens,
            DTYPE=model_dtype(torch.float32), num_warps=4,
        )  # fmt: skip
    return out
