"""Allocators: never above the budget, and as good as each of them promises."""

import random
import time
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmix_fx.errors import AllocatorError, BudgetError, FormatError, PlanLayerError
from kvmix_fx.plan import ModelGeometry, QuantSpec, WindowRule
from kvmix_fx.plan.allocators import ALLOCATORS, Problem, allocate
from kvmix_fx.plan.allocators.problem import Offer, frontier, hull
from kvmix_fx.plan.budget import Budget
from kvmix_fx.plan.prices import Menu, Prices, Scores, distortion
from tests.depth import examples

SIGNAL_FREE = ("uniform", "random")
SIGNAL_BOUND = tuple(name for name in ALLOCATORS if name not in SIGNAL_FREE)
DETERMINED = tuple(name for name in ALLOCATORS if name != "random")

SMALL_MENU = Menu(
    (QuantSpec(2), QuantSpec(3, group_size=64), QuantSpec(3)),
    (QuantSpec(2, "token"), QuantSpec(4, "token", "head"), QuantSpec(4, "token")),
)


def geometry(layers, head_dim=64):
    return ModelGeometry(layers, 3, head_dim)


# whole numbers add up the same in every order
losses = st.integers(0, 10**6).map(float)


@st.composite
def prices(draw, menu=SMALL_MENU, min_layers=1, max_layers=4):
    layers = draw(st.integers(min_layers, max_layers))
    rows = [
        draw(st.lists(st.tuples(*[losses] * len(specs)), min_size=layers, max_size=layers))
        for specs in (menu.keys, menu.values)
    ]
    return Prices("drawn", menu, *map(tuple, rows))


@st.composite
def scores(draw, max_layers=6):
    layers = draw(st.integers(1, max_layers))
    numbers = st.lists(st.floats(0.01, 100), min_size=layers, max_size=layers).map(tuple)
    return Scores("drawn", draw(numbers), draw(numbers))


bits = st.floats(3.0, 4.5)
"""What the small menu spans, from K2V2 in groups of 32 on."""


def loss(plan):
    return plan.provenance["predicted_loss"]


def solve(name, signal, amount, **options):
    layers = len(signal.keys)
    return allocate(name, signal, Budget(bits=amount), geometry(layers), **options)


@given(prices(), bits, st.sampled_from(sorted(ALLOCATORS)))
def test_never_exceeds_bits(signal, amount, name):
    assert solve(name, signal, amount).bits_per_element() <= amount + 1e-9


@given(scores(), st.sampled_from(sorted(ALLOCATORS)), st.floats(0, 1), st.integers(1, 700), st.data())
def test_never_exceeds_bytes(signal, name, level, length, data):
    sizes = geometry(len(signal.keys), head_dim=96)
    problem_of = lambda budget: Problem(  # noqa: E731
        Prices.from_scores(signal, Menu.uniform(sizes), 96), budget, sizes, WindowRule(length=32), 4
    )
    for unit in ({"bytes_per_token": 1.0}, {"total_bytes": 1.0, "batch": 2, "length": length}):
        costs = problem_of(Budget(**unit)).costs.values()
        low, high = min(costs) * len(signal.keys), max(costs) * len(signal.keys)
        raw = Budget(**unit)._raw_cost(sizes)
        low, high = low * (1 + 1e-9), min(high, raw)
        if low > high:  # a context shorter than its raw ring
            continue
        budget = Budget(**unit | {next(iter(unit)): low + level * (high - low)})
        try:
            plan = allocate(name, signal, budget, sizes, sink_length=4)
        except BudgetError:
            # KVmix's three widths do not reach down to the cheapest pair of the menu
            assert name == "rank_quota"
            continue
        assert budget.allows(budget.cost(plan))


@given(prices(max_layers=3), bits)
def test_exact_is_exact(signal, amount):
    plan = solve("exact", signal, amount)
    sizes = geometry(len(signal.keys))
    problem = Problem(signal, Budget(bits=amount), sizes, WindowRule(length=32))
    every = product(problem.costs, repeat=sizes.num_layers)
    assert loss(plan) == min(problem.total_loss(choice) for choice in every if problem.fits(choice))


@given(st.data(), st.integers(40, 400))
@settings(max_examples=examples(30))
def test_exact_is_exact_in_bytes(data, length):
    signal = data.draw(prices(max_layers=3))
    sizes = geometry(len(signal.keys))
    unit = {"batch": 1, "length": length}
    start = Problem(signal, Budget(total_bytes=1, **unit), sizes, WindowRule(length=0))
    low, high = (pick(start.costs.values()) * sizes.num_layers for pick in (min, max))
    high = min(high, start.budget._raw_cost(sizes))
    if low > high:
        return
    budget = Budget(total_bytes=data.draw(st.floats(low, high)), **unit)
    problem = Problem(signal, budget, sizes, WindowRule(length=0))
    every = product(problem.costs, repeat=sizes.num_layers)
    best = min(problem.total_loss(choice) for choice in every if problem.fits(choice))
    assert loss(allocate("exact", signal, budget, sizes, window=0, sink_length=0)) == best


