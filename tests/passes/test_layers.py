"""Which layer of the plan a cache is: its place tells, however the model was traced."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attention

import kvmix_fx
from kvmix_fx.backend import KVMixBackend
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.passes.manager import UNKNOWN_LAYER
from kvmix_fx.passes.sites import ADOPT, LEAVE
from kvmix_fx.testing.models import tiny_llama


def ids(length=40):
    return torch.randint(1, 128, (2, length), generator=torch.Generator().manual_seed(1))


def mixed(layers=2):
    return kvmix_fx.KVPlan.uniform(layers, 8, window=0).with_layers("0", key=2, value=2)


def break_layers(model):
    """Break the graph inside every layer, as unsupported code there does."""
    for layer in model.model.layers:

        def forward(*args, forward=layer.forward, **kwargs):
            torch._dynamo.graph_break()
            return forward(*args, **kwargs)

        layer.forward = forward
    return model


def test_layers_traced_one_by_one_get_their_own_bits():
    model, whole = break_layers(tiny_llama()), tiny_llama()
    kvmix_fx.compile(model, mixed(), inner="eager", fullgraph=False)
    kvmix_fx.compile(whole, mixed(), inner="eager")
    logits = []
    for one in (model, whole, tiny_llama()):
        with torch.no_grad():
            past = one(ids(), use_cache=True).past_key_values
            logits.append(one(ids(1), past_key_values=past).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-4)
    assert (logits[2] - logits[1]).abs().max() > 1e-3
    sites = [site for site in kvmix_fx.compiled(model).report.sites if site.rewritten]
    assert [(s.layer, s.key_bits) for s in sites] == [(0, 2), (1, 8)] * 2


def test_explain_tells_layers_apart_where_graphs_break():
    report = kvmix_fx.explain(break_layers(tiny_llama()), ids(), mixed())
    assert [(s.layer, s.key_bits) for s in report.sites if s.recognized] == [(0, 2), (1, 8)] * 2


def test_an_encoder_decoder_with_two_numbers_in_its_paths():
    """T5: decoder.block.1.layer.0; both caches of a layer have its bits, and an encoder has no layer."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=128, d_model=64, d_kv=32, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    kvmix_fx.compile(model, mixed(), inner="eager")
    with torch.no_grad():
        past = model(ids(), decoder_input_ids=ids(20), use_cache=True).past_key_values
    for cache in (past.self_attention_cache, past.cross_attention_cache):
        assert [layer.keys.format.bits for layer in cache.layers] == [2, 8]
    sites = kvmix_fx.compiled(model).report.sites
    assert sorted((s.layer is None, s.layer) for s in sites if s.action == ADOPT) == [
        (False, 0),
        (False, 0),
        (False, 1),
        (False, 1),
    ]
    assert {s.layer for s in sites if s.action == LEAVE} <= {None}


class Tower(nn.Module):
    """Two layers that see and remember nothing, then two that cache what they saw, numbered from 0 both."""

    def __init__(self):
        super().__init__()
        self.see = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])
        self.say = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])

    def forward(self, x, past=None):
        for layer in self.see:
            y = layer(x)
            x = x + attention(y, y * 2, y * 3, is_causal=True)
        cache = []
        for layer in self.say:
            k, v = layer(x), layer(x * 2)
            cache.append((k, v))
            x = x + attention(x, k, v, is_causal=True)
        return x, cache


def test_layers_without_a_cache_are_no_layers_of_the_plan():
    model = Tower().eval()
    kvmix_fx.compile(model, mixed(), inner="eager")
    with torch.no_grad():
        _, cache = model(torch.randn(2, 2, 40, 32))
    assert [[t.format.bits for t in pair] for pair in cache] == [[2, 2], [8, 8]]
    assert [s.layer for s in kvmix_fx.compiled(model).report.sites] == [None, None, 0, 1]


def run(function, plan, *args):
    backend = KVMixBackend(plan, "eager")
    with torch.no_grad():
        return torch.compile(function, backend=backend)(*args), backend.report


class Store:
    """A cache with a list of keys and one of values."""

    def __init__(self):
        self.key_cache, self.value_cache = [None, None, None], [None, None, None]


class Slot:
    keys = values = None


def in_lists(store, i, k, v):
    store.key_cache[i], store.value_cache[i] = k, v


def in_slots(store, i, k, v):
    store["slots"][i].keys, store["slots"][i].values = k, v


def in_pairs(store, i, k, v):
    store[i] = (k, v)


@pytest.mark.parametrize(
    ("store", "put"),
    [
        (Store(), in_lists),
        ({"slots": [Slot(), Slot(), Slot()]}, in_slots),
        ([None, None, None], in_pairs),
    ],
)
def test_a_layer_that_is_traced_alone_is_known_by_where_it_stores(store, put):
    def layer(x, i):
        k, v = x * 2, x * 3
        put(store, i, k, v)
        return attention(x, k, v, is_causal=True)

    x = torch.randn(2, 2, 40, 32)
    for i in (2, 0):
        _, report = run(layer, mixed(3), x, i)
        assert [(s.layer, s.key_bits) for s in report.sites] == [(i, 8 if i else 2)]


def test_a_layer_of_which_nothing_tells_which_it_is_stays_plain_and_says_so():
    def layer(x):
        k, v = x * 2, x * 3
        return attention(x, k, v, is_causal=True), (k, v)

    x = torch.randn(2, 2, 40, 32)
    (_, (k, _)), report = run(layer, mixed(3), x)
    assert type(k) is torch.Tensor
    assert [(s.layer, s.action, s.reason) for s in report.sites] == [(None, LEAVE, UNKNOWN_LAYER)]
    # all layers alike: it can be any of them
    (_, (k, _)), report = run(layer, kvmix_fx.KVPlan.uniform(3, 4), x)
    assert isinstance(k, QuantizedKVTensor)
    assert [(s.layer, s.key_bits) for s in report.sites] == [(None, 4)]


def test_numbers_that_say_which_argument_it_is_are_no_layers():
    """One site of three: the cache is argument 3 of several, and the second result."""

    def layer(*args):
        x, past = args[0], args[3]
        k, v = torch.cat([past.keys, x], 2), torch.cat([past.values, x], 2)
        return x, attention(x, k, v), (k, v)

    past = Slot()
    past.keys = past.values = torch.randn(2, 2, 40, 32)
    _, report = run(layer, mixed(3), torch.randn(2, 2, 1, 32), 0, 0, past)
    assert [(s.layer, s.reason) for s in report.sites] == [(None, UNKNOWN_LAYER)]
