"""Prompts that are not traced: the same cache, bit for bit, and the same next steps as after a traced one."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import kvmix_fx
from kvmix_fx import backend, dynamo, errors
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.contracts import cache_argument
from kvmix_fx.integrations.transformers import KVMixCache, KVMixStaticCache, prompts
from kvmix_fx.testing.models import tiny_llama
from kvmix_kernels import ops

CACHES = {
    "packed fixed": lambda plan, model: KVMixStaticCache(plan, model.config, 256),
    "packed growing": lambda plan, model: KVMixCache(plan, model.config),
    "transformers' fixed": lambda plan, model: StaticCache(config=model.config, max_cache_len=256),
    "transformers' growing": lambda plan, model: DynamicCache(config=model.config),
}
PLANS = {
    "uniform": lambda model: kvmix_fx.KVPlan.uniform(model, 2, 3, window=8, group_size=16, sink_length=4),
    # orders of channels come from the queries, and packed tiles need more than a window of 128 tokens
    "tiers": lambda model: kvmix_fx.KVPlan.preset("tiers", model),
    "mixkvq": lambda model: kvmix_fx.KVPlan.preset("mixkvq", model),
    "one plain layer": lambda model: kvmix_fx.KVPlan.uniform(
        model, 4, 2, window=8, group_size=16
    ).with_layers([0], key=kvmix_fx.QuantSpec(16), value=kvmix_fx.QuantSpec(16)),
    # the model's first layer is one of 24 tokens, which is what the plan keeps raw of a layer
    "a plain window": lambda model: kvmix_fx.KVPlan.uniform(model, 4, 2, window=8, group_size=16),
}
KINDS = ["packed fixed", "transformers' growing"]
CASES = [
    *(("uniform", kind) for kind in CACHES),
    *((plan, kind) for plan in list(PLANS)[1:] for kind in KINDS),
]


def tokens(length, rows=2):
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(3))


def steps(model, cache, ids, mask, more=2):
    """Logits of a prompt with padding and of single tokens after it, and how many graphs the prompt took."""
    with torch.no_grad():
        found = [model(ids, attention_mask=mask, use_cache=True, **cache_argument(model, cache)).logits]
        graphs = len(kvmix_fx.compiled(model).report.graphs)
        for i in range(more):
            mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
            step = {"attention_mask": mask, "use_cache": True, **cache_argument(model, cache)}
            found.append(model(ids[:, i : i + 1], **step).logits)
    return found, graphs


def stored(cache):
    both = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return [part for t in both for part in (t.cached.tensors if isinstance(t, QuantizedKVTensor) else (t,))]


def with_a_window():
    config = Qwen2Config(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=24, use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).eval()


def compiled(plan, traces, **model):
    made = with_a_window() if plan == "a plain window" else tiny_llama(**model)
    options = {"trace_prompts": traces}
    return kvmix_fx.compile(made, PLANS[plan](made), inner="eager", options=options)


@pytest.mark.parametrize(("plan", "kind"), CASES)
def test_the_cache_is_that_of_a_traced_prompt(plan, kind):
    ids = tokens(180)
    mask = torch.ones_like(ids)
    mask[0, :21] = 0
    results = {}
    for traces in (True, False):
        model = compiled(plan, traces)
        cache = CACHES[kind](kvmix_fx.compiled(model).plan, model)
        logits, graphs = steps(model, cache, ids, mask)
        assert graphs == traces
        assert any(isinstance(layer.keys, QuantizedKVTensor) for layer in cache.layers)
        results[traces] = logits, stored(cache)
    assert all(map(torch.equal, results[True][0], results[False][0]))
    assert all(map(torch.equal, results[True][1], results[False][1]))


@pytest.mark.parametrize("length", [10, 60])
def test_a_plain_window_that_grows_takes_one_graph_for_all_steps(length):
    """It counts its tokens in a number, and is a slice of the prompt when it is full."""
    model = compiled("a plain window", False)
    cache = KVMixCache(kvmix_fx.compiled(model).plan, model.config)
    ids = tokens(length)
    steps(model, cache, ids, torch.ones_like(ids), 4)
    assert len(kvmix_fx.compiled(model).report.graphs) == 1
    assert type(cache.layers[0]) is DynamicSlidingWindowLayer
    # no more of the prompt is in memory
    assert cache.layers[0].keys.untyped_storage().nbytes() <= 2 * 2 * 24 * 16 * 4


def test_another_prompt_is_another_cache():
    """The control: what is equal above differs where it has to."""
    model, ids = compiled("tiers", False), tokens(180)
    caches = [KVMixStaticCache(kvmix_fx.compiled(model).plan, model.config, 256) for _ in range(2)]
    for cache, given in zip(caches, (ids, ids.flip(1)), strict=True):
        steps(model, cache, given, torch.ones_like(given), 0)
    assert not all(map(torch.equal, *map(stored, caches)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", ["uniform", "one plain layer", "a plain window"])
def test_scales_without_the_range_are_widened(plan, kind):
    """As for a traced prompt: once, with a warning that names the layer, and nothing is lost or kept twice.

    A window is not full after this prompt in a cache of fixed capacity.
    """
    results = {}
    ids = tokens(20)
    for traces in (True, False):
        model = compiled(plan, traces).float()
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight.mul_(3e6)
        cache = CACHES[kind](kvmix_fx.compiled(model).plan, model)
        with pytest.warns(errors.NarrowScalesWarning, match="keys of layer 1"):
            results[traces], graphs = steps(model, cache, ids, torch.ones_like(ids))
        assert bool(graphs) == traces
        assert cache.layers[1].keys.scale.dtype == torch.float32
        lengths = {int(layer.get_seq_length()) for layer in cache.layers}
        assert lengths == {22}
    assert all(map(torch.equal, *results.values()))
    assert all(logits.isfinite().all() for logits in results[False])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", ["uniform", "a plain window"])
def test_a_prompt_that_fails_leaves_an_empty_cache(plan, kind):
    model, ids = compiled(plan, False), tokens(20)
    plan = kvmix_fx.compiled(model).plan
    want, _ = steps(model, CACHES[kind](plan, model), ids, torch.ones_like(ids))
    cache = CACHES[kind](plan, model)
    failing, calls = "append_" if "fixed" in kind else "quantize_pack", []
    real = getattr(ops, failing)

    def fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    with mock.patch.object(ops, failing, fails), pytest.raises(KeyboardInterrupt):
        steps(model, cache, ids, torch.ones_like(ids), 0)
    assert cache.get_seq_length() == 0
    again, _ = steps(model, cache, ids, torch.ones_like(ids))
    assert all(map(torch.equal, want, again))


def test_what_a_prompt_needs_a_graph_for_has_one():
    """Attention that is not torch's, tiers of tokens, a prompt behind tokens, no cache handed in."""
    ids = tokens(60)
    mask = torch.ones_like(ids)

    def graphs(model, cache, given=ids, seen=mask):
        before = len(kvmix_fx.compiled(model).report.graphs)
        steps(model, cache, given, seen, 0)
        return len(kvmix_fx.compiled(model).report.graphs) - before

    model = compiled("uniform", False)
    plan = kvmix_fx.compiled(model).plan
    cache = KVMixStaticCache(plan, model.config, 256)
    assert graphs(model, cache) == 0
    assert graphs(model, cache, ids, torch.cat([mask, mask], 1)) == 1
    with torch.no_grad():
        model(ids, use_cache=True)
    assert len(kvmix_fx.compiled(model).report.graphs) == 2
    eager = tiny_llama()
    eager.set_attn_implementation("eager")
    kvmix_fx.compile(eager, PLANS["uniform"](eager), inner="eager", options={"trace_prompts": False})
    assert graphs(eager, KVMixStaticCache(kvmix_fx.compiled(eager).plan, eager.config, 256)) == 1


