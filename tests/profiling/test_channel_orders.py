"""Formats with tiers, rotation and byte scales in a profile, and plans made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvmix_fx
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.errors import AllocatorError, BudgetError, PlanFieldError, ProfileFileError
from kvmix_fx.plan import KVPlan, LayerPlan, ModelGeometry, QuantSpec
from kvmix_fx.plan.allocators import ALLOCATORS, allocate
from kvmix_fx.plan.budget import Budget
from kvmix_fx.plan.orders import decode_order, encode_order
from kvmix_fx.plan.prices import Drop, Menu, Prices, drops, keeping
from kvmix_fx.profiling import Profile, channel_orders
from kvmix_fx.profiling.calibration import load_calibration
from kvmix_fx.profiling.kl import measure_drops
from kvmix_fx.profiling.observe import Listeners, Observer, observing
from kvmix_fx.profiling.rounding import round_trip
from kvmix_fx.testing.models import tiny_llama
from tests.depth import examples

GEOMETRY = ModelGeometry(4, 2, 64)
MENU = Menu.default(GEOMETRY)


def tokens(rows: int = 2, length: int = 180) -> torch.Tensor:
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(1))


SMALL = Menu(
    (
        QuantSpec(2, "channel", 32),
        QuantSpec(4, "channel", 128, "byte", tiers=((4, 8), (2, 24)), order="prompt"),
        QuantSpec(4, "channel", 128, "byte", tiers=((4, 8), (2, 16), (0, 8)), order="prompt"),
    ),
    (
        QuantSpec(2, "token", "head"),
        QuantSpec(2, "token", "head", "byte", rotation="hadamard", symmetric=True),
    ),
)


@pytest.fixture(scope="module")
def measured() -> Profile:
    torch.set_num_threads(1)
    return kvmix_fx.profile(tiny_llama(), tokens(), menu=SMALL, signals=("fisher_scaled", "weight_gradient"))


@pytest.mark.parametrize("spec", [*MENU.keys, *MENU.values], ids=str)
def test_a_round_trip_leaves_what_a_packed_cache_holds(spec: QuantSpec) -> None:
    x = torch.randn(2, 2, 4 + 256, 64, generator=torch.Generator().manual_seed(0))
    x *= torch.linspace(0.1, 3, 64)
    widest = torch.arange(63, -1, -1)
    order = torch.stack([widest, widest.roll(1)])
    if spec.tiers:
        spec = replace(spec, order="plan", channel_order=encode_order(order.tolist()))
    fmt = spec.format(128, sink=4, window=0)
    packed = QuantizedKVTensor.from_hp(x, fmt, hint=order.int() if spec.tiers else None)
    spec = replace(spec, order="prompt" if spec.tiers else "none", channel_order="")
    found = round_trip(x, spec, sink=4, order=order)
    torch.testing.assert_close(found, packed.dequantize(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found[:, :, :4], x[:, :, :4])
    if spec.tiers:
        other = round_trip(x, spec, sink=4, order=order.flip(1))
        assert (other - x).square().mean() > 1.2 * (found - x).square().mean()


def test_the_menu_has_the_uniform_formats_and_more() -> None:
    plain = Menu.uniform(GEOMETRY)
    assert set(plain.keys) < set(MENU.keys)
    assert set(plain.values) < set(MENU.values)
    assert MENU.predictable().keys == tuple(
        spec for spec in MENU.keys if not spec.tiers and spec.range_factor is None
    )
    assert [drops(MENU.keys[n]) for n in MENU.dropping()] == [True]
    assert keeping(MENU.keys[MENU.dropping()[0]]) in MENU.keys
    for head_dim in (16, 32, 48, 80, 96, 128, 256):
        menu = Menu.default(ModelGeometry(1, 1, head_dim))
        for key in menu.keys:
            LayerPlan(key, menu.values[-1]).formats(head_dim)
        for value in menu.values:
            LayerPlan(menu.keys[0], value).formats(head_dim)


@st.composite
def priced(draw: st.DrawFn) -> Prices:
    numbers = st.integers(0, 10**6).map(float)
    rows = [
        tuple(draw(st.lists(st.tuples(*[numbers] * len(specs)), min_size=3, max_size=3)))
        for specs in (MENU.keys, MENU.values)
    ]
    barred = draw(st.frozensets(st.tuples(st.integers(0, 2), st.sampled_from(MENU.dropping()))))
    return Prices("drawn", MENU, *rows, barred)


@given(priced(), st.floats(2.4, 6))
@settings(max_examples=examples(15), deadline=None)
def test_more_formats_are_never_worse(prices: Prices, bits: float) -> None:
    """At any budget, by the planner's own prices; and no layer has what it may not have."""
    geometry = replace(GEOMETRY, num_layers=3)
    plain = prices.within(Menu.uniform(geometry))
    whole = allocate("exact", prices, Budget(bits=bits), geometry)
    less = allocate("exact", plain, Budget(bits=bits), geometry)
    assert whole.bits_per_element() <= bits + 1e-9
    assert whole.provenance["predicted_loss"] <= less.provenance["predicted_loss"]
    for name in ALLOCATORS:
        plan = allocate(name, prices, Budget(bits=bits), geometry)
        assert plan.provenance["predicted_loss"] >= whole.provenance["predicted_loss"]
        taken = {(n, MENU.keys.index(layer.key)) for n, layer in enumerate(plan.layers)}
        assert not taken & prices.barred


