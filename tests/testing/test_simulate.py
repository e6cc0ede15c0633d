"""The packed cache answers as the simulated one does, and far from how the unquantized one does.

In float64, because rounding noise that tips one code over is as large as a step: two float32 computations of
the same attention part at once, in float64 hardly ever.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="the simulated cache serves transformers models")

import kvmix_fx
from kvmix_fx.plan import KVPlan
from kvmix_fx.plan.schema import QuantSpec
from kvmix_fx.testing import texts
from kvmix_fx.testing.simulate import SimulatedCache, round_trip, teacher_forced

PLANS = {
    "k2v2": {"key_bits": 2},
    "k4v2 with sinks": {"key_bits": 4, "value_bits": 2, "sink_length": 4},
    "k3v1 without window": {"key_bits": 3, "value_bits": 1, "window": 0},
    "k8v4 g16 in tiles of 48": {"key_bits": 8, "value_bits": 4, "group_size": 16, "tile": 48},
    "keys alone": {"key_bits": 2, "value_bits": 16},
}


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        # large, so that attention chooses among tokens and a wrong key shows
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


def logits(model: nn.Module, ids: Tensor, prefill: int, cache: object | None = None) -> Tensor:
    return torch.cat([step for _, step in teacher_forced(model, ids, prefill, cache)], 1)


def packed_logits(model: nn.Module, plan: KVPlan, ids: Tensor, prefill: int) -> Tensor:
    kvmix_fx.compile(model, plan, inner="eager")
    try:
        return logits(model, ids, prefill)
    finally:
        kvmix_fx.restore(model)


def mean_kl(a: Tensor, b: Tensor) -> float:
    a, b = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS.keys())
def test_packed_logits_are_the_simulated_ones_and_not_the_exact_ones(tiny, options):
    plan = KVPlan.uniform(tiny, **options)
    tiny = copy.deepcopy(tiny).double()
    ids = torch.randint(0, 97, (2, 190), generator=torch.Generator().manual_seed(1))
    packed = packed_logits(tiny, plan, ids, prefill=90)
    simulated = logits(tiny, ids, 90, SimulatedCache(plan))
    exact = logits(tiny, ids, 90)

    assert torch.equal(simulated[:, :90], exact[:, :90]), "a prefill attends exactly"
    assert float((packed - simulated).abs().max()) < 1e-6
    # the control: without rounding, the same comparison fails by far
    assert float((packed - exact).abs().max()) > 0.05
    assert mean_kl(exact[:, 90:], packed[:, 90:]) > 1e-5


def test_float32_moves_a_packed_code_now_and_then_and_no_more(tiny):
    plan = KVPlan.uniform(tiny, 4, 2)
    ids = torch.randint(0, 97, (2, 190), generator=torch.Generator().manual_seed(1))
    packed, simulated = packed_logits(tiny, plan, ids, 90), logits(tiny, ids, 90, SimulatedCache(plan))
    assert mean_kl(simulated, packed) < 1e-6
    assert mean_kl(logits(tiny, ids, 90), packed) > 1e-3


@pytest.mark.real_model
def test_packed_smollm2_answers_as_the_simulated_one(model, tokenizer):
    # a few of the layers: real keys and values, and a fraction of the time
    model = copy.deepcopy(model).double()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:4], 4
    ids = texts.chunks(tokenizer, texts.prose(), length=241, count=1)
    plan = KVPlan.uniform(model, key_bits=2)
    packed = packed_logits(model, plan, ids, prefill=200)[:, 200:]
    simulated = logits(model, ids, 200, SimulatedCache(plan))[:, 200:]
    exact = logits(model, ids, 200)[:, 200:]
    assert packed.shape[1] == 41
    assert float((packed - simulated).abs().max()) < 1e-4
    assert mean_kl(exact, packed) > 0.001
    assert float((packed - exact).abs().max()) > 0.1


def test_several_tokens_a_step_see_the_cache_as_it_was_before_the_step(tiny):
    plan = KVPlan.uniform(tiny, key_bits=2, window=0)
    ids = torch.randint(0, 97, (1, 150), generator=torch.Generator().manual_seed(2))

    def in_two_steps(cache: object) -> Tensor:
        with torch.no_grad():
            first = tiny(input_ids=ids[:, :100], past_key_values=cache, use_cache=True)
            return tiny(input_ids=ids[:, 100:], past_key_values=first.past_key_values).logits

    simulated = in_two_steps(SimulatedCache(plan))
    kvmix_fx.compile(tiny, plan, inner="eager")
    try:
        packed = in_two_steps(None)
    finally:
        kvmix_fx.restore(tiny)
    torch.testing.assert_close(packed, simulated, atol=1e-3, rtol=0)
    assert not torch.allclose(packed, in_two_steps(None), atol=1e-2)


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_rounding_moves_no_element_by_more_than_half_a_step(axis):
    x = torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(3))
    spec = QuantSpec(3, axis, 32)
    dim = 2 if axis == "channel" else 3
    step = (
        x.unflatten(dim, (-1, 32)).amax(dim + 1, keepdim=True)
        - x.unflatten(dim, (-1, 32)).amin(dim + 1, keepdim=True)
    ) / 7
    error = (round_trip(x, spec) - x).abs().unflatten(dim, (-1, 32))
    assert (error <= 0.51 * step).all()
    assert (error > 0.3 * step).any()


def test_constant_groups_and_16_bits_come_back_as_they_were():
    x = torch.full((1, 1, 32, 32), 0.5)
    assert torch.equal(round_trip(x, QuantSpec(2, "channel", 32)), x)
    noise = torch.randn(1, 1, 32, 32)
    assert torch.equal(round_trip(noise, QuantSpec(16)), noise)
