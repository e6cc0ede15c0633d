"""The plans whose quality is measured, by provider name, the most telling first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmix_fx.plan import KVPlan, LayerPlan, QuantSpec, WindowRule

HIGH_KEY_LAYERS = (17, 18, 19, 20, 23, 24)
"""The 20 % of SmolLM2's layers whose 2-bit keys cost most: `python -m benchmarks.quality.sensitivity`."""

HIGH_VALUE_LAYERS = (14, 15, 17, 18, 23, 24)
"""Likewise for values."""


def uniform(key_bits: int, value_bits: int, **options: Any) -> Callable[[object], KVPlan]:
    """The same bits everywhere; keys and values in groups of one size."""
    return lambda model: KVPlan.uniform(model, key_bits, value_bits, **options)


def long_groups(key_bits: int, value_bits: int) -> Callable[[object], KVPlan]:
    """Keys in groups of 128 tokens, values in one group per head, which has only 64 channels."""

    def make(model: object) -> KVPlan:
        layer = LayerPlan(
            QuantSpec(key_bits, "channel", 128), QuantSpec(value_bits, "token", "head"), WindowRule(length=32)
        )
        return KVPlan.uniform(model, key_bits).with_layers(
            "all", key=layer.key, value=layer.value, tile=layer.tile_length
        )

    return make


def kvmix(model: object) -> KVPlan:
    """KVmix's preset: 3-bit keys and 4-bit values in the most sensitive fifth of the layers, else 2 bits."""
    return KVPlan.preset("kvmix", model, high_key_layers=HIGH_KEY_LAYERS, high_value_layers=HIGH_VALUE_LAYERS)


PLANS: dict[str, Callable[[object], KVPlan]] = {
    "k4v4 g32 w32": uniform(4, 4),
    "k4v2 g32 w32": uniform(4, 2),
    "k2v2 g32 w32": uniform(2, 2),
    "k8v8 g32 w32": uniform(8, 8),
    "k3v2 g32 w32": uniform(3, 2),
    "preset g32 w32": kvmix,
    "k3v3 g32 w32": uniform(3, 3),
    "k2v4 g32 w32": uniform(2, 4),
    "k2v2 g32 w32 s4": uniform(2, 2, sink_length=4),
    "k2v2 g64 w32": uniform(2, 2, group_size=64),
    "k4v4 g64 w32": uniform(4, 4, group_size=64),
    "k2v2 g32 w128": uniform(2, 2, window=128),
    "k4v4 g32 w128": uniform(4, 4, window=128),
    "k2v2 g32 w0": uniform(2, 2, window=0),
    "k4v4 g32 w0": uniform(4, 4, window=0),
    "k2v2 g128 w32": long_groups(2, 2),
    "k4v4 g128 w32": long_groups(4, 4),
}
"""g: elements per group; w: recent tokens raw at least; s: first tokens raw. g128 groups values per head.

"preset" is KVmix's own plan, the others are uniform."""
