"""Caches to be handed to generate(), and plain ones made packed."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    StaticCache,
    StaticIndexedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from kvmix_fx.integrations.transformers.layers import (
    INDEXED_LATENTS,
    KVMixDynamicLayer,
    KVMixHybridLayer,
    KVMixIndexedLayer,
    KVMixSlidingLayer,
    KVMixStaticLayer,
    PromptFirstStaticLayer,
    capacity_of,
    fixed_layers,
    forget,
)
from kvmix_fx.plan import KVPlan
from kvmix_fx.plan.checks import check_integer


class KVMixCache(DynamicCache):
    """A growing packed cache, for generate() on a compiled or plain model."""

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
    """A packed cache of fixed capacity, for generate()."""

    def __init__(self, plan: KVPlan, config: Any, max_cache_len: int) -> None:
        """`max_cache_len`: capacity in tokens. Buffers are allocated at the first call.

        Raises:
            PlanError, HeadSizeError: the plan does not fit the model, or there is no room for a token.
        """
        check_integer("max_cache_len", max_cache_len, 1)
        plan = plan.for_model(config)
        super().__init__(config=config, max_cache_len=max_cache_len)
        self.plan = plan
        self.full_rows = False
        self.grows = False
        pack_static_layers(self, plan, max_cache_len)

    @property
    def is_compileable(self) -> bool:
        """Whether generate() should build the whole mask of a step, as it does for caches of fixed capacity.

        Sequences without padding need none: attention ends with the last token stored.
        """
        # not by super(), in which older Dynamo does not find a property
        return not self.full_rows and all(layer.is_compileable for layer in self.layers)

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

        Nor on one with a sliding layer that is smaller than its window because the cache is. If a layer
        cannot be enlarged, for want of memory, those before it get their capacity back.
        """
        own = capacity_of(self.layers)
        others: list[Any] = [x for x in self.layers if not isinstance(x, PromptFirstStaticLayer)]
        if capacity > own and all(layer.max_cache_len < own for layer in others):
            begun: list[tuple[PromptFirstStaticLayer, int]] = []
            try:
                for layer in fixed_layers(self):
                    begun.append((layer, layer.max_cache_len))
                    layer.enlarge(capacity)
            except BaseException:
                for layer, room in begun:
                    layer.narrow(room)
                raise

    def reset(self) -> None:
        """Forget all tokens, keep the buffers."""
        self.full_rows = False
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


_EXCHANGED = frozenset(
    (
        StaticLayer,
        StaticSlidingWindowLayer,
        StaticIndexedLayer,
        LinearAttentionAndStaticFullAttentionLayer,
        LinearAttentionAndStaticSlidingWindowAttentionLayer,
    )
)


def pack_static_layers(cache: Cache, plan: KVPlan, capacity: int | None = None) -> None:
    """Exchange the plain layers of a StaticCache for packed ones, with the tokens they hold.

    Layers the plan keeps at 16 bits stay plain. Windows get all of the cache's capacity packed, under the
    model's mask, where that takes less than the window does at 16 bits.

    `capacity`: of the cache, in tokens; None if only its layers tell.
    """
    if _EXCHANGED.isdisjoint(map(type, cache.layers)):
        return  # in every step but the first
    fixed = [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)]
    room = max(fixed, default=0) if capacity is None else capacity
    windows = _exchanges_windows(cache, plan, room, capacity is not None)
    # all or none of a kind: they share a mask
    hybrids, indexed = (
        not any(
            layer_plan.is_raw and isinstance(layer, kind)
            for layer, layer_plan in zip(cache.layers, plan.layers, strict=False)
        )
        for kind in (LinearAttentionAndStaticFullAttentionLayer, StaticIndexedLayer)
    )
    for i, (layer, layer_plan) in enumerate(zip(cache.layers, plan.layers, strict=False)):
        new: PromptFirstStaticLayer
        if type(layer) is StaticLayer or (windows and type(layer) is StaticSlidingWindowLayer):
            size = layer.max_cache_len if type(layer) is StaticLayer else room
            new = PromptFirstStaticLayer(size) if layer_plan.is_raw else KVMixStaticLayer(size, layer_plan)
        elif hybrids and type(layer) is LinearAttentionAndStaticFullAttentionLayer:
            new = KVMixHybridLayer(layer, layer_plan, layer.max_cache_len)
        elif windows and type(layer) is LinearAttentionAndStaticSlidingWindowAttentionLayer:
            new = KVMixHybridLayer(layer, layer_plan, room)
        elif INDEXED_LATENTS and indexed and type(layer) is StaticIndexedLayer:
            new = KVMixIndexedLayer(layer, layer_plan)
        else:
            continue
        new.is_sliding = layer.is_sliding
        stored = _stored(layer)
        if stored:
            keys, values = layer.keys, layer.values
            assert keys is not None
            assert values is not None
            new.update(keys[:, :, :stored], values[:, :, :stored])
            new.host_length = stored
        cache.layers[i] = new


def _exchanges_windows(cache: Cache, plan: KVPlan, capacity: int, known: bool) -> bool:
    """Whether all windows of a StaticCache are to hold its whole capacity: they share a mask.

    `known`: whether that is its capacity whatever its layers say, which may all be windows.
    """
    geometry = plan.geometry
    if geometry is None or not plan.packs_fixed_windows(capacity):
        return False
    for i, layer in enumerate(cache.layers[: len(plan.layers)]):
        if isinstance(layer, StaticSlidingWindowLayer):
            told = known or capacity > layer.max_cache_len or capacity < geometry.layer(i).window
            # there is no plain layer of ours that has states besides
            kept = plan.layers[i].is_raw and type(layer) is not StaticSlidingWindowLayer
            if kept or not told or _stored(layer) < layer.cumulative_length_int:
                return False
    return True


def let_grow(cache: Cache) -> None:
    """Exchange the empty layers of fixed capacity of a cache that is filled once, as across attention.

    A graph that reads such a layer without writing it cannot know how many tokens it holds; and once packed
    as it is, it has no room to waste.
    """
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, StaticLayer) and not layer.is_initialized:
            cache.layers[i] = DynamicLayer()


def _stored(layer: StaticLayer) -> int:
    """Tokens that a plain layer of fixed capacity holds."""
    if not layer.is_initialized:
        return 0
    if isinstance(layer, StaticSlidingWindowLayer):
        return min(layer.cumulative_length_int, layer.max_cache_len)
    return int(layer.cumulative_length)
