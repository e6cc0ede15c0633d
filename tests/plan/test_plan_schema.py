"""Making plans: what is checked, what is compared, what the digest sees."""

import copy
import dataclasses
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmix_fx.errors import (
    FormatError,
    HeadSizeError,
    PlanFieldError,
    PlanGeometryError,
    PlanLayerError,
    RangeWarning,
)
from kvmix_fx.plan import KVPlan, LayerPlan, ModelGeometry, QuantSpec, TokenTier, WindowRule
from kvmix_fx.plan.orders import encode_order
from kvmix_fx.testing.strategies import layer_plans, plans
from kvmix_kernels import layout

GEOMETRY = ModelGeometry(num_layers=4, num_kv_heads=2, head_dim=64)
LAYER = LayerPlan(QuantSpec(4), QuantSpec(2, "token"))


TIER_FIELDS = {"bits": 4, "group_size": 128, "scale_dtype": "byte", "order": "prompt"}
HEAD = {"bits": 2, "axis": "token", "group_size": "head"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (TIER_FIELDS | {"tiers": ((4, 12), (2, 52))}, "multiples of 8"),
        (TIER_FIELDS | {"tiers": ((2, 16), (4, 48))}, "each once and in this order"),
        (TIER_FIELDS | {"tiers": ((4, 16), (2, 48)), "order": "none"}, "need an order of channels"),
        (TIER_FIELDS | {"tiers": ((4, 16), (2, 48)), "order": "plan"}, "belong together"),
        (
            TIER_FIELDS
            | {
                "tiers": ((4, 16), (2, 48)),
                "order": "plan",
                "channel_order": encode_order([[0] * 64]),
            },
            "is no order of 64 channels: each must occur once",
        ),
        (
            TIER_FIELDS
            | {
                "tiers": ((4, 16), (2, 48)),
                "order": "plan",
                "channel_order": encode_order([range(48)]),
            },
            "it is of another model",
        ),
        (HEAD | {"symmetric": True}, "symmetric codes need rotation"),
        ({"bits": 4, "rotation": "hadamard"}, "leave rotation to values"),
        (HEAD | {"range_factor": 1.5}, "range_factor must be from 0.01 to 1"),
        (HEAD | {"range_factor": "all"}, "range_factor must be a number"),
    ],
)
def test_tiers_rotation_and_ranges_are_checked_when_a_spec_is_made(fields, message):
    with pytest.raises((PlanFieldError, FormatError), match=message):
        QuantSpec(**fields)


def test_tiers_and_orders_are_checked_against_the_model():
    value = QuantSpec(2, "token", "head", "byte", rotation="hadamard", symmetric=True)
    short = QuantSpec(**TIER_FIELDS, tiers=((4, 16), (2, 40)))
    with pytest.raises(HeadSizeError, match=r"layer 0, key: tiers of .* do not add up to the head size 64"):
        KVPlan((LayerPlan(short, value),) * 4, GEOMETRY)
    order = encode_order([range(64)])
    other = QuantSpec(**TIER_FIELDS | {"order": "plan"}, tiers=((4, 16), (2, 48)), channel_order=order)
    with pytest.raises(PlanLayerError, match="orders of channels for 1 KV heads, the model has 2"):
        KVPlan((LayerPlan(other, value),) * 4, GEOMETRY)
    with pytest.raises(PlanFieldError, match="keys are not rotated"):
        LayerPlan(value, value)


