"""What tokens of a prompt get of its attention: the kernel, the PyTorch path and float64."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kvmix_kernels.importance.policy import EVERY_QUERY
from kvmix_kernels.layout import make_format, make_high, with_high
from kvmix_kernels.tokens import append, prompt, scores
from kvmix_kernels.tokens import ops as token_ops
from kvmix_kernels.triton import importance
from tests.depth import examples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = importance.Blocks(32, 16, 4, 1), importance.Blocks(16, 32, 4, 1)
"""Small enough that short prompts have many of them, and of two sizes."""
few = settings(max_examples=examples(20))


def exact(query, keys, mask, scale, softcap, queries, sink_logits=None):
    """Column sums in float64, all at once."""
    B, Hq, L, _ = query.shape
    found = query.double() @ keys.double().repeat_interleave(Hq // keys.shape[1], 1).mT * scale
    if softcap:
        found = softcap * torch.tanh(found / softcap)
    real = torch.ones(B, L, dtype=torch.bool, device=query.device)
    if mask is None:
        found = found.masked_fill(torch.ones_like(found, dtype=torch.bool).triu(1), -torch.inf)
    elif mask.dtype == torch.bool:
        found, real = found.masked_fill(~mask, -torch.inf), mask[:, 0, -1].expand(B, L)
    else:
        found = found + mask.double()
        real = (mask[:, 0, -1] > torch.finfo(mask.dtype).min / 2).expand(B, L)
    if sink_logits is not None:
        found = torch.cat([found, sink_logits.double().view(1, -1, 1, 1).expand(B, Hq, L, 1)], 3)
    weights = found.softmax(-1)[..., :L].nan_to_num(0) * real[:, None, :, None]
    if queries != EVERY_QUERY:
        weights[:, :, : max(0, L - queries)] = 0
    return weights.sum(2).unflatten(1, (keys.shape[1], -1)).sum(2)


def padded(kind, B, L, hidden, dtype):
    """A causal mask [B, 1, L, L] whose first row's first tokens are padding."""
    mask = torch.ones(L, L, dtype=torch.bool, device=DEVICE).tril().expand(B, 1, L, L).clone()
    mask[0, :, :, :hidden] = False
    if kind == "bool":
        return mask
    lowest = -torch.inf if kind == "infinite" else torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=DEVICE).masked_fill(~mask, lowest)


def drawn(B, Hkv, group, L, D, dtype, size=1.0):
    """Queries and keys of a prompt; the queries as models have them, transposed."""
    query = torch.randn(B, L, Hkv * group, D, device=DEVICE).mul(size).to(dtype).transpose(1, 2)
    return query, torch.randn(B, Hkv, L, D, device=DEVICE).mul(size).to(dtype)


def lost(query, keys, *rest):
    """(error of the kernel, of PyTorch in float32) against float64."""
    want = exact(query, keys, *rest)
    plain = scores.of_prompt(query.float(), keys.float(), *rest)
    found = importance.of_prompt(query, keys, *rest, None, *BLOCKS)
    assert found.shape == plain.shape
    assert found.dtype == torch.float32
    return (found - want).abs().max().item(), (plain - want).abs().max().item(), want.abs().max().item()


