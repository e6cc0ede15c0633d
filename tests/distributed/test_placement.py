"""Models that lie on devices in a way that compiled steps cannot follow are refused, with what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kvmix_fx
from kvmix_fx import parallel
from kvmix_fx.errors import HeadSplitError, PlacementError
from kvmix_fx.parallel import Ranks
from kvmix_fx.testing.models import tiny_llama


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def plan(model):
    return kvmix_fx.KVPlan.uniform(model, 4, 2, group_size=16, window=8)


def refused(model, plan, *parts):
    before = dict(vars(model))
    for attempt in (
        lambda: kvmix_fx.compile(model, plan),
        lambda: kvmix_fx.profile(model, torch.ones(1, 200).long()),
    ):
        with pytest.raises(PlacementError) as caught:
            attempt()
        for part in (*parts, "DistributedConfig(tp_size=N)"):
            assert part in str(caught.value)
    assert vars(model) == before


def test_layers_on_several_devices(model, plan):
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    refused(model, plan, "0 and 1")


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_one_device_and_offloaded_weights(model, plan, where):
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": where}
    refused(model, plan, f"0 and {where}", "offloaded", "device_map=0")


def test_accelerate_itself(model, plan):
    accelerate = pytest.importorskip("accelerate")
    ids = torch.randint(1, 100, (2, 60))
    want = model(ids).logits
    accelerate.cpu_offload(model, torch.device("cpu"))
    refused(model, plan, "offloaded", "accelerate")
    accelerate.hooks.remove_hook_from_submodules(model)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    refused(model, plan, "hooks", "remove_hook_from_submodules")
    # the advice leads to a model that works
    accelerate.hooks.remove_hook_from_submodules(model)
    kvmix_fx.compile(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, want)


def test_several_hooks_on_one_module(model, plan):
    accelerate = pytest.importorskip("accelerate")
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", offload=True)
    accelerate.hooks.add_hook_to_module(model.lm_head, accelerate.hooks.SequentialHook(hook))
    refused(model, plan, "offloaded")


@pytest.mark.parametrize(("field", "name"), [("fsdp_size", "FSDP"), ("pp_size", "pipeline parallelism")])
def test_other_kinds_of_parallelism(model, plan, field, name):
    from transformers.distributed import DistributedConfig

    model.config.distributed_config = DistributedConfig(**{field: 2})
    refused(model, plan, name, f"{field}=2")


def test_one_device_is_fine(model, plan):
    model.hf_device_map = {"": "cpu"}
    assert kvmix_fx.compile(model, plan) is model


def test_modules_without_a_configuration_are_not_asked_for_heads():
    parallel.check_placement(nn.Linear(2, 2))


def test_heads_are_counted_before_anything_is_traced(model, plan, monkeypatch):
    monkeypatch.setattr(Ranks, "of", classmethod(lambda cls, _: cls(3, 0, None)))
    with pytest.raises(HeadSplitError, match=r"2 KV heads.*3 ranks.*tp_size of 1 or 2"):
        kvmix_fx.compile(model, plan)