@given(prices(), bits, st.sampled_from(sorted(ALLOCATORS)))
def test_none_predicts_less_loss_than_exact(signal, amount, name):
    assert loss(solve("exact", signal, amount)) <= loss(solve(name, signal, amount))


@given(prices(), bits, bits)
def test_more_bits_never_cost_quality(signal, one, other):
    low, high = sorted((one, other))
    for name in ("exact", "uniform"):
        assert loss(solve(name, signal, high)) <= loss(solve(name, signal, low))


@given(prices(), bits, bits)
def test_greedy_falls_with_the_budget_until_an_upgrade_is_left_out(signal, one, other):
    """With twice the largest upgrade to spare, nothing that the smaller budget took is missing."""
    low, high = sorted((one, other))
    largest = 4.5 - 3.0  # of one layer, from the cheapest pair of the menu to the dearest
    if high - low >= largest:
        assert loss(solve("greedy", signal, high)) <= loss(solve("greedy", signal, low))


@given(prices(min_layers=2), bits, st.randoms(use_true_random=False))
def test_the_order_of_layers_does_not_matter(signal, amount, rng):
    order = list(range(len(signal.keys)))
    rng.shuffle(order)
    turned = Prices(
        "drawn", signal.menu, *(tuple(rows[i] for i in order) for rows in (signal.keys, signal.values))
    )
    for name in DETERMINED:
        plan, other = solve(name, signal, amount), solve(name, turned, amount)
        assert loss(plan) == loss(other)
        if name != "exact":  # which may choose freely among equals
            assert [plan.layers[i] for i in order] == list(other.layers)


@given(losses, losses, st.integers(1, 40), st.floats(2.5, 8.5), st.sampled_from(SIGNAL_BOUND))
@settings(max_examples=examples(60))
def test_equal_scores_give_a_uniform_plan(key, value, layers, amount, name):
    signal = Scores("equal", (key,) * layers, (value,) * layers)
    if name == "exact":  # spends the rest of the budget on some layers, so give it one without a rest
        amount = solve("uniform", signal, amount).bits_per_element()
        plan = solve(name, signal, amount)
        assert loss(plan) <= loss(solve("uniform", signal, amount)) * (1 + 1e-9)
    else:
        assert len(set(solve(name, signal, amount).layers)) == 1


def test_equal_scores_give_a_uniform_plan_exactly_where_one_is_on_the_hull():
    signal = Scores("equal", (1.0,) * 6, (1.0,) * 6)
    sizes = geometry(6)
    priced = Prices.from_scores(signal, Menu.uniform(sizes), sizes.head_dim)
    problem = Problem(priced, Budget(bits=4), sizes, WindowRule())
    for offer in hull(problem.offers(0)):
        plan = solve("exact", signal, offer.cost)
        assert len(set(plan.layers)) == 1
        assert plan.bits_per_element() == offer.cost


@given(st.lists(st.builds(Offer, st.integers(1, 9), st.integers(0, 9), st.just((0, 0))), min_size=1))
def test_hull_bounds_every_offer_from_below(offers):
    kept = hull(offers)
    assert set(kept) <= set(frontier(offers)) <= set(offers)
    assert kept[0].cost == min(offer.cost for offer in offers)
    assert kept[-1].loss == min(offer.loss for offer in offers)
    for offer in offers:
        for a, b in zip(kept, kept[1:], strict=False):
            if a.cost <= offer.cost <= b.cost:
                on_line = a.loss + (b.loss - a.loss) * (offer.cost - a.cost) / (b.cost - a.cost)
                assert offer.loss >= on_line - 1e-9


def test_water_filling_gives_one_bit_for_each_factor_beta():
    """Weights in powers of beta, on a menu with bits alone, are bits that differ by one."""
    menu = Menu(tuple(QuantSpec(b, scale_dtype="float16") for b in (1, 2, 3, 4)), (QuantSpec(4, "token"),))
    rows = tuple(tuple(100.0 * 5.0 ** (layer - spec.bits) for spec in menu.keys) for layer in range(4))
    signal = Prices("powers", menu, rows, ((1.0,),) * 4)
    plan = solve("water_filling", signal, (2.5 + 1 + 5) / 2)
    assert [layer.key.bits for layer in plan.layers] == [1, 2, 3, 4]


def test_rank_quota_is_kvmix_rule():
    rng = random.Random(0)
    signal = Scores("norms", *(tuple(rng.random() for _ in range(32)) for _ in "kv"))
    plan = solve("rank_quota", signal, 3.4, share=0.2)
    high_keys = {i for i, layer in enumerate(plan.layers) if layer.key.bits == 3}
    high_values = {i for i, layer in enumerate(plan.layers) if layer.value.bits == 4}
    assert high_keys == set(sorted(range(32), key=lambda i: signal.keys[i])[-6:])
    assert high_values == set(sorted(range(32), key=lambda i: signal.values[i])[-6:])
    assert {layer.key.group_size for layer in plan.layers} == {32}
    assert plan.key_bits == 2.1875
    assert plan.value_bits == 2.375


