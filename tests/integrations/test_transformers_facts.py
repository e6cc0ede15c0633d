"""One canary per fact of transformers, private or undocumented, that kvmix_fx.integrations.transformers uses.

All of it is about plain models: when a release breaks one of these, start there.
"""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.generation.configuration_utils import GenerationMode

import kvmix_fx
from kvmix_fx.contracts import NAMES, cache_name, given_cache, returned_cache
from kvmix_fx.integrations.transformers.generate import _why_not_fixed
from kvmix_fx.runtime import recording
from kvmix_fx.testing.models import tiny_llama

IDS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(5))
NEW = 4


@pytest.fixture
def model():
    return tiny_llama()


def padded():
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    return mask


def steps(model, **kwargs):
    """What generate() calls a model with, step by step."""
    calls = []
    forward = model.forward

    def noting(*args, **kwargs):
        assert not args
        calls.append(kwargs)
        return forward(**kwargs)

    noting.__signature__ = inspect.signature(forward)
    vars(model)["forward"] = noting
    model.generate(IDS, do_sample=False, max_new_tokens=NEW, **kwargs)
    assert len(calls) == NEW
    return calls


def test_generate_asks_the_instance_for_its_cache_and_takes_the_one_it_is_given(model):
    asked = []
    cache = DynamicCache(config=model.config)

    def prepare(*args):
        asked.append(args)
        args[1][cache_name(GenerationMixin.prepare_inputs_for_generation)] = cache

    vars(model)["_prepare_cache_for_generation"] = prepare
    out = model.generate(IDS, do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True)
    ((config, model_kwargs, mode, batch, length),) = asked
    assert returned_cache(out) is cache
    assert isinstance(config, GenerationConfig)
    assert "attention_mask" in model_kwargs
    assert (mode, batch) == (GenerationMode.GREEDY_SEARCH, 2)
    # with a token to spare or not, the cache holds all of them
    assert length in (IDS.shape[1] + NEW - 1, IDS.shape[1] + NEW)


def test_what_the_cache_of_generate_is_chosen_by_is_in_its_config(model):
    config = model.generation_config
    assert {"cache_implementation", "use_cache", "is_assistant", "num_return_sequences"} <= vars(
        config
    ).keys()
    assert GenerationMode.SAMPLE is not GenerationMode.BEAM_SEARCH


def test_classes_say_whether_they_compile_as_one_graph():
    assert PreTrainedModel._can_compile_fullgraph is False
    assert LlamaForCausalLM._can_compile_fullgraph is True


def test_generate_gets_the_compiled_call_of_the_instance_for_its_decode_steps(model):
    taken = []

    def get(config):
        def call(*args, **kwargs):
            taken.append(config)
            return model(*args, **kwargs)

        return call

    vars(model)["get_compiled_call"] = get
    # true on CUDA only
    vars(model)["_valid_auto_compile_criteria"] = lambda *_: True
    model.generate(IDS, do_sample=False, max_new_tokens=NEW, cache_implementation="static")
    assert len(taken) == NEW - 1


def test_only_caches_that_say_they_compile_get_a_whole_mask(model):
    cache = StaticCache(config=model.config, max_cache_len=32)
    masks = [call["attention_mask"] for call in steps(model, attention_mask=padded(), past_key_values=cache)]
    assert [tuple(mask.shape[:1]) + tuple(mask.shape[-1:]) for mask in masks] == [(2, 32)] * NEW
    assert {mask.dim() for mask in masks} == {4}

    class Uncompilable(StaticCache):
        is_compileable = False

    cache = Uncompilable(config=model.config, max_cache_len=32)
    model = tiny_llama()
    masks = [call["attention_mask"] for call in steps(model, attention_mask=padded(), past_key_values=cache)]
    assert [tuple(mask.shape) for mask in masks] == [(2, IDS.shape[1] + i) for i in range(NEW)]


def test_between_single_tokens_generate_itself_adds_ones_to_the_mask(model):
    masks = [call["attention_mask"] for call in steps(model, attention_mask=padded())]
    for before, after in zip(masks, masks[1:], strict=False):
        assert torch.equal(after[:, :-1], before)
        assert after[:, -1].all()


def test_steps_have_names_and_positions(model):
    for call in steps(model, attention_mask=padded()):
        assert {"input_ids", "position_ids", cache_name(type(model).forward)} <= call.keys()


def test_full_attention_layers_of_caches_are_of_these_very_classes(model):
    assert {type(layer) for layer in StaticCache(config=model.config, max_cache_len=8).layers} == {
        StaticLayer
    }
    growing = DynamicCache(config=model.config).layers
    assert {type(layer) for layer in growing} == {DynamicLayer}
    assert len(growing) == 2
    assert not any(layer.is_initialized for layer in growing)


def test_a_cache_is_made_of_the_layers_it_is_given():
    layers = [DynamicLayer(), DynamicLayer()]
    assert Cache(layers=layers).layers is layers


def test_static_layers_count_their_tokens_in_a_tensor_of_their_own():
    layer = StaticLayer(max_cache_len=8)
    x = torch.ones(1, 2, 3, 16)
    assert layer.cumulative_length.shape == ()
    assert layer.cumulative_length.dtype == torch.int64
    assert not layer.is_initialized
    counter = layer.cumulative_length
    layer.update(x, x)
    assert layer.is_initialized
    assert layer.cumulative_length.item() == 3
    assert layer.keys.shape == (1, 2, 8, 16)
    layer.reset()
    assert layer.cumulative_length.item() == 0
    assert layer.cumulative_length is counter


