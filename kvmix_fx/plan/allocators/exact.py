"""The least predicted loss within the budget, exactly."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

from kvmix_fx.plan.allocators.problem import Choice, Ladders, Pair, Problem, frontier, hull_steps, saving

_ROUNDING = 1e-9
"""Relative: sums of floats in different orders must not prune the optimum."""


class _State(NamedTuple):
    """A choice for the first layers."""

    cost: float
    loss: float
    pair: Pair
    before: _State | None


def exact(problem: Problem | Ladders) -> Choice:
    """Dynamic programme over the layers (a multiple-choice knapsack).

    After each layer it keeps the partial choices that no other beats in cost and loss, and of these only such
    as can still lead to less loss than a known plan. The bound is Lagrange's: with a multiplier m >= 0, the
    layers that are left lose at least min(loss + m * cost) each, less m times what is left of the budget.
    With m the saving at which a greedy search exhausts the budget the bound is nearly tight and few choices
    survive: 80 layers of 144 pairs take some 0.05 s for budgets in bits, and 3 s in bytes of one length,
    whose costs are less regular.
    """
    multiplier, known = _greedy(problem)
    fronts = [frontier(problem.offers(layer)) for layer in range(problem.num_layers)]
    # cost and bound of what follows layer i, at position i + 1
    cheapest = _suffix_sums([front[0].cost for front in fronts])
    bound = _suffix_sums([min(o.loss + multiplier * o.cost for o in front) for front in fronts])
    allowed = known + multiplier * problem.limit + _ROUNDING * (known + multiplier * problem.limit)

    states: list[_State] = [_State(0.0, 0.0, (0, 0), None)]
    for front, rest_cost, rest_bound in zip(fronts, cheapest[1:], bound[1:], strict=True):
        grown = [
            _State(cost, loss, offer.pair, state)
            for state in states
            for offer in front
            if (cost := state.cost + offer.cost) + rest_cost <= problem.limit
            and (loss := state.loss + offer.loss) + multiplier * cost + rest_bound <= allowed
        ]
        grown.sort(key=lambda state: (state.cost, state.loss))
        states = []
        for state in grown:
            if not states or state.loss < states[-1].loss:
                states.append(state)

    choice: Choice = []
    last: _State | None = states[-1]  # the dearest loses least
    while last is not None and last.before is not None:
        choice.append(last.pair)
        last = last.before
    return choice[::-1]


def _greedy(problem: Problem | Ladders) -> tuple[float, float]:
    """The saving per cost at which the budget is exhausted, and the loss of a plan that fits it."""
    choice: Choice = list(problem.cheapest)
    cost = problem.total_cost(choice)
    for layer, before, after in hull_steps(problem, range(problem.num_layers)):
        cost += after.cost - before.cost
        if cost > problem.limit:
            return saving(before, after), problem.total_loss(choice)
        choice[layer] = after.pair
    return 0.0, problem.total_loss(choice)


def _suffix_sums(numbers: list[float]) -> list[float]:
    return [*accumulate(reversed(numbers), initial=0.0)][::-1]
