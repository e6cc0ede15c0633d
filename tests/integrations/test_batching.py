"""Continuous batching over packed pages: what the engine makes of requests, and what is undone."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AttentionInterface, GenerationConfig

import kvmix_fx
from kvmix_fx.errors import (
    FormatError,
    MissingPackageError,
    PlanLayerError,
    PoolError,
    RequestLengthError,
    ServingError,
)
from kvmix_fx.integrations.transformers import batching
from kvmix_fx.plan import KVPlan
from kvmix_fx.testing.batching import Logits, free_share, results
from kvmix_fx.testing.models import STORED, WINDOWS, WRITTEN_OUT, tiny_architecture, tiny_llama

try:
    batching.require_engine("these tests")
except MissingPackageError as error:
    REASON = str(error)
else:
    REASON = ""

engine = pytest.mark.skipif(bool(REASON), reason=REASON)
MEMORY = 4 << 20
NEW = 6
LENGTHS = (3, 31, 32, 100, 67, 150)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 128, (n,), generator=generator).tolist() for n in LENGTHS]


def options(**given):
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    return ContinuousBatchingConfig(**given)


def run(model, plan, prompts, new=NEW, memory=MEMORY, **given):
    """Logits [new, vocabulary] and tokens of each prompt, all of them at once."""
    with kvmix_fx.serve(model, plan, memory=memory, continuous_batching_config=options(**given)) as manager:
        with Logits(manager) as heard:
            ids = manager.add_requests(prompts, max_new_tokens=new)
            found = results(manager, ids)
        assert free_share(manager) == 1
    assert all(result.error is None for result in found.values())
    return [torch.stack(heard.by_request[i]) for i in ids], [found[i].generated_tokens for i in ids]


@torch.no_grad()
def plain(model, prompt, tokens):
    """The model's own logits for the tokens chosen."""
    return model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]


def worst(logits, others):
    return max((a - b).abs().max().item() for a, b in zip(logits, others, strict=True))


@engine
def test_without_packing_requests_of_any_length_side_by_side_have_the_models_own_logits(model, prompts):
    # steps of 48 tokens cut the longer prompts, and mix what is left of them with decoding
    logits, tokens = run(model, KVPlan.uniform(model, 16), prompts, max_batch_tokens=48)
    assert worst(logits, [plain(model, *pair) for pair in zip(prompts, tokens, strict=True)]) < 2e-6


@engine
def test_packed_requests_side_by_side_have_the_logits_that_each_has_alone(model, prompts):
    fine, coarse = (KVPlan.uniform(model, bits, window=0) for bits in (8, 2))
    logits, tokens = run(model, fine, prompts, max_batch_tokens=48)
    alone = [run(model, fine, [prompt])[0][0] for prompt in prompts[3:]]
    exact = [plain(model, *pair) for pair in zip(prompts, tokens, strict=True)]
    assert worst(logits[3:], alone) < 5e-3
    assert worst(logits, exact) < 5e-3
    rough = run(model, coarse, prompts, max_batch_tokens=48)[0]
    assert worst([x[:1] for x in rough], [x[:1] for x in exact]) > 5e-2


@engine
def test_a_prefix_of_many_requests_is_stored_once(model, prompts):
    prefix = prompts[5][:128]
    with kvmix_fx.serve(model, KVPlan.uniform(model, 8), memory=MEMORY) as manager, Logits(manager) as heard:
        # one that ends in its first step leaves nothing to others
        first = manager.add_request([*prefix, 7], max_new_tokens=2)
        results(manager, [first])
        others = manager.add_requests([[*prefix, n] for n in range(8, 14)], max_new_tokens=20)
        found = results(manager, others)
        packed = manager.cache.packed
        # the others compute their last token and their answers
        assert manager.counts.tokens == len(prefix) + 2 + 6 * 20
        # the pages of the prefix, and nothing of the answers, which are shorter than a page
        assert len(packed.ledger.cached_blocks) == len(prefix) // packed.tokens_per_page
        assert len(packed._sinks) == 1
        assert free_share(manager) == 1
    for last, name in zip(range(8, 14), others, strict=True):
        exact = plain(model, [*prefix, last], found[name].generated_tokens)
        assert worst([torch.stack(heard.by_request[name])], [exact]) < 5e-3


