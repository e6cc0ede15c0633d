"""All tokens of a cached tensor as numbers. Simple: attention never needs it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.layout import AXIS_TOKEN, TensorFormat
from kvmix_kernels.triton.common import check_grids, device_of, model_dtype
from kvmix_kernels.triton.fields import next_power_of_2, packed_end_of, stored_values


@triton.jit(do_not_specialize=["heads", "length", "tile", "sink", "window", "ring", "blocks"])
def dequantize_kernel(
    qdata_ptr, scale_ptr, zero_ptr, residual_ptr, start_ptr, out_ptr,
    qdata_sb, qdata_sh, scale_sb, scale_sh, residual_sb, residual_sh, heads, length, tile, sink, window, ring, blocks,
    ON_DEVICE: tl.constexpr, BITS: tl.constexpr, AXIS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, DP: tl.constexpr, TOKENS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of tokens, fastest, x heads x batch. Output [batch * heads, length, D]; 0 beyond the live tokens."""
    pid = tl.program_id(0).to(tl.int64)
    block = (pid % blocks).to(tl.int32)
    at = pid // blocks
    head = at % heads
    batch = at // heads
    live = length
    if ON_DEVICE:
        live = tl.minimum(tl.load(start_ptr).to(tl.int32), length)
    position = (block * TOKENS + tl.arange(0, TOKENS))[:, None]
    channel = tl.arange(0, DP)[None, :]
    value = stored_values(
        qdata_ptr + batch * qdata_sb + head * qdata_sh, scale_ptr + batch * scale_sb + head * scale_sh,
        zero_ptr + batch * scale_sb + head * scale_sh, residual_ptr + batch * residual_sb + head * residual_sh,
        residual_ptr, 0, position, channel, (position < live) & (channel < D),
        live, packed_end_of(live, tile, sink, window), sink, ring, BITS, AXIS, GROUP, D, BLOCK, False, True, DTYPE,
    )  # fmt: skip
    out_ptr += at * length * D
    tl.store(
        out_ptr + position * D + channel,
        value.to(out_ptr.dtype.element_ty),
        mask=(position < length) & (channel < D),
    )


def dequantize(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    residual: Tensor,
    start: Tensor | None,
    length: int,
    format: list[int],
) -> Tensor:
    """The op `dequantize`."""
    fmt = TensorFormat(*format)
    B, H, _, D = residual.shape
    out = residual.new_empty(B, H, length, D)
    if out.numel() == 0:
        return out
    check_grids(scale, zero_point)
    DP = next_power_of_2(D)
    tokens = max(1, 4096 // DP)
    blocks = -(-length // tokens)
    group = 1 if fmt.is_raw else layout.channel_group(fmt, D) if fmt.axis == AXIS_TOKEN else fmt.group_size
    with device_of(residual):
        dequantize_kernel[(B * H * blocks,)](
            qdata, scale, zero_point, residual, residual if start is None else start, out,
            *qdata.stride()[:2], *scale.stride()[:2], *residual.stride()[:2],
            H, length, fmt.tile, fmt.sink, fmt.window, fmt.ring, blocks,
            ON_DEVICE=start is not None, BITS=fmt.bits, AXIS=fmt.axis, GROUP=group, D=D, BLOCK=layout.plane_block(fmt), DP=DP, TOKENS=tokens,
            DTYPE=model_dtype(torch.float32), num_warps=4,
        )  # fmt: skip
    return out
