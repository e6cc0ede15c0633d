"""generate() with tiers of tokens: with all in a high tier of 16 bits nothing is lost; without, much."""

from __future__ import annotations

import pytest
import torch

import kvmix_fx
from kvmix_fx import KVPlan
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.passes import rewrite
from kvmix_fx.passes.manager import CAME_PLAIN, NO_TIER_ACROSS, NO_TIER_UNREAD
from kvmix_fx.plan import TokenTier
from kvmix_fx.plan.schema import NO_TIER_IN_WINDOW
from kvmix_fx.testing.models import STORED, WINDOWS, tiny_architecture, tiny_llama
from kvmix_kernels.tokens import prompt

from .oracle import worst

LENGTH, NEW = 70, 8
WHOLE = TokenTier(None, 400, recent=0.0, balancer=True)


def asked(model, rows=2, hidden=9, max_new=NEW, **options):
    ids = torch.randint(1, 120, (rows, LENGTH), generator=torch.Generator().manual_seed(3)).to(model.device)
    mask = torch.ones_like(ids)
    mask[0, :hidden] = 0
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=max_new, do_sample=False, output_logits=True,
        return_dict_in_generate=True, eos_token_id=-1, **options,
    )  # fmt: skip
    return out.logits, out.past_key_values, out.sequences


WAYS = {"growing": {}, "beams": {"num_beams": 2}, "chunks": {"prefill_chunk_size": 40}}


def test_a_tier_of_all_tokens_loses_nothing():
    model = tiny_llama()
    plain = {name: asked(model, **way) for name, way in WAYS.items()}
    plan = KVPlan.uniform(model, 2, 2, window=8).with_layers("all", token_tier=WHOLE)
    kvmix_fx.compile(model, plan)
    for name, way in WAYS.items():
        logits, cache, sequences = asked(model, **way)
        assert worst(plain[name][0], logits) < 2e-4, name
        assert torch.equal(plain[name][2], sequences), name
        keys = cache.layers[1].keys
        assert isinstance(keys, QuantizedKVTensor)
        # all packed tokens, but the padding of the first row
        assert (keys.positions[-1] >= 0).sum(1).tolist() == [64, 64]


