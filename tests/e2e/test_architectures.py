"""True architecture classes, two layers, random weights: packed logits equal the oracle's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvmix_fx
from kvmix_fx import KVPlan
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.errors import DequantizeWarning
from kvmix_fx.integrations.transformers import KVMixCache, KVMixStaticCache
from kvmix_fx.integrations.transformers.layers import INDEXED_LATENTS
from kvmix_fx.passes.sites import LEAVE, NOT_RECOGNIZED, STORE
from kvmix_fx.testing.models import LEFT_ALONE, PACKED, STORED, TINY, WINDOWS, WRITTEN_OUT, tiny_architecture

from .oracle import OracleCache, steps, worst


def tokens(rows=2, length=90):
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    ("name", "attention"), [(n, "sdpa") for n in PACKED] + [(n, "eager") for n in WRITTEN_OUT]
)
def test_packed_logits_equal_the_oracle(name, attention, fixed):
    """Left padded, so that absolute positions and masks are part of the check.

    Growing caches are tried on two layers, which have to be told apart, and fixed ones on one.
    """
    config, overrides = (PACKED if attention == "sdpa" else WRITTEN_OUT)[name]
    if fixed:
        overrides = overrides | {"num_hidden_layers": 1, "n_layer": 1}
        if "layer_types" in overrides:
            overrides["layer_types"] = overrides["layer_types"][:1]
    model = tiny_architecture(config, overrides, attention)
    plan = kvmix_fx.KVPlan.uniform(model, 2, 2, window=8)
    ids, mask = tokens(), torch.ones(2, 90, dtype=torch.long)
    ids[0, :11], mask[0, :11] = 0, 0
    # generate() passes positions; a plain loop has to do it itself
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    plain, _ = decode(model, ids, mask, positions)
    want, _ = decode(model, ids, mask, positions, OracleCache(plan, mask.bool()))
    kvmix_fx.compile(model, plan, inner="eager")
    past = KVMixStaticCache(plan, model.config, 90) if fixed else None
    got, past = decode(model, ids, mask, positions, past)
    assert worst(got, want) < 3e-4
    assert worst(plain, want) > 5e-3
    assert all(isinstance(t, QuantizedKVTensor) for layer in past.layers for t in (layer.keys, layer.values))
    assert not kvmix_fx.compiled(model).report.skipped()
    assert len(kvmix_fx.compiled(model).report.graphs) == 2


def decode(model, ids, mask, positions, past=None, prompt=40):
    import inspect

    takes = "position_ids" in inspect.signature(model.forward).parameters
    logits = []
    with torch.no_grad():
        for first, last in ((0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))):
            # contiguous, as generate() makes them: strides of a longer row would be compiled in
            extra = {"position_ids": positions[:, first:last].contiguous()} if takes else {}
            step, seen = ids[:, first:last].contiguous(), mask[:, :last].contiguous()
            out = model(step, attention_mask=seen, past_key_values=past, use_cache=True, **extra)
            past = out.past_key_values
            logits.append(out.logits[:, -1])
    return logits[1:], past


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_cannot_be_packed_is_exact_and_says_why(name):
    config, overrides, reason = LEFT_ALONE[name]
    model = tiny_architecture(config, overrides)
    ids = tokens()
    want, _ = steps(model, ids, 40)
    plan = kvmix_fx.KVPlan.uniform(2, 2, 2, window=8)
    kvmix_fx.compile(model, plan, inner="eager", on_nothing="ignore")
    got, _ = steps(model, ids, 40)
    assert worst(got, want) < 1e-5
    report = kvmix_fx.compiled(model).report
    assert {s.action for s in report.sites} == {LEAVE}
    assert reason in report.sites[0].reason


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_packed(name, fixed):
    """Left padded; tokens leave the window from the prompt on, and several times later.

    In a fixed cache they stay stored, and the mask hides them.
    """
    config, overrides, attention = WINDOWS[name]
    window = 64
    if fixed:
        # all of its capacity has to take less than the window does at 16 bits
        window = 128
        overrides = {key: window if (size == 64 and "window" in key) or "chunk" in key else size
                     for key, size in overrides.items()}  # fmt: skip
    model = tiny_architecture(config, overrides, attention)
    # a window keeps no sink, and the oracle has one for all layers
    plan = kvmix_fx.KVPlan.uniform(model, 2, 2, window=8, sink_length=0)
    # before a tile is flushed that an earlier chunk takes part in
    length = 165 if "chunks" in name else 190
    ids, mask = tokens(length=length), torch.ones(2, length, dtype=torch.long)
    ids[0, :11], mask[0, :11] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    plain, _ = decode(model, ids, mask, positions, prompt=110)
    oracle = OracleCache(plan, mask.bool())
    # what no later query sees does not widen groups of the prompt either
    far = max(0, 110 - window)
    first = torch.tensor([[64 + 11], [64]] if "chunks" in name else [[far]] * 2)
    first = first * 0 if fixed and "chunks" in name else first
    for layer, own in zip(oracle.layers, KVMixCache(plan, model.config).layers, strict=True):
        if own.is_sliding:
            layer.valid = layer.valid & (torch.arange(length) >= first)
    want, _ = decode(model, ids, mask, positions, oracle, prompt=110)
    kvmix_fx.compile(model, plan, inner="eager")
    past = KVMixStaticCache(plan, model.config, length) if fixed else KVMixCache(plan, model.config)
    got, past = decode(model, ids, mask, positions, past, prompt=110)
    assert worst(got, want) < 3e-4
    assert worst(plain, want) > 5e-3
    assert past.get_seq_length() == length
    stored = [layer.keys.shape[2] for layer in past.layers if layer.is_sliding]
    assert stored
    assert all(n == length if fixed else 63 <= n < 63 + 32 for n in stored)
    report = kvmix_fx.compiled(model).report
    assert not report.skipped()
    assert len(report.graphs) == 2


@pytest.mark.parametrize("name", WINDOWS)
def test_an_order_of_channels_comes_from_the_tokens_that_a_window_keeps(name, monkeypatch):
    """The prompt is longer than the window; layer 0 reads the same in both models."""
    model = tiny_architecture(*WINDOWS[name])
    ids = tokens(length=120)
    plan = KVPlan.preset("tiers", model, window=8)
    plan = plan.with_layers("all", key=replace(plan.layers[0].key, group_size=32), tile=32)
    seen = []
    find = type(ALL_ATTENTION_FUNCTIONS).get_interface

    def watched(self, *names):
        def look(module, *states, **kwargs):
            seen.append(states[:3])
            return attention(module, *states, **kwargs)

        attention = find(self, *names)
        return look

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(type(ALL_ATTENTION_FUNCTIONS), "get_interface", watched)
        model(ids)
    kvmix_fx.compile(model, plan, inner="eager")
    with torch.no_grad():
        layer = model(ids, use_cache=True).past_key_values.layers[0]
    far = 120 - 63
    query, key, value = (x[:, :, far:] for x in seen[0])
    # what the last token does not see widens no group, and its queries do not count
    mask = (torch.arange(far, 120) >= (64 if "chunks" in name else far)).expand(2, 1, 1, -1)
    for x, packed, hint in ((key, layer.keys, query), (value, layer.values, None)):
        want = QuantizedKVTensor.from_hp(x, packed.format, mask, hint)
        n = packed.format.packed_tiles(packed.shape[2])
        assert n > 0
        for a, b in zip(packed.cached.tensors, want.cached.tensors, strict=True):
            assert torch.equal(a, b)
    # the control
    other = QuantizedKVTensor.from_hp(key, layer.keys.format, mask)
    assert not torch.equal(other.cached.order, layer.keys.cached.order)


def test_windows_in_caches_of_fixed_capacity_say_why_they_stay():
    model = tiny_architecture(*WINDOWS["mistral"][:2])
    plan = kvmix_fx.KVPlan.uniform(model, 2, window=8)
    kvmix_fx.compile(model, plan, inner="eager")
    # a window of 64 tokens takes less at 16 bits than so many at 2; every call says so
    for _ in range(2):
        with pytest.raises(kvmix_fx.errors.NoSiteError, match="growing caches are packed"):
            steps(model, tokens(length=80), 70, KVMixStaticCache(plan, model.config, 900))
    # where growing caches do not pack it either, nobody is sent there
    plan = KVPlan.preset("mikv", model)
    kvmix_fx.compile(model, plan, inner="eager")
    with pytest.raises(kvmix_fx.errors.NoSiteError, match=r'with_layers\(LAYER, token_tier="none"\)'):
        steps(model, tokens(length=80), 70, KVMixStaticCache(plan, model.config, 900))


def test_a_model_of_windows_generates_from_a_packed_cache():
    """8 bits say what the plain model says, 2 bits do not; the default cache, without one handed in."""
    model = tiny_architecture(*WINDOWS["mistral"][:2])
    ids = tokens(length=100)
    settings = {"max_new_tokens": 40, "do_sample": False, "output_logits": True}
    settings["return_dict_in_generate"] = True
    plain = model.generate(ids, **settings)
    differences = []
    for bits in (8, 2):
        plan = kvmix_fx.KVPlan.uniform(model, bits, window=8)
        out = kvmix_fx.compile(model, plan, inner="eager").generate(ids, **settings)
        layer = out.past_key_values.layers[1]
        assert isinstance(layer.keys, QuantizedKVTensor)
        assert layer.keys.format.bits == bits
        assert out.past_key_values.get_seq_length() == 139
        differences.append((out.logits[1] - plain.logits[1]).abs().max().item())
    assert differences[0] < 5e-2 < differences[1]


SMALL_BART = {
    "vocab_size": 128, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0,
    "eos_token_id": None, "bos_token_id": None, "forced_eos_token_id": None, "decoder_start_token_id": 1,
}  # fmt: skip
SMALL_T5 = {
    "vocab_size": 128, "d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2,
    "pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 1,
}  # fmt: skip
SMALL_BLOOM = {
    "vocab_size": 128, "hidden_size": 64, "n_layer": 1, "n_head": 2, "pad_token_id": 0, "eos_token_id": None,
    "bos_token_id": None,
}  # fmt: skip


SMALL_SPARSE = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "index_n_heads": 2,
    "index_head_dim": 32, "index_topk": 24, "first_k_dense_replace": 1, "mlp_layer_types": ["dense"],
    "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings", "attention", "layers"),
    [
        # the cache that transformers makes of this configuration has more layers than the decoder fills
        ("BartForCausalLM", SMALL_BART | {"encoder_layers": 2}, "sdpa", 1),
        ("T5ForConditionalGeneration", SMALL_T5, "sdpa", 2),
        # its mask has a column for every place of the cache, from the prompt on
        ("BloomForCausalLM", SMALL_BLOOM, "eager", 1),
        # keeps the keys of its indexer beside the latents
        pytest.param(
            *("DeepseekV32ForCausalLM", SMALL_SPARSE, "sdpa", 1),
            marks=pytest.mark.skipif(not INDEXED_LATENTS, reason="this transformers caches no latents there"),
        ),
    ],
)
def test_static_caches_of_generate(name, settings, attention, layers):
    """Left padded: 8 bits say what the plain model says, 2 bits do not. Self- and cross-attention."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    config = model_class.config_class(**settings)
    config._attn_implementation = attention
    model = model_class(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    ids, mask = tokens(length=70), torch.ones(2, 70, dtype=torch.long)
    ids[0, :11], mask[0, :11] = 0, 0
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 3, "min_new_tokens": 3}
    given |= {"cache_implementation": "static", "return_dict_in_generate": True, "output_logits": True}
    given |= {"decoder_input_ids": ids[:, 11:]} if config.is_encoder_decoder else {}
    plain = model.generate(**given)
    differences = []
    for bits in (8, 2):
        plan = kvmix_fx.KVPlan.uniform(model, bits, group_size=16, window=8)
        out = kvmix_fx.compile(model, plan, inner="eager").generate(**given)
        differences.append((out.logits[1] - plain.logits[1]).abs().max().item())
        past = out.past_key_values
        caches = [getattr(past, "self_attention_cache", past), getattr(past, "cross_attention_cache", past)]
        packed = {
            id(layer)
            for cache in caches
            for layer in cache.layers
            if isinstance(layer.keys, QuantizedKVTensor) and (layer.keys.dequantize() != 0).any()
        }
        assert len(packed) == layers
    assert differences[0] < differences[1] / 8


