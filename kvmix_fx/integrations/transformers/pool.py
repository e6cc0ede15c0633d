"""Packed caches of fixed capacity, kept for the next generate() call of the same batch size."""

from __future__ import annotations

import weakref
from typing import Any

from transformers import PreTrainedModel

from kvmix_fx.integrations.transformers.caches import KVMixStaticCache
from kvmix_fx.integrations.transformers.layers import capacity_of
from kvmix_fx.plan import KVPlan
from kvmix_fx.runtime import recording

CAPACITY_STEP = 256
"""Capacities that nobody chose are multiples of this many tokens: prompts of similar length share a cache."""


def in_steps(capacity: int) -> int:
    """The capacity that a cache for `capacity` tokens gets."""
    return -(-capacity // CAPACITY_STEP) * CAPACITY_STEP


class GenerationCaches:
    """Packed caches of fixed capacity for generate(), used again when their user has dropped them."""

    def __init__(self, model: PreTrainedModel, plan: KVPlan) -> None:
        """Start without caches."""
        self._model, self._plan = model, plan
        self._free: dict[int, list[Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model starts without caches."""
        return GenerationCaches, (self._model, self._plan)

    def new(self, batch: int, capacity: int) -> KVMixStaticCache:
        """An empty cache of `capacity` tokens at least.

        The layers of a dropped cache of the same batch size are emptied and used again if they are large
        enough; their addresses are the same, so a recorded step is still good. Else they make room.
        """
        capacity = in_steps(capacity)
        dropped = self._free.pop(batch, None)
        if dropped is not None and capacity_of(dropped) >= capacity:
            cache = KVMixStaticCache.over(self._plan, dropped)
        else:
            cache = KVMixStaticCache(self._plan, self._model.config, capacity)
        # nobody chose its capacity, so nobody expects it to end there when a conversation goes on
        cache.grows = True
        # runs when nobody holds the cache any more; until then its tokens are its user's
        weakref.finalize(cache, self._keep, batch, cache.layers)
        return cache

    def _keep(self, batch: int, layers: list[Any]) -> None:
        self._free.pop(batch, None)
        self._free[batch] = layers
        while len(self._free) > recording.MAX_ENTRIES:
            # the one that has not been used for longest
            del self._free[next(iter(self._free))]
