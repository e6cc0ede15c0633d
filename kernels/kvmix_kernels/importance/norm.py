"""Keys of small norm matter (arXiv 2406.11430): needs no attention at all."""

from __future__ import annotations

from torch import Tensor

from kvmix_kernels.importance.policy import Policy


def smallness(keys: Tensor, _positions: Tensor) -> Tensor:
    """Less the Euclidean norm of each key."""
    return -keys.float().norm(dim=3)


POLICY = Policy(of_keys=smallness)