@pytest.mark.parametrize(("name", "fixed"), [("diffllama", False), ("deepseek-v3, latents", True)])
def test_caches_are_packed_as_storage_whatever_reads_them(name, fixed):
    """8 bits say what the plain model says, 2 bits do not."""
    config, overrides, attention = STORED[name]
    model = tiny_architecture(config, overrides, attention)
    ids = tokens(length=80)
    plain, _ = steps(model, ids, 70)
    differences = []
    for bits in (8, 2):
        plan = kvmix_fx.KVPlan.uniform(model, bits, group_size=16, window=8)
        kvmix_fx.compile(model, plan, inner="eager")
        got, past = steps(model, ids, 70, KVMixStaticCache(plan, model.config, 80) if fixed else None)
        assert all(layer.keys.format.bits == layer.values.format.bits == bits for layer in past.layers)
        differences.append(worst(got, plain))
        report = kvmix_fx.compiled(model).report
        assert {site.layer for site in report.sites} >= {0, 1}
        assert len(report.graphs) == 2
        assert all("there is no cache here" not in site.reason for site in report.sites)
        actions = {site.action for site in report.graphs[0].sites}
        assert fixed or actions == {STORE, LEAVE}
    assert differences[0] < 5e-3
    assert differences[1] > 3 * differences[0] + 5e-3


