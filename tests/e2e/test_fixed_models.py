"""Caches of fixed capacity of models whose layers are not all alike, or that are traced in pieces."""

from __future__ import annotations

import pytest
import torch

import kvmix_fx
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.errors import CacheShapeError, GraphBreakWarning
from kvmix_fx.integrations.transformers.layers import KVMixHybridLayer, KVMixStaticLayer
from kvmix_fx.plan import KVPlan
from kvmix_fx.testing.models import MOE, tiny_architecture, tiny_llama

PROMPT, PADDING = 72, 11


def tokens():
    ids = torch.randint(5, 75, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :PADDING], mask[0, :PADDING] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model):
    with torch.no_grad():
        return model.generate(
            **tokens(), max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True,
            use_cache=True, cache_implementation="static",
        )  # fmt: skip


def difference(out, plain):
    """Of the logits of all steps, in their standard deviations; another token makes it large, too."""
    return max(float((a - b).abs().max() / b.std()) for a, b in zip(out.logits, plain.logits, strict=True))


def nbytes(x):
    return x.packed_nbytes if isinstance(x, QuantizedKVTensor) else x.numel() * x.element_size()


def checked(model, bits=(8, 2)):
    """Caches and reports of a model under plans of 8 bits, which must not show, and of 2, which must."""
    plain = generated(model)
    found = []
    for width in bits:
        plan = KVPlan.uniform(model, width, width, group_size=16, window=8)
        kvmix_fx.compile(model, plan, inner="eager")
        out = generated(model)
        off = difference(out, plain)
        assert (off < 0.02) == (width == 8), off
        cache = kvmix_fx.returned_cache(out)
        held = sum(nbytes(t) for layer in cache.layers for t in (layer.keys, layer.values))
        plan = kvmix_fx.compiled(model).plan
        assert held == plan.nbytes(2, PROMPT + 2, itemsize=4, cache="fixed")
        found.append((cache, kvmix_fx.compiled(model).report))
    kvmix_fx.restore(model)
    return found


MIMO = MOE | {
    "n_routed_experts": 4, "layer_types": ["full_attention", "sliding_attention"], "v_head_dim": 32,
    "mlp_layer_types": ["dense", "dense"], "sliding_window": 96,
}  # fmt: skip


def test_layers_may_have_different_numbers_of_kv_heads():
    model = tiny_architecture("MiMoV2FlashConfig", MIMO, "eager")
    for cache, report in checked(model):
        assert [layer.keys.shape[1] for layer in cache.layers] == [2, 4]
        assert {type(layer) for layer in cache.layers} == {KVMixStaticLayer}
        assert {site.action for site in report.sites} == {"packed append", "packed attention"}


def zaya(window):
    types = {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": window}
    return tiny_architecture("ZayaConfig", types | {"num_experts": 2, "num_experts_per_tok": 1})


def test_layers_with_states_are_packed_with_their_windows():
    """The masks have names of the model's own."""
    for cache, report in checked(zaya(96)):
        assert {type(layer) for layer in cache.layers} == {KVMixHybridLayer}
        assert {site.action for site in report.sites} == {"packed append", "packed attention"}


def test_windows_that_stay_plain_keep_the_mask_of_a_plain_cache():
    ((cache, report),) = checked(zaya(16), bits=(8,))
    assert [type(layer) is KVMixHybridLayer for layer in cache.layers] == [True, False]
    assert {site.layer for site in report.sites if site.action == "packed attention"} == {0}


def test_a_model_that_is_traced_in_pieces_between_writing_and_reading():
    model = tiny_architecture("MptConfig", {"d_model": 128, "n_heads": 4, "n_layers": 1}, "eager")
    with pytest.warns(GraphBreakWarning):
        found = checked(model)
    for cache, report in found:
        assert {type(layer) for layer in cache.layers} == {KVMixStaticLayer}
        assert {site.idiom for site in report.sites} == {"index_copy_", "read"}


class ReadsAhead(torch.nn.Module):
    """A layer that looks at what it has cached in a graph of its own, before it writes to it."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.held = layer, []

    @torch._dynamo.disable
    def note(self, keys):
        if isinstance(keys, QuantizedKVTensor):
            self.held.append(keys.stored_tokens())

    def forward(self, hidden, **kwargs):
        torch._dynamo.graph_break()
        # its name depends on the release of transformers
        cached = kwargs.get("cache", kwargs.get("past_key_values")).layers[1]
        if cached.is_initialized:
            self.note(cached.keys)
            # of the row without padding
            hidden = hidden + (cached.keys[1, 0] != 0).any(1).sum() % 5
        torch._dynamo.graph_break()
        return self.layer(hidden, **kwargs)


def test_a_layer_that_is_read_before_it_is_written_while_others_have_been():
    """All layers of a cache share a counter unless the model is traced in pieces."""
    model = tiny_llama()
    model.model.layers[1] = ReadsAhead(model.model.layers[1])
    with pytest.warns(GraphBreakWarning):
        ((cache, report),) = checked(model, bits=(8,))
    assert model.model.layers[1].held == [0, PROMPT, PROMPT + 1]
    assert len({id(layer.keys.live) for layer in cache.layers}) == 2
    assert "read" in {site.idiom for site in report.sites}


def test_heads_that_no_configuration_tells_are_refused_before_anything_is_written():
    model = tiny_architecture("MiMoV2FlashConfig", MIMO, "eager")
    plain = generated(model)
    for layer in model.model.layers:
        del layer.self_attn.num_key_value_groups  # nothing else tells
    plan = KVPlan.uniform(model, 8, window=8)
    kvmix_fx.compile(model, plan, inner="eager")
    for layer in model.model.layers:
        layer.self_attn.num_key_value_groups = 2 - layer.self_attn.layer_idx
    with pytest.raises(CacheShapeError, match=r"computes 4 KV heads of 32 .* for 2 of 32.*a growing cache"):
        generated(model)
    with torch.no_grad():
        out = model.generate(
            **tokens(), max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert difference(out, plain) < 0.1