def test_growing_and_fixed_caches_keep_the_same_tokens():
    model = tiny_llama()
    plain = asked(model)[0]
    plan = KVPlan.preset("mikv", model, window=8)
    kvmix_fx.compile(model, plan)
    logits, growing, _ = asked(model)
    others, fixed, _ = asked(model, cache_implementation="static")
    assert worst(logits, others) < 1e-5
    # the control: most tokens are at two bits
    assert worst(plain, logits) > 1e-3
    for a, b in zip(growing.layers, fixed.layers, strict=True):
        # a fifth of the packed ones in each head
        kept = [[sorted(p[p >= 0].tolist()) for p in row] for row in a.keys.positions]
        assert kept == [[sorted(p[p >= 0].tolist()) for p in row] for row in b.keys.positions]
        assert all(len(head) == 64 // 5 for row in kept for head in row)
    nbytes = sum(t.packed_nbytes for layer in growing.layers for t in (layer.keys, layer.values))
    assert nbytes == plan.nbytes(2, LENGTH + NEW - 1, itemsize=4)
    report = str(kvmix_fx.compiled(model).report)
    assert "packed on exit, K2V2, 20 % of tokens at 16" in report
    assert "packed attention, K2V2, 20 % of tokens at 16" in report


@pytest.mark.parametrize(("cache", "hidden"), [("growing", 0), ("static", 0), ("growing", 9)])
def test_a_prompt_s_attention_tells_what_its_weights_sum_up_to(cache, hidden, monkeypatch):
    """Where it is plainly causal; the same tokens are kept as when importance finds the sums itself."""
    way = {"cache_implementation": "static"} if cache == "static" else {}
    told = []
    fused = prompt._fused
    # as on a GPU, though heads share keys
    monkeypatch.setattr(prompt, "worth_asking", lambda *_: True)
    monkeypatch.setattr(prompt, "_fused", lambda *args: told.append(1) or fused(*args))
    found = []
    for tells in (True, False):
        model = tiny_llama()
        kvmix_fx.compile(model, KVPlan.preset("mikv", model, window=8))
        if not tells:
            monkeypatch.setattr(rewrite._Rewriter, "_log_sums", lambda *_: None)
        found.append(asked(model, hidden=hidden, **way))
        # under a mask it does not
        assert len(told) == (2 if tells and not hidden else 0)
        told.clear()
    assert worst(found[0][0], found[1][0]) < 1e-5
    for a, b in zip(found[0][1].layers, found[1][1].layers, strict=True):
        assert torch.equal(a.keys.positions, b.keys.positions)


def test_learned_sinks_count_once_and_windows_stay():
    """gpt-oss: a layer with a window, one without; both have a learned sink."""
    model = tiny_architecture(*WINDOWS["gpt-oss"])
    plain = asked(model)[0]
    plan = KVPlan.uniform(model, 2, 2, window=8).with_layers("all", token_tier=WHOLE)
    compiled = kvmix_fx.compile(model, plan, inner="eager")
    logits, cache, _ = asked(model)
    assert worst(plain, logits) < 2e-4
    packed = [isinstance(layer.keys, QuantizedKVTensor) for layer in cache.layers]
    assert packed == [not layer.is_sliding for layer in cache.layers]
    assert set(packed) == {True, False}
    reasons = {site.reason for site in kvmix_fx.compiled(compiled).report.skipped()}
    assert NO_TIER_IN_WINDOW in reasons


def test_a_cache_that_no_known_attention_reads_stays_plain_and_the_report_says_why():
    model = tiny_architecture(*STORED["diffllama"])
    plain = asked(model, max_new=3)[0]
    plan = KVPlan.uniform(model, 2, 2, window=8).with_layers("all", token_tier=TokenTier())
    kvmix_fx.compile(model, plan, inner="eager", on_nothing="ignore")
    logits, cache, _ = asked(model, max_new=3)
    assert worst(plain, logits) < 1e-4
    assert not any(isinstance(layer.keys, QuantizedKVTensor) for layer in cache.layers)
    assert NO_TIER_UNREAD in {site.reason for site in kvmix_fx.compiled(model).report.sites}


def test_attention_across_stays_plain_and_the_report_says_why():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, eos_token_id=None, pad_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    plain = asked(model, max_new=3)[0]
    plan = KVPlan.uniform(model, 2, 2, window=8).with_layers("all", token_tier=TokenTier())
    kvmix_fx.compile(model, plan, inner="eager")
    logits, cache, _ = asked(model, max_new=3)
    assert worst(plain, logits) < 1e-4
    assert isinstance(cache.self_attention_cache.layers[0].keys, QuantizedKVTensor)
    assert not isinstance(cache.cross_attention_cache.layers[0].keys, QuantizedKVTensor)
    reasons = {site.reason for site in kvmix_fx.compiled(model).report.skipped()}
    assert reasons == {NO_TIER_ACROSS, CAME_PLAIN}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_replayed_steps_read_and_fill_both_tiers(inner):
    model = tiny_llama().to("cuda")
    plain = asked(model, max_new=60)[0]
    errors = {}
    for name, tier in (("all", WHOLE), ("few", TokenTier(None, 2)), ("faithful", TokenTier())):
        plan = KVPlan.uniform(model, 2, 2, window=8).with_layers("all", token_tier=tier)
        logits = []
        for replayed in (True, False):
            kvmix_fx.compile(model, plan, inner=inner, options={"cuda_graphs": None if replayed else False})
            logits.append(asked(model, max_new=60)[0])
            kvmix_fx.restore(model)
        assert worst(*logits) < 1e-3
        errors[name] = worst(plain, logits[0])
    assert errors["all"] < errors["few"] / 10