def test_hybrid_models_pack_their_full_attention_layers():
    """Gemma 3: sliding layers stay, full ones are packed."""
    model = tiny_architecture(
        "Gemma3TextConfig",
        {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 32},
    )
    plan = kvmix_fx.KVPlan.uniform(2, 2, 2, window=8)
    ids = tokens()
    plain, _ = steps(model, ids, 40)
    kvmix_fx.compile(model, plan, inner="eager")
    got, past = steps(model, ids, 40)
    assert not isinstance(past.layers[0].keys, QuantizedKVTensor)
    assert isinstance(past.layers[1].keys, QuantizedKVTensor)
    assert worst(got, plain) > 1e-3
    report = kvmix_fx.compiled(model).report
    assert report.rewritten_layers() == [1]
    assert {s.layer for s in report.skipped()} == {0}


def test_caps_change_what_a_model_says():
    """So the oracle's check of Gemma 2 could fail."""
    ids = tokens()
    logits = []
    for cap in (1.5, 50.0):
        name, overrides = WRITTEN_OUT["gemma2"]
        model = tiny_architecture(name, overrides | {"attn_logit_softcapping": cap}, "eager")
        kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 4, window=8), inner="eager")
        logits.append(steps(model, ids, 40)[0])
    assert worst(*logits) > 5e-3


