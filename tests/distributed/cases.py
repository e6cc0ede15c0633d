"""What is run alike on one process and on several: models, plans, and ways of filling a cache."""

from __future__ import annotations

from functools import partial

import torch

import kvmix_fx
from kvmix_fx.cache.sizes import cache_size
from kvmix_fx.integrations.transformers import KVMixStaticCache
from kvmix_fx.plan import QuantSpec
from kvmix_fx.plan.prices import Menu
from kvmix_fx.profiling.measure import known_signals
from kvmix_fx.testing.models import tiny_llama
from kvmix_fx.testing.smollm2 import smollm2_config

PROMPT, NEW = 70, 30
CACHES = ("growing", "fixed")


def llama():
    """8 query heads, 4 KV heads of 16 channels, 2 layers."""
    return tiny_llama(num_attention_heads=8, num_key_value_heads=4, head_dim=16)


def smollm2():
    """The first two layers of SmolLM2's architecture: 9 query heads, 3 KV heads of 64 channels."""
    from transformers import LlamaForCausalLM

    config = smollm2_config()
    config.num_hidden_layers = 2
    config.eos_token_id, config.vocab_size = None, 384
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


MODELS = {"llama": llama, "smollm2": smollm2}

PLANS = {
    "8 bits": partial(kvmix_fx.KVPlan.uniform, key_bits=8, value_bits=8, group_size=16, window=8),
    "2 bits": partial(kvmix_fx.KVPlan.uniform, key_bits=2, value_bits=2, group_size=16, window=8),
    "4 and 2 bits, a sink, a layer at 16 bits": lambda model: kvmix_fx.KVPlan.uniform(
        model, 4, 2, group_size=16, window=8, sink_length=4
    ).with_layers([0], key=16, value=16),
}


def padded(rows):
    """Token ids and mask [rows, PROMPT]; of several rows, the first is padded on the left."""
    ids = torch.randint(1, 120, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    if rows > 1:
        ids[0, :9] = mask[0, :9] = 0
    return ids, mask


def generated(model, cache, rows, **settings):
    """Tokens and the logits they were chosen from; the cache."""
    ids, mask = padded(rows)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **cache, **settings,
    )  # fmt: skip
    return {"tokens": out.sequences, "logits": torch.stack(out.logits)}, out.past_key_values


def run(model, plan, cache, beams):
    """What one plan and one kind of cache are tried with: tensors by name, and facts."""
    plain = {}
    if beams:
        plain["2 rows, 2 beams"], _ = generated(model, {}, 2, num_beams=2)
    kvmix_fx.compile(model, plan)
    how = {"cache_implementation": "dynamic" if cache == "growing" else "static"}
    if plan.layers[0].is_raw:
        # as an object of ours
        how = {"past_key_values": KVMixStaticCache(plan, model.config, PROMPT + NEW)}
    found = {}
    found["3 rows, left padding"], past = generated(model, how, 3)
    if beams:
        found["2 rows, 2 beams"], _ = generated(model, how, 2, num_beams=2)
    report = kvmix_fx.compiled(model).report
    facts = {
        "layers": report.rewritten_layers(),
        "heads": past.layers[-1].keys.shape[1],
        "nbytes": cache_size(past)[0],
        "length": past.layers[-1].max_cache_len if cache == "fixed" else past.get_seq_length(),
    }
    return {"runs": found, "plain": plain, "facts": facts}


def profiled(model):
    """Every signal, on made-up text."""
    ids = torch.randint(1, 120, (3, 136), generator=torch.Generator().manual_seed(5))
    menu = Menu(
        tuple(QuantSpec(bits, "channel", 16) for bits in (2, 4)),
        tuple(QuantSpec(bits, "token", 16) for bits in (2, 4)),
    )
    return kvmix_fx.profile(model, ids, signals=known_signals(), menu=menu, length=136, progress=False)


def numbers(profile):
    """All scores and prices of a profile by signal, [layers, ...] of keys and of values."""
    return {
        name: [torch.tensor(table, dtype=torch.float64) for table in (found.keys, found.values)]
        for name in profile.signals
        for found in (profile.signal(name),)
    }
