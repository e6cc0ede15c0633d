"""Both tiers as numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmix_kernels import ops
from kvmix_kernels.cached import Cached
from kvmix_kernels.tokens import places
from kvmix_kernels.tokens.places import Count, factors, in_tier


def dequantize(cached: Cached, start: Tensor | None, length: int) -> Tensor:
    """All tokens, [B, H, length, D] in the model dtype: of the tier they are in, as the model made them."""
    count = places.count_of(start, length)
    tokens = overlaid(
        cached, ops.dequantize(cached.low.tensors, start, length, cached.low.format.encode()), count
    )
    factor = factors(cached)
    return tokens if factor is None else (tokens / factor).to(tokens.dtype)


def overlaid(cached: Cached, tokens: Tensor, count: Count, first: int = 0) -> Tensor:
    """The tokens [B, H, n, D] from position `first` on, of the high tier where they are in it; as stored."""
    high = cached.high
    B, H, n, D = tokens.shape
    slots = cached.positions.shape[2]
    kept = ops.dequantize(high.tensors, None, slots, high.format.encode()).to(tokens.dtype)
    index = (cached.positions.long() - first).masked_fill(~in_tier(cached, count), n)
    index = index.masked_fill((index < 0) | (index > n), n)
    # one place more, for slots that hold nothing, or nothing that is asked for
    room = torch.cat([tokens, tokens.new_zeros(B, H, 1, D)], 2)
    return room.scatter_(2, index.unsqueeze(3).expand(B, H, slots, D), kept)[:, :, :n].contiguous()
