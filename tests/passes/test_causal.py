"""Which masks are recognized as plain causal ones, and that nothing else is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kvmix_fx
from kvmix_fx.passes.causal import drop_causal_masks
from kvmix_fx.passes.find.attention import find_attention
from kvmix_fx.testing.models import tiny_llama


def attend(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def positions(x):
    n = torch.arange(x.shape[2], device=x.device)
    return n[None, None, :, None], n[None, None, None, :]


def causal(q, k, v):
    rows, columns = positions(q)
    return attend(q, k, v, (columns <= rows).expand(q.shape[0], -1, q.shape[2], q.shape[2]))


def window(q, k, v):
    rows, columns = positions(q)
    return attend(q, k, v, (columns <= rows) & (columns > rows - 4096))


def reversed_time(q, k, v):
    rows, columns = positions(q)
    return attend(q, k, v, rows <= columns)


def shifted(q, k, v):
    rows, columns = positions(q)
    return attend(q, k, v, columns <= rows + 1)


def padded(q, k, v):
    rows, columns = positions(q)
    return attend(q, k, v, (columns <= rows) & (q[:, :1, :, 0] > -9)[:, :, None])


def no_mask(q, k, v):
    return attend(q, k, v, None)


@pytest.mark.parametrize(
    ("function", "dropped"),
    [(causal, 1), (window, 0), (reversed_time, 0), (shifted, 0), (padded, 0), (no_mask, 0)],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_only_plain_causal_masks_are_dropped(function, dropped, dynamic):
    found, left = [], []

    def backend(gm, _inputs):
        found.append(drop_causal_masks(gm.graph))
        gm.recompile()
        left.append(sum(node.target is torch.arange for node in gm.graph.nodes))
        assert all(
            (call.mask is None) == bool(call.is_causal or function is no_mask)
            for call in find_attention(gm.graph)
        )
        return gm.forward

    q, k, v = (torch.randn(2, 2, 10, 16) for _ in range(3))
    if dynamic:
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 2)
    got = torch.compile(function, backend=backend)(q, k, v)
    torch.testing.assert_close(got, function(q, k, v))
    assert found == [dropped]
    assert dropped == 0 or left == [0]


def repeat(x, groups):
    B, H, L, D = x.shape
    return x[:, :, None].expand(B, H, groups, L, D).reshape(B, H * groups, L, D)


@pytest.mark.parametrize(
    ("function", "value_dim", "shared"), [(causal, 16, True), (causal, 24, False), (padded, 16, False)]
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_heads_are_not_repeated_where_nothing_needs_it(function, value_dim, shared, dynamic):
    """A mask makes models repeat heads; without it that is a copy of the whole prompt's keys and values."""
    left = []

    def grouped(q, k, v):
        return function(q, repeat(k, 3), repeat(v, 3)), k

    def backend(gm, _inputs):
        drop_causal_masks(gm.graph)
        gm.graph.lint()
        gm.recompile()
        left.append(sum(node.target in ("reshape", "expand") for node in gm.graph.nodes))
        assert [bool(call.node.kwargs.get("enable_gqa")) for call in find_attention(gm.graph)] == [shared]
        return gm.forward

    q, k, v = torch.randn(2, 6, 10, 16), torch.randn(2, 2, 10, 16), torch.randn(2, 2, 10, value_dim)
    if dynamic:
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 2)
    got, _ = torch.compile(grouped, backend=backend)(q, k, v)
    torch.testing.assert_close(got, grouped(q, k, v)[0])
    assert (left == [0]) == shared


@pytest.mark.parametrize(("dtype", "shared"), [(torch.bfloat16, True), (torch.float32, False)])
def test_heads_stay_repeated_where_an_accelerator_has_no_kernel_for_shared_ones(dtype, shared):
    found = []

    def backend(gm, _inputs):
        drop_causal_masks(gm.graph)
        found.extend(bool(call.node.kwargs.get("enable_gqa")) for call in find_attention(gm.graph))
        return gm.forward

    q, k = (torch.empty(2, heads, 10, 16, dtype=dtype, device="meta") for heads in (6, 2))
    torch.compile(lambda q, k, v: causal(q, repeat(k, 3), repeat(v, 3)), backend=backend)(q, k, k)
    assert found == [shared]


@pytest.mark.parametrize("kwargs", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("pad", [0, 5])
def test_prefill_of_a_model(kwargs, pad):
    """Unpadded prompts are attended to without a mask; padded ones keep theirs."""
    model = tiny_llama()
    calls, heads = [], []

    def inner(gm, _inputs):
        found = find_attention(gm.graph)
        calls.append([(call.mask is None, bool(call.is_causal)) for call in found])
        heads.append([call.key.meta["example_value"].shape[1] for call in found])
        return gm.forward

    ids = torch.randint(1, 60, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    settings = {
        "max_new_tokens": 3,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    want = model.generate(ids, attention_mask=mask, **settings).logits[0]
    kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 4, 4, group_size=16), inner=inner)
    got = model.generate(ids, attention_mask=mask, **settings, **kwargs).logits[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert calls[0] == [(not pad, not pad)] * 2
    config = model.config
    assert heads[0] == [config.num_attention_heads if pad else config.num_key_value_heads] * 2
