"""What is raised in the middle of a step: the cache is as before or says that it is not usable."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from transformers import LogitsProcessor
from transformers.cache_utils import LinearAttentionLayer

import kvmix_fx
from kvmix_fx import errors
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.contracts import cache_argument, returned_cache
from kvmix_fx.integrations.transformers import KVMixCache, KVMixStaticCache
from kvmix_fx.testing.models import tiny_llama
from kvmix_kernels.cpu import native
from kvmix_kernels.reference import storage

PLAN = {"window": 8, "group_size": 16}


def tokens(length=60, rows=1):
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def ready():
    model = tiny_llama()
    return kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 2, **PLAN), inner="eager")


def forward(model, ids, past=None):
    with torch.no_grad():
        return model(ids, use_cache=True, **cache_argument(model, past))


def reads(cache):
    return [t.dequantize() for layer in cache.layers for t in (layer.keys, layer.values)]


class Fails:
    """`storage.append` that raises when it is called for the n-th time."""

    def __init__(self, at, error):
        self.at, self.error, self.calls, self.append = at, error, 0, storage.append

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.at:
            raise self.error("in the middle")
        return self.append(*args)


def fails(at, error):
    return mock.patch.object(storage, "append", Fails(at, error))


def made(model, kind):
    plan = kvmix_fx.compiled(model).plan
    if kind == "growing":
        return KVMixCache(plan, model.config)
    return KVMixStaticCache(plan, model.config, 128)


@pytest.mark.parametrize(("kind", "error"), [("growing", KeyboardInterrupt), ("fixed", RuntimeError)])
def test_a_step_that_fails_between_attention_and_append(ready, kind, error, subtests):
    """Two of four tensors have been written; a step before a tile is packed, and the one that packs it."""
    ids = tokens()
    for length in (39, 40, 41):
        with subtests.test(length=length):
            cache = made(ready, kind)
            forward(ready, ids[:, :39], cache)
            for i in range(39, length):
                forward(ready, ids[:, i : i + 1], cache)
            with fails(3, error), pytest.raises(error):
                forward(ready, ids[:, length : length + 1], cache)
            again = made(ready, kind)
            forward(ready, ids[:, :39], again)
            for i in range(39, length):
                forward(ready, ids[:, i : i + 1], again)
            assert all(map(torch.equal, reads(cache), reads(again)))
            want = forward(ready, ids[:, length : length + 1], again).logits
            assert torch.equal(forward(ready, ids[:, length : length + 1], cache).logits, want)
            assert all(map(torch.equal, reads(cache), reads(again)))


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_attention_that_runs_out_of_memory_leaves_the_cache_as_it_was(ready, kind, error):
    """In the second layer: the first has read, and in a fixed cache also written, its tokens of the step."""
    ids, cache = tokens(), made(ready, kind)
    forward(ready, ids[:, :39], cache)
    before, real, calls = reads(cache), native.attend, []

    def attend(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise error("no room")
        return real(*args, **kwargs)

    with mock.patch.object(native, "attend", attend), pytest.raises(error):
        forward(ready, ids[:, 39:40], cache)
    assert len(calls) == 2
    assert all(map(torch.equal, reads(cache), before))
    whole = made(ready, kind)
    forward(ready, ids[:, :39], whole)
    for i in range(39, 43):
        step = ids[:, i : i + 1]
        assert torch.equal(forward(ready, step, cache).logits, forward(ready, step, whole).logits)


def test_a_long_step_that_fails_says_that_the_cache_is_lost(ready):
    """It writes over raw tokens that were packed in the tensors it reached."""
    ids, cache = tokens(90), made(ready, "fixed")
    forward(ready, ids[:, :39], cache)
    with fails(3, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        forward(ready, ids[:, 39:80], cache)
    with pytest.raises(errors.CacheMutationError, match=r"cache\.reset\(\) and fill it anew"):
        forward(ready, ids[:, 39:40], cache)
    cache.reset()
    assert torch.equal(forward(ready, ids, cache).logits, forward(ready, ids, made(ready, "fixed")).logits)


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_a_prompt_that_fails_leaves_the_next_one_right(ready, kind):
    ids = tokens()
    want = forward(ready, ids, made(ready, kind)).logits
    with fails(2, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        ready.generate(ids, max_new_tokens=4)
    cache = made(ready, kind)
    with fails(2, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        forward(ready, ids, cache)
    assert torch.equal(forward(ready, ids, cache).logits, want)
    assert cache.get_seq_length() == 60


def test_a_cache_that_could_not_be_enlarged_is_as_before(ready):
    ids, cache, calls = tokens(64), made(ready, "fixed"), []
    forward(ready, ids[:, :60], cache)
    before, enlarged = reads(cache), QuantizedKVTensor.enlarged

    def failing(self, capacity):
        calls.append(capacity)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no room")
        return enlarged(self, capacity)

    with mock.patch.object(QuantizedKVTensor, "enlarged", failing), pytest.raises(torch.OutOfMemoryError):
        cache.enlarge(200)
    assert all(torch.equal(a, b[:, :, : a.shape[2]]) for a, b in zip(before, reads(cache), strict=True))
    assert {layer.max_cache_len for layer in cache.layers} == {128}
    assert {t.shape[2] for layer in cache.layers for t in (layer.keys, layer.values)} == {128}
    again = made(ready, "fixed")
    forward(ready, ids[:, :60], again)
    for i in range(60, 64):
        if i == 62:
            cache.enlarge(200)
        got = forward(ready, ids[:, i : i + 1], cache).logits
        torch.testing.assert_close(got, forward(ready, ids[:, i : i + 1], again).logits, atol=1e-5, rtol=1e-5)
    assert {layer.keys.shape[2] for layer in cache.layers} == {200}


def test_two_compiled_models_and_a_plain_one_do_not_know_of_each_other(ready):
    """Step by step in turns, with caches of both kinds, as each does alone."""
    ids = tokens(44)
    other = tiny_llama(seed=1)
    plain = tiny_llama(seed=2)
    kvmix_fx.compile(other, kvmix_fx.KVPlan.uniform(other, 4, **PLAN), inner="eager")
    models = (ready, other, plain)

    def caches():
        return [made(ready, "growing"), made(other, "fixed"), None]

    def alone(model, past):
        logits = []
        for piece in (ids[:, :40], *ids[:, 40:].split(1, 1)):
            out = forward(model, piece, past)
            past = returned_cache(out)
            logits.append(out.logits)
        return logits

    want = [alone(*both) for both in zip(models, caches(), strict=True)]
    pasts, got = caches(), [[], [], []]
    for piece in (ids[:, :40], *ids[:, 40:].split(1, 1)):
        for i, model in enumerate(models):
            out = forward(model, piece, pasts[i])
            pasts[i] = returned_cache(out)
            got[i].append(out.logits)
    for a, b in zip(want, got, strict=True):
        assert all(map(torch.equal, a, b))


class Raises(LogitsProcessor):
    """A user's hook in generate() that raises when it is called for the n-th time."""

    def __init__(self, at, error):
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, ids, scores):
        self.calls += 1
        if self.calls == self.at:
            raise self.error("of the user's")
        return scores


