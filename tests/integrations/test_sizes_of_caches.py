"""What a plan says that a cache takes is what a cache of that model allocates."""

from __future__ import annotations

import pytest
import torch
import transformers

from kvmix_fx import KVMixCache, KVPlan
from kvmix_fx.cache import QuantizedKVTensor

MODELS = {
    "full": ("LlamaConfig", {}),
    "windows": ("MistralConfig", {"sliding_window": 200}),
    "windows and full": ("GptOssConfig", {"sliding_window": 200, "num_hidden_layers": 4}),
    "a window that stays raw": ("MistralConfig", {"sliding_window": 40}),
    "heads of two sizes": ("Gemma4TextConfig", {"num_hidden_layers": 6, "sliding_window": 200}),
    "shared caches": ("Gemma3nTextConfig", {"num_hidden_layers": 10, "num_kv_shared_layers": 5}),
    "latents": ("DeepseekV3Config", {}),
    "layers without a cache": ("Qwen3NextConfig", {"num_hidden_layers": 8}),
}


def nbytes(x):
    return x.packed_nbytes if isinstance(x, QuantizedKVTensor) else x.numel() * x.element_size()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [100, 700])
def test_a_growing_cache_takes_what_the_plan_says(name, length):
    kind, options = MODELS[name]
    config = getattr(transformers, kind)(**{"num_hidden_layers": 2, **options})
    plan = KVPlan.uniform(config, 4, 2, window=16)
    cache = KVMixCache(plan, config)
    total = 0
    for index, layer in enumerate(cache.layers):
        sizes = plan.geometry.layer(index)
        if not sizes.num_kv_heads:
            assert not isinstance(layer, transformers.DynamicLayer)
            continue
        keys, values = (
            torch.randn(1, sizes.num_kv_heads, length, n, dtype=torch.float16)
            for n in (sizes.head_dim, sizes.value_dim)
        )
        # one more token lets go of what the window has left
        layer.update(keys[:, :, :-1], values[:, :, :-1])
        layer.update(keys[:, :, -1:], values[:, :, -1:])
        assert layer.get_seq_length() == length
        total += nbytes(layer.keys) + nbytes(layer.values)
    assert plan.nbytes(1, length) == total


def test_a_cache_of_an_encoder_and_a_decoder_counts_both():
    config = transformers.BartConfig(d_model=128, decoder_layers=2, decoder_attention_heads=4)
    plan = KVPlan.uniform(config, 4, 2, window=16)
    alone = KVPlan.uniform(
        transformers.LlamaConfig(hidden_size=128, num_attention_heads=4, num_hidden_layers=2), 4, 2, window=16
    )
    assert plan.nbytes(3, 500) == 2 * alone.nbytes(3, 500)
    assert plan.nbytes(3, 500, source_length=90) == alone.nbytes(3, 500) + alone.nbytes(3, 90)
    assert plan.bytes_per_token == alone.bytes_per_token
