"""Keys of small norm matter (arXiv 2406.11430): needs no attention at all."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmix_kernels.importance.policy import Policy


def smallness(keys: Tensor, _positions: Tensor) -> Tensor:
    """Less the Euclidean norm of each key."""
    return -torch.linalg.vector_norm(keys, dim=3, dtype=torch.float32)


POLICY = Policy(of_keys=smallness)