@few
@given(
    shape=st.tuples(st.integers(1, 2), st.sampled_from((1, 2)), st.sampled_from((1, 2, 3))),
    L=st.integers(1, 90),
    D=st.sampled_from((16, 64, 80, 96, 128, 256)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    softcap=st.sampled_from((0.0, 0.0, 5.0)),
    sinks=st.booleans(),
    kind=st.sampled_from((None, None, "bool", "infinite", "finite")),
    hidden=st.integers(0, 40),
    queries=st.sampled_from((EVERY_QUERY, EVERY_QUERY, 1, 32)),
    size=st.sampled_from((0.0, 1.0, 30.0)),
)
def test_the_kernel_loses_no_more_than_float32_does(
    shape, L, D, dtype, softcap, sinks, kind, hidden, queries, size
):
    query, keys = drawn(*shape, L, D, dtype, size)
    mask = None if kind is None else padded(kind, shape[0], L, min(hidden, L - 1), dtype)
    logits = torch.randn(query.shape[1], device=DEVICE) * 3 if sinks else None
    error, other, largest = lost(query, keys, mask, D**-0.5, softcap, queries, logits)
    # a log-sum-exp of scores of hundreds is rounded to 2^-16 of one, products a little worse by tensor cores
    reach = (query.float().norm(dim=3).max() * keys.float().norm(dim=3).max() * D**-0.5).item()
    assert error <= 4 * other + 2**-20 * (4 + reach) * (1 + largest)


@pytest.mark.parametrize(("L", "blocks"), [(150, (None, None)), (50, BLOCKS)])
def test_what_was_in_memory_does_not_matter_and_every_row_gives_one(L, blocks, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
    query, keys = drawn(1, 2, 3, L, 64, torch.bfloat16)
    for queries, rows in ((32, 32), (200, L), (EVERY_QUERY, L)):
        found = importance.of_prompt(query, keys, None, 0.125, 0.0, queries, None, None, *blocks)
        assert torch.allclose(found.sum(2), torch.full((1, 2), 3.0 * rows, device=DEVICE), rtol=1e-5)
    # the same sums in the same order
    again = importance.of_prompt(query, keys, None, 0.125, 0.0, EVERY_QUERY, None, None, *blocks)
    assert torch.equal(found, again)


def test_padding_that_is_no_number_gives_and_gets_nothing():
    query, keys = drawn(2, 1, 2, 50, 64, torch.float16)
    mask = padded("bool", 2, 50, 9, torch.float16)
    clean = importance.of_prompt(query, keys, mask, 0.125, 0.0, EVERY_QUERY, None, None, *BLOCKS)
    assert (clean[0, :, :9] == 0).all()
    # rows of padding that see nothing, or anything: they do not count
    mask[0, :, :9] = True
    query[0, :, :9], keys[0, :, :9] = torch.nan, torch.nan
    found = importance.of_prompt(query, keys, mask, 0.125, 0.0, EVERY_QUERY, None, None, *BLOCKS)
    assert torch.equal(found, clean)
    # every other row sees the keys of padding no more than before
    assert found[0].sum().item() == pytest.approx(2 * 41, rel=1e-5)


def test_a_mask_of_each_head_and_one_that_is_not_causal():
    query, keys = drawn(2, 2, 2, 40, 64, torch.bfloat16)
    mask = torch.rand(2, 4, 40, 56, device=DEVICE) < 0.5
    # all see the last query's tokens or not alike, so that no row is padding
    mask[:, :, -1] = True
    row = torch.rand(1, 1, 1, 40, device=DEVICE) < 0.5
    row[..., 0] = True
    for seen in (
        mask,
        torch.where(mask, 0.0, -torch.inf),
        mask[:1, :1],
        mask[0, 0],
        row.expand(1, 1, 40, 40),
    ):
        found = importance.of_prompt(query, keys, seen, 0.125, 0.0, EVERY_QUERY, None, None, *BLOCKS)
        plain = scores.of_prompt(query.float(), keys.float(), seen, 0.125, 0.0, EVERY_QUERY)
        assert torch.allclose(found, plain, atol=1e-5)


@pytest.mark.parametrize("queries", [EVERY_QUERY, 32])
def test_sums_that_are_known_are_not_found_again(queries):
    query, keys = drawn(2, 2, 2, 90, 64, torch.bfloat16)
    known = importance.log_sums(query, keys, 0.125)
    torch.testing.assert_close(
        known, scores.log_sums(query.float(), keys.float(), 0.125), atol=1e-5, rtol=1e-5
    )
    given = (query, keys, None, 0.125, 0.0, queries, None)
    found = importance.of_prompt(*given, known, *BLOCKS)
    torch.testing.assert_close(found, importance.of_prompt(*given, None, *BLOCKS), atol=1e-5, rtol=1e-5)
    # they are what counts: of twice the sums there is half of the weight
    half = importance.of_prompt(*given, known + math.log(2), *BLOCKS)
    torch.testing.assert_close(half, found / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("D", [64, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_a_prompt_tells_its_sums(heads, D, dtype):
    """By the kernel that PyTorch chooses, and where that tells none."""
    query, keys = drawn(2, heads, 4 // heads, 70, D, dtype)
    values = torch.randn_like(keys)
    out, sums = token_ops.attend_prompt(query, keys, values, 0.2, heads < 4)
    plain = scaled_dot_product_attention(query, keys, values, is_causal=True, scale=0.2, enable_gqa=heads < 4)
    assert torch.equal(out, plain)
    found = query.double() @ keys.double().repeat_interleave(4 // heads, 1).mT * 0.2
    want = found.masked_fill(
        torch.ones(70, 70, dtype=torch.bool, device=DEVICE).triu(1), -torch.inf
    ).logsumexp(3)
    # a product of half precision is rounded where PyTorch finds the sums
    torch.testing.assert_close(sums.double(), want, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-5)
    opcheck(token_ops.attend_prompt, (query, keys, values, 0.2, heads < 4))


def test_what_has_no_kernel_takes_pytorch_and_all_else_the_kernel():
    prompt = drawn(1, 1, 2, 20, 64, torch.float16)
    dispatched = append._of_prompt(*prompt, None, 0.125, 0.0, EVERY_QUERY, None)
    assert torch.equal(dispatched, importance.of_prompt(*prompt, None, 0.125, 0.0, EVERY_QUERY))
    assert not torch.equal(dispatched, scores.of_prompt(*prompt, None, 0.125, 0.0, EVERY_QUERY))
    query, keys = drawn(1, 1, 2, 20, 64, torch.float32)
    given = (None, 0.125, 0.0, EVERY_QUERY)
    assert torch.equal(importance.of_prompt(query, keys, *given), scores.of_prompt(query, keys, *given))
    none = importance.of_prompt(query[:, :, :0].half(), keys[:, :, :0].half(), *given)
    assert none.shape == (1, 1, 0)


@pytest.mark.parametrize("policy", ["accumulated", "last", "norm"])
def test_a_prompt_on_a_gpu_is_chosen_by_the_kernel(policy, monkeypatch):
    """On a CPU its place is taken by the interpreter: who is in the tier is what PyTorch chooses."""
    calls = []

    def counted(*args):
        calls.append(args)
        return importance.of_prompt(*args, *BLOCKS)

    high = make_high(25, policy=policy, recent=0)
    both = [make_format(2, axis, 16, 16, 0, 0) for axis in ("channel", "token")]
    formats = with_high(both[0], high).encode(), with_high(both[1], high._replace(scored=0)).encode()
    query, keys = drawn(1, 2, 2, 96, 32, torch.bfloat16)
    values = torch.randn_like(keys)

    def packed():
        return token_ops.pack_tiers(keys, values, query, None, 0.2, 0.0, *formats)

    with monkeypatch.context() as patch:
        patch.setattr(append, "of_prompt", counted)
        patch.setattr(append, "_of_prompt", counted)
        found = packed()
    assert len(calls) == (policy != "norm")

    def exactly(query, keys, *rest):
        # of half precision, PyTorch rounds the scores on a GPU
        return scores.of_prompt(query.float(), keys.float(), *rest)

    monkeypatch.setattr(append, "of_prompt", exactly)
    monkeypatch.setattr(append, "_of_prompt", exactly)
    for one, other in zip(found, packed(), strict=True):
        assert torch.allclose(one.float(), other.float(), atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "D", "worth"), [("bfloat16", 128, True), ("bfloat16", 20, False), ("float32", 128, False)]
)
def test_a_gpu_is_asked_for_sums_where_flash_tells_them(dtype, D, worth):
    with FakeTensorMode():
        query = torch.empty(1, 4, 9, D, dtype=getattr(torch, dtype), device="cuda:0")
    assert prompt.worth_asking(query, grouped=True) == worth
