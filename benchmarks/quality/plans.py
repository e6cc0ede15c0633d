"""The plans whose quality is measured, by provider name, the most telling first."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from kvmix_fx.plan import KVPlan, LayerPlan, ModelGeometry
from kvmix_fx.profiling import channel_orders

HIGH_KEY_LAYERS = (17, 18, 19, 20, 23, 24)
"""The 20 % of SmolLM2's layers whose 2-bit keys cost most: `python -m benchmarks.quality.sensitivity`."""

HIGH_VALUE_LAYERS = (14, 15, 17, 18, 23, 24)
"""Likewise for values."""


def uniform(name: str) -> Callable[[object], KVPlan]:
    """What the name says in every layer; values in one group per head where the head is no larger."""

    def make(model: object) -> KVPlan:
        geometry = ModelGeometry.of(model)
        layer = LayerPlan.parse(name, geometry.head_dim)
        return KVPlan((layer,) * geometry.num_layers, geometry, name=name)

    return make


def kvmix(model: object) -> KVPlan:
    """KVmix's preset: 3-bit keys and 4-bit values in the most sensitive fifth of the layers, else 2 bits."""
    return KVPlan.preset("kvmix", model, high_key_layers=HIGH_KEY_LAYERS, high_value_layers=HIGH_VALUE_LAYERS)


def tiers(name: str) -> Callable[[nn.Module], KVPlan]:
    """The preset of so many bits, its orders of channels from the package's own text, or from the prompt."""

    def make(model: nn.Module) -> KVPlan:
        _, bits, source = name.split()
        orders = channel_orders(model) if source == "plan" else None
        return KVPlan.preset("tiers", model, bits=float(bits), channel_orders=orders)

    return make


TIERS = ("tiers 2.4 plan", "tiers 2.4 prompt", "tiers 2.6 plan", "tiers 3.1 plan")

NAMES = (
    "k4v4 g32 w32",
    "k4v2 g32 w32",
    "k2v2 g32 w32",
    "k8v8 g32 w32",
    "k3v2 g32 w32",
    "preset g32 w32",
    "k3v3 g32 w32",
    "k2v4 g32 w32",
    "k2v2 g32 w32 s4",
    "k2v2 g64 w32",
    "k4v4 g64 w32",
    "k2v2 g32 w128",
    "k4v4 g32 w128",
    "k2v2 g32 w0",
    "k4v4 g32 w0",
    "k2v2 g128 w32",
    "k4v4 g128 w32",
)
PLANS: dict[str, Callable[[nn.Module], KVPlan]] = {
    name: kvmix if name.startswith("preset") else uniform(name) for name in NAMES
} | {name: tiers(name) for name in TIERS}
"""g: elements per group; w: recent tokens raw at least; s: first tokens raw. g128 groups values per head.

"preset" is KVmix's own plan; "tiers" are the preset of that name, with orders of channels that the plan
brings, or that the first flush chooses; the others are uniform."""