def test_a_layer_that_may_have_nothing_is_refused() -> None:
    menu = Menu((QuantSpec(2),), (QuantSpec(2, "token"),))
    with pytest.raises(PlanFieldError, match="no format of the menu is left for the keys of layer 0"):
        Prices("kl", menu, ((1.0,),), ((1.0,),), frozenset({(0, 0)}))
    with pytest.raises(PlanFieldError, match="no price for"):
        Prices("kl", menu, ((1.0,),), ((1.0,),)).within(MENU)


def test_a_profile_of_tiers(measured: Profile, tmp_path: Path) -> None:
    assert len(measured.orders) == 2
    assert sorted(decode_order(measured.orders[0], 32)[1]) == list(range(32))
    assert measured.orders == channel_orders(tiny_llama(), tokens())
    assert list(measured.drops) == [2]
    prices = measured.prices["fisher_scaled"]
    for layer, drop in enumerate(measured.drops[2]):
        assert 0 < drop.mean <= drop.worst
        assert prices.keys[layer][2] == prices.keys[layer][1] + drop.mean
    assert measured.settings["sink_length"] == 4
    assert "2 of 2 layers may have it" in measured.describe()
    assert Profile.load(measured.save(tmp_path / "p.safetensors")) == measured


def test_a_drop_is_measured_by_itself() -> None:
    """Worked out a second way: the means of groups put in by hand, everything else exact."""
    model, ids = tiny_llama(), tokens(1)
    text = load_calibration(ids, None)
    with observing(model), torch.no_grad():
        observer = Observer(model, sink_length=4)
        kept: dict[int, torch.Tensor] = {}
        observer.listeners = Listeners(
            cached=lambda layer, role, x: kept.setdefault(layer, x) if role == "key" else None
        )
        exact = observer.read(ids)[0].log_softmax(-1)
        observer.listeners = Listeners()
        observer.orders = {n: torch.arange(32).flip(0).expand(2, 32) for n in (0, 1)}
        found = measure_drops(observer, text, SMALL)[2]
        for layer, drop in enumerate(found):
            means = kept[layer].clone()
            for group in (slice(4, 132), slice(132, 180)):
                # the last of the order are channels 7 to 0
                means[:, :, group, :8] = means[:, :, group, :8].mean(2, keepdim=True)
            observer.replacements = {(layer, "key"): means}
            moved = observer.read(ids)[0].log_softmax(-1)
            kl = (exact.exp() * (exact - moved)).sum(-1)[observer.first_packed_query :].mean()
            # the mean is stored in quarters of a byte scale
            assert drop.mean == drop.worst == pytest.approx(float(kl), rel=0.1)


def test_a_plan_drops_channels_only_where_that_was_cheap(measured: Profile) -> None:
    costly = replace(measured, drops={2: (Drop(1e-4, 2e-4), Drop(1e-2, 2e-2))})
    cheapest = (2 + 1 / 8 + 2 + 1 / 4) / 2  # keys that drop in both layers, and rotated values
    plan = costly.plan(bits=2.4)
    assert [drops(layer.key) for layer in plan.layers] == [True, False]
    assert costly.droppable() == (0,)
    assert costly.droppable(max_drop_kl=0.1) == (0, 1)
    free = costly.plan(bits=cheapest + 1e-6, max_drop_kl=0.1)
    assert [drops(layer.key) for layer in free.layers] == [True, True]
    with pytest.raises(BudgetError, match="below the"):
        costly.plan(bits=cheapest + 1e-6)
    unmeasured = replace(measured, drops={})
    assert not any(drops(layer.key) for layer in unmeasured.plan(bits=2.5).layers)
    assert unmeasured.droppable() == ()


def test_plans_bring_the_orders_that_were_measured(measured: Profile) -> None:
    plan = measured.plan(bits=2.7, max_drop_kl=0)
    assert any(layer.key.tiers for layer in plan.layers)
    for layer, order in zip(plan.layers, measured.orders, strict=True):
        if layer.key.tiers:
            assert (layer.key.order, layer.key.channel_order) == ("plan", order)
        assert layer.sink_length == 4
    asked = measured.plan(bits=2.7, order="prompt", max_drop_kl=0)
    assert {layer.key.order for layer in asked.layers if layer.key.tiers} == {"prompt"}
    assert measured.ordered(asked).layers == plan.layers
    assert KVPlan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanFieldError, match="order must be one of"):
        measured.plan(bits=2.7, order="tile")


def test_scores_are_priced_with_formats_whose_error_is_known(measured: Profile) -> None:
    plan = measured.plan(bits=3.0, signal="weight_gradient")
    assert not any(layer.key.tiers or layer.value.symmetric for layer in plan.layers)
    with pytest.raises(AllocatorError, match="offer other formats as well"):
        measured.plan(bits=3.0, signal="weight_gradient", menu=Menu(SMALL.keys[1:], SMALL.values))


def test_profiles_of_the_first_version_still_load(measured: Profile, tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    from kvmix_fx.profiling.report import FORMAT, _digest

    path = measured.save(tmp_path / "p.safetensors")
    arrays = numpy.load_file(path)

    def written(**changes: object) -> Path:
        import safetensors

        with safetensors.safe_open(path, "numpy") as file:
            content = json.loads(file.metadata()[FORMAT]) | changes
        for name in ("orders", "drops"):
            del content[name]
        text = json.dumps(content)
        numpy.save_file(arrays, tmp_path / "old", {FORMAT: text, "digest": _digest(text, arrays)})
        return tmp_path / "old"

    old = Profile.load(written(version=1))
    assert old == replace(measured, orders=(), drops={})
    assert not any(layer.key.channel_order for layer in old.plan(bits=2.7).layers)
    with pytest.raises(ProfileFileError, match="version 3, this package reads up to 2"):
        Profile.load(written(version=3))
