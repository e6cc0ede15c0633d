"""All tokens of a cached tensor as numbers. Simple: attention never needs it."""

from __future__ import annotations

import triton
import triton.language as tl

from kvmix_kernels.triton.kernels.fields import (
    ROTATED,
    TILED,
    packed_end_of,
    packed_values,
    rotate,
    stored_values,
)
from kvmix_kernels.triton.kernels.forms import Form, Places, Stored


@triton.jit(do_not_specialize=["heads", "length", "tile", "sink", "window", "ring", "blocks"])
def dequantize_kernel(
    qdata_ptr, scale_ptr, zero_ptr, residual_ptr, order_ptr, exact_ptr, start_ptr, out_ptr,
    qdata_sb, qdata_sh, scale_sb, scale_sh, residual_sb, residual_sh, order_sb, order_sh, exact_sb, exact_sh,
    heads, length, tile, sink, window, ring, blocks,
    ON_DEVICE: tl.constexpr, BITS: tl.constexpr, AXIS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, DP: tl.constexpr, KEPT: tl.constexpr, HIGH: tl.constexpr, SYMMETRIC: tl.constexpr,
    TURNED: tl.constexpr, RAW: tl.constexpr, TOKENS: tl.constexpr, DTYPE: tl.constexpr,
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
    X: tl.constexpr = Form(BITS, AXIS, GROUP, D, BLOCK, DP, KEPT, HIGH, SYMMETRIC, TURNED, RAW)
    x = Stored(
        qdata_ptr + batch * qdata_sb + head * qdata_sh, scale_ptr + batch * scale_sb + head * scale_sh,
        zero_ptr + batch * scale_sb + head * scale_sh, residual_ptr + batch * residual_sb + head * residual_sh,
        order_ptr + batch * order_sb + head * order_sh, exact_ptr + batch * exact_sb + head * exact_sh, tile,
    )  # fmt: skip
    places = Places(live, packed_end_of(live, tile, sink, window), sink, ring)
    ok = (position < live) & (channel < D)
    value = stored_values(x, residual_ptr, 0, position, channel, ok, places, X, False, TURNED == 0, DTYPE)
    out_ptr += at * length * D + position * D
    out_ok = (position < length) & (channel < D)
    if TURNED != 0:
        packed = ok & (position >= sink) & (position < places.end)
        turned = packed_values(x, position, channel, packed, sink, X)
        if TURNED == ROTATED:
            value = tl.where(packed, rotate(turned, D, 1).to(DTYPE), value)
        else:
            if TURNED == TILED:
                place = x.order + (position - sink) // tile * D + channel
                own = tl.load(place, mask=packed, other=0).to(tl.int32)
            else:
                own = tl.load(x.order + channel, mask=channel < D, other=0)
            tl.store(out_ptr + own, turned.to(out_ptr.dtype.element_ty), mask=packed)
            out_ok = out_ok & ((position < sink) | (position >= places.end))
    tl.store(out_ptr + channel, value.to(out_ptr.dtype.element_ty), mask=out_ok)