@engine
@pytest.mark.parametrize("sharing", [True, False])
def test_copies_of_a_request_have_their_own_tails_and_sinks(model, prompts, sharing):
    config = GenerationConfig(
        num_return_sequences=3, do_sample=True, top_k=1, max_new_tokens=50, eos_token_id=-1
    )
    with (
        kvmix_fx.serve(
            model,
            KVPlan.uniform(model, 8, window=0),
            memory=MEMORY,
            generation_config=config,
            continuous_batching_config=options(allow_block_sharing=sharing),
        ) as manager,
        Logits(manager) as heard,
    ):
        for prompt in (prompts[0], prompts[4]):
            name = manager.add_request(prompt)
            copies = [f"{name}{end}" for end in ("", "__child#0", "__child#1")]
            found = results(manager, copies)
            assert len({tuple(found[one].generated_tokens) for one in copies}) == 1
            first, *others = (torch.stack(heard.by_request[one]) for one in copies)
            assert worst(others, [first, first]) < 1e-5
        assert free_share(manager) == 1


@engine
def test_a_pool_that_is_full_computes_again_and_says_the_same(model, prompts, monkeypatch):
    from transformers.generation.continuous_batching.requests import RequestState

    plan = KVPlan.uniform(model, 16)
    wanted = run(model, plan, prompts[3:], 40)[1]
    again, original = [], RequestState.create_equivalent_initial_request

    def noting(state):
        again.append(state.request_id)
        return original(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", noting)
    page = 2 * 2 * 2 * 32 * 32 * 4
    # two of trash, and nine pages and tails where all three would take 18
    assert run(model, plan, prompts[3:], 40, 11 * page, allow_block_sharing=False)[1] == wanted
    assert again


@engine
def test_what_cannot_be_held_is_refused_and_what_is_cancelled_returns_its_pages(model, prompts):
    with kvmix_fx.serve(
        model,
        KVPlan.uniform(model, 4, 2),
        memory=MEMORY,
        continuous_batching_config=options(max_batch_tokens=8, allow_block_sharing=False),
    ) as manager:
        with pytest.raises(RequestLengthError, match="tokens and 6 new ones do not fit into the pool"):
            manager.add_request([1] * manager.capacity, max_new_tokens=6)
        with pytest.raises(RequestLengthError, match="give at least one"):
            manager.add_request([])
        # eight tokens a step: it is cancelled long before it is read
        long = manager.add_request([1] * (manager.capacity - 10), max_new_tokens=6)
        good, bad = manager.add_requests([prompts[0], [1] * (1 << 20)], max_new_tokens=6)
        manager.cancel_request(long)
        found = results(manager, [good, bad])
        assert found[good].error is None
        assert "do not fit into the pool" in found[bad].error
        assert free_share(manager) == 1


@engine
def test_keys_that_scales_cannot_hold_fail_with_what_to_do(prompts):
    model = tiny_llama(num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1e7)
    with kvmix_fx.serve(model, KVPlan.uniform(model, 4), memory=MEMORY) as manager:
        name = manager.add_request(prompts[0], max_new_tokens=1)
        assert "keys of layer 0" in results(manager, [name])[name].error
    assert model.config._attn_implementation == "sdpa"
    wide = KVPlan.uniform(model, 4, scale_dtype="float32")
    with kvmix_fx.serve(model, wide, memory=MEMORY) as manager:
        name = manager.add_request(prompts[0], max_new_tokens=1)
        assert results(manager, [name])[name].error is None


@engine
@pytest.mark.parametrize("seed", range(4))
def test_pools_that_hold_a_few_requests_answer_all_and_lose_no_page(seed):
    drawn = random.Random(seed)
    model = tiny_llama(num_hidden_layers=1)
    plan = KVPlan.uniform(model, drawn.choice([4, 8]), window=drawn.choice([0, 32]))
    given = options(max_batch_tokens=drawn.choice([16, 512]), allow_block_sharing=seed % 2 == 0)
    common = [drawn.randint(1, 127) for _ in range(70)]
    with kvmix_fx.serve(
        model, plan, memory=(180 + 30 * seed) << 10, continuous_batching_config=given
    ) as manager:
        kept, cancelled = [], []
        for number in range(15):
            own = [drawn.randint(1, 127) for _ in range(drawn.randint(1, 60))]
            prompt = common + own if number % 2 and manager.capacity > 170 else own
            name = manager.add_request(prompt, max_new_tokens=drawn.randint(1, 40))
            (cancelled if number % 5 == 4 else kept).append(name)
            if number % 5 == 4:
                manager.cancel_request(name)
        assert all(result.error is None for result in results(manager, kept).values())
        # the last to be cancelled may still be known until the next step
        final = manager.add_request([1], max_new_tokens=1)
        results(manager, [final])
        assert free_share(manager) == 1
        assert manager.counts.failed == 0


@engine
@pytest.mark.parametrize("name", ["gpt-oss", "gemma2"])
def test_windows_learned_sinks_and_caps_are_those_of_the_model(prompts, name):
    config, given, *_ = {**WINDOWS, **WRITTEN_OUT}[name]
    # gpt-oss has layers with windows, which keep the engine's own pages
    model = tiny_architecture(config, given, "eager")
    logits, tokens = run(model, KVPlan.uniform(model, 16), prompts[1:5], max_batch_tokens=48)
    exact = [plain(model, *pair) for pair in zip(prompts[1:5], tokens, strict=True)]
    assert worst(logits, exact) < 2e-6


@engine
def test_generate_batch_of_a_compiled_model_has_packed_pages_and_leaves_nothing(model, prompts):
    tokens = run(model, KVPlan.uniform(model, 16), prompts)[1]
    before = dict(vars(model))
    kvmix_fx.compile(model, KVPlan.uniform(model, 16))
    try:
        found = model.generate_batch(
            prompts, max_new_tokens=NEW, continuous_batching_config=options(num_blocks=64)
        )
        assert model.config._attn_implementation == "sdpa"
        assert [result.generated_tokens for result in found.values()] == tokens
        manager = model.init_continuous_batching(continuous_batching_config=options(num_blocks=64))
        assert isinstance(manager, batching.manager.PackedBatchingManager)
        assert manager.cache.packed.layout.layers.keys() == {0, 1}
        with pytest.raises(ServingError, match="close the manager before you call"):
            kvmix_fx.restore(model)(torch.tensor([[1, 2]]))
        with pytest.raises(ServingError, match="is being served already"):
            kvmix_fx.serve(model, KVPlan.uniform(model, 4), memory=MEMORY)
        manager.close()
        kvmix_fx.compile(model, KVPlan.uniform(model, 16))
        with pytest.warns(UserWarning, match="not kept from one generate_batch to the next"):
            model.generate_batch(
                prompts[:1],
                max_new_tokens=1,
                continuous_batching_config=options(num_blocks=64),
                persistent_manager=True,
            )
        model._cached_continuous_batching_manager = object()
        with pytest.raises(ServingError, match="destroy_cached_continuous_batching_manager"):
            model.generate_batch(prompts[:1], max_new_tokens=1)
        del model._cached_continuous_batching_manager
    finally:
        kvmix_fx.restore(model)
    assert vars(model) == before
    assert "kvmix_paged" not in AttentionInterface().valid_keys()


@engine
@pytest.mark.parametrize(
    ("plan", "memory", "given", "error", "says"),
    [
        (lambda m: KVPlan.preset("tiers", m), MEMORY, {}, FormatError, 'order="prompt" chooses'),
        (lambda m: KVPlan.uniform(3, 4), MEMORY, {}, PlanLayerError, "3 layers"),
        (lambda m: None, MEMORY, {}, ServingError, "needs a plan"),
        (lambda m: KVPlan.uniform(m, 4), 1000, {}, PoolError, "a pool of 1000 bytes is too small"),
        (lambda m: KVPlan.uniform(m, 4), None, {"max_memory_percent": 1e-9}, PoolError, "no room for a pool"),
        (lambda m: KVPlan.uniform(m, 4), MEMORY, {"page_size": 48}, FormatError, "no multiple of this plan"),
        (lambda m: KVPlan.uniform(m, 4), MEMORY, {"cpu_offload_space": 1.0}, ServingError, "offloaded"),
        (
            lambda m: KVPlan.uniform(m, 4),
            MEMORY,
            {"use_cuda_graph": (True, True)},
            ServingError,
            "CUDA graphs",
        ),
        (lambda m: KVPlan.uniform(m, 4), MEMORY, {"default_compile_level": 1}, ServingError, "not compiled"),
    ],
)
def test_what_does_not_go_together_is_said_before_the_model_is_touched(
    model, plan, memory, given, error, says
):
    before = dict(vars(model))
    with pytest.raises(error, match=says):
        kvmix_fx.serve(model, plan(model), memory=memory, continuous_batching_config=options(**given))
    assert vars(model) == before
    assert model.config._attn_implementation == "sdpa"


@engine
def test_models_without_full_attention_and_things_that_are_none_are_refused():
    model = tiny_architecture("MistralConfig", {"sliding_window": 24})
    with pytest.raises(ServingError, match="all layers of this model have sliding windows"):
        kvmix_fx.serve(model, KVPlan.uniform(model, 4), memory=MEMORY)
    model = tiny_architecture(*STORED["deepseek-v3, latents"])
    with pytest.raises(ServingError, match="caches latents"):
        kvmix_fx.serve(model, KVPlan.uniform(model, 4, group_size=16), memory=MEMORY)
    model = tiny_architecture("BloomConfig", {"n_layer": 2, "n_head": 4}, "eager")
    with pytest.raises(ServingError, match="attention of its own"):
        kvmix_fx.serve(model, KVPlan.uniform(model, 4), memory=MEMORY)
    with pytest.raises(ServingError, match="takes a model of transformers"):
        kvmix_fx.serve(torch.nn.Linear(2, 2), KVPlan.uniform(1, 4))


@pytest.mark.skipif(not REASON, reason="this transformers has the engine")
def test_an_older_transformers_is_named():
    model = tiny_llama(num_hidden_layers=1)
    with pytest.raises(MissingPackageError, match=r"continuous batching needs transformers >= 5\.23"):
        kvmix_fx.serve(model, KVPlan.uniform(model, 4))
    kvmix_fx.compile(model, KVPlan.uniform(model, 4))
    with pytest.raises(MissingPackageError, match=r"generate_batch of a compiled model"):
        model.generate_batch([[1, 2]], max_new_tokens=2)


@engine
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels interpreted, graphs faked: GPUs have both")
def test_steps_that_decode_are_padded_and_told_by_tables_as_for_a_graph(monkeypatch, prompts):
    from transformers.generation.continuous_batching import model_runner

    from kvmix_fx.integrations.transformers.batching import manager as managers
    from kvmix_fx.integrations.transformers.batching.runner import PackedRunner
    from kvmix_kernels.paged import attend
    from kvmix_kernels.triton import paged

    model = tiny_llama(num_hidden_layers=1)
    plan = KVPlan.uniform(model, 8, window=0)
    # three requests, of which one fills a page while it decodes, in a step with room for four
    asked = [prompts[0], prompts[1], prompts[2][:5]]
    given = {"new": 2, "allow_block_sharing": False}
    wanted = run(model, plan, asked, **given)
    shapes = []

    def forward_alone(self, forward, _stream, *args):
        shapes.append(self.inputs_and_outputs._get_graph_key())
        forward(*args)

    # kernels in the interpreter, and a graph that is made anew for every step
    monkeypatch.setattr(attend, "_kernel", lambda *_: paged)
    monkeypatch.setattr(managers, "can_record", lambda _: True)
    monkeypatch.setattr(model_runner, "get_memory_pools", lambda: (None, None))
    monkeypatch.setattr(PackedRunner, "_capture_graph", forward_alone)
    found = run(model, plan, asked, use_cuda_graph=(False, True), **given)
    assert set(shapes) == {(4, 32)}
    assert found[1] == wanted[1]
    assert worst(found[0], wanted[0]) < 5e-3
