"""Tiers of tokens in plans: checks, files, sizes, presets."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmix_fx.errors import FormatError, PlanFieldError, PlanFileError, PlanGeometryError, PresetError
from kvmix_fx.plan import KVPlan, LayerPlan, ModelGeometry, QuantSpec, TokenTier
from kvmix_kernels import layout

GEOMETRY = ModelGeometry(num_layers=4, num_kv_heads=2, head_dim=64)

token_tiers = st.builds(
    TokenTier,
    st.integers(10, 99).map(lambda percent: percent / 100),
    st.none(),
    st.sampled_from(layout.HIGH_BITS),
    st.sampled_from(("head", 32)),
    st.sampled_from(layout.POLICIES),
    st.sampled_from((0.0, 0.5, 1.0)),
    st.booleans(),
    st.booleans(),
)


@given(token_tiers | st.builds(TokenTier, st.none(), st.integers(2, 500)))
def test_files_keep_tiers(tier):
    plan = KVPlan.uniform(GEOMETRY, 2).with_layers("1-2", token_tier=tier)
    again = KVPlan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest
    assert json.loads(plan.to_json())["version"] == 3
    assert plan.digest != KVPlan.uniform(GEOMETRY, 2).digest


def test_a_tier_is_taken_away_by_name():
    plan = KVPlan.uniform(GEOMETRY, 2).with_layers("all", token_tier=TokenTier())
    assert plan.with_layers("all", sink_length=0).layers[0].token_tier == TokenTier()
    assert [layer.token_tier for layer in plan.with_layers(0, token_tier="none").layers[:2]] == [
        None,
        TokenTier(),
    ]


def test_plans_without_tiers_are_written_as_they_were():
    content = KVPlan.uniform(GEOMETRY, 2).to_dict()
    assert content["version"] == 1
    assert "token_tier" not in content["layers"][0]


def test_tiers_by_hand_in_a_file():
    text = {
        "format": "kvmix_plan",
        "version": 3,
        "num_layers": 2,
        "defaults": {"key": {"bits": 2}, "value": {"bits": 2}},
        "layers": [{"match": 1, "token_tier": {"share": 0.1, "policy": "last"}}],
    }
    plan = KVPlan.from_dict(text)
    assert plan.layers[0].token_tier is None
    assert plan.layers[1].token_tier == TokenTier(0.1, policy="last")
    text["layers"][0]["token_tier"]["polcy"] = "last"
    with pytest.raises(PlanFileError, match="did you mean 'policy'"):
        KVPlan.from_dict(text)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"share": 0.123}, PlanFieldError, "share must be whole percents"),
        ({"share": 1.5}, PlanFieldError, r"share must be a number from 0\.01 to 0\.99"),
        ({"share": 0.0}, PlanFieldError, r"share must be a number from 0\.01 to 0\.99"),
        ({"share": 1.0}, PlanFieldError, r"share must be a number from 0\.01 to 0\.99"),
        ({"recent": 1.5}, PlanFieldError, "recent must be a number from 0 to 1"),
        ({"tokens": 5}, PlanFieldError, "with tokens, set share=None"),
        ({"share": None}, PlanFieldError, "give one of share and tokens"),
        ({"share": None, "tokens": 1}, PlanFieldError, "tokens must be at least 2"),
        ({"bits": 2}, PlanFieldError, "bits must be one of 16, 8, 4"),
        ({"policy": "best"}, PlanFieldError, "policy must be one of"),
        ({"group_size": 24}, FormatError, "must be a multiple of 16"),
        ({"group_size": "Head"}, PlanFieldError, 'a number of channels or "head"'),
    ],
)
def test_bad_fields_are_named(fields, error, message):
    with pytest.raises(error, match=message):
        TokenTier(**fields)


def test_tiers_that_do_not_fit_a_layer():
    with pytest.raises(FormatError, match=r"1 % of a tile of 32 tokens .* or at least 4 %"):
        LayerPlan(QuantSpec(2), QuantSpec(2, "token"), token_tier=TokenTier(0.01))
    with pytest.raises(FormatError, match="value: a tensor that stays at 16 bits has no high tier"):
        LayerPlan(QuantSpec(2), QuantSpec(16), token_tier=TokenTier())
    plan = KVPlan.preset("mikv", GEOMETRY).with_layers("0", key=16, value=16)
    assert plan.layers[0].token_tier is None
    with pytest.raises(PlanGeometryError):
        KVPlan.uniform(3, 2).with_layers("all", token_tier=TokenTier()).bits_per_element()


@pytest.mark.parametrize(("key", "value", "bits"), [(8, 8, 4), (4, 4, 4), (8, 2, 4), (8, 8, 8)])
def test_tokens_that_matter_are_at_more_bits_than_the_others(key, value, bits):
    plan = KVPlan.uniform(GEOMETRY, key, value)
    with pytest.raises(
        PlanFieldError, match=f"a high tier of {bits} bits over K{key}V{value} .* no more bits"
    ):
        plan.with_layers("all", token_tier=TokenTier(bits=bits))
    # more for one of the two will do, and eviction reads no others
    KVPlan.uniform(GEOMETRY, bits, 2).with_layers("all", token_tier=TokenTier(bits=bits))
    plan.with_layers("all", token_tier=TokenTier(bits=bits, evict=True))


def test_bits_count_codes_positions_and_scores():
    plan = KVPlan.preset("mikv", GEOMETRY)
    # 2 bits and half an element of scales for groups of 32, and a fifth of the tokens at 16 with positions
    # in keys and values and a score in keys, 4 bytes each; of keys a byte that says who is in the tier
    skipped = 8 / 2 / 64
    assert plan.bits_per_element() == pytest.approx(2 + 32 / 32 + skipped + 0.2 * (16 + 8 * (8 + 4) / 2 / 64))
    fixed = KVPlan.uniform(GEOMETRY, 2).with_layers("all", token_tier=TokenTier(None, 64))
    assert fixed.bits_per_element() == 3 + skipped
    added = fixed.bits_per_element(1056) - KVPlan.uniform(GEOMETRY, 2).bits_per_element(1056)
    packed = fixed.layers[0].formats(64)[0].packed_tiles(1056) * fixed.layers[0].formats(64)[0].tile
    assert added == pytest.approx(64 / 1056 * (16 + 8 * 12 / 2 / 64) + packed / 1056 * skipped)


def test_presets():
    plan = KVPlan.preset("mikv", GEOMETRY, low_bits=3, high_bits=8, share=0.1)
    layer = plan.layers[0]
    assert (layer.key.bits, layer.key.axis, layer.key.group_size) == (3, "token", 32)
    assert layer.token_tier == TokenTier(0.1, None, 8, 32, balancer=True)
    assert KVPlan.preset("mikv", GEOMETRY, low_bits=0).layers[0].token_tier.evict
    over = KVPlan.preset("mikv", GEOMETRY, channel_tiers=True, high_bits=4).layers[0]
    assert over.key.tiers
    assert over.value.rotation == "hadamard"
    assert over.token_tier.bits == 4
    with pytest.raises(PresetError, match="leave low_bits at 2"):
        KVPlan.preset("mikv", GEOMETRY, channel_tiers=True, low_bits=4)
    assert KVPlan.preset("zipcache", GEOMETRY).layers[0].token_tier.policy == "mean"
    assert "20% at 16 (accumulated, balanced)" in str(KVPlan.preset("mikv", GEOMETRY))
    evicting = KVPlan.preset("mikv", GEOMETRY, low_bits=0)
    assert "20% at 16 (accumulated, balanced, others ignored)" in str(evicting)
    assert "token tiers in 4" in repr(evicting)
    assert "token tiers" not in repr(KVPlan.uniform(GEOMETRY, 2))
    with pytest.raises(PresetError, match=r"ZipCache evicts nothing.*low_bits=0"):
        KVPlan.preset("zipcache", GEOMETRY, low_bits=0)
    for nothing in (None, False):
        with pytest.raises(PlanFieldError, match="low_bits must be an integer"):
            KVPlan.preset("mikv", GEOMETRY, low_bits=nothing)
