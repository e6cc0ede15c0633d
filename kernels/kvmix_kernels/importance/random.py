"""Tokens of chance, the same each time: what a score has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmix_kernels.importance.policy import Policy

PRIME = 2654435761
SPAN = 1 << 32


def chance(keys: Tensor, positions: Tensor) -> Tensor:
    """Numbers from 0 to 1 that depend on row, head and position."""
    B, H = keys.shape[:2]
    heads = torch.arange(B * H, device=keys.device).view(B, H, 1)
    mixed = (positions.long() * 7919 + heads * 104729 + 1) * PRIME % SPAN
    return ((mixed ^ (mixed >> 15)) * PRIME % SPAN).float() / SPAN


POLICY = Policy(of_keys=chance)
