"""Published rules, and the controls that they must beat. Layers that are priced alike are treated alike."""

from __future__ import annotations

import math
import random as _random
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from kvmix_fx.errors import AllocatorError, BudgetError
from kvmix_fx.plan.allocators.problem import Choice, Offer, Problem, Upgrade, alike, climb, hull, hull_steps
from kvmix_fx.plan.prices import distortion, is_predictable
from kvmix_fx.plan.schema import QuantSpec
from kvmix_fx.plan.text import pair_label


def greedy(problem: Problem) -> Choice:
    """Always the upgrade that saves most loss per cost, until nothing fits (KV-AdaQuant, arXiv 2502.15075).

    The paper's repository takes the next bit width of one tensor; here an upgrade is the next step on the
    convex hull of a layer's offers, which includes group sizes. Up to the first upgrade that does not fit
    the predicted loss falls with the budget; the smaller upgrades that are taken after it can make a
    slightly larger budget predict a slightly greater loss.
    """
    groups = {group[0]: group for group in _layers_alike(problem)}
    upgrades = (Upgrade(groups[layer], *after.pair) for layer, _, after in hull_steps(problem, groups))
    return climb(problem, problem.cheapest, upgrades)


def water_filling(problem: Problem) -> Choice:
    """Bits in proportion to the logarithm of each tensor's weight (RateQuant, arXiv 2605.06675).

    The loss of tensor i at e effective bits is fitted as a_i * beta^-e, with one beta for all keys and one
    for all values, by least squares of logarithms. Its sum is least, at a given mean of e, where
    e_i = (ln(a_i ln beta) - level) / ln beta. Every tensor takes the best format that costs at most e_i,
    at the lowest level that the budget allows; formats that still fit below that level are then taken.
    """
    menu = problem.prices.menu
    start = [0, 0]
    found: list[tuple[float, Sequence[float], Upgrade]] = []
    for role, (rows, specs) in enumerate(((problem.keys, menu.keys), (problem.values, menu.values))):
        ladder = _ladder(problem, rows, specs)
        weights, slope = _fit(rows, ladder)
        start[role] = ladder[0].pair[0]
        for group in alike(rows):
            for rung in ladder[1:]:
                key, value = (rung.pair[0], None) if role == 0 else (None, rung.pair[0])
                level = weights[group[0]] + math.log(slope) - slope * rung.cost
                found.append((level, rows[group[0]], Upgrade(group, key, value)))
    found.sort(key=lambda entry: (-entry[0], entry[1]))
    first: Choice = [(start[0], start[1])] * problem.num_layers
    if not problem.fits(first):  # the fewest bits are not always the fewest bytes of a short context
        first = problem.cheapest
    return climb(problem, first, (upgrade for _, _, upgrade in found))


def thresholds(problem: Problem) -> Choice:
    """The cheapest format of each tensor whose loss stays below a threshold, the same for all tensors.

    The threshold is the lowest that the budget allows. A tensor that no format keeps below it takes its best.
    """
    menu = problem.prices.menu
    orders = [
        sorted(range(len(specs)), key=lambda f, specs=specs: problem.element_bits(specs[f]))
        for specs in (menu.keys, menu.values)
    ]

    def choose(threshold: float) -> Choice:
        def format_of(row: Sequence[float], order: list[int]) -> int:
            best = min(row)
            return next(f for f in order if row[f] <= max(threshold, best))

        return [
            (format_of(key, orders[0]), format_of(value, orders[1]))
            for key, value in zip(problem.keys, problem.values, strict=True)
        ]

    candidates = sorted({price for row in (*problem.keys, *problem.values) for price in row})
    for threshold in candidates:
        choice = choose(threshold)
        if problem.fits(choice):
            return choice
    return problem.cheapest


def rank_quota(
    problem: Problem,
    share: float | None = None,
    low_bits: int = 2,
    high_key_bits: int = 3,
    high_value_bits: int = 4,
) -> Choice:
    """More bits for the keys, and for the values, of the layers that rank first (KVmix, arXiv 2506.08018).

    The two rankings are independent, by the price at low bits. Of all group sizes (one for keys, one for
    values) and shares that the budget allows, the one of least predicted loss is taken.

    Args:
        problem: prices under a budget.
        share: of the layers that get more bits, 0.2 in the paper; None for whichever is best.
        low_bits: of all other layers.
        high_key_bits: of the keys that rank first.
        high_value_bits: of the values that rank first.

    Raises:
        AllocatorError: the share is not within 0 to 1, or the menu lacks these bits in groups of one size.
        BudgetError: no group size meets the budget with this share.
    """
    if share is not None and not 0 <= share <= 1:
        raise AllocatorError(f"share must be from 0 to 1, got {share}")
    prices, num_layers = problem.prices, problem.num_layers
    counts = range(num_layers + 1) if share is None else (int(share * num_layers),)
    key_pairs = _same_grid(prices.menu.keys, low_bits, high_key_bits)
    value_pairs = _same_grid(prices.menu.values, low_bits, high_value_bits)
    if not key_pairs or not value_pairs:
        raise AllocatorError(
            f"the menu needs keys of {low_bits} and {high_key_bits} bits and values of {low_bits} and "
            f"{high_value_bits} bits in groups of the same size"
        )
    choices = []
    for (low_key, high_key), (low_value, high_value), count in product(key_pairs, value_pairs, counts):
        keys = _first([row[low_key] for row in prices.keys], count)
        values = _first([row[low_value] for row in prices.values], count)
        choices.append(
            [
                (high_key if i in keys else low_key, high_value if i in values else low_value)
                for i in range(num_layers)
            ]
        )
    fitting = [choice for choice in choices if problem.fits(choice)]
    if not fitting:
        raise BudgetError(
            f"a budget of {problem.budget} allows no plan with {counts[0]} layers at "
            f"{pair_label(str(high_key_bits), str(high_value_bits))} and the others at {low_bits} bits: "
            "raise the budget, lower the share, or offer larger groups"
        )
    return min(fitting, key=lambda choice: (problem.total_loss(choice), problem.total_cost(choice)))


