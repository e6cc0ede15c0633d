"""Menus, and scores turned into prices."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvmix_fx.errors import PlanFieldError
from kvmix_fx.plan import LayerPlan, ModelGeometry, QuantSpec
from kvmix_fx.plan.prices import Menu, Prices, Scores, distortion
from kvmix_fx.testing.simulate import round_trip


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_distortion_is_that_of_normal_data(bits, group_size, axis):
    x = torch.randn(4, 4, 256, 128, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits, axis, group_size)
    measured = float((round_trip(x, spec) - x).square().mean())
    assert distortion(spec, head_dim=128) == pytest.approx(measured, rel=0.12)


def test_distortion_of_whole_heads_and_of_raw_tensors():
    assert distortion(QuantSpec(3, "token", "head"), 64) == distortion(QuantSpec(3, "token", 64), 64)
    assert distortion(QuantSpec(16), 64) == 0


@given(st.sampled_from((16, 32, 48, 64, 80, 96, 112, 128, 256)))
def test_default_menu_fits_every_head(head_dim):
    menu = Menu.uniform(ModelGeometry(2, 2, head_dim))
    for key in menu.keys:
        for value in menu.values:
            LayerPlan(key, value).formats(head_dim)
    assert len(set(menu.values)) == len(menu.values)
    assert {spec.group_size for spec in menu.keys} == {32, 64, 128}
    assert "head" in {spec.group_size for spec in menu.values}


def test_default_menu_names_no_grouping_twice():
    def sizes(head_dim):
        return [s.group_size for s in Menu.uniform(ModelGeometry(1, 1, head_dim), bits=(2,)).values]

    assert sizes(32) == ["head"]
    assert sizes(64) == [32, "head"]
    assert sizes(80) == ["head"]
    assert sizes(128) == [32, 64, "head"]
    assert sizes(256) == [32, 64, 128, "head"]


def test_prices_of_scores_are_squares_times_distortion():
    menu = Menu.uniform(ModelGeometry(2, 1, 64))
    prices = Prices.from_scores(Scores("norm", (1.0, 3.0), (2.0, 0.0)), menu, 64)
    for spec, one, three in zip(menu.keys, *prices.keys, strict=True):
        assert one == distortion(spec, 64)
        assert math.isclose(three, 9 * one)
    assert prices.values[1] == (0.0,) * len(menu.values)
    assert prices.values[0][0] == 4 * distortion(menu.values[0], 64)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_scores_are_finite_and_not_negative(bad):
    with pytest.raises(PlanFieldError, match="'norm': a score must be finite and at least 0"):
        Scores("norm", (bad,), (1.0,))


def test_tables_that_do_not_fit():
    menu = Menu((QuantSpec(2),), (QuantSpec(2, "token"),))
    with pytest.raises(PlanFieldError, match="one entry per layer for keys and for values, got 1 and 2"):
        Scores("norm", (1.0,), (1.0, 2.0))
    with pytest.raises(PlanFieldError, match="2 prices for the 1 formats of the values"):
        Prices("kl", menu, ((1.0,),), ((1.0, 2.0),))