def unknown_attention(module, query, key, value, attention_mask, scaling, **_):
    key, value = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), value), None


@pytest.fixture
def unknown():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY)
    transformers.AttentionInterface.register("unknown", unknown_attention)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="unknown").eval()


def test_attention_of_an_unknown_form_is_explained_layer_by_layer(unknown):
    report = kvmix_fx.explain(unknown, tokens(), kvmix_fx.KVPlan.uniform(unknown, 2))
    assert [site.layer for site in report.graphs[0].sites] == [0, 1, 0, 1]
    assert {site.action for site in report.graphs[0].sites} == {STORE, NOT_RECOGNIZED}
    assert all("multiplied by einsum" in s.reason for s in report.graphs[0].sites if not s.recognized)
    assert "graph 0: 2 attention sites, 2 not recognized" in str(report)
    assert {site.query_length for site in report.graphs[1].sites} == {"1"}


def test_attention_of_an_unknown_form_is_slow_and_told_a_way_out(unknown):
    model = unknown
    kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 2), inner="eager")
    settings = {"max_new_tokens": 2, "return_dict_in_generate": True}
    with pytest.warns(DequantizeWarning, match=r'layers 0, 1 .*einsum.*attn_implementation="sdpa"'):
        past = model.generate(tokens(), **settings).past_key_values
    assert isinstance(past.layers[0].keys, QuantizedKVTensor)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_head_sizes_and_half_precision(head_dim, dtype):
    model = tiny_architecture("LlamaConfig", {"head_dim": head_dim, "num_hidden_layers": 1}).to(dtype)
    plan = kvmix_fx.KVPlan.uniform(model, 3, 3, group_size=16, window=8)
    ids = tokens(1)
    want, _ = steps(model, ids, 40, OracleCache(plan))
    plain, _ = steps(model, ids, 40)
    kvmix_fx.compile(model, plan, inner="eager")
    got, _ = steps(model, ids, 40)
    noise = 0.05 if dtype == torch.bfloat16 else 0.02
    assert worst(got, want) < noise * max(w.abs().max().item() for w in want)
    assert worst(got, want) < worst(plain, want)