def test_layers_are_cut_by_a_negative_number_of_tokens():
    layer = DynamicLayer()
    x = torch.ones(1, 2, 5, 16)
    layer.update(x, x)
    layer.crop(-2)
    assert layer.get_seq_length() == 3


def test_attention_modules_tell_their_layer_and_the_query_heads_of_a_kv_head(model):
    modules = [m for m in model.get_decoder().modules() if hasattr(m, "num_key_value_groups")]
    assert [(m.layer_idx, m.num_key_value_groups) for m in modules] == [(0, 2), (1, 2)]


def test_windows_count_by_numbers_and_may_have_states_beside_them():
    kind = LinearAttentionAndStaticSlidingWindowAttentionLayer
    assert issubclass(kind, LinearAttentionLayer)
    assert issubclass(kind, StaticSlidingWindowLayer)
    layer = kind(max_cache_len=8, sliding_window=4, number_of_states=2)
    assert layer.number_of_states == 2
    x = torch.ones(1, 2, 3, 16)
    layer.update(x, x)
    assert layer.get_seq_length() == layer.cumulative_length_int == 3
    assert isinstance(layer.get_seq_length(), int)


@pytest.fixture
def told(model, monkeypatch):
    """Why a compiled model's generate() got no packed cache of fixed capacity; None if it did."""
    monkeypatch.setattr(recording, "REPLAY_DEVICES", ("cpu",))
    kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 4, group_size=16), options={"cuda_graphs": False})
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("kvmix_fx.integrations.transformers.generate")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)

    def ask(**kwargs):
        records.clear()
        model.generate(IDS, max_new_tokens=2, **({"do_sample": False} | kwargs))
        return (
            records[0].removeprefix("generate() gets no packed cache of fixed capacity: ")
            if records
            else None
        )

    yield ask
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_who_gets_no_fixed_cache_can_read_why(told, model, monkeypatch):
    assert told() is None
    assert told(do_sample=True) is None
    assert told(num_beams=2) == "beam_search cuts or reorders its cache"
    assert told(cache_implementation="dynamic") == "cache_implementation='dynamic' was asked for"
    assert told(use_cache=False) == "use_cache=False was asked for"
    assert (
        told(**{cache_name(type(model).forward): DynamicCache(config=model.config)})
        == "a cache was handed in"
    )
    model._can_compile_fullgraph = False
    assert told() == "transformers says that LlamaForCausalLM cannot be compiled as one graph"
    monkeypatch.setattr(recording, "REPLAY_DEVICES", ("cuda",))
    assert told() == "steps on cpu are not recorded"


def test_other_reasons_against_a_fixed_cache(model, monkeypatch):
    monkeypatch.setattr(recording, "REPLAY_DEVICES", ("cpu",))
    plan = kvmix_fx.KVPlan.uniform(model, 4, group_size=16)
    config, greedy = model.generation_config, GenerationMode.GREEDY_SEARCH
    assert _why_not_fixed(model, plan.for_model(model), config, {}, greedy, 64) == ""
    assert "head sizes" in _why_not_fixed(model, kvmix_fx.KVPlan.uniform(2, 4), config, {}, greedy, 64)
    config.is_assistant = True
    assert "assistant" in _why_not_fixed(model, plan.for_model(model), config, {}, greedy, 64)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    assert "2 devices" in _why_not_fixed(model, plan.for_model(model), config, {}, greedy, 64)


def test_a_model_knows_whether_its_recorders_are_installed():
    """`output_hidden_states` installs hooks on the first call, once, on the inner model or on the outer."""
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    model = tiny_llama(num_hidden_layers=1)
    assert not hasattr(model.model, "_output_capturing_hooks_installed")
    maybe_install_capturing_hooks(model)
    assert model._output_capturing_hooks_installed
    assert model.model._output_capturing_hooks_installed
    assert len(model.model.layers[0]._forward_hooks) == 1


def test_a_cache_has_one_name_in_calls_and_results(model):
    """Whatever a release calls it, generate() and forward agree, and results have it."""
    (first, *_) = steps(model)
    name = cache_name(type(model).forward)
    assert [other for other in NAMES if other in first] == [name]
    assert name == cache_name(GenerationMixin.prepare_inputs_for_generation)
    assert given_cache(first) is first[name]
    with torch.no_grad():
        assert returned_cache(model(input_ids=IDS, use_cache=True)).get_seq_length() == IDS.shape[1]


def test_the_engine_makes_its_lists_anew_in_every_step_and_asks_in_the_order_of_tokens(model, monkeypatch):
    """`PackedCache` takes new lists for a new step, and requests for the order of the step's tokens."""
    cache = pytest.importorskip("transformers.generation.continuous_batching.cache")
    if not hasattr(cache, "ATTN_TYPE_TO_ALLOCATOR"):
        pytest.skip("an engine of which caches cannot be ours")
    steps = []
    original = cache.PagedAttentionCache.extend_read_and_write_indices

    def noting(self, name, past, count, read, write):
        if not any(write is seen for seen, _ in steps):
            steps.append((write, []))
        steps[-1][1].append(count)
        return original(self, name, past, count, read, write)

    monkeypatch.setattr(cache.PagedAttentionCache, "extend_read_and_write_indices", noting)
    seen = []
    model.register_forward_hook(
        lambda _m, _a, given, _o: seen.append(given["cu_seq_lens_q"].diff().tolist()), with_kwargs=True
    )
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    config = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=8, page_size=32)
    found = model.generate_batch(IDS.tolist(), max_new_tokens=NEW, continuous_batching_config=config)
    assert [result.error for result in found.values()] == [None, None]
    assert seen == [counts for _, counts in steps]
    assert any(len(counts) > 1 for counts in seen)
