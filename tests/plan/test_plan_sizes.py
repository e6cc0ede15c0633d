"""Bytes and bits of plans, against figures worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmix_fx.errors import HeadSplitError, PlanFieldError, PlanGeometryError
from kvmix_fx.plan import KVPlan, LayerPlan, ModelGeometry, QuantSpec, WindowRule
from kvmix_fx.testing.strategies import plans


def plan_of(key, value, window, sink=0, tile=None, *, layers=1, heads=1, head_dim):
    layer = LayerPlan(key, value, WindowRule(length=window), sink, tile)
    return KVPlan((layer,) * layers, ModelGeometry(layers, heads, head_dim))


K2, V2 = QuantSpec(2), QuantSpec(2, "token")


def test_nbytes_of_a_growing_two_bit_cache():
    plan = plan_of(K2, V2, 32, head_dim=128)
    # 1056 tokens: 32 stay raw and the other 1024 are 32 tiles, which the growth steps hit exactly.
    codes = 1024 * 128 // 4
    key_metadata = (1024 // 32) * 128 * (2 + 2)
    value_metadata = 1024 * (128 // 32) * (2 + 2)
    ring = 64 * 128 * 2
    assert plan.nbytes(1, 1056) == 2 * codes + key_metadata + value_metadata + 2 * ring == 131_072


def test_nbytes_counts_the_slack_of_a_growing_cache():
    plan = plan_of(K2, V2, 32, head_dim=128)
    # 33 full tiles lie between growth steps of 4 tiles, so 36 are allocated.
    packed = 36 * 32 * 128 * 3 // 8
    assert plan.nbytes(1, 32 + 33 * 32) == 2 * (packed + 64 * 128 * 2)


def test_nbytes_of_a_fixed_cache_with_sink_and_unequal_tensors():
    plan = plan_of(QuantSpec(4), QuantSpec(2, "token", "head"), 128, sink=4, head_dim=64)
    tokens = 27 * 32  # of 1000 - 4 - 128
    raw = (4 + 160) * 64 * 2  # 128 + 32 recent slots are a multiple of the tile already
    key = tokens * 64 // 2 + 27 * 64 * 4 + raw
    value = tokens * 64 // 4 + tokens * 4 + raw
    assert plan.nbytes(1, 1000, cache="fixed") == key + value == 93_824


def test_nbytes_of_one_raw_tensor_beside_a_packed_one():
    plan = plan_of(QuantSpec(3, group_size=128, scale_dtype="float32"), QuantSpec(16), 0, head_dim=96)
    key = 256 * 96 * 3 // 8 + 2 * 96 * (4 + 4) + 128 * 96 * 2
    value = 384 * 96 * 2  # raw rows come in whole tiles too
    assert plan.nbytes(1, 300) == plan.nbytes(1, 300, cache="fixed") == key + value
    # A growing cache keeps room for the next token, a fixed one ends at its capacity.
    assert plan.nbytes(1, 256) - plan.nbytes(1, 256, cache="fixed") == 128 * 96 * 2


def test_nbytes_of_a_raw_plan_is_that_of_the_models_own_cache():
    plan = plan_of(QuantSpec(16), QuantSpec(16), 32, sink=4, layers=3, heads=5, head_dim=72)
    for cache in ("growing", "fixed"):
        assert plan.nbytes(2, 77, cache=cache) == 2 * 3 * 5 * 77 * 72 * 2 * 2
        assert plan.nbytes(2, 77, cache=cache, itemsize=4) == 2 * 3 * 5 * 77 * 72 * 2 * 4


def test_itemsize_weighs_raw_slots_only():
    plan = plan_of(K2, V2, 32, head_dim=128)
    assert plan.nbytes(1, 1056, itemsize=4) - plan.nbytes(1, 1056) == 2 * 64 * 128 * 2


def test_nbytes_adds_up_layers_heads_and_rows():
    one = plan_of(K2, V2, 32, head_dim=128).nbytes(1, 500)
    assert plan_of(K2, V2, 32, layers=28, heads=8, head_dim=128).nbytes(4, 500) == 28 * 8 * 4 * one


@given(plans(), st.integers(0, 3000), st.integers(0, 300), st.integers(1, 9), st.sampled_from((2, 4)))
def test_nbytes_grows_with_length_and_is_linear_in_batch(plan, length, more, batch, itemsize):
    for cache in ("growing", "fixed"):
        one = plan.nbytes(1, length, itemsize=itemsize, cache=cache)
        assert plan.nbytes(batch, length, itemsize=itemsize, cache=cache) == batch * one
        assert plan.nbytes(1, length + more, itemsize=itemsize, cache=cache) >= one


@given(plans(), st.integers(0, 2000))
def test_allocation_holds_what_is_stored(plan, length):
    geometry = plan.geometry
    elements = 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim * length
    stored = plan.bits_per_element(length) * elements / 8 if length else 0
    for cache in ("growing", "fixed"):
        assert plan.nbytes(1, length, cache=cache) >= stored * (1 - 1e-9)


@pytest.mark.parametrize(
    ("key", "value", "bits"),
    [
        (K2, V2, 3.0),
        (QuantSpec(4), V2, 4.0),
        (QuantSpec(3), V2, 3.5),
        (QuantSpec(4, group_size=128), QuantSpec(4, "token", "head"), 4.25),
        (QuantSpec(1, scale_dtype="float32"), QuantSpec(16), 9.5),
        (QuantSpec(16), QuantSpec(16), 16.0),
    ],
)
def test_bits_per_element_counts_scales_and_offsets(key, value, bits):
    plan = plan_of(key, value, 128, sink=4, layers=2, heads=3, head_dim=128)
    assert plan.bits_per_element() == bits
    assert plan.nominal_bits() == (key.bits + value.bits) / 2
    assert plan.bytes_per_token == bits * 2 * 2 * 3 * 128 / 8


def test_bits_per_element_counts_raw_tokens():
    plan = plan_of(K2, V2, 128, sink=4, head_dim=128)
    assert plan.bits_per_element(1) == plan.bits_per_element(132) == plan.bits_per_element(163) == 16.0
    assert plan.bits_per_element(164) == (32 * 3 + 132 * 16) / 164
    assert plan.bits_per_element(10**9) == pytest.approx(3.0, abs=1e-5)


@given(plans(), st.integers(1, 10**6))
def test_bits_per_element_approaches_its_limit(plan, length):
    limit = plan.bits_per_element()
    most_raw = max(layer.sink_length + layer.window.length + layer.tile_length for layer in plan.layers)
    # A tensor's own limit lies within 80 bits: 8-bit codes with two float32 for every element, and 16 raw.
    assert abs(plan.bits_per_element(length) - limit) <= 80 * min(1, most_raw / length) + 1e-9


def test_key_and_value_bits_are_means_over_layers():
    plan = plan_of(K2, V2, 32, layers=4, head_dim=64).with_layers(0, key=4).with_layers("0-2", value=3)
    assert (plan.key_bits, plan.value_bits, plan.nominal_bits()) == (2.5, 2.75, 2.625)


def test_figures_in_bytes_ask_for_the_geometry():
    plan = KVPlan((LayerPlan(K2, V2),))
    assert plan.bits_per_element(1000) > plan.bits_per_element() == 3.0
    with pytest.raises(PlanGeometryError, match=r"use plan\.for_model\(model\).*geometry=ModelGeometry"):
        plan.nbytes(1, 100)
    with pytest.raises(PlanGeometryError, match="for_model"):
        _ = plan.bytes_per_token
    whole = KVPlan((LayerPlan(K2, QuantSpec(2, "token", "head")),))
    with pytest.raises(PlanGeometryError, match="for_model"):
        whole.bits_per_element()
    raw = KVPlan((LayerPlan(K2, QuantSpec(16, "token", "head")),))
    assert raw.bits_per_element() == 9.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"length": -1}, "length must be at least 0"),
        ({"length": 1.5}, "length must be an integer"),
        ({"itemsize": 0}, "itemsize must be at least 1"),
        ({"cache": "paged"}, "cache must be one of 'growing', 'fixed'; got 'paged'"),
    ],
)
def test_nbytes_refuses_what_is_no_count(arguments, message):
    with pytest.raises(PlanFieldError, match=message):
        plan_of(K2, V2, 32, head_dim=64).nbytes(**{"batch": 1, "length": 1} | arguments)


def test_bits_per_element_needs_a_token():
    with pytest.raises(PlanFieldError, match="length must be at least 1, got 0"):
        plan_of(K2, V2, 32, head_dim=64).bits_per_element(0)


@given(plans(), st.sampled_from(["growing", "fixed"]), st.integers(0, 3000))
def test_ranks_share_the_whole_cache_to_the_byte(plan, cache, length):
    heads = plan.geometry.num_kv_heads
    whole = plan.nbytes(3, length, cache=cache)
    for ranks in range(1, 2 * heads):
        if heads % ranks == 0:
            assert ranks * plan.nbytes(3, length, cache=cache, tp_size=ranks) == whole
        else:
            with pytest.raises(HeadSplitError, match=f"{heads} KV heads .* among {ranks} ranks"):
                plan.nbytes(3, length, cache=cache, tp_size=ranks)


def test_a_number_of_ranks_is_a_count():
    plan = plan_of(K2, V2, 32, heads=4, head_dim=64)
    with pytest.raises(PlanFieldError, match="tp_size must be at least 1"):
        plan.nbytes(1, 10, tp_size=0)
    with pytest.raises(HeadSplitError, match="a tp_size of 1 or 2 or 4,"):
        plan.nbytes(1, 10, tp_size=3)
