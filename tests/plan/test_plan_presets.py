"""Presets against the methods they stand for."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmix_fx.errors import (
    FormatError,
    HeadSizeError,
    PlanFieldError,
    PlanGeometryError,
    PlanLayerError,
    PresetError,
)
from kvmix_fx.plan import PRESETS, KVPlan, LayerPlan, ModelGeometry, QuantSpec, WindowRule, preset
from kvmix_fx.plan.allocators import allocate
from kvmix_fx.plan.budget import Budget
from kvmix_fx.plan.presets import kitty, kivi, kv_adaquant, kvmix, mixkvq, tiers, uniform
from kvmix_fx.plan.prices import Scores

GEOMETRY = ModelGeometry(32, 8, 128)
CONFIG = SimpleNamespace(
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096
)


@pytest.mark.parametrize("target", [GEOMETRY, CONFIG, SimpleNamespace(config=CONFIG), 32])
def test_targets(target):
    plan = uniform(target, 4, 2)
    layer = LayerPlan(QuantSpec(4, "channel", 32), QuantSpec(2, "token", 32), WindowRule(length=32), 4)
    assert plan.layers == (layer,) * 32
    assert plan.geometry == (None if target == 32 else GEOMETRY)
    assert plan.name == "uniform K4V2 g32"
    assert plan.provenance == {"preset": "uniform"}


def test_uniform_passes_everything_on():
    plan = uniform(
        2,
        8,
        4,
        64,
        key_axis="token",
        value_axis="channel",
        window=0,
        sink_length=4,
        tile=128,
        scale_dtype="bfloat16",
        name="mine",
    )
    expected = LayerPlan(
        QuantSpec(8, "token", 64, "bfloat16"),
        QuantSpec(4, "channel", 64, "bfloat16"),
        WindowRule(length=0),
        4,
        128,
    )
    assert plan.layers == (expected,) * 2
    assert plan.name == "mine"


def test_uniform_gives_values_the_bits_of_keys():
    assert uniform(1, 3).layers[0].value.bits == 3


def test_kivi():
    plan = kivi(GEOMETRY)
    layer = LayerPlan(QuantSpec(2, "channel", 32), QuantSpec(2, "token", 32), WindowRule(length=128))
    assert plan.layers == (layer,) * 32
    assert plan.bits_per_element() == 3.0


def test_kv_adaquant():
    plan = kv_adaquant(GEOMETRY)
    layer = LayerPlan(QuantSpec(4, "token", "head"), QuantSpec(2, "token", "head"), WindowRule(length=64))
    assert plan.layers == (layer,) * 32
    assert plan.bits_per_element() == 3.25
    better = kv_adaquant(GEOMETRY, key_axis="channel").layers[0]
    assert better == LayerPlan(QuantSpec(4, "channel", 32), layer.value, layer.window)


@pytest.mark.parametrize(
    ("bits", "tiers_of_keys", "value_bits", "effective"),
    [
        (2.15, ((4, 32), (2, 96)), 2, 2.34375),
        (2.4, ((4, 32), (2, 96)), 2, 2.34375),
        (2.45, ((4, 32), (2, 96)), 2, 2.34375),
        (2.5, ((4, 64), (2, 64)), 2, 2.59375),
        (2.6, ((4, 64), (2, 64)), 2, 2.59375),
        (3.1, ((4, 64), (2, 64)), 3, 3.125),
    ],
)
def test_tiers_by_bits(bits, tiers_of_keys, value_bits, effective):
    plan = tiers(GEOMETRY, bits=bits)
    assert {layer.key.tiers for layer in plan.layers} == {tiers_of_keys}
    assert {layer.key.order for layer in plan.layers} == {"prompt"}
    assert plan.layers[0].value.bits == value_bits
    assert plan.bits_per_element() == effective
    # with a length, raw tokens and the order of the channels count: one int32 per channel and sequence
    packed, order = (4096 - 4 - 32) // 128 * 128, 32
    counted = (packed * effective + (4096 - packed) * 16 + order / 2) / 4096
    assert plan.bits_per_element(4096) == pytest.approx(counted, rel=1e-12)


def test_tiers_drop_channels_where_that_is_allowed():
    plan = tiers(GEOMETRY, bits=2.15, drop_layers="1-31")
    assert plan.layers[0].key.tiers == ((4, 32), (2, 96))
    assert {layer.key.tiers for layer in plan.layers[1:]} == {((4, 32), (2, 64), (0, 32))}
    assert plan.bits_per_element() == pytest.approx(2.34375 - 0.25 * 31 / 32)
    assert tiers(GEOMETRY, bits=2.4, drop_layers="all") == tiers(GEOMETRY, bits=2.4)
    with pytest.raises(PlanLayerError, match="there is no layer 32"):
        tiers(GEOMETRY, bits=2.15, drop_layers=[32])
    for bits in ("2.4", True, 0, float("nan")):
        with pytest.raises(PlanFieldError, match="bits must be"):
            tiers(GEOMETRY, bits=bits)


def test_mixkvq():
    plan = mixkvq(GEOMETRY)
    tiers = ((16, 8), (4, 16), (2, 104))
    layer = LayerPlan(
        QuantSpec(4, "channel", 32, tiers=tiers, order="tile", range_factor=1.0),
        QuantSpec(2, "token", 32),
        WindowRule(length=0),
        tile=128,
    )
    assert plan.layers == (layer,) * 32
    # 3.125 bits of codes, as the paper counts, and scales, offsets and orders
    assert plan.bits_per_element() == (2 + 14 / 16 + 2 / 8 + 1 + 8 / 128 + 3) / 2
    key, value = plan.layers[0].formats(128)
    # 128 tokens wait, are packed together, and none is left
    assert (key.packed_tiles(127), key.packed_tiles(128), key.ring) == (0, 1, 128)
    assert {tier.span for tier in (*key.tiers, *value.tiers)} == {100}
    assert mixkvq(GEOMETRY, 16, 32).layers[0].key.tiers == ((16, 16), (4, 32), (2, 80))
    assert mixkvq(ModelGeometry(2, 2, 64)).layers[0].key.tiers == ((16, 8), (4, 8), (2, 48))
    assert plan.layers[0].label == "K16/4/2 of 8/16/104V2"


def test_kitty():
    plan = kitty(GEOMETRY)
    layer = LayerPlan(
        QuantSpec(4, "channel", 128, tiers=((4, 16), (2, 112)), order="tile_keys", range_factor=1.0),
        QuantSpec(2, "token", "head"),
        WindowRule(length=128),
        32,
        128,
    )
    assert plan.layers == (layer,) * 32
    # as published: 2.56 bits of keys, 2.41 in all; 2.53 for Kitty-Pro
    assert plan.bits_per_element() == (2.5625 + 2.25) / 2
    assert kitty(GEOMETRY, 0.25).bits_per_element() == (2.8125 + 2.25) / 2
    assert all(tier.span == 100 for tier in plan.layers[0].formats(128)[0].tiers)
    for share in (0, 1.0, -1):
        with pytest.raises(PresetError, match="a share that leaves some at 4 and some at 2 bits"):
            kitty(GEOMETRY, share)
    with pytest.raises(PresetError, match="leave -40 of 128 at 2 bits"):
        mixkvq(GEOMETRY, 152)


def test_kvmix_raises_keys_and_values_apart():
    plan = kvmix(GEOMETRY, [0, 1, 2, 3, 30, 31], "last:6")
    assert [layer.key.bits for layer in plan.layers] == [3] * 4 + [2] * 26 + [3] * 2
    assert [layer.value.bits for layer in plan.layers] == [2] * 26 + [4] * 6
    assert (plan.key_bits, plan.value_bits) == (2.1875, 2.375)  # the paper's plan for 32 layers
    assert {(layer.key.axis, layer.value.axis) for layer in plan.layers} == {("channel", "token")}
    assert kvmix(32, [0], (), high_key_bits=4).layers[0].key.bits == 4


@pytest.mark.parametrize("none", [(), [], set(), range(0)])
def test_kvmix_without_important_layers_is_uniform(none):
    assert kvmix(4, none, none).digest == uniform(4, 2, sink_length=0).digest


@given(st.sampled_from([name for name in PRESETS if name != "kvmix"]))
def test_preset_by_name_is_the_function(name):
    options = {"key_bits": 4} if name == "uniform" else {}
    assert preset(name, GEOMETRY, **options) == KVPlan.preset(name, GEOMETRY, **options)
    assert preset(name, GEOMETRY, **options) == PRESETS[name](GEOMETRY, **options)
    assert preset(name, GEOMETRY, **options).provenance["preset"] == name


def test_plans_of_ours_keep_four_sinks_and_published_ones_their_papers():
    signal = Scores("norm", (1.0,) * 32, (1.0,) * 32)
    ours = [uniform(GEOMETRY, 4), tiers(GEOMETRY), allocate("exact", signal, Budget(bits=3.0), GEOMETRY)]
    assert {layer.sink_length for plan in ours for layer in plan.layers} == {4}
    published = [kivi(GEOMETRY), kv_adaquant(GEOMETRY), kvmix(GEOMETRY, [0], [1])]
    assert {layer.sink_length for plan in published for layer in plan.layers} == {0}


def test_plan_class_forwards_to_uniform():
    assert KVPlan.uniform(GEOMETRY, 4, 2, 64, window=7) == uniform(GEOMETRY, 4, 2, 64, window=7)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "kvmx",
            {},
            "there is no preset 'kvmx'; did you mean 'kvmix'\\? known: uniform, kivi, kv-adaquant, kvmix",
        ),
        ("gguf", {}, "there is no preset 'gguf'; known: uniform"),
        (
            "kvmix",
            {},
            "preset 'kvmix': missing a required argument: 'high_key_layers'; it takes target, high_key",
        ),
        (
            "kivi",
            {"bit": 3},
            "preset 'kivi': got an unexpected keyword argument 'bit'; it takes target, bits, group",
        ),
    ],
)
def test_preset_refuses_what_it_does_not_know(name, options, message):
    with pytest.raises(PresetError, match=message):
        preset(name, 4, **options)


def test_presets_check_target_and_parts():
    with pytest.raises(PlanLayerError, match="at least one layer, got 0"):
        uniform(0, 4)
    with pytest.raises(PlanGeometryError, match="num_hidden_layers"):
        uniform("a model's name", 4)
    with pytest.raises(PlanGeometryError, match="num_hidden_layers"):
        uniform(True, 4)
    with pytest.raises(HeadSizeError, match="layer 0, value: group_size 32 does not divide the head size 80"):
        uniform(ModelGeometry(2, 2, 80), 4)
    with pytest.raises(PlanFieldError, match="bits must be one of"):
        uniform(4, 5)
    with pytest.raises(FormatError, match="group_size 32 does not divide the tile of 48"):
        uniform(4, 4, tile=48)
    with pytest.raises(PlanLayerError, match="there is no layer 9"):
        kvmix(4, [9], ())
