"""What packing leaves of a tensor: the reference quantizer, there and back."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmix_fx.plan import QuantSpec
from kvmix_fx.plan.orders import decode_order
from kvmix_kernels import layout
from kvmix_kernels.layout import AXIS_CHANNEL
from kvmix_kernels.reference.quantize import out_of_order, quantize
from kvmix_kernels.reference.scales import load_scale, load_zero, rotate


def round_trip(
    x: Tensor,
    spec: QuantSpec,
    valid: Tensor | None = None,
    *,
    sink: int = 0,
    order: Tensor | None = None,
) -> Tensor:
    """Quantize `x` as `spec` says and restore it.

    The numbers are those that a packed cache holds, since codes and scales come from the same reference.
    Groups along tokens are complete ones of the whole tensor after the sink; a last incomplete group is
    rounded by itself.

    Args:
        x: [B, Hkv, L, D], floating point.
        spec: how to keep it.
        valid: tokens that may set a group's range, bool [B, L]; None for all.
        sink: leading tokens that stay as they are.
        order: of channels, int [Hkv, D], for tiers whose plan does not bring one.

    Returns:
        [B, Hkv, L, D] in float32 (float64 for float64).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if spec.is_raw or x.shape[2] <= sink:
        return x.to(wide)
    first, x = x[:, :, :sink], x[:, :, sink:]
    B, H, L, D = x.shape
    if spec.tiers:
        if spec.channel_order:
            order = torch.tensor(decode_order(spec.channel_order, D), device=x.device)
        assert order is not None
        order = order.to(x.device).expand(B, H, D)
    else:
        order = None
    tile = spec.tokens_per_group
    fmt = spec.format(tile)
    layout.check_head_size(fmt, D)
    missing = -L % tile
    if valid is not None:
        valid = valid[:, sink:]
    if missing:
        if valid is None:
            valid = torch.ones(B, L, dtype=torch.bool, device=x.device)
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
        valid = torch.nn.functional.pad(valid, (0, missing))
    codes, scale, zero_point = quantize(x, valid, fmt, order)
    dropped = D - codes.shape[3]
    codes = torch.nn.functional.pad(codes, (0, dropped)) if dropped else codes
    step = load_scale(scale, fmt, wide)
    offset = load_zero(step, zero_point, fmt)
    if fmt.axis == AXIS_CHANNEL:
        grouped, dim = codes.view(B, H, -1, fmt.group_size, D), 3
    else:
        grouped, dim = codes.view(B, H, L + missing, -1, layout.channel_group(fmt, D)), 4
    restored = grouped.to(wide) * step.unsqueeze(dim) + offset.unsqueeze(dim)
    restored = restored.view(B, H, L + missing, D)[:, :, :L]
    if order is not None:
        restored = out_of_order(restored, order)
    if fmt.rotation:
        restored = rotate(restored)
    return torch.cat((first.to(wide), restored), 2) if sink else restored