def uniform(problem: Problem) -> Choice:
    """The pair of formats that is best for all layers together: the control that a mixed plan must beat.

    Each layer's cheapest where no pair that all may have is within the budget.
    """
    layers = range(problem.num_layers)
    offers = (
        Offer(cost, sum(problem.loss(i, pair) for i in layers), pair) for pair, cost in problem.costs.items()
    )
    fitting = [
        offer for offer in offers if offer.loss < math.inf and problem.fits([offer.pair] * problem.num_layers)
    ]
    if not fitting:
        return problem.cheapest
    best = min(fitting, key=lambda offer: (offer.loss, offer.cost, offer.pair))
    return [best.pair] * problem.num_layers


def random(problem: Problem, seed: int = 0) -> Choice:
    """Upgrades of tensors drawn at random, until nothing fits: the control for what a signal knows.

    The prices are not looked at; each tensor climbs the formats that are efficient for normal data, of those
    for which that can be said.
    """
    menu = problem.prices.menu
    head_dim = problem.geometry.head_dim
    climbs: list[tuple[int, int]] = []
    ladders = []
    for role, specs in enumerate((menu.keys, menu.values)):
        row = [distortion(spec, head_dim) if is_predictable(spec) else math.inf for spec in specs]
        ladders.append([offer.pair[0] for offer in _ladder(problem, [row], specs)])
        climbs += [(layer, role) for layer in range(problem.num_layers)] * (len(ladders[role]) - 1)
    _random.Random(seed).shuffle(climbs)
    reached: dict[tuple[int, int], int] = {}
    upgrades = []
    for layer, role in climbs:
        rung = reached[layer, role] = reached.get((layer, role), 0) + 1
        position = ladders[role][rung]
        upgrades.append(Upgrade((layer,), *((position, None) if role == 0 else (None, position))))
    first: Choice = [(ladders[0][0], ladders[1][0])] * problem.num_layers
    if not problem.fits(first):
        first = problem.cheapest
    return climb(problem, first, upgrades)


def _layers_alike(problem: Problem) -> list[tuple[int, ...]]:
    return alike(zip(problem.keys, problem.values, strict=True))


def _ladder(problem: Problem, rows: Sequence[Sequence[float]], specs: Sequence[QuantSpec]) -> list[Offer]:
    """The efficient formats of all keys, or all values, by effective bits; `pair` holds the format twice.

    Those that some layer may not have are left out.
    """
    offers = (
        Offer(problem.element_bits(spec), sum(row[f] for row in rows), (f, f)) for f, spec in enumerate(specs)
    )
    return hull([offer for offer in offers if offer.loss < math.inf])


def _fit(rows: Sequence[Sequence[float]], ladder: Sequence[Offer]) -> tuple[list[float], float]:
    """Least squares of ln(price) = weight of the row - slope * bits, over the packed formats of the ladder.

    Returns:
        The weight of every row, and the slope: at least that of one bit in ten, so that a level exists.
    """
    rungs = [rung for rung in ladder if rung.cost < 16] or ladder
    floor = 1e-6 * max(max(row) for row in rows) or 1.0  # a price of 0 has no logarithm
    logs = [[math.log(max(row[rung.pair[0]], floor)) for rung in rungs] for row in rows]
    mean = sum(rung.cost for rung in rungs) / len(rungs)
    centred = [rung.cost - mean for rung in rungs]
    spread = len(rows) * sum(c * c for c in centred)
    slope = -sum(c * y for row in logs for c, y in zip(centred, row, strict=True)) / spread if spread else 0.0
    slope = max(slope, math.log(4) / 10)
    return [sum(row) / len(row) + slope * mean for row in logs], slope


def _same_grid(specs: Sequence[QuantSpec], low: int, high: int) -> list[tuple[int, int]]:
    """Positions of two formats that differ in nothing but their bits."""
    positions = {spec: f for f, spec in enumerate(specs)}
    pairs = (
        (f, positions.get(replace(spec, bits=high)))
        for f, spec in enumerate(specs)
        if spec.bits == low and is_predictable(spec)
    )
    return [(f, position) for f, position in pairs if position is not None]


def _first(scores: Sequence[float], count: int) -> set[int]:
    """The layers of the `count` highest scores; of layers that share the last place, none."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    if 0 < count < len(order):
        return {i for i in order[:count] if scores[i] > scores[order[count]]}
    return set(order[:count])
