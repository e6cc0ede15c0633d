"""Modules around a model: what they really call is compiled, or they are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import TextGenerationPipeline

import kvmix_fx
from kvmix_fx import errors
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.testing.models import tiny_llama

IDS = torch.randint(1, 128, (2, 60), generator=torch.Generator().manual_seed(3))
SETTINGS = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def generate(self, **kwargs):
        return self.inner.generate(**kwargs)


class Past(Wrapper):
    """Calls a part of the model, not the model."""

    def forward(self, *args, **kwargs):
        return self.inner.lm_head(self.inner.model(*args, **kwargs).last_hidden_state)


class LowRank(nn.Module):
    """What adapters put in the place of a layer of the model."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, 4) * 0.1)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def base():
    return tiny_llama(num_hidden_layers=1)


def adapted(make):
    model = base()
    torch.manual_seed(1)
    attention = model.model.layers[0].self_attn
    attention.q_proj = LowRank(attention.q_proj)
    return make(model).eval()


def packed(model, bits=8):
    plan = kvmix_fx.KVPlan.uniform(1, bits, window=16)
    return kvmix_fx.compile(model, plan, inner="eager")


def generate(model):
    return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **SETTINGS)


@pytest.fixture(scope="module")
def answers():
    """Last logits of the adapted model at full precision and, as a control, at two bits."""
    exact, coarse = generate(adapted(Wrapper)), generate(packed(adapted(Wrapper), bits=2))
    return exact.logits[-1], coarse.logits[-1]


@pytest.mark.parametrize("make", [Wrapper, lambda model: Wrapper(Wrapper(model))])
def test_a_wrapper_generates_from_a_packed_cache(make, answers):
    model = packed(adapted(make))
    got = generate(model)
    assert isinstance(got.past_key_values.layers[0].keys, QuantizedKVTensor)
    want, coarse = answers
    assert (got.logits[-1] - want).abs().max() < 0.05 < (coarse - want).abs().max()
    with torch.no_grad():
        past = model(IDS, use_cache=True).past_key_values
    assert isinstance(past.layers[0].keys, QuantizedKVTensor)
    assert kvmix_fx.compiled(model).report.rewritten_layers() == [0]


def test_peft_generates_from_a_packed_cache():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = packed(peft.get_peft_model(base(), config).eval())
    assert isinstance(generate(model).past_key_values.layers[0].keys, QuantizedKVTensor)


def test_a_wrapper_that_goes_past_the_model_is_refused():
    model = packed(Past(base()).eval())
    assert isinstance(generate(model).past_key_values.layers[0].keys, QuantizedKVTensor)
    with torch.no_grad(), pytest.raises(errors.NoSiteError, match="LlamaForCausalLM"):
        model(IDS)


def test_a_wrapper_is_restored_with_what_is_inside_and_copied_with_it():
    model = packed(Wrapper(base()).eval())
    twin = copy.deepcopy(model)
    kvmix_fx.restore(model)
    assert "forward" not in {*vars(model), *vars(model.inner)}
    assert type(generate(model).past_key_values.layers[0].keys) is torch.Tensor
    assert isinstance(generate(twin).past_key_values.layers[0].keys, QuantizedKVTensor)


def test_a_wrapper_around_two_models_is_refused():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.large, self.small = base(), base()

    with pytest.raises(errors.BackendOptionError, match="2 models"):
        packed(Pair().eval())


def test_what_is_no_module_is_refused_with_the_module_to_pass():
    pipeline = TextGenerationPipeline.__new__(TextGenerationPipeline)
    pipeline.model = base()
    with pytest.raises(errors.BackendOptionError, match=r"its \.model, a LlamaForCausalLM"):
        packed(pipeline)
    packed(pipeline.model)
    assert isinstance(generate(pipeline.model).past_key_values.layers[0].keys, QuantizedKVTensor)


def test_an_adapter_added_later_is_used():
    """Layers of a compiled model may be exchanged, as adapters do."""
    model = packed(base())
    generate(model)
    torch.manual_seed(1)
    attention = model.model.layers[0].self_attn
    attention.q_proj = LowRank(attention.q_proj)
    want, got = generate(adapted(lambda m: m)), generate(model)
    assert (got.logits[-1] - want.logits[-1]).abs().max() < 0.05
    assert (got.logits[-1] - generate(base()).logits[-1]).abs().max() > 0.05
