"""Which layers of a StaticCache are exchanged for packed ones, and with what they hold."""

from __future__ import annotations

import pytest
import torch
from transformers import FalconH1Config, MistralConfig, StaticCache, ZayaConfig
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    StaticIndexedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.integrations.transformers import KVMixStaticCache
from kvmix_fx.integrations.transformers.caches import let_grow, pack_static_layers
from kvmix_fx.integrations.transformers.layers import (
    INDEXED_LATENTS,
    KVMixHybridLayer,
    KVMixIndexedLayer,
    KVMixStaticLayer,
)
from kvmix_fx.plan import KVPlan
from kvmix_fx.testing.models import TINY

WINDOW = 512


def mistral(window=WINDOW):
    return MistralConfig(**TINY | {"sliding_window": window})


def plan(config, bits=4):
    return KVPlan.uniform(config, bits, window=8).for_model(config)


def tokens(n, seed=0):
    return torch.randn(2, 2, n, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("capacity", "bits", "packed"),
    [(300, 8, True), (512, 8, True), (700, 8, True), (2000, 8, False), (2000, 2, True), (9000, 2, False)],
)
def test_windows_are_packed_where_the_whole_capacity_takes_less(capacity, bits, packed):
    config = mistral()
    cache = KVMixStaticCache(plan(config, bits), config, capacity)
    kinds = {type(layer) for layer in cache.layers}
    assert kinds == {KVMixStaticLayer if packed else StaticSlidingWindowLayer}
    assert all(cache.is_sliding)
    if packed:
        assert {layer.max_cache_len for layer in cache.layers} == {capacity}
        keys = torch.zeros(1, 2, 3, 32, dtype=torch.float16)
        for layer in cache.layers:
            layer.update(keys, keys)
        allocated = sum(t.packed_nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        assert allocated == cache.plan.nbytes(1, capacity, cache="fixed")
        assert allocated < plan(mistral(None), 16).nbytes(1, min(capacity, WINDOW), cache="fixed")


def test_a_capacity_that_only_windows_tell_is_not_guessed():
    """A cache for 512 tokens and one for 10000 have the same layers."""
    config = mistral()
    for capacity, packed in ((511, True), (512, False), (10000, False)):
        cache = StaticCache(config, max_cache_len=capacity)
        pack_static_layers(cache, plan(config))
        assert isinstance(cache.layers[0], KVMixStaticLayer) == packed


def test_windows_share_a_mask_so_all_or_none_are_exchanged():
    config = mistral()
    mixed = plan(config, 2).with_layers("0", key=16, value=16)
    for capacity, exchanged in ((500, True), (600, False)):
        cache = KVMixStaticCache(mixed, config, capacity)
        kinds = [isinstance(layer, StaticSlidingWindowLayer) for layer in cache.layers]
        assert kinds == [not exchanged] * 2


@pytest.mark.parametrize("bits", [8, 16])
def test_windows_with_states_besides_are_exchanged_if_all_of_them_are_packed(bits):
    """They share a mask, and no plain layer of ours has states."""
    types = ["hybrid_sliding", "hybrid", "hybrid_sliding"]
    config = ZayaConfig(
        **TINY | {"num_hidden_layers": 3, "layer_types": types, "sliding_window": 96}, num_experts=2
    )
    mixed = plan(config, 8).with_layers("2", key=bits, value=bits)
    cache = StaticCache(config, max_cache_len=90)
    states = torch.ones(2, 3, 4)
    cache.layers[0].update_conv_state(states)
    pack_static_layers(cache, mixed, 90)
    kinds = [type(layer) is KVMixHybridLayer for layer in cache.layers]
    assert kinds == [bits == 8, True, bits == 8]
    assert cache.is_sliding == [True, False, True]
    assert cache.layers[0].conv_states[0].equal(states)
    assert cache.layers[0].max_cache_len == 90


def test_tokens_that_a_window_holds_are_kept_unless_some_have_left():
    config = mistral(64)
    for stored, exchanged in ((50, True), (70, False)):
        cache = StaticCache(config, max_cache_len=72 if stored == 70 else 60)
        for index in range(2):
            cache.update(tokens(stored), tokens(stored, 1), index)
        pack_static_layers(cache, plan(config, 8), 72 if stored == 70 else 60)
        layer = cache.layers[0]
        assert isinstance(layer, KVMixStaticLayer) == exchanged
        if exchanged:
            assert int(layer.cumulative_length) == layer.host_length == stored
            assert isinstance(layer.keys, QuantizedKVTensor)
            assert (layer.keys.dequantize()[:, :, :stored] - tokens(stored)).abs().max() < 0.05


def test_a_count_is_as_much_of_a_copy_as_that_of_the_layer_in_whose_place_it_is():
    """Models compute positions from what they have asked before a write, some of them behind it."""
    config = mistral(None)
    for window in (False, True):
        own = StaticSlidingWindowLayer(80, 80) if window else StaticLayer(80)
        ours = KVMixStaticLayer(80, plan(config).layers[0])
        ours.is_sliding = window
        counts = []
        for layer in (own, ours):
            layer.update(tokens(70), tokens(70))
            counts.append(layer.get_seq_length())
            layer.update(tokens(1), tokens(1))
        assert int(counts[0]) == int(counts[1])
        assert int(ours.get_seq_length()) == 71
        assert int(counts[1]) == 70 or not window


def test_layers_with_states_keep_them_beside_packed_tokens():
    config = FalconH1Config(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, intermediate_size=64, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16,
    )  # fmt: skip
    cache = StaticCache(config, max_cache_len=80)
    states = torch.ones(2, 3, 4)
    cache.layers[0].update_conv_state(states)
    pack_static_layers(cache, plan(config, 8))
    layer = cache.layers[0]
    assert isinstance(layer, KVMixHybridLayer)
    assert layer.conv_states[0].equal(states)
    keys, _ = layer.update(tokens(70), tokens(70, 1))
    assert keys.equal(tokens(70))
    assert (layer.keys.dequantize()[:, :, :70] - tokens(70)).abs().max() < 0.05
    layer.reset()
    assert not layer.has_tokens
    assert not layer.conv_states[0].any()
    assert "is_conv_states_initialized" in vars(layer)


@pytest.mark.skipif(not INDEXED_LATENTS, reason="this transformers caches no latents there")
def test_layers_of_sparse_attention_keep_the_keys_of_their_indexer():
    cache = Cache(layers=[StaticIndexedLayer(max_cache_len=80)])
    pack_static_layers(cache, KVPlan.uniform(1, 8, window=8))
    layer = cache.layers[0]
    assert isinstance(layer, KVMixIndexedLayer)
    first, more = tokens(70)[:, 0], tokens(3, 1)[:, 0]
    layer.update(tokens(70), tokens(70, 1))
    layer.host_length = 70
    # as with keys and values, a first step has its own tokens alone
    assert layer.update_indexer(first).equal(first)
    stored = layer.update_indexer(more)
    assert stored[:, :73].equal(torch.cat([first, more], 1))
    assert stored.shape[1] == 80
    layer.take_back(3)
    layer.enlarge(96)
    again = layer.update_indexer(2 * more)
    assert again[:, :73].equal(torch.cat([first, 2 * more], 1))
    assert again.shape[1] == 96
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.indexer_keys[0].equal(again[1])
    layer.reset()
    assert not layer.indexer_keys.any()
    assert layer.update_indexer(more).equal(more)


def test_layers_that_are_filled_once_grow():
    cache = StaticCache(mistral(None), max_cache_len=20)
    cache.update(tokens(9), tokens(9), 0)
    let_grow(cache)
    assert [type(layer) is DynamicLayer for layer in cache.layers] == [False, True]
