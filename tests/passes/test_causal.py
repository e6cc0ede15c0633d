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
    n = torch.arange(x.shape[2])
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


@pytest.mark.parametrize("kwargs", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("pad", [0, 5])
def test_prefill_of_a_model(kwargs, pad):
    """Unpadded prompts are attended to without a mask; padded ones keep theirs."""
    model = tiny_llama()
    calls = []

    def inner(gm, _inputs):
        calls.append([(call.mask is None, bool(call.is_causal)) for call in find_attention(gm.graph)])
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
