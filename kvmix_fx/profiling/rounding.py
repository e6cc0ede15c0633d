"""What packing leaves of a tensor: the reference quantizer, there and back."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmix_fx.plan import QuantSpec
from kvmix_kernels import layout
from kvmix_kernels.layout import AXIS_CHANNEL
from kvmix_kernels.reference.quantize import quantize


def round_trip(x: Tensor, spec: QuantSpec, valid: Tensor | None = None) -> Tensor:
    """Quantize `x` as `spec` says and restore it.

    The numbers are those that a packed cache holds, since codes and scales come from the same reference.
    Groups along tokens are complete ones of the whole tensor; a last incomplete group is rounded by itself.

    Args:
        x: [B, Hkv, L, D], floating point.
        spec: how to keep it.
        valid: tokens that may set a group's range, bool [B, L]; None for all.

    Returns:
        [B, Hkv, L, D] in float32 (float64 for float64).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if spec.is_raw:
        return x.to(wide)
    B, H, L, D = x.shape
    tile = spec.tokens_per_group
    group_size = layout.WHOLE_HEAD if spec.group_size == "head" else spec.group_size
    fmt = layout.make_format(spec.bits, spec.axis, group_size, tile, 0, 0, spec.scale_dtype)
    layout.check_head_size(fmt, D)
    missing = -L % tile
    if missing:
        if valid is None:
            valid = torch.ones(B, L, dtype=torch.bool, device=x.device)
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
        valid = torch.nn.functional.pad(valid, (0, missing))
    codes, scale, zero_point = quantize(x, valid, fmt)
    if fmt.axis == AXIS_CHANNEL:
        grouped, dim = codes.view(B, H, -1, fmt.group_size, D), 3
    else:
        grouped, dim = codes.view(B, H, L + missing, -1, layout.channel_group(fmt, D)), 4
    restored = grouped.to(wide) * scale.to(wide).unsqueeze(dim) + zero_point.to(wide).unsqueeze(dim)
    return restored.view(B, H, L + missing, D)[:, :, :L]