def test_a_hook_of_generate_that_raises_leaves_whole_steps(ready, subtests):
    """After the prompt, and after a step: its tokens are in the cache, and the next call goes on from it."""
    ids = tokens(40)
    want = ready.generate(ids, max_new_tokens=6, do_sample=False)
    for kind, at, error in (
        ("growing", 1, KeyboardInterrupt),
        ("fixed", 4, ValueError),
        (None, 4, MemoryError),
    ):
        with subtests.test(kind=kind):
            cache = made(ready, kind) if kind else None
            options = {"max_new_tokens": 6, "do_sample": False} | ({"past_key_values": cache} if kind else {})
            with pytest.raises(error, match="of the user's"):
                ready.generate(ids, logits_processor=[Raises(at, error)], **options)
            if cache is None:
                assert torch.equal(ready.generate(ids, **options), want)
                continue
            assert cache.get_seq_length() == 39 + at
            options["max_new_tokens"] = 6 - at
            assert torch.equal(ready.generate(want[:, : 40 + at], **options), want)


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_a_hook_between_layers_that_raises(kind):
    """The model is traced in pieces then: the layers before the hook have had their token."""
    model = tiny_llama()
    kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 2, **PLAN), inner="eager", fullgraph=False)
    raised = []

    @torch._dynamo.disable
    def hook(*_):
        if raised:
            raise raised.pop()("of the user's")

    model.model.layers[1].register_forward_pre_hook(hook)
    ids, cache, again = tokens(44), made(model, kind), made(model, kind)
    for i in (0, 40, 41):
        piece, error = (ids[:, i : i + 1], MemoryError) if i else (ids[:, :40], KeyboardInterrupt)
        raised.append(error)
        with pytest.raises(error, match="of the user's"):
            forward(model, piece, cache)
        assert cache.get_seq_length() == again.get_seq_length() == i
        if i:
            assert all(map(torch.equal, reads(cache), reads(again)))
        got, want = (forward(model, piece, past).logits for past in (cache, again))
        assert torch.equal(got, want)


def test_states_that_a_step_changed_in_place_are_not_taken_for_those_before_it(ready):
    cache = made(ready, "growing")
    cache.layers.append(LinearAttentionLayer())
    with torch.no_grad():
        cache.layers[2].update_conv_state(torch.ones(1, 4, 4))
    with fails(2, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        forward(ready, tokens(), cache)
    with pytest.raises(
        errors.CacheMutationError, match=r"linear attention had changed: call cache\.reset\(\)"
    ):
        forward(ready, tokens(), cache)
    cache.reset()
    assert torch.equal(
        forward(ready, tokens(), cache).logits, forward(ready, tokens(), made(ready, "growing")).logits
    )
