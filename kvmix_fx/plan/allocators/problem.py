"""What every allocator solves: one format for the keys and one for the values of every layer."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from kvmix_fx.plan.budget import Budget
from kvmix_fx.plan.geometry import ModelGeometry
from kvmix_fx.plan.prices import Prices
from kvmix_fx.plan.schema import LayerPlan, QuantSpec, WindowRule
from kvmix_kernels import layout

Pair: TypeAlias = tuple[int, int]
"""Positions of a layer's formats in `menu.keys` and `menu.values`."""

Choice: TypeAlias = list[Pair]
"""One pair for every layer: what an allocator returns."""


class Offer(NamedTuple):
    """One pair of formats for one layer: what it costs, and the loss that it is predicted to bring."""

    cost: float
    loss: float
    pair: Pair


@dataclass(frozen=True)
class Problem:
    """Prices under a budget.

    A layer's formats are chosen together, because keys grouped along many tokens enlarge the tile, and with
    it the raw window, of the values too. What a pair costs does not depend on the layer.

    Attributes:
        prices: predicted losses, which add up.
        budget: what the cache may cost, over all layers.
        geometry: of the model.
        window: recent tokens kept raw.
        sink_length: leading tokens kept raw.
        tile: tokens packed together; None for the smallest that fits a layer's groups.
    """

    prices: Prices
    budget: Budget
    geometry: ModelGeometry
    window: WindowRule
    sink_length: int = 0
    tile: int | None = None

    @property
    def num_layers(self) -> int:
        """Layers to choose for."""
        return len(self.prices.keys)

    @cached_property
    def limit(self) -> float:
        """Bound on the sum of the costs of all layers."""
        return self.budget.layer_limit(self.geometry)

    @cached_property
    def costs(self) -> dict[Pair, float]:
        """Cost of one layer under every pair."""
        menu = self.prices.menu
        return {
            (k, v): self.budget.layer_cost(self.layer(key, value), self.geometry)
            for k, key in enumerate(menu.keys)
            for v, value in enumerate(menu.values)
        }

    def layer(self, key: QuantSpec, value: QuantSpec) -> LayerPlan:
        """The plan of a layer with these formats."""
        return LayerPlan(key, value, self.window, self.sink_length, self.tile)

    @cached_property
    def keys(self) -> tuple[tuple[float, ...], ...]:
        """Predicted losses of keys by layer and format, infinite where the layer may not have the format."""
        barred = self.prices.barred
        return tuple(
            tuple(math.inf if (layer, n) in barred else price for n, price in enumerate(row))
            for layer, row in enumerate(self.prices.keys)
        )

    @property
    def values(self) -> tuple[tuple[float, ...], ...]:
        """Predicted losses of values by layer and format."""
        return self.prices.values

    def loss(self, layer: int, pair: Pair) -> float:
        """Predicted loss of a layer's keys and values."""
        return self.keys[layer][pair[0]] + self.values[layer][pair[1]]

    def element_bits(self, spec: QuantSpec) -> float:
        """Effective bits of one format, in the limit of long contexts."""
        return layout.bits_per_packed_element(spec.format(spec.tokens_per_group), self.geometry.head_dim)

    @cached_property
    def cheapest(self) -> Choice:
        """The pair of least cost that each layer may have."""
        order = sorted(self.costs, key=lambda pair: (self.costs[pair], pair))
        return [
            next(pair for pair in order if (layer, pair[0]) not in self.prices.barred)
            for layer in range(self.num_layers)
        ]

    def row(self, layer: int) -> tuple[tuple[float, ...], ...]:
        """What tells a layer from others: its predicted losses."""
        return self.keys[layer], self.values[layer]

    def offers(self, layer: int) -> list[Offer]:
        """All pairs that one layer may have."""
        found = (Offer(cost, self.loss(layer, pair), pair) for pair, cost in self.costs.items())
        return [offer for offer in found if offer.loss < math.inf]

    def total_cost(self, choice: Choice) -> float:
        """Sum over the layers."""
        return sum(self.costs[pair] for pair in choice)

    def total_loss(self, choice: Choice) -> float:
        """Sum over the layers."""
        return sum(self.loss(layer, pair) for layer, pair in enumerate(choice))

    def fits(self, choice: Choice) -> bool:
        """Whether a choice is within the budget."""
        return self.total_cost(choice) <= self.limit


