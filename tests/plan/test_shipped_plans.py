"""Plans that come with the package: each loads, is of the bits in its name, fits its model, says its cost."""

from __future__ import annotations

import dataclasses

import pytest

from kvmix_fx.errors import PlanFileError, PlanLayerError
from kvmix_fx.plan import KVPlan, ModelGeometry, shipped_plans
from kvmix_fx.testing.smollm2 import smollm2_config

NAMES = shipped_plans()


def test_they_are_listed_by_model_and_bits() -> None:
    assert [name.removeprefix("kvmix:smollm2-135m/") for name in NAMES] == ["2.2", "2.5", "3.0", "4.0"]


@pytest.mark.parametrize("name", NAMES)
def test_each_is_of_the_stated_bits_and_fits_its_model(name: str) -> None:
    plan = KVPlan.from_pretrained(name)
    assert plan.name == name
    assert plan.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    bits = float(name.rpartition("/")[2])
    assert bits - 0.05 < plan.bits_per_element() <= bits
    assert plan.for_model(smollm2_config()) == plan
    elements = 65536 * 30 * 3 * 64 * 2
    assert plan.bits_per_element(65536) == pytest.approx(8 * plan.nbytes(1, 65536) / elements, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_each_says_where_it_comes_from_and_what_it_cost_on_other_text(name: str) -> None:
    told = KVPlan.from_pretrained(name).provenance
    assert "first 40 %" in told["data"]["source"]
    assert told["data"]["tokens"] > 500
    assert told["profile"]["commit"]
    assert {"weights", "commit", "torch", "transformers", "command"} <= told["made"].keys()
    assert all("last 60 %" in one["data"]["source"] for one in told["evaluation"])
    for one in told["evaluation"]:
        assert one["data"]["sha256"] != told["data"]["sha256"]
        assert 0 < one["kl_mean"]["value"] < one["kl_worst_chunk"]["value"] < 0.2
        assert one["predictions"] == 256


def test_more_bits_cost_less() -> None:
    for text in (0, 1):
        costs = [
            KVPlan.from_pretrained(name).provenance["evaluation"][text]["kl_mean"]["value"] for name in NAMES
        ]
        assert costs == sorted(costs, reverse=True)


def test_they_are_refused_for_other_models() -> None:
    geometry = ModelGeometry.of(smollm2_config())
    for name in NAMES:
        plan = KVPlan.from_pretrained(name)
        with pytest.raises(PlanLayerError, match="the plan has 30 layers, the model has 28"):
            plan.for_model(ModelGeometry(28, 8, 128))
        with pytest.raises(PlanLayerError, match="orders of channels for 3 KV heads, the model has 5"):
            plan.for_model(dataclasses.replace(geometry, num_kv_heads=5))


@pytest.mark.parametrize("name", ["kvmix:smollm2-135m/2.6", "kvmix:llama/2.5", "kvmix:", "kvmix:../plans/x"])
def test_an_unknown_name_lists_those_that_there_are(name: str) -> None:
    with pytest.raises(PlanFileError) as raised:
        KVPlan.from_pretrained(name)
    for known in (repr(name), *NAMES, "kvmix plan auto"):
        assert known in str(raised.value)
