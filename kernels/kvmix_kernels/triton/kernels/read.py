"""All tokens of a cached tensor as numbers. Simple: attention never needs it."""

from __future__ import annotations

import triton
import triton.language as tl

from kvmix_kernels.triton.kernels.fields import (
    ROTATED,
    TILED,
    as_form,
    packed_end_of,
    packed_values,
    rotate,
    stored,
    stored_values,
)
from kvmix_kernels.triton.kernels.forms import Places


@triton.jit(do_not_specialize=["heads", "length", "tile", "sink", "window", "ring", "blocks"])
def dequantize_kernel(
    buffers, strides, start_ptr, out_ptr, heads, length, tile, sink, window, ring, blocks,
    ON_DEVICE: tl.constexpr, FORM: tl.constexpr, TOKENS: tl.constexpr, DTYPE: tl.constexpr,
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
    X: tl.constexpr = as_form(FORM)
    D: tl.constexpr = X.D
    channel = tl.arange(0, X.DP)[None, :]
    x = stored(buffers, strides, batch, head, tile)
    places = Places(live, packed_end_of(live, tile, sink, window), sink, ring)
    ok = (position < live) & (channel < D)
    value = stored_values(x, x.residual, 0, position, channel, ok, places, X, False, X.TURNED == 0, DTYPE)
    out_ptr += at * length * D + position * D
    out_ok = (position < length) & (channel < D)
    if X.TURNED != 0:
        packed = ok & (position >= sink) & (position < places.end)
        turned = packed_values(x, position, channel, packed, sink, X)
        if X.TURNED == ROTATED:
            value = tl.where(packed, rotate(turned, D, 1).to(DTYPE), value)
        else:
            if X.TURNED == TILED:
                place = x.order + (position - sink) // tile * D + channel
                own = tl.load(place, mask=packed, other=0).to(tl.int32)
            else:
                own = tl.load(x.order + channel, mask=channel < D, other=0)
            tl.store(out_ptr + own, turned.to(out_ptr.dtype.element_ty), mask=packed)
            out_ok = out_ok & ((position < sink) | (position >= places.end))
    tl.store(out_ptr + channel, value.to(out_ptr.dtype.element_ty), mask=out_ok)
