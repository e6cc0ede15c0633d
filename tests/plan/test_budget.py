"""Budgets in their three units, and what they refuse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmix_fx.errors import BudgetError, HeadSplitError, PlanFieldError
from kvmix_fx.plan import KVPlan, ModelGeometry
from kvmix_fx.plan.budget import Budget
from kvmix_fx.testing.strategies import plans

GEOMETRY = ModelGeometry(32, 8, 128)


@given(plans(), st.integers(1, 4), st.integers(1, 3000))
def test_layers_add_up_to_the_plan(plan, batch, length):
    for budget in (
        Budget(bits=3.0),
        Budget(bytes_per_token=1000),
        Budget(total_bytes=10**6, batch=batch, length=length, itemsize=4),
    ):
        total = sum(budget.layer_cost(layer, plan.geometry) for layer in plan.layers)
        exactly = Budget(**budget.to_dict() | {budget.unit: budget.cost(plan)})
        assert total == pytest.approx(exactly.layer_limit(plan.geometry))
        assert budget.of_layers(total, plan.geometry) == pytest.approx(budget.cost(plan))
        assert exactly.allows(exactly.cost(plan))
        assert not exactly.allows(exactly.cost(plan) * 1.001)


def test_units_agree_with_the_plan():
    plan = KVPlan.uniform(GEOMETRY, 3, 2)
    assert Budget(bits=3).cost(plan) == 3.5
    assert Budget(bytes_per_token=1).cost(plan) == 3.5 * 2 * 32 * 8 * 128 / 8
    assert Budget(total_bytes=1, batch=2, length=500).cost(plan) == plan.nbytes(2, 500)
    of_one_rank = Budget(total_bytes=1, batch=2, length=500, tp_size=4)
    assert of_one_rank.cost(plan) == plan.nbytes(2, 500) / 4
    with pytest.raises(HeadSplitError):
        Budget(total_bytes=1, batch=2, length=500, tp_size=3).cost(plan)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of bits, bytes_per_token, total_bytes; got none of them"),
        ({"bits": 3, "bytes_per_token": 9}, "got bits and bytes_per_token"),
        ({"bits": "3"}, "bits must be a number, got '3'"),
        ({"bits": True}, "bits must be a number, got True"),
        ({"bits": 0}, "bits must be positive and finite, got 0"),
        ({"bits": float("nan")}, "positive and finite, got nan"),
        ({"bytes_per_token": float("inf")}, "positive and finite, got inf"),
        ({"bits": 3, "length": 100}, "batch and length go with total_bytes"),
        ({"bits": 3, "tp_size": 2}, "go with total_bytes, like tp_size"),
        ({"total_bytes": 9, "batch": 1}, "total_bytes needs the batch and the length"),
    ],
)
def test_refuses_what_is_no_budget(arguments, message):
    with pytest.raises(BudgetError, match=message):
        Budget(**arguments)


def test_refuses_what_is_no_count():
    with pytest.raises(PlanFieldError, match="length must be at least 1"):
        Budget(total_bytes=9, batch=1, length=0)
    with pytest.raises(PlanFieldError, match="itemsize must be an integer"):
        Budget(bits=3, itemsize=2.0)


@pytest.mark.parametrize(
    ("low", "high", "raw"),
    [
        ({"bits": 2.0}, {"bits": 16.1}, "16 of an unquantized cache"),
        ({"bytes_per_token": 100}, {"bytes_per_token": 131_073}, "131,072 of an unquantized cache"),
        (
            {"total_bytes": 100, "batch": 2, "length": 10},
            {"total_bytes": 2.7e6, "batch": 2, "length": 10},
            r"2\.62144e\+06 of an unquantized cache",
        ),
        (
            {"total_bytes": 100, "batch": 2, "length": 10, "tp_size": 2},
            {"total_bytes": 1.35e6, "batch": 2, "length": 10, "tp_size": 2},
            r"1\.31072e\+06 of an unquantized cache",
        ),
    ],
)
def test_bounds(low, high, raw):
    with pytest.raises(BudgetError, match=r"below the 1,000 of the cheapest plan: raise it"):
        Budget(**low).check(1000, GEOMETRY)
    with pytest.raises(BudgetError, match=f"above the {raw}"):
        Budget(**high).check(0.1, GEOMETRY)


def test_says_itself():
    assert str(Budget(bits=2.5)) == "2.5 bits"
    assert str(Budget(total_bytes=3 * 2**30, batch=4, length=1024)) == (
        "3,221,225,472 total bytes (batch 4, 1,024 tokens)"
    )
    assert str(Budget(total_bytes=2**20, batch=4, length=64, tp_size=2)) == (
        "1,048,576 total bytes on each of 2 ranks (batch 4, 64 tokens)"
    )
