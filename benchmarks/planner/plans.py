"""The plans that are compared, by provider name. Window 32, no sinks, tiles of 128 tokens everywhere.

One tile length for all plans: each keeps the same tokens raw, whatever its groups, so that equal effective
bits in the limit of long contexts are equal bits here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from kvmix_fx.errors import BudgetError
from kvmix_fx.plan import KVPlan, LayerPlan, ModelGeometry, QuantSpec, WindowRule
from kvmix_fx.plan.allocators import allocate
from kvmix_fx.plan.budget import Budget
from kvmix_fx.plan.prices import Menu, Prices, Scores

BUDGETS = (2.5, 2.8, 3.0, 3.5, 4.0)
"""Mean effective bits per element."""

ALLOCATORS = ("exact", "greedy", "water_filling", "thresholds", "rank_quota")
SEEDS = range(5)

DEFAULT = ("fisher_scaled", "exact")
"""What `Profile.plan` does unless told."""

SHIPPED_SIGNALS = ("fisher", "fisher_scaled")
"""What is also measured with the calibration text that comes with the package."""

WINDOW = 32
TILE = 128


def menu(geometry: ModelGeometry) -> Menu:
    """What every allocator and the uniform control choose from."""
    return Menu.uniform(geometry)


def of_signal(signal: Scores | Prices, allocator: str, bits: float, geometry: ModelGeometry) -> KVPlan:
    """One cell of the grid."""
    offered = menu(geometry) if isinstance(signal, Scores) else None
    return allocate(
        allocator, signal, Budget(bits=bits), geometry, menu=offered, window=WINDOW, sink_length=0, tile=TILE
    )


def uniform(key: QuantSpec, value: QuantSpec, geometry: ModelGeometry) -> KVPlan:
    """The same formats in every layer."""
    layer = LayerPlan(key, value, WindowRule(length=WINDOW), tile=TILE)
    return KVPlan((layer,) * geometry.num_layers, geometry, name=uniform_name(key, value))


def uniform_name(key: QuantSpec, value: QuantSpec) -> str:
    """Such as "k3 g64 v3 ghead"."""
    return f"k{key.bits} g{key.group_size} v{value.bits} g{value.group_size}"


def uniform_candidates(bits: float, geometry: ModelGeometry) -> list[KVPlan]:
    """Every uniform plan that could be the best within the budget.

    Left out is only what another plan of the list beats for certain: one that fits too, with as many bits or
    more and groups as small or smaller, for keys and for values.
    """

    def size(spec: QuantSpec) -> int:
        return geometry.head_dim if spec.group_size == "head" else spec.group_size

    def finer(a: QuantSpec, b: QuantSpec) -> bool:
        return a.bits >= b.bits and size(a) <= size(b)

    offered = menu(geometry)
    fitting = [
        pair
        for pair in product(offered.keys, offered.values)
        if uniform(*pair, geometry).bits_per_element() <= bits + 1e-9
    ]
    best = (
        pair
        for pair in fitting
        if not any(
            other != pair and finer(other[0], pair[0]) and finer(other[1], pair[1]) for other in fitting
        )
    )
    return [uniform(*pair, geometry) for pair in best]


def controls(bits: float, geometry: ModelGeometry) -> Iterator[tuple[str, KVPlan]]:
    """Plans without a signal: random ones, and published pairs of widths with the finest groups that fit."""
    blank = Scores("none", (1.0,) * geometry.num_layers, (1.0,) * geometry.num_layers)
    for seed in SEEDS:
        plan = allocate(
            "random",
            blank,
            Budget(bits=bits),
            geometry,
            menu=menu(geometry),
            window=WINDOW,
            sink_length=0,
            tile=TILE,
            seed=seed,
        )
        yield f"random {seed}", plan
    for provider, key_bits, value_bits in (("kivi", 2, 2), ("kv-adaquant k4v2", 4, 2), ("k2v4", 2, 4)):
        for key_group, value_group in ((32, 32), (64, "head"), (128, "head")):
            plan = uniform(
                QuantSpec(key_bits, "channel", key_group),
                QuantSpec(value_bits, "token", value_group),
                geometry,
            )
            if plan.bits_per_element() <= bits + 1e-9:
                yield provider, replace(plan, name=provider)
                break


def paper_rule(scores: Scores, bits: float, geometry: ModelGeometry) -> KVPlan | None:
    """KVmix's own: 3-bit keys and 4-bit values in the first 20 % of each ranking; None if too dear."""
    try:
        return allocate(
            "rank_quota",
            scores,
            Budget(bits=bits),
            geometry,
            menu=menu(geometry),
            window=WINDOW,
            sink_length=0,
            tile=TILE,
            share=0.2,
        )
    except BudgetError:
        return None
