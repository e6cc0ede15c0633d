"""Threads, processes and several models: nobody's tokens get into another's cache."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LogitsProcessor

import kvmix_fx
from kvmix_fx import errors
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.cache import tensor as module
from kvmix_fx.contracts import cache_argument, returned_cache
from kvmix_fx.integrations.transformers import KVMixCache, KVMixStaticCache
from kvmix_fx.testing.models import tiny_llama
from kvmix_fx.testing.tensors import values
from kvmix_kernels import layout

PLAN = {"window": 8, "group_size": 16}


def compiled(bits, seed):
    model = tiny_llama(num_hidden_layers=1, seed=seed)
    return kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, bits, **PLAN), inner="eager")


def made(model, kind):
    plan = kvmix_fx.compiled(model).plan
    return KVMixCache(plan, model.config) if kind else KVMixStaticCache(plan, model.config, 128)


def run(model, ids, kind):
    """Logits of a prompt and 20 steps, with a cache of its own, and the cache."""
    torch.set_num_threads(1)
    past, logits = made(model, kind), []
    with torch.no_grad():
        for piece in (ids[:, :40], *ids[:, 40:].split(1, 1)):
            out = model(piece, use_cache=True, **cache_argument(model, past))
            past = returned_cache(out)
            logits.append(out.logits[:, -1])
    return torch.stack(logits), past


def tokens(seed):
    return torch.randint(1, 128, (1, 60), generator=torch.Generator().manual_seed(seed))


class Waits(LogitsProcessor):
    """Lets others go on in the middle of generate(), and waits for them."""

    def __init__(self):
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __call__(self, ids, scores):
        self.inside.set()
        assert self.go_on.wait(60)
        return scores


@pytest.fixture
def models():
    return compiled(2, 0), compiled(4, 1)


def test_four_threads_with_two_models_get_what_each_gets_alone(models):
    """Caches of both kinds; the first steps of all threads are traced at the same time."""
    jobs = [(model, tokens(i), i < 2) for i, model in enumerate(models * 2)]
    start = threading.Barrier(len(jobs))

    def job(model, ids, kind):
        start.wait()
        return run(model, ids, kind)

    with ThreadPoolExecutor(len(jobs)) as pool:
        got = list(pool.map(job, *zip(*jobs, strict=True)))
    # a thread that did not find what another had compiled would compile in every step
    assert all(len(kvmix_fx.compiled(model).report.graphs) <= 8 for model in models)
    for (logits, cache), args in zip(got, jobs, strict=True):
        want, again = run(*args)
        assert torch.equal(logits, want)
        assert isinstance(cache.layers[0].keys, QuantizedKVTensor)
        assert torch.equal(cache.layers[0].keys.dequantize(), again.layers[0].keys.dequantize())


def test_a_cache_of_two_threads_is_refused_and_goes_on_where_it_was(models):
    model, ids, waits = models[0], tokens(5), Waits()
    for kind in (False, True):
        cache, waits = made(model, kind), Waits()
        options = {"past_key_values": cache, "max_new_tokens": 5, "do_sample": False}
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(model.generate, ids, logits_processor=[waits], **options)
            assert waits.inside.wait(60)
            with torch.no_grad(), pytest.raises(errors.CacheSharedError, match="another thread"):
                model(ids[:, :1], use_cache=True, **cache_argument(model, cache))
            with pytest.raises(errors.CacheSharedError, match="a cache of its own"):
                model.generate(ids, **options)
            # one of its own is a matter of its own
            alone = model.generate(ids, max_new_tokens=5, do_sample=False)
            waits.go_on.set()
            assert torch.equal(first.result(), alone)
        assert cache.get_seq_length() == 64
        # afterwards any thread may have it
        more = model.generate(alone, **options)
        assert torch.equal(more[:, :65], alone)
        assert cache.get_seq_length() == 69


def test_threads_that_go_on_from_one_growing_tensor_copy_it(monkeypatch):
    """Each would write behind the last token that both have."""
    fmt = layout.make_format(2, "channel", 8, 8, 0, 8)
    x = values("normal", (1, 2, 60, 32), 0)
    start, both = QuantizedKVTensor.from_hp(x[:, :, :40], fmt), threading.Barrier(2)
    start = start.append(x[:, :, 40:41])  # with room behind it
    prepare = module.prepare_append

    def together(*args):
        ready = prepare(*args)
        both.wait(60)  # neither has written yet
        return ready

    monkeypatch.setattr(module, "prepare_append", together)
    new = [values("normal", (1, 2, 3, 32), seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(start.append, new))
    monkeypatch.undo()
    for t, added in zip(got, new, strict=True):
        assert torch.equal(t.dequantize(), start.append(added).dequantize())


def child(pipe, model, cache, ids):
    logits = run(model, ids, True)[0]
    with torch.no_grad():
        more = model(ids[:, :1], use_cache=True, **cache_argument(model, cache)).logits
    pipe.send((logits.tolist(), more.tolist()))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
def test_a_process_forked_after_compiling(models):
    """It has the compiled graphs and a cache of its own, and so has its parent."""
    model, ids = models[0], tokens(7)
    want, cache = run(model, ids, True)
    held = cache.layers[0].keys, cache.layers[0].values
    before = [t.dequantize() for t in held]
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs, model, cache, ids))
    process.start()
    assert mine.poll(120)
    logits, more = mine.recv()
    process.join(20)
    assert process.exitcode == 0
    assert logits == want.tolist()
    assert all(map(torch.equal, before, [t.dequantize() for t in held]))
    with torch.no_grad():
        again = model(ids[:, :1], use_cache=True, **cache_argument(model, cache)).logits
    assert more == again.tolist()
