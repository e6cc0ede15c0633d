"""Sites of layers with a token tier: what they become, and what the report says where they cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvmix_fx
from kvmix_fx.backend import KVMixBackend
from kvmix_fx.cache import QuantizedKVTensor, tiers
from kvmix_fx.passes.manager import NO_PROMPT, NOT_COUNTED
from kvmix_fx.passes.sites import LEAVE, STORAGE
from kvmix_fx.plan import TokenTier
from kvmix_fx.testing.graphs import RecordingBackend, count_ops
from kvmix_fx.testing.models import PositionCacheModel
from kvmix_kernels import ops
from kvmix_kernels.tokens import ops as token_ops

TIER = TokenTier(0.25, recent=0.0)
PLAN = kvmix_fx.KVPlan.uniform(1, 2, 2, window=8).with_layers("all", token_tier=TIER)


def test_attention_that_stays_reads_both_tiers_and_says_that_nothing_is_counted():
    x = torch.randn(3, 2, 2, 100, 32)
    past = tiers.pack(x[0], x[1], PLAN.layers[0].formats(32), torch.randn(2, 4, 100, 32))
    q, k, v = torch.randn(2, 2, 1, 32), torch.randn(2, 2, 1, 32), torch.randn(2, 2, 1, 32)

    def decode(q, k, v, past_k, past_v):
        full_k, full_v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        # dropout keeps it from being replaced; at this rate it does nothing
        return sdpa(q, full_k, full_v, dropout_p=1e-30), full_k, full_v

    recorder = RecordingBackend()
    backend = KVMixBackend(PLAN, recorder)
    with torch.no_grad():
        out, new_k, new_v = torch.compile(decode, backend=backend, fullgraph=True)(q, k, v, *past)
    want = sdpa(q, *(torch.cat([t.dequantize(), new], 2) for t, new in zip(past, (k, v), strict=True)))
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-4)
    assert [t.shape[2] for t in (new_k, new_v)] == [101, 101]
    site = backend.report.sites[0]
    assert site.action == STORAGE
    assert site.reason.endswith(NOT_COUNTED)
    graph = recorder.graphs[0]
    counted = [
        count_ops(graph, op) for op in (token_ops.append_tiers_, token_ops.dequantize_tiers, ops.append_)
    ]
    assert counted == [1, 2, 0]


def test_buffers_of_the_model_stay_plain_and_the_report_says_why():
    model = PositionCacheModel().eval()
    plain = copy.deepcopy(model)
    plan = kvmix_fx.KVPlan.uniform(2, 2, 2, window=8).with_layers("all", token_tier=TIER)
    kvmix_fx.compile(model, plan, inner="eager", on_nothing="ignore")
    x = torch.randn(1, 60, 128)
    with torch.no_grad():
        torch.testing.assert_close(model(x, torch.arange(60)), plain(x, torch.arange(60)))
    assert not isinstance(model.k_cache_0, QuantizedKVTensor)
    sites = kvmix_fx.compiled(model).report.sites
    assert {(site.action, site.reason) for site in sites} == {(LEAVE, NO_PROMPT)}


@pytest.mark.parametrize(
    ("policy", "casts"), [("accumulated", False), ("accumulated", True), ("last", False), ("norm", False)]
)
def test_a_prompt_s_attention_tells_its_sums_if_queries_count_and_autocast_does_not(policy, casts):
    """An op of ours would not be cast for, and its result would be of another dtype."""
    plan = PLAN.with_layers("all", token_tier=TokenTier(0.25, policy=policy))
    tokens = torch.randn(3, 2, 2, 100, 32)

    def prompt(q, k, v):
        k, v = 2 * k, 2 * v
        return sdpa(q, k, v, is_causal=True), k, v

    recorder = RecordingBackend()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=casts):
        want = prompt(*tokens)[0]
        out, keys, _ = torch.compile(prompt, backend=KVMixBackend(plan, recorder), fullgraph=True)(*tokens)
    assert out.dtype == want.dtype
    torch.testing.assert_close(out, want)
    assert isinstance(keys, QuantizedKVTensor)
    assert count_ops(recorder.graphs[0], token_ops.attend_prompt) == (policy != "norm" and not casts)


def test_sums_that_a_cpu_would_find_apart_are_not_asked_for():
    """Where heads share keys its attention tells none."""
    q, x = torch.randn(2, 4, 100, 32), torch.randn(2, 2, 100, 32)

    def prompt(q, x):
        k, v = 2 * x, 3 * x
        return sdpa(q, k, v, is_causal=True, enable_gqa=True), k, v

    recorder = RecordingBackend()
    with torch.no_grad():
        out, keys, _ = torch.compile(prompt, backend=KVMixBackend(PLAN, recorder), fullgraph=True)(q, x)
    torch.testing.assert_close(out, prompt(q, x)[0])
    assert isinstance(keys, QuantizedKVTensor)
    assert count_ops(recorder.graphs[0], token_ops.attend_prompt) == 0
