"""Caches to be handed to generate(), and plain ones made packed."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)

from kvmix_fx.integrations.transformers.layers import (
    KVMixDynamicLayer,
    KVMixSlidingLayer,
    KVMixStaticLayer,
    PromptFirstStaticLayer,
    capacity_of,
    fixed_layers,
    forget,
)
from kvmix_fx.plan import KVPlan


class KVMixCache(DynamicCache):
    """A growing packed cache, for `generate(past_key_values=...)` on a compiled or plain model."""

    def __init__(self, plan: KVPlan, config: Any) -> None:
        """`config`: the model's; layers that are no attention keep their own kind."""
        plan = plan.for_model(config)
        super().__init__(config=config)
        self.plan = plan
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer and not plan.layers[i].is_raw:
                self.layers[i] = KVMixDynamicLayer(plan.layers[i])
        pack_sliding_layers(self, plan)


class KVMixStaticCache(StaticCache):
    """A packed cache of fixed capacity, for `generate(past_key_values=...)`."""

    def __init__(self, plan: KVPlan, config: Any, max_cache_len: int) -> None:
        """`max_cache_len`: capacity in tokens. Buffers are allocated at the first call."""
        plan = plan.for_model(config)
        super().__init__(config=config, max_cache_len=max_cache_len)
        self.plan = plan
        self.one_full_row = False
        self.grows = False
        pack_static_layers(self, plan)

    @property
    def is_compileable(self) -> bool:
        """Whether generate() should build the whole mask of a step, as it does for caches of fixed capacity.

        One sequence without padding needs none: attention ends with the last token stored.
        """
        # not by super(), in which older Dynamo does not find a property
        return not self.one_full_row and all(layer.is_compileable for layer in self.layers)

    @classmethod
    def over(cls, plan: KVPlan, layers: list[Any]) -> KVMixStaticCache:
        """An empty cache of layers that were another's."""
        cache = cls.__new__(cls)
        Cache.__init__(cache, layers=layers)
        cache.plan = plan
        cache.grows = False
        cache.reset()
        return cache

    def enlarge(self, capacity: int) -> None:
        """Make room for `capacity` tokens, keeping those stored. No effect on a cache that has it.

        Nor on one with a sliding layer that is smaller than its window because the cache is.
        """
        own = capacity_of(self.layers)
        others: list[Any] = [x for x in self.layers if not isinstance(x, PromptFirstStaticLayer)]
        if capacity > own and all(layer.max_cache_len < own for layer in others):
            for layer in fixed_layers(self):
                layer.enlarge(capacity)

    def reset(self) -> None:
        """Forget all tokens, keep the buffers."""
        self.one_full_row = False
        packed = [layer for layer in self.layers if isinstance(layer, KVMixStaticLayer)]
        forget(packed)
        for layer in self.layers:
            if not isinstance(layer, KVMixStaticLayer):
                layer.reset()


def pack_sliding_layers(cache: Cache, plan: KVPlan) -> None:
    """Exchange the plain growing layers of sliding and chunked windows for packed ones, with their tokens."""
    for i, (layer, layer_plan) in enumerate(zip(cache.layers, plan.layers, strict=False)):
        if type(layer) is DynamicSlidingWindowLayer and layer_plan.packs_window(layer.sliding_window):
            cache.layers[i] = KVMixSlidingLayer.over(layer, layer_plan)


def pack_static_layers(cache: Cache, plan: KVPlan) -> None:
    """Exchange the plain full-attention layers of a StaticCache for packed ones.

    Tokens they already hold are kept. Layers the plan keeps at 16 bits stay plain.
    """
    for i, layer in enumerate(cache.layers):
        if type(layer) is not StaticLayer:
            continue
        new = (
            PromptFirstStaticLayer(layer.max_cache_len)
            if plan.layers[i].is_raw
            else KVMixStaticLayer(layer.max_cache_len, plan.layers[i])
        )
        stored = int(layer.cumulative_length)
        if layer.is_initialized and stored:
            keys, values = layer.keys, layer.values
            assert keys is not None
            assert values is not None
            new.update(keys[:, :, :stored], values[:, :, :stored])
            new.host_length = stored
        cache.layers[i] = new