def test_a_range_that_is_cut_off_unrotated_values_warns():
    assert QuantSpec(**HEAD, range_factor=1) == QuantSpec(**HEAD, range_factor=1.0)
    with pytest.warns(RangeWarning, match="rotate them"):
        LayerPlan(QuantSpec(4), QuantSpec(**HEAD, range_factor=0.8))


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"bits": 5}, "bits", "bits must be one of 1, 2, 3, 4, 6, 8, 16; got 5"),
        ({"bits": 4.0}, "bits", "got 4.0"),
        ({"bits": True}, "bits", "got True"),
        ({"bits": "4"}, "bits", "got '4'"),
        ({"bits": 4, "axis": "row"}, "axis", "axis must be one of 'channel', 'token'; got 'row'"),
        (
            {"bits": 4, "scale_dtype": "int8"},
            "scale_dtype",
            "one of 'float16', 'bfloat16', 'float32', 'byte'; got 'int8'",
        ),
        ({"bits": 4, "group_size": 0}, "group_size", "group_size must be at least 1, got 0"),
        (
            {"bits": 4, "group_size": 2**31},
            "group_size",
            "group_size must be at most 2147483647, got 2147483648",
        ),
        ({"bits": 4, "group_size": None}, "group_size", "group_size must be an integer, got None"),
        ({"bits": 4, "group_size": "head"}, "group_size", 'needs axis="token"'),
    ],
)
def test_spec_names_the_field_it_refuses(fields, field, message):
    with pytest.raises(PlanFieldError) as caught:
        QuantSpec(**fields)
    assert message in str(caught.value)
    assert caught.value.field == field


def test_spec_refuses_token_groups_that_split_words():
    with pytest.raises(FormatError, match='group_size 24 must be a multiple of 16 with axis="token"'):
        QuantSpec(4, "token", 24)
    assert QuantSpec(16, "token", 24).is_raw


def test_other_windows_are_refused_with_the_kinds_there_are():
    with pytest.raises(PlanFieldError, match=r"kind must be one of 'fixed'; got 'ratio'"):
        WindowRule("ratio", 20)
    with pytest.raises(PlanFieldError, match="length must be at least 0, got -1"):
        WindowRule(length=-1)
    for window, message in ((-1, "at least 0, got -1"), (1.5, r"an integer, got 1\.5")):
        with pytest.raises(PlanFieldError, match=f"window must be {message}"):
            KVPlan.uniform(2, 4, window=window)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"key": 4}, "key must be a QuantSpec, got 4"),
        ({"value": None}, "value must be a QuantSpec"),
        ({"window": 32}, "window must be a WindowRule, got 32"),
        ({"sink_length": -1}, "sink_length must be at least 0"),
        ({"tile": 0}, "tile must be at least 1"),
        ({"tile": 32.0}, "tile must be an integer, got 32.0"),
    ],
)
def test_layer_names_the_field_it_refuses(fields, message):
    with pytest.raises(PlanFieldError, match=message):
        LayerPlan(**{"key": QuantSpec(4), "value": QuantSpec(2, "token")} | fields)


def test_layer_names_the_tensor_whose_groups_do_not_fill_the_tile():
    with pytest.raises(FormatError, match=r"^value: group_size 48 does not divide the tile of 64 tokens"):
        LayerPlan(QuantSpec(4, group_size=32), QuantSpec(4, group_size=48), tile=64)


@pytest.mark.parametrize(
    ("key", "value", "tile"),
    [
        (QuantSpec(2, "token"), QuantSpec(2, "token"), 32),
        (QuantSpec(2, group_size=16), QuantSpec(2, "token"), 32),
        (QuantSpec(2, group_size=128), QuantSpec(2, "token"), 128),
        (QuantSpec(2, group_size=24), QuantSpec(2, "token"), 48),
        (QuantSpec(2, group_size=24), QuantSpec(2, group_size=32), 96),
        (QuantSpec(16, group_size=128), QuantSpec(2, group_size=64), 64),
        (QuantSpec(2, "token", 64), QuantSpec(2, "token", "head"), 32),
    ],
)
def test_default_tile_is_the_smallest_legal_one(key, value, tile):
    assert LayerPlan(key, value).tile_length == tile