def test_generate_takes_it():
    model, ids = compiled("uniform", False), tokens(60)
    given = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(ids, **given)
    assert len(kvmix_fx.compiled(model).report.graphs) == 1
    traced = compiled("uniform", True).generate(ids, **given)
    assert all(map(torch.equal, plain.logits, traced.logits))


@pytest.mark.parametrize("plan", ["uniform", "a plain window"])
def test_a_cache_that_was_emptied_takes_it_again(plan):
    """generate() uses the layers of a cache that was dropped again; windows keep their buffers."""
    model = compiled(plan, False)
    cache = KVMixStaticCache(kvmix_fx.compiled(model).plan, model.config, 256)
    ids = tokens(100)
    logits = []
    for _ in range(2):
        found, graphs = steps(model, cache, ids, torch.ones_like(ids))
        assert graphs == 0 or logits
        logits.append(found)
        cache.reset()
    assert len(kvmix_fx.compiled(model).report.graphs) == 1
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


def test_a_window_may_be_initialized_before_it_has_tokens():
    """As models with a cache of their own do; its keys have no shape yet."""
    model, ids = compiled("a plain window", False), tokens(40)
    cache, other = (DynamicCache(config=model.config) for _ in range(2))
    cache.layers[0].lazy_initialization(*(torch.empty(2, 2, 0, 16) for _ in range(2)))
    found = [steps(model, one, ids, torch.ones_like(ids))[0] for one in (cache, other)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_option_is_checked():
    model = tiny_llama()
    with pytest.raises(errors.BackendOptionError, match='"trace_prompts" must be True, False or None'):
        kvmix_fx.compile(model, PLANS["uniform"](model), options={"trace_prompts": "no"})


@pytest.mark.parametrize("accelerator", [True, False])
def test_inductor_is_loaded_while_a_device_reads_the_first_prompt(accelerator):
    events = []
    with (
        mock.patch.object(backend, "_on_accelerator", return_value=accelerator),
        mock.patch.object(dynamo, "load_inductor", side_effect=lambda: events.append("loaded")),
        mock.patch.object(
            prompts.PlainPrompt,
            "_check_ranges",
            autospec=True,
            side_effect=lambda _: events.append("waited for"),
        ),
    ):
        model = kvmix_fx.compile(tiny_llama(num_hidden_layers=1))
        for _ in range(2):
            model.generate(tokens(50), max_new_tokens=1, do_sample=False)
    assert events == ["loaded"] * accelerator + ["waited for"] * 2