def test_rank_quota_meets_the_budget_by_its_share():
    signal = Scores("norms", tuple(range(1, 31)), tuple(range(1, 31)))
    high = [
        sum(layer.key.bits == 3 for layer in solve("rank_quota", signal, amount).layers)
        for amount in (3.1, 3.5, 4.0, 4.5)
    ]
    assert high == sorted(high)
    assert high[-1] == 30


def test_thresholds_keep_every_tensor_below_one_loss():
    rng = random.Random(1)
    signal = Scores("norms", *(tuple(rng.random() for _ in range(12)) for _ in "kv"))
    sizes = geometry(12)
    plan = solve("thresholds", signal, 3.3)
    tensors = [
        (score, spec)
        for scores, role in ((signal.keys, "key"), (signal.values, "value"))
        for score, layer in zip(scores, plan.layers, strict=True)
        for spec in (getattr(layer, role),)
    ]
    worst = max(score**2 * distortion(spec, sizes.head_dim) for score, spec in tensors)
    for score, spec in tensors:
        offered = Menu.uniform(sizes).keys if spec.axis == "channel" else Menu.uniform(sizes).values
        cheaper = [
            other
            for other in offered
            if other.bits + 32 / _size(other) < spec.bits + 32 / _size(spec)
            and score**2 * distortion(other, sizes.head_dim) <= worst
        ]
        assert not cheaper


def _size(spec):
    return 64 if spec.group_size == "head" else spec.group_size


def test_random_plans_differ_by_seed_and_ignore_the_signal():
    rising = Scores("rising", tuple(range(1, 13)), tuple(range(1, 13)))
    flat = Scores("flat", (1.0,) * 12, (1.0,) * 12)
    digests = {solve("random", rising, 3.2, seed=seed).digest for seed in range(5)}
    assert len(digests) == 5
    assert solve("random", rising, 3.2, seed=3).digest == solve("random", flat, 3.2, seed=3).digest


def test_exact_is_fast():
    rng = random.Random(2)
    signal = Scores("norms", *(tuple(rng.lognormvariate(0, 1) for _ in range(80)) for _ in "kv"))
    started = time.process_time()
    allocate("exact", signal, Budget(bits=3.0), ModelGeometry(80, 8, 128))
    assert time.process_time() - started < 2


def test_plan_says_how_it_was_made():
    signal = Scores("norms", (1.0, 2.0), (2.0, 3.0))
    plan = allocate("rank_quota", signal, Budget(bits=3.5), geometry(2), window=64, sink_length=4, share=0.5)
    assert plan.geometry == geometry(2)
    assert plan.layers[0].window == WindowRule(length=64)
    assert plan.layers[0].sink_length == 4
    told = dict(plan.provenance)
    assert told.pop("predicted_loss") > 0
    assert told.pop("version")
    assert told == {
        "signal": "norms",
        "allocator": "rank_quota",
        "budget": {"bits": 3.5},
        "options": {"share": 0.5},
    }


def test_wide_key_groups_enlarge_the_ring_of_a_budget_in_bytes():
    signal = Scores("norms", (1.0,) * 4, (1.0,) * 4)
    menu = Menu((QuantSpec(2, group_size=128), QuantSpec(2)), (QuantSpec(2, "token"),))
    in_bits = allocate("uniform", signal, Budget(bits=2.99), geometry(4), menu=menu)
    assert in_bits.layers[0].key.group_size == 128
    # the plan of more bits is the smaller one at 300 tokens
    tight = Budget(total_bytes=in_bits.nbytes(1, 300) - 1, batch=1, length=300)
    assert allocate("uniform", signal, tight, geometry(4), menu=menu).layers[0].key.group_size == 32


def test_bad_requests():
    signal = Scores("norms", (1.0, 2.0), (2.0, 3.0))
    with pytest.raises(AllocatorError, match="no allocator 'exakt'; did you mean 'exact'"):
        solve("exakt", signal, 3.0)
    with pytest.raises(AllocatorError, match=r"'exact'.*'seed'; it takes no options"):
        solve("exact", signal, 3.0, seed=1)
    with pytest.raises(AllocatorError, match="from 0 to 1, got 2"):
        solve("rank_quota", signal, 3.0, share=2)
    with pytest.raises(AllocatorError, match="keys of 2 and 1 bits"):
        solve("rank_quota", signal, 3.0, high_key_bits=1)
    with pytest.raises(AllocatorError, match="menu with scores only"):
        solve("exact", Prices.from_scores(signal, SMALL_MENU, 64), 3.0, menu=SMALL_MENU)
    with pytest.raises(PlanLayerError, match="covers 2 layers, the model has 3: profile this model"):
        allocate("exact", signal, Budget(bits=3), geometry(3))
    with pytest.raises(BudgetError, match=r"2\.2 bits is below the 2\.375 of the cheapest plan"):
        solve("exact", signal, 2.2)
    with pytest.raises(BudgetError, match="above the 16 of an unquantized cache"):
        solve("exact", signal, 16.5)
    with pytest.raises(BudgetError, match="no plan with 2 layers at K3V4"):
        solve("rank_quota", signal, 2.5, share=1)
    with pytest.raises(FormatError, match="tile"):
        solve("exact", signal, 3.0, tile=32)
