"""Sizes that fit: the search for them, and caches that were filled without a prefill."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import kvmix_fx
from benchmarks.e2e import capacity
from benchmarks.e2e.capacity import Case, Tried
from benchmarks.rows import load, make_row, save
from kvmix_fx import KVPlan
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.integrations.transformers import KVMixStaticCache
from kvmix_fx.runtime import recording
from kvmix_fx.testing.models import tiny_llama

CONTEXT = 75
STEPS = 4


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def plan(model):
    return KVPlan.uniform(model, 2, 3, group_size=16, window=8).with_layers([0], key=16, value=16)


def logits(model, cache, rows, steps=STEPS):
    tokens = torch.arange(rows * steps).view(rows, steps) % 100 + 1
    with torch.no_grad():
        return torch.cat(
            [model(input_ids=tokens[:, i : i + 1], past_key_values=cache).logits for i in range(steps)], 1
        )


def prefilled(model, plan, rows):
    cache = KVMixStaticCache(plan, model.config, CONTEXT + capacity.ROOM)
    ids = torch.arange(rows * CONTEXT).view(rows, CONTEXT) % 100 + 1
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("rows", [1, 3])
def test_a_filled_cache_is_like_one_after_a_prompt(model, plan, rows):
    kvmix_fx.compile(model, plan, inner="eager")
    prompted = prefilled(model, plan, rows)
    filled, other = (capacity.filled_packed(model, plan, rows, CONTEXT) for _ in range(2))
    assert filled.full_rows == prompted.full_rows
    for mine, theirs in zip(filled.layers, prompted.layers, strict=True):
        assert (mine.host_length, mine.has_tokens) == (theirs.host_length, theirs.has_tokens)
        assert mine.cumulative_length == theirs.cumulative_length
        for name in ("keys", "values"):
            getattr(mine, name).copy_(getattr(theirs, name))
    want = logits(model, prompted, rows)
    graphs = len(kvmix_fx.compiled(model).report.graphs)
    assert torch.equal(logits(model, filled, rows), want)
    assert len(kvmix_fx.compiled(model).report.graphs) == graphs
    assert (logits(model, other, rows) - want).abs().max() > 0.1


@pytest.mark.parametrize("rows", [1, 3])
def test_random_contents_are_attended_to(model, plan, rows):
    """Against the model itself on the same tokens at full precision."""
    cache = capacity.filled_packed(model, plan, rows, CONTEXT)
    plain, short = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        keys, values = (
            (t.dequantize() if isinstance(t, QuantizedKVTensor) else t)[:, :, :CONTEXT]
            for t in (layer.keys, layer.values)
        )
        plain.update(keys, values, i)
        short.update(keys[:, :, 1:], values[:, :, 1:], i)
    want, control = logits(model, plain, rows, 1), logits(model, short, rows, 1)
    kvmix_fx.compile(model, plan, inner="eager")
    torch.testing.assert_close(logits(model, cache, rows, 1), want, atol=1e-4, rtol=1e-4)
    assert (control - want).abs().max() > 1e-2


@pytest.mark.parametrize("fill", [capacity.filled_static, capacity.filled_dynamic])
def test_filled_plain_caches(model, fill):
    cache = fill(model, 3, CONTEXT)
    copy = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        copy.update(layer.keys[:, :, :CONTEXT].clone(), layer.values[:, :, :CONTEXT].clone(), i)
    assert int(cache.get_seq_length()) == CONTEXT
    torch.testing.assert_close(logits(model, cache, 3), logits(model, copy, 3))
    assert (logits(model, fill(model, 3, CONTEXT), 3) - logits(model, copy, 3)).abs().max() > 0.1


@pytest.mark.parametrize(("told", "graphs"), [(True, 1), (False, 2)])
def test_one_graph_serves_all_batch_sizes(model, told, graphs):
    plan = KVPlan.uniform(model, 2, 3, group_size=16, window=8)
    kvmix_fx.compile(model, plan, inner="eager")
    for rows, context in ((5, 64), (3, 64), (8, 128)):
        cache, tokens = capacity.filled_packed(model, plan, rows, context), torch.ones(rows, 1).long()
        if told and rows == 5:
            capacity.any_batch(cache, tokens)
        capacity.decode(model, cache, tokens, 1)
    assert len(kvmix_fx.compiled(model).report.graphs) == graphs


@pytest.fixture(autouse=True)
def _no_device(monkeypatch):
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)


@pytest.mark.parametrize("limit", [1, 2, 9, 10, 57, 1000])
@pytest.mark.parametrize("predicted", [1, 9, 10, 60, 1024])
@pytest.mark.parametrize("stride", [1, 3, 10])
def test_search_ends_at_the_limit(limit, predicted, stride):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    good, bad = capacity.largest(fits, predicted, stride)
    assert (good, bad) == (limit // stride * stride, (limit // stride + 1) * stride)
    assert len(tried) == len(set(tried)) <= 2 + 2 * len(f"{max(limit, predicted):b}")


def test_a_linear_peak_needs_few_tries():
    tried = []

    def attempt(size, steps):
        tried.append(size)
        peak = 1000 + 7 * size
        return Tried(size, [0.1] * steps, peak, 7 * size) if peak <= 100_000 else "out of memory"

    found, bad, reason = capacity.search(attempt, 9000, 100_000, 1, 0.01)
    assert found is not None
    assert found.size <= (100_000 - 1000) // 7 < bad <= 1.011 * found.size
    assert reason == "out of memory"
    assert len(tried) <= 5
    nothing, bad, reason = capacity.search(lambda *_: "no", 9000, 100_000, 1, 0.01)
    assert (nothing, reason) == (None, "no")
    assert bad <= 90


def test_what_fails_is_said(model):
    case = Case.parse("b1")

    def make(batch, context):
        if context > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        raise RuntimeError("invalid configuration argument")

    assert capacity.attempt(model, make, case, 200, 2) == "out of memory"
    assert "invalid configuration" in capacity.attempt(model, make, case, 50, 2)


def test_a_size_whose_steps_cannot_be_recorded_does_not_fit(monkeypatch, model, plan):
    """And costs no later size its recording."""
    recorded = []

    def record(run, inputs):
        recorded.append(inputs)
        if len(recorded) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return recording.Recording(run(*inputs), lambda: None)

    monkeypatch.setattr(recording, "REPLAY_DEVICES", ("cpu",))
    monkeypatch.setattr(recording, "record_cuda", record)
    kvmix_fx.compile(model, plan, inner="eager")

    def attempt(size):
        def make(batch, context):
            return capacity.filled_packed(model, plan, batch, context)

        return capacity.attempt(model, make, Case.parse("b1"), size, capacity.PROBE_STEPS)

    assert attempt(64) == "out of memory"
    fitted = attempt(48)
    assert isinstance(fitted, Tried)
    assert fitted.cache == plan.nbytes(1, 48 + capacity.ROOM, cache="fixed", itemsize=4)
    assert len(recorded) == 2


def test_weights_can_be_lent(model):
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    capacity.give_memory_away(model)
    assert all(parameter.untyped_storage().nbytes() == 0 for parameter in model.parameters())
    capacity.take_memory_back(model)
    after = model(ids).logits
    assert after.isfinite().all()
    assert after.shape == before.shape


def test_sizes_are_compared_in_any_order(tmp_path):
    rows = [
        make_row("generate", "c", provider, "largest_batch", value, "rows")
        for provider, value in (("kvmix a", 30), ("transformers static", 8), ("transformers dynamic", 10))
    ]
    for row in rows:
        save([row], tmp_path)
        capacity.compare("c", "largest_batch", tmp_path)
    found = {row.provider: row for row in load("generate", folder=tmp_path)}
    assert (found["kvmix a"].baseline, found["kvmix a"].ratio) == ("transformers dynamic", 3)
    assert found["transformers dynamic"].ratio is None


def test_cases():
    long, many = Case.parse("b2"), Case.parse("n8192")
    assert (long.shape(4096), many.shape(17)) == ((2, 4096), (17, 8192))
    assert long.name("m", 80) == "m b2 longest in 80 GB"
    assert many.name("m", 80) == "m n8192 largest batch in 80 GB"
    for text in ("x3", "b0", "bb"):
        with pytest.raises(ValueError):
            Case.parse(text)