@dataclass(frozen=True)
class Ladders:
    """Offers that are each layer's own, under a limit: what `exact` also solves.

    Attributes:
        offered: of each layer; the second number of every pair is 0, and the first its place here.
        limit: bound on the sum of the costs of all layers.
    """

    offered: tuple[tuple[Offer, ...], ...]
    limit: float

    @property
    def num_layers(self) -> int:
        """Layers to choose for."""
        return len(self.offered)

    @property
    def cheapest(self) -> Choice:
        """The offer of least cost of each layer."""
        return [min(offers).pair for offers in self.offered]

    def row(self, layer: int) -> tuple[Offer, ...]:
        """What tells a layer from others."""
        return self.offered[layer]

    def offers(self, layer: int) -> list[Offer]:
        """All that one layer may have."""
        return list(self.offered[layer])

    def total_cost(self, choice: Choice) -> float:
        """Sum over the layers."""
        return sum(offers[place].cost for offers, (place, _) in zip(self.offered, choice, strict=True))

    def total_loss(self, choice: Choice) -> float:
        """Sum over the layers."""
        return sum(offers[place].loss for offers, (place, _) in zip(self.offered, choice, strict=True))


def frontier(offers: Sequence[Offer]) -> list[Offer]:
    """The offers that no other beats in both cost and loss: ascending in cost, descending in loss."""
    kept: list[Offer] = []
    for offer in sorted(offers):
        if not kept or offer.loss < kept[-1].loss:
            kept.append(offer)
    return kept


def hull(offers: Sequence[Offer]) -> list[Offer]:
    """The lower convex hull of the frontier: each step saves less loss per cost than the one before."""
    kept: list[Offer] = []
    for offer in frontier(offers):
        while len(kept) > 1 and saving(kept[-2], kept[-1]) <= saving(kept[-1], offer):
            kept.pop()
        kept.append(offer)
    return kept


def saving(before: Offer, after: Offer) -> float:
    """Loss saved per cost."""
    return (before.loss - after.loss) / (after.cost - before.cost)


class Upgrade(NamedTuple):
    """New formats for some layers; None leaves the keys, or the values, as they are."""

    layers: tuple[int, ...]
    key: int | None
    value: int | None


def climb(problem: Problem, choice: Choice, upgrades: Iterable[Upgrade]) -> Choice:
    """Take the upgrades in their order, each for all of its layers or for none.

    One that the budget does not allow ends the climb of its tensors; others go on.
    """
    choice = list(choice)
    cost = problem.total_cost(choice)
    ended: set[tuple[int, bool]] = set()
    for layers, key, value in upgrades:
        tensors = {(layers[0], True)} if key is not None else set()
        tensors |= {(layers[0], False)} if value is not None else set()
        if tensors & ended:
            continue
        new = {
            i: (choice[i][0] if key is None else key, choice[i][1] if value is None else value)
            for i in layers
        }
        change = sum(problem.costs[pair] - problem.costs[choice[i]] for i, pair in new.items())
        if cost + change > problem.limit:
            ended |= tensors
            continue
        cost += change
        for i, pair in new.items():
            choice[i] = pair
    return choice


def alike(rows: Iterable[Hashable]) -> list[tuple[int, ...]]:
    """Positions of equal rows together, so that equal tensors get equal formats."""
    groups: dict[Hashable, list[int]] = {}
    for position, row in enumerate(rows):
        groups.setdefault(row, []).append(position)
    return [tuple(positions) for positions in groups.values()]


def hull_steps(problem: Problem | Ladders, layers: Iterable[int]) -> list[tuple[int, Offer, Offer]]:
    """All steps (layer, from, to) up the hulls of the layers, the greatest saving per cost first.

    The steps of a layer come in their order, because a hull is convex. Where savings are equal, prices
    decide and not the order of the layers.
    """
    found = [
        (layer, before, after) for layer in layers for before, after in pairwise(hull(problem.offers(layer)))
    ]
    found.sort(key=lambda step: (-saving(step[1], step[2]), step[1].cost, problem.row(step[0])))
    return found