@given(layer_plans(head_dim=64))
def test_formats_are_those_of_the_layout(layer):
    for spec, fmt in zip((layer.key, layer.value), layer.formats(64), strict=True):
        assert (fmt.bits, fmt.axis) == (spec.bits, layout.AXES[spec.axis])
        assert fmt.group_size == (layout.WHOLE_HEAD if spec.group_size == "head" else spec.group_size)
        assert layout.SCALE_DTYPES[fmt.scale_dtype] == spec.scale_dtype
        assert (fmt.tile, fmt.sink, fmt.window) == (layer.tile_length, layer.sink_length, layer.window.length)
        assert fmt.is_raw or spec.axis == "token" or fmt.tile % spec.group_size == 0
    assert layer.is_raw == all(fmt.is_raw for fmt in layer.formats(64))


def test_formats_name_the_tensor_a_head_size_rules_out():
    with pytest.raises(HeadSizeError, match=r"^key: head size 72 is not a multiple of 16"):
        LAYER.formats(72)
    with pytest.raises(HeadSizeError, match=r"^value: group_size 32 does not divide the head size 80"):
        LAYER.formats(80)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": (LAYER, "K4V2")}, r"layers\[1\] must be a LayerPlan, got 'K4V2'"),
        ({"geometry": (4, 2, 64)}, "geometry must be a ModelGeometry"),
        ({"provenance": ["gradients"]}, "provenance must be a Mapping"),
        ({"provenance": {"scores": np.ones(3)}}, r"provenance must hold plain JSON values .*\.tolist\(\)"),
        ({"provenance": {"loss": float("nan")}}, "provenance must hold plain JSON values"),
        ({"name": None}, "name must be a str"),
        ({"base_model": 7}, "base_model must be a str"),
    ],
)
def test_plan_names_the_field_it_refuses(fields, message):
    with pytest.raises(PlanFieldError, match=message):
        KVPlan(**{"layers": (LAYER,) * 4} | fields)


def test_plan_refuses_no_layers_and_other_counts():
    with pytest.raises(PlanLayerError, match="at least one layer"):
        KVPlan(())
    with pytest.raises(
        PlanLayerError, match="the plan has 3 layers, the model has 4; build the plan from this"
    ):
        KVPlan((LAYER,) * 3, GEOMETRY)


def test_plan_names_the_layer_a_head_size_rules_out():
    layers = (LAYER, LAYER, LayerPlan(QuantSpec(4), QuantSpec(2, "token", 48)), LAYER)
    with pytest.raises(
        HeadSizeError, match=r"^layer 2, value: group_size 48 does not divide the head size 64"
    ):
        KVPlan(layers, GEOMETRY)


def test_a_list_of_layers_becomes_a_tuple():
    assert KVPlan([LAYER] * 4).layers == (LAYER,) * 4


@given(plans())
def test_plans_survive_copying_and_pickling(plan):
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), dataclasses.replace(plan)):
        assert twin == plan
        assert hash(twin) == hash(plan)
        assert twin.digest == plan.digest


def test_plans_cannot_be_changed():
    plan = KVPlan((LAYER,), provenance={"scores": [1, 2]})
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.name = "other"
    plan.provenance["scores"].append(3)
    assert plan.provenance["scores"] == [1, 2]
    with pytest.raises(TypeError):
        plan.provenance["scores"] = []


def test_provenance_is_a_mapping_that_compares_by_content():
    one, two = (
        KVPlan((LAYER,), provenance=p).provenance
        for p in ({"a": (1, 2), "b": None}, {"b": None, "a": [1, 2]})
    )
    assert one == two == {"a": [1, 2], "b": None}
    assert hash(one) == hash(two)
    assert (len(one), sorted(one), one["a"]) == (2, ["a", "b"], [1, 2])
    with pytest.raises(KeyError):
        one["c"]


TIERED = QuantSpec(4, tiers=((4, 16), (2, 48)), order="prompt")
ORDER, OTHER_ORDER = (encode_order([order]) for order in (range(64), range(63, -1, -1)))

