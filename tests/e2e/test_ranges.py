"""Keys and values outside the range of half-precision scales get wider ones, and somebody is told."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import transformers

import kvmix_fx
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.errors import NarrowScalesWarning
from kvmix_fx.integrations.transformers import KVMixStaticCache
from kvmix_fx.passes import rewrite
from kvmix_fx.testing.models import tiny_llama
from kvmix_kernels import layout


def scaled_model(scale):
    """The same function for every scale: values are multiplied, the output projection is divided."""
    model = tiny_llama(num_hidden_layers=1).bfloat16()
    attention = model.model.layers[0].self_attn
    attention.v_proj.weight.data.mul_(scale)
    attention.o_proj.weight.data.div_(scale)
    return model


def logits(model, past=None):
    ids = torch.randint(1, 128, (2, 91), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        past = model(ids[:, :90].contiguous(), use_cache=True, past_key_values=past).past_key_values
        out = model(ids[:, 90:].contiguous(), past_key_values=past, use_cache=True)
    return out.logits[:, -1].float(), past.layers[0]


@pytest.mark.parametrize(("scale", "fixed"), [(1e-5, False), (1e6, True)])
def test_scales_get_the_range_of_the_data(scale, fixed):
    model = scaled_model(scale)
    want, _ = logits(model)
    plan = kvmix_fx.KVPlan.uniform(model, 8, window=16)
    kvmix_fx.compile(model, plan, inner="eager")
    cache = [KVMixStaticCache(plan, model.config, 100) if fixed else None for _ in range(2)]
    with pytest.warns(NarrowScalesWarning, match=r"of values of layer 0 \(up to .*scale_dtype=\"float32\""):
        got, layer = logits(model, cache[0])
    assert (got - want).abs().max() < 2e-2
    assert (layer.keys.scale.dtype, layer.values.scale.dtype) == (torch.float16, torch.float32)
    assert "float32 scales" in repr(layer.values)
    # the next cache has them from the beginning
    with warnings.catch_warnings():
        warnings.simplefilter("error", NarrowScalesWarning)
        again, layer = logits(model, cache[1])
    assert torch.equal(again, got)
    assert layer.values.scale.dtype == torch.float32


def test_one_of_several_processes_says_so_and_does_no_step_twice(monkeypatch):
    """Other ranks would wait for what a second try communicates."""
    monkeypatch.setattr("kvmix_fx.api.process_group_size", lambda: 2)
    model = scaled_model(1e6)
    kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 8, window=16), inner="eager")
    with pytest.warns(NarrowScalesWarning, match='scale_dtype="float32" in the plan') as caught:
        _, layer = logits(model)
    assert len([w for w in caught if w.category is NarrowScalesWarning]) == 1
    assert layer.values.scale.dtype == torch.float16
    assert kvmix_fx.compiled(model).report.graphs[0].sites[0].layer == 0
    assert len(kvmix_fx.compiled(model).report.graphs) == 2


def bart():
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    layers = model.model.decoder.layers
    layers[1].self_attn.v_proj.bias.data.mul_(3e6)
    return model, layers, layers[1].self_attn.out_proj


def qwen3_next():
    config = transformers.Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=16, linear_value_head_dim=16, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = transformers.Qwen3NextForCausalLM(config).eval()
    return model, model.model.layers, model.model.layers[1].self_attn.o_proj


@pytest.mark.parametrize("make", [bart, qwen3_next])
def test_a_step_in_pieces_that_is_done_again_finds_the_cache_as_it_was(make):
    """Layers of the pieces before have got their tokens, attention across its cache, others states."""
    torch.manual_seed(0)
    model, layers, projection = make()
    layers[1].self_attn.v_proj.weight.data.mul_(3e6)
    projection.weight.data.div_(3e6)
    ids = torch.randint(1, 60, (2, 20))

    def generate():
        out = model.generate(
            ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1, output_logits=True,
            return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        return torch.stack(out.logits)

    want = generate()
    for layer in layers:
        layer.forward = functools.partial(in_a_piece, layer)
    # nothing leaves the window, so nothing is rounded
    kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 8, window=40, group_size=16), fullgraph=False)
    with pytest.warns(NarrowScalesWarning):
        got = generate()
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def in_a_piece(layer, *args, **kwargs):
    torch._dynamo.graph_break()
    return type(layer).forward(layer, *args, **kwargs)


def test_scales_without_the_range_would_show(monkeypatch):
    model = scaled_model(1e6)
    want, _ = logits(model)
    monkeypatch.setattr(rewrite, "ranges_wider", lambda *_: False)
    kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 8, window=16), inner="eager")
    got, layer = logits(model)
    assert (got - want).abs().max() > 0.1
    assert layer.values.scale.dtype == torch.float16


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("scale_dtype", ["float16", "byte"])
@pytest.mark.parametrize("scale", [1e-7, 1e-5, 1e-3, 1.0, 3e4, 1e6])
def test_a_packed_tensor_loses_no_more_than_at_scale_one(bits, scale_dtype, scale):
    x = torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(0))
    fmt = layout.make_format(bits, window=0, scale_dtype=scale_dtype)

    def error(factor):
        y = x * factor
        return ((QuantizedKVTensor.from_hp(y, fmt).dequantize() - y).abs().max() / y.abs().max()).item()

    assert error(scale) < 1.1 * error(1.0)
