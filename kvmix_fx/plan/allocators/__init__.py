"""Allocators: from scores or prices and a budget to a plan. Pure functions, by name.

An allocator takes a `Problem` (and options of its own) and returns one pair of formats for every layer.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from kvmix_fx.errors import AllocatorError, PlanLayerError
from kvmix_fx.plan.allocators.exact import exact
from kvmix_fx.plan.allocators.problem import Choice, Offer, Pair, Problem
from kvmix_fx.plan.allocators.rules import greedy, random, rank_quota, thresholds, uniform, water_filling
from kvmix_fx.plan.budget import Budget
from kvmix_fx.plan.geometry import ModelGeometry
from kvmix_fx.plan.prices import Menu, Prices, Scores
from kvmix_fx.plan.schema import DEFAULT_SINK, KVPlan, WindowRule, as_window

ALLOCATORS: Mapping[str, Callable[..., Choice]] = MappingProxyType(
    {
        "exact": exact,
        "greedy": greedy,
        "water_filling": water_filling,
        "thresholds": thresholds,
        "rank_quota": rank_quota,
        "uniform": uniform,
        "random": random,
    }
)
"""The allocators by the names that `allocate` and the command line take."""


def allocate(
    name: str,
    signal: Scores | Prices,
    budget: Budget,
    geometry: ModelGeometry,
    *,
    menu: Menu | None = None,
    window: WindowRule | int = 32,
    sink_length: int = DEFAULT_SINK,
    tile: int | None = None,
    **options: Any,
) -> KVPlan:
    """The plan that an allocator makes of a signal.

    Args:
        name: a key of `ALLOCATORS`.
        signal: scores, which are priced by `Prices.from_scores`, or prices.
        budget: what the cache may cost.
        geometry: of the model.
        menu: formats to choose from, for scores only, which price those of `Menu.predictable`; None for
            `Menu.uniform`. Prices bring their own.
        window: recent tokens kept raw.
        sink_length: leading tokens kept raw.
        tile: tokens packed together; None for the smallest that fits each layer's groups.
        options: what that allocator takes.

    Returns:
        A plan with geometry, whose provenance tells signal, allocator, budget, predicted loss and version.

    Raises:
        AllocatorError: no such allocator, an option it does not take, a menu beside prices, or one of which
            scores price nothing.
        BudgetError: the budget is below the cheapest plan of the menu, or above an unquantized cache.
        PlanLayerError: the signal was measured on a model of another number of layers.
        FormatError, HeadSizeError: a format of the menu does not fit the tile or the model's heads.
    """
    allocator = ALLOCATORS.get(name)
    if allocator is None:
        close = difflib.get_close_matches(str(name), ALLOCATORS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        raise AllocatorError(f"there is no allocator {name!r}{hint} known: {', '.join(ALLOCATORS)}")
    signature = inspect.signature(allocator)
    try:
        signature.bind(None, **options)
    except TypeError as error:
        taken = ", ".join(list(signature.parameters)[1:]) or "no options"
        raise AllocatorError(f"allocator {name!r}: {error}; it takes {taken}") from error
    if len(signal.keys) != geometry.num_layers:
        raise PlanLayerError(
            f"signal {signal.signal!r} covers {len(signal.keys)} layers, the model has "
            f"{geometry.num_layers}: profile this model"
        )
    if isinstance(signal, Scores):
        offered = Menu.uniform(geometry) if menu is None else menu.predictable()
        if not offered.keys or not offered.values:
            raise AllocatorError(
                f"signal {signal.signal!r} is scores, which price no tiers, symmetric codes or part of a "
                "range: offer other formats as well, or take a signal that prices formats (fisher_scaled)"
            )
        prices = Prices.from_scores(signal, offered, geometry.head_dim)
    elif menu is not None:
        raise AllocatorError("prices come with their menu; pass a menu with scores only")
    else:
        prices = signal

    problem = Problem(prices, budget, geometry, as_window(window), sink_length, tile)
    cheapest = problem.total_cost(problem.cheapest)
    budget.check(budget.of_layers(cheapest, geometry), geometry)
    choice = allocator(problem, **options)
    formats = prices.menu
    provenance = {
        "signal": signal.signal,
        "allocator": name,
        "budget": budget.to_dict(),
        "predicted_loss": problem.total_loss(choice),
        "version": _version(),
    }
    return KVPlan(
        tuple(problem.layer(formats.keys[k], formats.values[v]) for k, v in choice),
        geometry,
        provenance | ({"options": options} if options else {}),
        f"{signal.signal} {name}, {budget}",
    )


def _version() -> str | None:
    try:
        return importlib.metadata.version("kvmix-fx")
    except importlib.metadata.PackageNotFoundError:  # a bare source tree
        return None


__all__ = ["ALLOCATORS", "Choice", "Offer", "Pair", "Problem", "allocate"]
