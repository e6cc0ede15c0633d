"""Which tokens matter: one policy a file, one interface for all.

A policy says where the importance of a token comes from and how tokens are then ranked. All work for each row
and KV head by itself; the attention of query heads that share a KV head is summed.
"""

from __future__ import annotations

from kvmix_kernels.importance import accumulated, last, mean, norm, oracle, random
from kvmix_kernels.importance.policy import Policy
from kvmix_kernels.layout import POLICIES, TensorFormat

_BY_NAME: dict[str, Policy] = {
    "accumulated": accumulated.POLICY,
    "mean": mean.POLICY,
    "last": last.POLICY,
    "norm": norm.POLICY,
    "random": random.POLICY,
    "oracle": oracle.POLICY,
}


def policy_of(fmt: TensorFormat) -> Policy:
    """The policy of a format with a high tier."""
    assert fmt.high is not None
    return _BY_NAME[POLICIES[fmt.high.policy]]


__all__ = ["Policy", "policy_of"]