CHANGES = {
    "key.bits": {"key": QuantSpec(8)},
    "key.axis": {"key": QuantSpec(4, "token")},
    "key.group_size": {"key": QuantSpec(4, group_size=16)},
    "key.scale_dtype": {"key": QuantSpec(4, scale_dtype="bfloat16")},
    "key.tiers": {"key": TIERED},
    "key.order": {"key": dataclasses.replace(TIERED, order="plan", channel_order=ORDER)},
    "key.channel_order": {"key": dataclasses.replace(TIERED, order="plan", channel_order=OTHER_ORDER)},
    "key.range_factor": {"key": QuantSpec(4, range_factor=0.9)},
    "value.rotation": {"value": QuantSpec(2, "token", rotation="hadamard")},
    "value.symmetric": {"value": QuantSpec(2, "token", rotation="hadamard", symmetric=True)},
    "value.bits": {"value": QuantSpec(3, "token")},
    "value.axis": {"value": QuantSpec(2, "channel")},
    "value.group_size": {"value": QuantSpec(2, "token", "head")},
    "value.scale_dtype": {"value": QuantSpec(2, "token", scale_dtype="float32")},
    "window.length": {"window": WindowRule(length=33)},
    "sink_length": {"sink_length": 4},
    "tile": {"tile": 64},
    "token_tier": {"token_tier": TokenTier(0.1)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("index", [0, 3])
def test_digest_changes_with_every_field_of_every_layer(change, index):
    plan = KVPlan((LAYER,) * 4)
    layers = list(plan.layers)
    layers[index] = dataclasses.replace(LAYER, **change)
    assert KVPlan(tuple(layers)).digest != plan.digest


def test_no_field_is_missing_from_the_changes():
    names = {field.name for field in dataclasses.fields(LayerPlan)}
    specs = {field.name for field in dataclasses.fields(QuantSpec)}
    tested = {name.split(".")[0] for name in CHANGES}
    assert tested == names
    assert {name.split(".")[1] for name in CHANGES if name.startswith(("key.", "value."))} == specs


def test_digest_changes_with_the_number_and_order_of_layers():
    other = dataclasses.replace(LAYER, sink_length=1)
    assert (
        len({KVPlan(layers).digest for layers in ((LAYER,), (LAYER,) * 2, (LAYER, other), (other, LAYER))})
        == 4
    )


def test_digest_leaves_out_what_the_runtime_does_not_act_on():
    plan = KVPlan((LAYER,) * 4)
    twin = KVPlan(plan.layers, GEOMETRY, {"signal": "none"}, "other", "some/model")
    assert twin != plan
    assert twin.digest == plan.digest
    assert KVPlan((dataclasses.replace(LAYER, tile=32),) * 4).digest == plan.digest


@given(plans(), st.data())
def test_digest_follows_the_resolved_tile(plan, data):
    index = data.draw(st.integers(0, len(plan.layers) - 1))
    layer = plan.layers[index]
    same = plan.with_layers(index, tile=layer.tile_length)
    assert same.digest == plan.digest
    assert plan.with_layers(index, tile=2 * layer.tile_length).digest != plan.digest


def test_for_model_adds_the_geometry():
    config = SimpleNamespace(
        num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, hidden_size=512
    )
    plan = KVPlan((LAYER,) * 4).for_model(SimpleNamespace(config=config))
    assert plan.geometry == GEOMETRY


def test_for_model_refuses_models_the_plan_does_not_fit():
    plan = KVPlan((LAYER,) * 32)
    with pytest.raises(PlanLayerError, match="the plan has 32 layers, the model has 28"):
        plan.for_model(ModelGeometry(28, 8, 128))
    with pytest.raises(HeadSizeError, match="layer 0, value: group_size 32 does not divide the head size 80"):
        plan.for_model(ModelGeometry(32, 8, 80))
    with pytest.raises(PlanGeometryError, match="has none of num_hidden_layers"):
        plan.for_model(object())


def test_with_layers_changes_the_selected_layers_only():
    plan = KVPlan((LAYER,) * 4, GEOMETRY, {"signal": "x"}, "mine", "some/model")
    changed = plan.with_layers(
        "0,-1", key=8, value=QuantSpec(4, "token", "head"), window=64, sink_length=4, tile=64
    )
    expected = LayerPlan(QuantSpec(8), QuantSpec(4, "token", "head"), WindowRule(length=64), 4, 64)
    assert changed.layers == (expected, LAYER, LAYER, expected)
    assert dataclasses.replace(changed, layers=plan.layers) == plan


def test_with_layers_given_bits_keeps_the_rest_of_the_spec():
    plan = KVPlan((LayerPlan(QuantSpec(4, group_size=64), QuantSpec(2, "token", 16, "float32")),))
    changed = plan.with_layers(0, key=3, value=16, window=WindowRule(length=0)).layers[0]
    assert changed.key == QuantSpec(3, group_size=64)
    assert changed.value == QuantSpec(16, "token", 16, "float32")
    assert changed.window.length == 0


def test_with_layers_checks_what_it_makes():
    plan = KVPlan((LAYER,) * 4, GEOMETRY)
    with pytest.raises(PlanLayerError, match="there is no layer 4: the plan has 4 layers, 0 to 3"):
        plan.with_layers([0, 4], key=8)
    with pytest.raises(PlanFieldError, match="bits must be one of"):
        plan.with_layers("all", key=7)
    with pytest.raises(HeadSizeError, match="layer 1, value: group_size 48"):
        plan.with_layers(1, value=QuantSpec(2, "token", 48))


def test_text_shows_layers_planned_alike_once():
    plan = KVPlan((LAYER,) * 4, ModelGeometry(4, 2, 64), name="mine").with_layers(
        "0,3", key=16, value=QuantSpec(4, "token", "head", "float32"), sink_length=4
    )
    plan = plan.with_layers(1, key=16, value=16)
    assert str(plan).splitlines() == [
        "mine: 4 layers, 9.75 bits a code, 10.25 bits per element, 1,312 bytes per token",
        "layers  bits    keys         values              window  sink  tile",
        "0,3     K16V4   raw          token head float32  32      4     32",
        "1       K16V16  raw          raw",
        "2       K4V2    channel g32  token g32           32      0     32",
    ]


def test_text_of_many_kinds_of_layers_fits_80_columns():
    shown = str(KVPlan.from_pretrained("kvmix:smollm2-135m/2.5")).splitlines()
    assert all(len(line) <= 80 for line in shown)
    assert "all layers: values token head byte, window 32, sink 4" in shown
    assert any(line.split()[:2] == ["4,10-12,16,19-20,25-29", "K4/2/0"] for line in shown)
    # lists of layers are broken where that is not enough
    layer = dataclasses.replace(LAYER, value=QuantSpec(4, "token", "head", "float32"))
    plan = KVPlan((layer,) * 60).with_layers(list(range(0, 60, 2)), key=8, window=64, sink_length=4, tile=64)
    plan = plan.with_layers(59, value=2)
    shown = str(plan).splitlines()
    assert all(len(line) <= 80 for line in shown)
    listed = "".join(line.split()[0] for line in shown[3:-1])
    assert listed.startswith(",".join(map(str, range(0, 60, 2))))


def test_text_needs_no_geometry():
    assert str(KVPlan((LAYER,))).startswith("custom: 1 layers, 3.00 bits a code, 4.00 bits per element\n")
    whole = KVPlan((dataclasses.replace(LAYER, value=QuantSpec(2, "token", "head")),))
    assert str(whole).startswith("custom: 1 layers, 3.00 bits a code, groups of one head (unknown size)\n")


@given(plans())
def test_text_fits_any_plan(plan):
    assert str(plan).splitlines()[-1]
    assert plan.digest[:12] in repr(plan)


@given(st.integers(-3, 0) | st.booleans() | st.none() | st.floats() | st.text())
def test_geometry_takes_positive_integers_only(size):
    with pytest.raises(PlanFieldError, match="head_dim must be"):
        ModelGeometry(1, 1, size)
