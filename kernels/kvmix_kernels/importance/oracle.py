"""Scores that the caller knows, from queries still to come: a bound for every other policy, and no method.

They are given where tokens are appended (`mass` of the op `append_tiers_`); a model's own steps give none.
"""

from kvmix_kernels.importance.policy import Policy

POLICY = Policy()
