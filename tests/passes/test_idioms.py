"""One tiny model per way of writing a cache: graph before and after, and numbers against an oracle."""

from __future__ import annotations

import copy
import operator
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed

import kvmix_fx
from kvmix_fx import passes
from kvmix_fx.backend import KVMixBackend
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.errors import CacheMutationError, NoSiteError
from kvmix_fx.passes.find.updates import IDIOMS
from kvmix_fx.passes.sites import ADOPT, APPEND, ATTEND, LEAVE, NOT_RECOGNIZED, STORAGE
from kvmix_fx.runtime import recording
from kvmix_fx.testing.graphs import RecordingBackend, arguments, count_ops
from kvmix_fx.testing.models import PositionCacheModel, TupleCacheModel, sharpen
from kvmix_kernels import ops


def attention(q, k, v, mask=None, group=2, spelling="expand", **kwargs):
    """The ways models repeat grouped heads."""
    B, H, L, D = k.shape
    if spelling == "expand":
        k, v = (t[:, :, None, :, :].expand(B, H, group, L, D).reshape(B, H * group, L, D) for t in (k, v))
    elif spelling == "unsqueeze":
        k, v = (t.unsqueeze(2).expand(B, H, group, L, D).reshape(B, H * group, L, D) for t in (k, v))
    elif spelling == "repeat_interleave":
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    elif spelling == "enable_gqa":
        kwargs["enable_gqa"] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **kwargs)


PLAN = kvmix_fx.KVPlan.uniform(1, 2, 2, window=8)
FORMATS = PLAN.layers[0].formats(32)


def run(function, *args):
    """Compile with the pass; return the result, the graphs given to the inner compiler, the report."""
    recorder = RecordingBackend()
    backend = KVMixBackend(PLAN, recorder)
    with torch.no_grad():
        result = torch.compile(function, backend=backend, fullgraph=True)(*args)
    return result, recorder.graphs, backend.report


def caches(length=100, fixed=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for fmt in FORMATS:
        x = torch.randn(2, 2, length, 32, generator=generator)
        if not fixed:
            tensors.append(QuantizedKVTensor.from_hp(x, fmt))
            continue
        t = QuantizedKVTensor.empty_fixed(2, 2, 160, 32, fmt, torch.float32, "cpu")
        t.index_copy_(2, torch.arange(length), x)
        tensors.append(t)
    return tensors


def step(n=1, seed=9):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, n, 32, generator=generator)
    k, v = torch.randn(2, 2, 2, n, 32, generator=generator)
    return q, k, v


def oracle(q, k, v, past_k, past_v, length=None, **kwargs):
    """SDPA over the unpacked history and the exact new tokens."""
    hk, hv = past_k.dequantize()[:, :, :length], past_v.dequantize()[:, :, :length]
    return attention(q, torch.cat([hk, k], 2), torch.cat([hv, v], 2), spelling="enable_gqa", **kwargs)


@pytest.mark.parametrize("spelling", ["expand", "unsqueeze", "repeat_interleave", "enable_gqa"])
@pytest.mark.parametrize("dim", [2, -2])
@pytest.mark.parametrize("n", [1, 5])
def test_concatenation_and_every_spelling_of_grouped_heads(spelling, dim, n):
    def decode(q, k, v, past_k, past_v):
        full_k, full_v = torch.cat([past_k, k], dim), torch.cat((past_v, v), dim=dim)
        return attention(q, full_k, full_v, spelling=spelling), full_k, full_v

    past_k, past_v = caches()
    want = oracle(*step(n), past_k, past_v)
    (out, new_k, new_v), graphs, report = run(decode, *step(n), past_k, past_v)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    assert [s.action for s in report.sites] == [ATTEND]
    assert count_ops(graphs[0], ops.attend) == 1
    assert count_ops(graphs[0], ops.append_) == 1
    assert count_ops(graphs[0], F.scaled_dot_product_attention) == 0
    assert count_ops(graphs[0], torch.cat) == 0
    assert isinstance(new_k, QuantizedKVTensor)
    assert torch.equal(new_k.dequantize(), torch.cat([past_k, step(n)[1]], 2).dequantize())
    assert torch.equal(new_v.dequantize(), torch.cat([past_v, step(n)[2]], 2).dequantize())


@pytest.mark.parametrize("idiom", ["index_copy_", "setitem", "slice"])
@pytest.mark.parametrize("n", [1, 5])
def test_writes_by_position(idiom, n):
    def decode(q, k, v, past_k, past_v, positions, mask):
        if idiom == "index_copy_":
            past_k.index_copy_(2, positions, k)
            past_v.index_copy_(2, positions, v)
        elif idiom == "slice":
            past_k[:, :, 100 : 100 + n] = k
            past_v[:, :, 100 : 100 + n] = v
        else:
            past_k[:, :, positions] = k
            past_v[:, :, positions] = v
        return attention(q, past_k, past_v, mask)

    past_k, past_v = caches(fixed=True)
    mask = torch.arange(160)[None, None, None, :] <= torch.arange(100, 100 + n)[None, None, :, None]
    want = oracle(*step(n), past_k, past_v, 100, mask=mask[..., : 100 + n])
    address = past_k.qdata.data_ptr()
    out, graphs, report = run(decode, *step(n), past_k, past_v, torch.arange(100, 100 + n), mask)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    assert [(s.action, s.idiom) for s in report.sites] == [(ATTEND, idiom)]
    assert count_ops(graphs[0], ops.attend) == 1
    assert count_ops(graphs[0], "index_copy_") == 0
    assert past_k.stored_tokens() == past_v.stored_tokens() == 100 + n
    assert past_k.qdata.data_ptr() == address
    fresh, _ = caches(fixed=True)
    fresh.index_copy_(2, torch.arange(100, 100 + n), step(n)[1])
    assert torch.equal(past_k.dequantize(), fresh.dequantize())


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("ask", ["numel", "nelement", "size", "shape", "len"])
def test_who_asks_how_large_a_cache_is_has_no_token_unpacked(ask, fixed):
    """Also in front of where the graph knows the positions of a fixed one."""

    def count(x):
        if ask == "size":
            return x.size().numel()
        if ask == "shape":
            return x.shape.numel()
        return len(x) if ask == "len" else getattr(x, ask)()

    def decode(q, k, v, past_k, past_v, start, mask):
        held = count(past_k)
        if fixed:
            positions = torch.arange(1) + start
            past_k.index_copy_(2, positions, k)
            past_v.index_copy_(2, positions, v)
        else:
            past_k, past_v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return attention(q, past_k, past_v, mask) * (held > 0), past_k, past_v, held

    past_k, past_v = caches(fixed=fixed)
    mask = (torch.arange(160) <= 100)[None, None, None] if fixed else None
    want = oracle(*step(), past_k, past_v, 100)
    asked = count(past_k)
    (out, _, _, held), graphs, _ = run(decode, *step(), past_k, past_v, torch.tensor(100), mask)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    assert held == asked
    assert count_ops(graphs[0], ops.dequantize) == 0


@pytest.mark.parametrize(("ask", "times"), [(False, 1), (True, 1), (True, 2)])
def test_a_length_that_guards_have_told_to_be_the_sum_of_others(ask, times):
    """As that of a window behind a prompt whose mask is made of both."""

    def decode(q, k, v, past_k, past_v, first, second):
        mask = torch.cat([first] * times + [second]).view(1, 1, 1, past_k.shape[2] + 1)
        held = past_k.shape[2] if ask else 1
        past_k, past_v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return attention(q, past_k, past_v, mask), past_k, past_v, q * held

    recorder = RecordingBackend()
    compiled = torch.compile(decode, backend=KVMixBackend(PLAN, recorder), fullgraph=True)
    for length in (100, 107):
        past_k, past_v = caches(length)
        q, k, v = step()
        first = torch.arange(40) > 7
        second = torch.ones(length + 1 - 40 * times, dtype=torch.bool)
        for mask in (first, second):
            torch._dynamo.mark_dynamic(mask, 0)
        with torch.no_grad():
            out, new_k, _, held = compiled(q, k, v, past_k, past_v, first, second)
        mask = torch.cat([first] * times + [second])[None, None, None]
        want = oracle(q, k, v, past_k, past_v, mask=mask)
        torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
        assert torch.equal(held, q * (length if ask else 1))
        assert new_k.shape[2] == length + 1
    assert len(recorder.graphs) == 1
    assert count_ops(recorder.graphs[0], ops.attend) == 1
    assert count_ops(recorder.graphs[0], ops.dequantize) == 0


def test_slices_that_move_from_step_to_step():
    def decode(q, k, v, past_k, past_v, start, mask):
        past_k[:, :, start : start + k.shape[2]] = k
        past_v[:, :, start : start + v.shape[2]] = v
        return attention(q, past_k, past_v, mask)

    recorder = RecordingBackend()
    backend = KVMixBackend(PLAN, recorder)
    compiled = torch.compile(decode, backend=backend, fullgraph=True)
    past_k, past_v = caches(fixed=True)
    for start in range(100, 150):
        mask = (torch.arange(160) <= start)[None, None, None]
        want = oracle(*step(seed=start), past_k, past_v, start, mask=mask[..., : start + 1])
        shifted = oracle(*step(seed=start), past_k, past_v, start - 1, mask=mask[..., :start])
        with torch.no_grad():
            out = compiled(*step(seed=start), past_k, past_v, start, mask)
        torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
        assert (out - shifted).abs().max() > 1e-3
        assert past_k.stored_tokens() == past_v.stored_tokens() == start + 1
    assert len(recorder.graphs) <= 2  # Dynamo takes the first start for a constant
    assert {(s.action, s.idiom) for s in backend.report.sites} == {(ATTEND, "slice")}


@pytest.mark.parametrize("idiom", ["index_copy_", "setitem", "slice"])
def test_a_first_step_that_writes_in_place_packs_what_it_wrote(idiom):
    """Attention of another form reads the cache after the write, as the model wrote it."""

    def decode(q, k, v, past_k, past_v, positions):
        for past, new in ((past_k, k), (past_v, v)):
            if idiom == "index_copy_":
                past.index_copy_(2, positions, new)
            elif idiom == "setitem":
                past[:, :, positions] = new
            else:
                past[:, :, 100:103] = new
        weights = torch.softmax(q @ past_k.mT.repeat_interleave(2, 1), -1)
        return weights @ past_v.repeat_interleave(2, 1) + weights.amax()

    past_k, past_v = caches(fixed=True)
    q, k, v = step(3)
    whole = [
        torch.cat([past.dequantize()[:, :, :100], new, torch.zeros(2, 2, 57, 32)], 2).repeat_interleave(2, 1)
        for past, new in ((past_k, k), (past_v, v))
    ]
    weights = torch.softmax(q @ whole[0].mT, -1)
    out, graphs, report = run(decode, q, k, v, past_k, past_v, torch.arange(100, 103))
    torch.testing.assert_close(out, weights @ whole[1] + weights.amax(), atol=2e-6, rtol=1e-5)
    assert count_ops(graphs[0], ops.dequantize) == 2
    assert count_ops(graphs[0], ops.append_) == 1
    assert past_k.stored_tokens() == past_v.stored_tokens() == 103
    assert [(s.action, s.idiom) for s in report.sites] == [(NOT_RECOGNIZED, idiom)]


@pytest.mark.parametrize("idiom", IDIOMS, ids=lambda idiom: idiom.name)
def test_every_idiom_is_drawn_and_in_the_table(idiom):
    table = (Path(passes.__file__).parent / "README.md").read_text()
    assert f"`{idiom.name}`" in table
    assert re.search(r"\n    before   .*\n    after    ", type(idiom).__doc__)


def test_first_step_of_a_fixed_cache_attends_to_its_own_tokens():
    def prefill(q, k, v, past_k, past_v, positions):
        past_k.index_copy_(2, positions, k)
        past_v.index_copy_(2, positions, v)
        return attention(q, k, v, is_causal=True)

    past_k, past_v = (QuantizedKVTensor.empty_fixed(2, 2, 160, 32, f, torch.float32, "cpu") for f in FORMATS)
    q, k, v = step(100)
    out, graphs, report = run(prefill, q, k, v, past_k, past_v, torch.arange(100))
    assert torch.equal(out, attention(q, k, v, is_causal=True))
    assert [s.action for s in report.sites] == [APPEND]
    assert count_ops(graphs[0], ops.append_) == 1
    assert torch.equal(past_k.dequantize()[:, :, :100], QuantizedKVTensor.from_hp(k, FORMATS[0]).dequantize())


POSITIONS = {
    "from zero": (lambda n: torch.arange(n), 0, True),
    "from one": (lambda n: torch.arange(1, n + 1), 1, False),
    "by keyword": (lambda n: torch.arange(start=2, end=n + 2), 2, False),
    "backwards": (lambda n: torch.arange(n - 1, -1, -1).flip(0), 0, False),
    "changed in place": (lambda n: torch.arange(n).add_(3), 3, False),
    "moved": (lambda n: torch.arange(n) + 4, 4, False),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_an_append_that_is_known_to_be_the_first_does_not_ask_the_device(name):
    make, first, known = POSITIONS[name]

    def prefill(q, k, v, past_k, past_v):
        positions = make(k.shape[2])
        past_k.index_copy_(2, positions, k)
        past_v.index_copy_(2, positions, v)
        return attention(q, k, v, is_causal=True)

    past_k, past_v = caches(first, fixed=True)
    q, k, v = step(100)
    _, graphs, _ = run(prefill, q, k, v, past_k, past_v)
    (append,) = (node for node in graphs[0].graph.nodes if node.target is ops.append_)
    given = arguments(append)
    assert (given["start"] is None, given["length"] == 0) == (known, known)
    fresh, _ = caches(first, fixed=True)
    fresh.index_copy_(2, torch.arange(first, first + 100), k)
    assert past_k.stored_tokens() == first + 100
    assert torch.equal(past_k.dequantize()[:, :, : first + 100], fresh.dequantize()[:, :, : first + 100])


def test_positions_that_are_moved_between_two_writes_are_not_taken_for_the_first():
    def prefill(q, k, v, past_k, past_v):
        positions = torch.arange(k.shape[2])
        past_k.index_copy_(2, positions, k)
        positions[:] += 5
        past_v.index_copy_(2, positions, v)
        return attention(q, k, v, is_causal=True)

    past_k, past_v = caches(50, fixed=True)
    _, graphs, _ = run(prefill, *step(100), past_k, past_v)
    appends = [arguments(node) for node in graphs[0].graph.nodes if node.target is ops.append_]
    assert all(given["start"] is not None for given in appends)


def test_plain_keys_and_values_that_leave_the_graph_are_packed():
    def prefill(q, k, v):
        return attention(q, k, v, is_causal=True), k, v

    q, k, v = step(100)
    (out, new_k, new_v), graphs, report = run(prefill, q, k * 1, v * 1)
    assert torch.equal(out, attention(q, k, v, is_causal=True))
    assert [s.action for s in report.sites] == [LEAVE]  # inputs of the graph belong to the caller

    def projected(q, k, v):
        k, v = k * 2, v * 2
        return attention(q, k, v, is_causal=True), k, v

    (out, new_k, new_v), graphs, report = run(projected, q, k, v)
    assert torch.equal(out, attention(q, 2 * k, 2 * v, is_causal=True))
    assert [s.action for s in report.sites] == [ADOPT]
    assert count_ops(graphs[0], ops.quantize_pack) == 2
    assert torch.equal(new_k.dequantize(), QuantizedKVTensor.from_hp(2 * k, FORMATS[0]).dequantize())
    assert torch.equal(new_v.dequantize(), QuantizedKVTensor.from_hp(2 * v, FORMATS[1]).dequantize())


def test_a_plain_history_is_packed_when_it_is_next_extended():
    def decode(q, k, v, past_k, past_v):
        full_k, full_v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return attention(q, full_k, full_v), full_k, full_v

    past = torch.randn(2, 2, 2, 100, 32)
    q, k, v = step()
    (out, new_k, _), _, report = run(decode, q, k, v, past[0], past[1])
    assert torch.equal(out, attention(q, torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)))
    assert [s.action for s in report.sites] == [ADOPT]
    assert torch.equal(
        new_k.dequantize(), QuantizedKVTensor.from_hp(torch.cat([past[0], k], 2), FORMATS[0]).dequantize()
    )


def test_one_append_serves_layers_that_share_keys_and_values():
    def decode(q, k, v, past_k, past_v):
        full_k, full_v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return attention(q, full_k, full_v) + attention(q * 2, full_k, full_v), full_k, full_v

    past_k, past_v = caches()
    q, k, v = step()
    want = oracle(q, k, v, past_k, past_v) + oracle(q * 2, k, v, past_k, past_v)
    (out, new_k, _), graphs, _ = run(decode, q, k, v, past_k, past_v)
    torch.testing.assert_close(out, want, atol=4e-6, rtol=1e-5)
    assert count_ops(graphs[0], ops.attend) == 2
    assert count_ops(graphs[0], ops.append_) == 1
    assert new_k.shape[2] == 101


def test_a_cache_that_is_only_read():
    def cross(q, past_k, past_v):
        return attention(q, past_k, past_v)

    past_k, past_v = caches()
    q = step()[0]
    want = attention(q, past_k.dequantize(), past_v.dequantize(), spelling="enable_gqa")
    out, graphs, report = run(cross, q, past_k, past_v)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    assert [s.action for s in report.sites] == [ATTEND]
    assert count_ops(graphs[0], ops.append_) == 0


def as_transformers_writes_it(q, k, v, mask, cap=None):
    scores = torch.matmul(q, k.transpose(2, 3)) * 32**-0.5
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.1, training=False), v)


def with_operators(q, k, v, mask, cap=None):
    scores = (q @ k.mT).float() / 32**0.5
    if cap is not None:
        scores = cap * (scores * (1 / cap)).tanh()
    if mask is not None:
        scores = mask + scores
    return scores.softmax(-1) @ v


def with_a_scaled_query(q, k, v, mask, cap=None):
    scores = torch.matmul(q * 32**-0.5, k.permute(0, 1, 3, 2))
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        scores += mask
    return torch.softmax(scores, 3).matmul(v)


def with_casts(q, k, v, mask, cap=None):
    """In higher precision, as GPT-J has it."""
    scores = torch.matmul(q.double(), k.to(torch.float64).transpose(-1, -2)) / 32**0.5
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores + mask
    return torch.matmul(F.softmax(scores, dim=-1).to(v.dtype), v)


def in_place(q, k, v, mask, cap=None):
    scores = (q @ k.transpose(-1, -2)).mul_(32**-0.5)
    if cap is not None:
        scores = scores.div_(cap).tanh().mul_(cap)
    if mask is not None:
        scores = scores.add_(mask)
    return scores.softmax(dim=-1) @ v


def folded(*tensors):
    return [t.reshape(t.shape[0] * t.shape[1], -1, t.shape[3]) for t in tensors]


def batched_matrices(q, k, v, mask):
    """As decoders of 2020 have it: the mask is added between two views, what is too low is cut off."""
    B, H, n, D = q.shape
    q3, k3, v3 = folded(q * 32**-0.5, k, v)
    scores = torch.bmm(q3, k3.transpose(1, 2)).view(B, H, n, -1) + mask
    scores = torch.max(scores, torch.full((), torch.finfo(q.dtype).min)).view(B * H, n, -1)
    weights = F.softmax(scores, dim=-1).view(B, H, n, -1).view(B * H, n, -1)
    return torch.bmm(F.dropout(weights, p=0.1, training=False), v3).view(B, H, n, D)


def batched_matrices_onto_a_bias(q, k, v, mask):
    """As Bloom has it."""
    B, H, n, D = q.shape
    q3, k3, v3 = folded(q, k, v)
    bias = torch.linspace(-1, 1, mask.shape[3]).expand(B * H, 1, -1)
    scores = bias.baddbmm(batch1=q3, batch2=k3.transpose(-1, -2), beta=0.5, alpha=32**-0.5)
    weights = F.softmax(scores.view(B, H, n, -1) + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights.view(B * H, n, -1), v3).view(B, H, n, D)


def batched_matrices_of_other_queries(q, k, v, mask):
    """As FSMT has it: queries come with their tokens first, and so does the output."""
    B, H, n, D = q.shape
    q3 = q.flatten(0, 1).transpose(0, 1).contiguous().transpose(0, 1) * 32**-0.5
    k3, v3 = folded(k, v)
    scores = (torch.bmm(q3, k3.transpose(1, 2)).view(B, H, n, -1) + mask).view(B * H, n, -1)
    out = torch.bmm(F.softmax(scores, dim=-1), v3).transpose(0, 1)
    return out.contiguous().view(n, B, H, D).permute(1, 2, 0, 3)


def with_einsum(q, k, v, mask):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * 32**-0.5 + mask
    return torch.einsum("bsij,bsjk->bsik", (torch.softmax(scores, -1), v))


def scaled_by_a_tensor(q, k, v, mask):
    """As CodeGen has it."""
    return torch.softmax(q @ k.mT / torch.tensor(32.0).sqrt() + mask, -1) @ v


@pytest.mark.parametrize(
    "written",
    [
        batched_matrices,
        batched_matrices_onto_a_bias,
        batched_matrices_of_other_queries,
        with_einsum,
        scaled_by_a_tensor,
    ],
)
def test_other_spellings_of_products_become_one_op(written):
    def decode(q, k, v, past_k, past_v, mask):
        full_k, full_v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        repeated = [t.repeat_interleave(2, dim=1) for t in (full_k, full_v)]
        return written(q, *repeated, mask), full_k, full_v

    past_k, past_v = caches()
    q, k, v = step(3)
    seen = torch.rand(2, 1, 3, 103, generator=torch.Generator().manual_seed(0)) < 0.7
    mask = torch.zeros(2, 1, 3, 103).masked_fill(~seen, -1e9)
    whole = [
        torch.cat([past.dequantize(), new], 2).repeat_interleave(2, dim=1)
        for past, new in ((past_k, k), (past_v, v))
    ]
    want = written(q, *whole, mask)
    (out, _, _), graphs, report = run(decode, q, k, v, past_k, past_v, mask)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    assert (out - written(q, *whole, mask * 0)).abs().max() > 5e-2
    assert [s.action for s in report.sites] == [ATTEND]
    for gone in (ops.dequantize, torch.matmul, torch.bmm, torch.softmax, F.softmax, torch.einsum):
        assert count_ops(graphs[0], gone) == 0


@pytest.mark.parametrize(
    "written", [as_transformers_writes_it, with_operators, with_a_scaled_query, with_casts, in_place]
)
@pytest.mark.parametrize("cap", [None, 0.2])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_written_out_becomes_one_op(written, cap, masked):
    def decode(q, k, v, past_k, past_v, mask):
        full_k, full_v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        k, v = (t.repeat_interleave(2, dim=1) for t in (full_k, full_v))
        return written(q, k, v, mask, cap), full_k, full_v

    past_k, past_v = caches()
    q, k, v = step(3)
    mask = None
    if masked:
        seen = torch.rand(2, 1, 3, 103, generator=torch.Generator().manual_seed(0)) < 0.7
        mask = torch.zeros(2, 1, 3, 103).masked_fill(~seen, -1e9)
    whole = [
        torch.cat([past.dequantize(), new], 2).repeat_interleave(2, dim=1)
        for past, new in ((past_k, k), (past_v, v))
    ]
    want = as_transformers_writes_it(q, *whole, mask, cap)
    uncapped = as_transformers_writes_it(q, *whole, mask)
    (out, new_k, _), graphs, report = run(decode, q, k, v, past_k, past_v, mask)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    assert cap is None or (out - uncapped).abs().max() > 5e-2
    assert [s.action for s in report.sites] == [ATTEND]
    assert count_ops(graphs[0], ops.attend) == 1
    # nothing of the old way is left
    left = (torch.matmul, operator.matmul, torch.softmax, F.softmax, torch.tanh, F.dropout, "add_", "mul_")
    for gone in (ops.dequantize, *left):
        assert count_ops(graphs[0], gone) == 0
    assert new_k.shape[2] == 103


def sink_as_a_column(q, k, v, mask, sinks):
    """As gpt-oss has it."""
    weights = torch.matmul(q, k.transpose(2, 3)) * 32**-0.5 + mask
    sinks = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    logits = torch.cat([weights, sinks], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    scores = F.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1]
    return torch.matmul(F.dropout(scores, p=0.1, training=False).to(v.dtype), v)


def sink_as_a_column_of_its_own(q, k, v, mask, sinks):
    logits = torch.cat([q @ k.mT * 32**-0.5 + mask, sinks[None, :, None, None].expand(2, -1, 3, 1)], 3)
    return (logits - logits.amax(-1, True)).softmax(-1)[:, :, :, :-1] @ v


def sink_as_a_factor(q, k, v, mask, sinks):
    """As Granite has it."""
    scores = torch.matmul(q, k.transpose(2, 3)) * 32**-0.5 + mask
    factor = (torch.logsumexp(scores, dim=-1) - sinks.view(1, -1, 1)).to(torch.float32).sigmoid()
    weights = F.dropout(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), p=0.0, training=False)
    return torch.matmul(weights, v) * factor.unsqueeze(-1).to(v.dtype)


def two_terms(q, k, v, mask, hidden):
    """A bias of positions and a mask, as in T5."""
    bias = torch.linspace(-1, 1, k.shape[2]).expand(4, 1, -1)
    return torch.softmax((q @ k.mT) * 32**-0.5 + bias + mask, -1) @ v


def filled_by_a_tensor(q, k, v, mask, hidden):
    """As GPT-Neo has it."""
    scores = torch.where(~hidden, (q @ k.mT) * 32**-0.5, torch.tensor(torch.finfo(q.dtype).min))
    return torch.softmax(scores + mask, -1) @ v


def filled_behind_a_bias(q, k, v, mask, hidden):
    """As MPT has it."""
    bias = torch.linspace(-1, 1, k.shape[2]).expand(4, 1, -1)
    return torch.softmax(((q @ k.mT) * 32**-0.5 + bias).masked_fill(hidden, -1e9), -1) @ v


def filled_twice(q, k, v, mask, hidden):
    scores = ((q @ k.mT) * 32**-0.5).masked_fill(hidden, float("-inf"))
    return torch.softmax(scores.masked_fill(mask < -1, -1e9), -1) @ v


@pytest.mark.parametrize("written", [two_terms, filled_by_a_tensor, filled_behind_a_bias, filled_twice])
def test_several_masks_become_one(written):
    def decode(q, k, v, past_k, past_v, mask, hidden):
        full_k, full_v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        k, v = (t.repeat_interleave(2, dim=1) for t in (full_k, full_v))
        return written(q, k, v, mask, hidden), full_k, full_v

    past_k, past_v = caches()
    q, k, v = step(3)
    generator = torch.Generator().manual_seed(0)
    seen, shown = (torch.rand(2, 1, 3, 103, generator=generator) < 0.7 for _ in range(2))
    mask = torch.zeros(2, 1, 3, 103).masked_fill(~seen, -1e9)
    whole = [
        torch.cat([past.dequantize(), new], 2).repeat_interleave(2, dim=1)
        for past, new in ((past_k, k), (past_v, v))
    ]
    want = written(q, *whole, mask, ~shown)
    others = [written(q, *whole, mask * 0, ~shown), written(q, *whole, mask, ~shown & False)]
    (out, _, _), graphs, report = run(decode, q, k, v, past_k, past_v, mask, ~shown)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    assert max((out - other).abs().max() for other in others) > 5e-2
    assert [s.action for s in report.sites] == [ATTEND]
    assert count_ops(graphs[0], ops.attend) == 1


@pytest.mark.parametrize("written", [sink_as_a_column, sink_as_a_column_of_its_own, sink_as_a_factor])
def test_learned_sinks_join_the_op(written):
    def decode(q, k, v, past_k, past_v, mask, sinks):
        full_k, full_v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        k, v = (t.repeat_interleave(2, dim=1) for t in (full_k, full_v))
        return written(q, k, v, mask, sinks), full_k, full_v

    past_k, past_v = caches()
    q, k, v = step(3)
    sinks = torch.tensor([-3.0, 1.0, 4.0, 7.0])
    mask = torch.zeros(2, 1, 3, 103)
    mask[0, :, :, :40] = -1e9
    whole = [
        torch.cat([past.dequantize(), new], 2).repeat_interleave(2, dim=1)
        for past, new in ((past_k, k), (past_v, v))
    ]
    want = sink_as_a_column(q, *whole, mask, sinks)
    (out, new_k, _), graphs, report = run(decode, q, k, v, past_k, past_v, mask, sinks)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    assert (out - as_transformers_writes_it(q, *whole, mask)).abs().max() > 5e-2
    assert [s.action for s in report.sites] == [ATTEND]
    left = (torch.matmul, operator.matmul, F.softmax, torch.cat, torch.logsumexp, "sigmoid", "max", "amax")
    for gone in (ops.dequantize, *left):
        assert count_ops(graphs[0], gone) == 0
    assert new_k.shape[2] == 103


@pytest.mark.parametrize("form", ["written out", "sdpa"])
def test_factors_that_change_between_calls(form):
    """Dynamo makes symbols of numbers that it has seen change."""
    past_k, past_v = caches()
    q, k, v = step()
    full_k, full_v = (
        torch.cat([past.dequantize(), new], 2).repeat_interleave(2, dim=1)
        for past, new in ((past_k, k), (past_v, v))
    )

    def decode(q, k, v, past_k, past_v, factor):
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        heads = [t.repeat_interleave(2, dim=1) for t in (k, v)]
        if form == "sdpa":
            return F.scaled_dot_product_attention(q, *heads, scale=factor), k, v
        return torch.softmax(q @ heads[0].mT * factor, -1) @ heads[1], k, v

    backend = KVMixBackend(PLAN, "eager")
    compiled = torch.compile(decode, backend=backend, fullgraph=True)
    for factor in (0.2, 0.4, 0.1):
        past_k, past_v = caches()
        with torch.no_grad():
            out, _, _ = compiled(q, k, v, past_k, past_v, factor)
        want = F.scaled_dot_product_attention(q, full_k, full_v, scale=factor)
        torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    assert {site.action for site in backend.report.sites} == {ATTEND}


def weights_are_read(q, k, v):
    weights = torch.softmax(q @ k.transpose(2, 3) * 32**-0.5, -1)
    return weights @ v + weights.amax()


def scores_are_read(q, k, v):
    scores = q @ k.transpose(2, 3) * 32**-0.5
    return torch.softmax(scores, -1) @ v + scores.amax()


def product_is_read(q, k, v):
    product = q @ k.transpose(2, 3)
    return torch.softmax(product * 32**-0.5, -1) @ v + product.amax()


def some_weights_are_dropped(q, k, v):
    return F.dropout(torch.softmax(q @ k.transpose(2, 3) * 32**-0.5, -1), 1.0, True) @ v


def weights_go_to_a_sink(q, k, v):
    scores = q @ k.transpose(2, 3) * 32**-0.5
    return torch.softmax(torch.cat([scores, scores[..., :1] * 0], -1), -1)[..., :-1] @ v


def softmax_over_queries(q, k, v):
    return torch.softmax(q @ k.transpose(2, 3) * 32**-0.5, 2) @ v


def scaled_by_tensors(q, k, v):
    """One number for each query."""
    return torch.softmax(q @ k.transpose(2, 3) * q.amax(3, keepdim=True), -1) @ v


def added_to_the_mask(q, k, v):
    mask = torch.zeros(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    mask += q @ k.transpose(2, 3) * 32**-0.5
    return torch.softmax(mask, -1) @ v


def two_are_added(q, k, v):
    return torch.softmax(q @ k.transpose(2, 3) * 32**-0.5 + q.amax() + q[..., :1], -1) @ v


def einsum_of_another_order(q, k, v):
    weights = torch.softmax(q @ k.mT, -1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.transpose(1, 2)).transpose(1, 2)


def weights_of_batched_matrices_are_read(q, k, v):
    product = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    weights = torch.softmax(product, -1)
    return torch.bmm(weights, v.flatten(0, 1)).view(q.shape) + weights.amax()


def batched_matrices_of_whole_rows(q, k, v):
    """No head of its own: nothing to unfold."""
    rows = [t.transpose(1, 2).flatten(2) for t in (q, k, v)]
    weights = torch.softmax(torch.bmm(rows[0], rows[1].mT), -1)
    return torch.bmm(weights, rows[2]).unflatten(2, (4, -1)).transpose(1, 2)


def filled_with_a_number_that_counts(q, k, v):
    hidden = torch.arange(k.shape[2]) % 3 == 0
    return torch.softmax((q @ k.mT).masked_fill(hidden, -1.0), -1) @ v


def masked_for_all_keys_at_once(q, k, v):
    return torch.softmax(q @ k.mT + torch.ones(1, 1, 1, 1), -1) @ v


def keys_are_turned_and_flipped(q, k, v):
    return torch.softmax(q @ k.flip(2).mT.flip(3).permute(0, 1, 2, 3), -1) @ v


def sink_for_each_query(q, k, v):
    logits = torch.cat([q @ k.mT, q.sum(-1, keepdim=True)], -1)
    return logits.softmax(-1)[..., :-1] @ v


def sink_that_keeps_its_column(q, k, v):
    logits = torch.cat([q @ k.mT, torch.ones(2, 4, 1, 1)], -1)
    return logits.softmax(-1) @ F.pad(v, (0, 0, 0, 1))


def share_of_other_scores(q, k, v):
    factor = (torch.logsumexp(2 * q @ k.mT, -1) - torch.ones(4).view(1, -1, 1)).sigmoid()
    return (q @ k.mT).softmax(-1) @ v * factor.unsqueeze(-1)


ANOTHER_FORM = {
    weights_are_read: "something else reads the weights",
    scores_are_read: "something else reads the scores",
    product_is_read: "something else reads the scores",
    some_weights_are_dropped: "weights are dropped at random",
    weights_go_to_a_sink: "something else reads the scores",
    softmax_over_queries: "softmax runs along dimension 2",
    scaled_by_tensors: "mul lies between the product of queries and keys and softmax",
    added_to_the_mask: "added to something else in place",
    two_are_added: "no mask of 1 to 4 dimensions",
    einsum_of_another_order: "multiplied by einsum, not by matmul",
    weights_of_batched_matrices_are_read: "something else reads the weights",
    batched_matrices_of_whole_rows: "multiplied by bmm, not by matmul",
    filled_with_a_number_that_counts: "masked_fill lies between",
    masked_for_all_keys_at_once: "one column for all keys",
    keys_are_turned_and_flipped: "keys are turned by permute",
    sink_for_each_query: "is no sink, one number for each head",
    sink_that_keeps_its_column: "added to the scores or dropped from the weights, and not both",
    share_of_other_scores: "no attention over the scores that its factor is made of",
}


@pytest.mark.parametrize("written", ANOTHER_FORM)
def test_attention_of_another_form_keeps_packed_storage_and_says_why(written):
    def decode(q, k, v, past_k, past_v):
        full_k, full_v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return written(q, *(t.repeat_interleave(2, dim=1) for t in (full_k, full_v))), full_k, full_v

    past_k, past_v = caches()
    q, k, v = step()
    whole = [
        torch.cat([past.dequantize(), new], 2).repeat_interleave(2, dim=1)
        for past, new in ((past_k, k), (past_v, v))
    ]
    want = written(q, *whole)
    (out, new_k, new_v), graphs, report = run(decode, q, k, v, past_k, past_v)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    assert ANOTHER_FORM[written] in report.sites[0].reason
    assert {(s.action, s.query_length) for s in report.sites} == {(NOT_RECOGNIZED, "1")}
    assert "K2V2" in {s.label for s in report.sites}
    assert str(report).count("not recognized") == 1 + len(report.sites)
    assert report.skipped() == report.sites
    assert count_ops(graphs[0], ops.attend) == 0
    assert count_ops(graphs[0], ops.append_) == 1
    assert count_ops(graphs[0], ops.dequantize) == 2
    assert new_k.shape[2] == new_v.shape[2] == 101
    assert torch.equal(new_k.dequantize(), torch.cat([past_k, k], 2).dequantize())


def other_dimension(k, v, past_k, past_v):
    return torch.cat([past_k, past_k], 1), torch.cat([past_v, past_v], dim=1)


def three_operands(k, v, past_k, past_v):
    return torch.cat([past_k, k, k], 2), torch.cat([past_v, v, v], 2)


def new_tokens_first(k, v, past_k, past_v):
    return torch.cat([k, past_k], 2), torch.cat([v, past_v], 2)


def two_caches(k, v, past_k, past_v):
    return torch.cat([past_k, past_v], 2), torch.cat([past_v, past_k], 2)


ANOTHER_WRITE = {
    other_dimension: "along dimension 1; along tokens, 2, it would be an append",
    three_operands: "3 tensors are concatenated",
    new_tokens_first: "behind other tokens",
    two_caches: "two caches are concatenated",
}


@pytest.mark.parametrize("write", ANOTHER_WRITE)
def test_writes_of_nearly_a_known_form_say_why_and_stay_right(write):
    def decode(k, v, past_k, past_v):
        return write(k, v, past_k, past_v)

    past_k, past_v = caches()
    _, k, v = step()
    want = write(k, v, past_k.dequantize(), past_v.dequantize())
    got, graphs, report = run(decode, k, v, past_k, past_v)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert [(s.action, s.label) for s in report.sites] == [(NOT_RECOGNIZED, "K2V2")] * 2
    assert all(ANOTHER_WRITE[write] in s.reason for s in report.sites)
    assert count_ops(graphs[0], ops.append_) == 0


def reads_it(q, k, past):
    return q @ past.repeat_interleave(2, 1).mT


def concatenates_it(q, k, past):
    return torch.cat([past, k], 2)


def attends_to_it(q, k, past):
    return attention(q, past, past, (torch.arange(160) < 101)[None, None, None])


@pytest.mark.parametrize("function", [reads_it, concatenates_it, attends_to_it])
def test_a_fixed_cache_that_a_graph_reads_without_writing_it_tells_how_many_tokens_it_holds(
    function, monkeypatch
):
    monkeypatch.setattr(recording, "REPLAY_DEVICES", ("cpu",))
    recorder = RecordingBackend()
    backend = KVMixBackend(PLAN, recorder)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    past, _ = caches(fixed=True)
    q, k, _ = step()
    for stored in (100, 101):
        with torch.no_grad():
            got = compiled(q, k, past)
        want = function(q, k, past.dequantize())
        if function is attends_to_it:  # empty places are no tokens, whatever a mask says
            history = past.dequantize()[:, :, :stored]
            want = attention(q, history, history)
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
        past.index_copy_(2, torch.tensor([100]), k)
    assert len(recorder.graphs) == 1
    assert "reads a cache of fixed capacity that it does not write" in backend.report.graphs[0].replay
    assert past.stored_tokens() == 101


def writes_at(idiom, past, new, start):
    if idiom == "slice":
        past[:, :, start : start + new.shape[2]] = new
        return
    positions = torch.arange(new.shape[2]) + start
    if idiom == "setitem":
        past[:, :, positions] = new
    else:
        past.index_copy_(2, positions, new)


@pytest.mark.parametrize("idiom", ["index_copy_", "setitem", "slice"])
@pytest.mark.parametrize("again", [False, True])
def test_tokens_may_be_read_before_the_positions_of_the_next_ones_are_known(idiom, again):
    def decode(q, k, v, past_k, past_v, start, mask):
        before = past_k.sum((0, 1, 3))
        # positions that depend on what is read cannot be known any earlier
        start = start + (before.isnan().any().long() if torch.is_tensor(start) else 0)
        writes_at(idiom, past_k, k, start)
        writes_at(idiom, past_v, v, start)
        after = past_k.sum((0, 1, 3)) if again else before
        return attention(q, past_k, past_v, mask), before, after

    past_k, past_v = caches(fixed=True)
    mask = (torch.arange(160) <= 100)[None, None, None]
    want = oracle(*step(), past_k, past_v, 100)
    before = past_k.dequantize().sum((0, 1, 3))
    after = before.clone()
    after[100] = step()[1].sum() if again else 0
    start = 100 if idiom == "slice" else torch.tensor(100)
    got, graphs, _ = run(decode, *step(), past_k, past_v, start, mask)
    for a, b in zip(got, (want, before, after), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    assert count_ops(graphs[0], ops.attend) == 1
    assert past_k.stored_tokens() == past_v.stored_tokens() == 101


def test_writes_that_no_attention_reads_are_listed_and_stored():
    def decode(k, v, past_k, past_v):
        return torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)

    past_k, past_v = caches()
    _, k, v = step(5)
    (new_k, new_v), graphs, report = run(decode, k, v, past_k, past_v)
    (site,) = report.sites
    assert (site.action, site.idiom, site.query_length, site.label) == (NOT_RECOGNIZED, "cat", "5", "K2V2")
    assert "no attention that reads what is written here" in site.reason
    assert count_ops(graphs[0], ops.append_) == 1
    assert torch.equal(new_k.dequantize(), torch.cat([past_k, k], 2).dequantize())
    assert torch.equal(new_v.dequantize(), torch.cat([past_v, v], 2).dequantize())


@pytest.mark.parametrize("swapped", [False, True])
def test_writes_are_paired_by_what_they_store_not_by_their_order(swapped):
    """Two layers of different lengths, whose writes come in any order."""

    def decode(k, v, a, b, past_k, past_v, other_k, other_v):
        first = torch.cat([past_k, k], 2), torch.cat([other_k, a], 2)
        last = torch.cat([past_v, v], 2), torch.cat([other_v, b], 2)
        return (*last, *first) if swapped else (*first, *last)

    past, other = caches(), caches(60)
    (_, k, v), (_, a, b) = step(3), step(2, seed=5)
    _, graphs, report = run(decode, k, v, a, b, *past, *other)
    assert count_ops(graphs[0], ops.append_) == 2
    assert [s.query_length for s in report.sites] == ["3", "2"]


def test_a_growing_cache_that_is_written_alone_becomes_plain_and_says_so():
    def decode(q, k, past_k):
        full = torch.cat([past_k, k], 2)
        return q @ full.repeat_interleave(2, 1).mT, full

    past_k, _ = caches()
    q, k, _ = step()
    whole = torch.cat([past_k.dequantize(), k], 2)
    (out, full), _, report = run(decode, q, k, past_k)
    torch.testing.assert_close(out, q @ whole.repeat_interleave(2, 1).mT, atol=1e-5, rtol=1e-5)
    assert type(full) is torch.Tensor
    assert torch.equal(full, whole)
    assert [s.action for s in report.sites] == [NOT_RECOGNIZED]
    assert "stays at 16 bits" in report.sites[0].reason


def test_a_fixed_cache_that_is_written_alone_is_refused():
    def decode(k, past_k):
        past_k[:, :, 100:101] = k
        return past_k * 1

    past_k, _ = caches(fixed=True)
    with pytest.raises(BackendCompilerFailed) as caught:
        run(decode, step()[1], past_k)
    assert isinstance(caught.value.inner_exception, CacheMutationError)
    assert past_k.stored_tokens() == 100


def test_a_cache_that_is_read_in_another_way_is_listed():
    def score(q, past_k, past_v):
        return q @ past_k.repeat_interleave(2, 1).mT, past_v.sum()

    past_k, past_v = caches()
    q = step()[0]
    want = score(q, past_k.dequantize(), past_v.dequantize())
    got, _, report = run(score, q, past_k, past_v)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-5)
    assert [(s.action, s.idiom) for s in report.sites] == [(NOT_RECOGNIZED, "read")] * 2


def test_what_is_no_attention_is_not_nearly_one():
    """A softmax over no product, a product of no softmax, and what comes after attention."""

    def layer(q, k, v, past_k, past_v):
        full_k, full_v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        out = attention(q, full_k, full_v)
        experts = torch.softmax(F.linear(out, torch.ones(4, 32)), -1) @ torch.ones(4, 32)
        return (
            experts + torch.softmax(out, -1).mT.mT @ torch.ones(32, 32) + out @ out.mT @ out,
            full_k,
            full_v,
        )

    _, _, report = run(layer, *step(3), *caches())
    assert [s.action for s in report.sites] == [ATTEND]


def test_models_of_another_form_are_refused_with_the_reason():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            k, v = k * 2, v * 2
            return weights_are_read(q, k, v), k, v

    model = Attention().eval()
    kvmix_fx.compile(model, PLAN, inner="eager")
    with torch.no_grad(), pytest.raises(NoSiteError, match="something else reads the weights"):
        model(*(torch.randn(1, 2, 5, 32) for _ in range(3)))


def test_sites_that_cannot_attend_packed_say_why_and_stay_right():
    def decode(q, k, v, past_k, past_v):
        full_k, full_v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return attention(q, full_k, full_v, is_causal=True), full_k, full_v

    past_k, past_v = caches()
    q, k, v = step(5)
    want = oracle(q, k, v, past_k, past_v, is_causal=True)
    (out, new_k, _), graphs, report = run(decode, q, k, v, past_k, past_v)
    torch.testing.assert_close(out, want)
    assert [s.action for s in report.sites] == [STORAGE]
    assert "is_causal" in report.sites[0].reason
    assert count_ops(graphs[0], ops.attend) == 0
    assert new_k.shape[2] == 105


def test_graphs_without_a_cache_are_returned_as_they_are():
    def encode(q, k, v):
        return attention(q, k * 2, v * 2), q.clone().clamp_(0)

    q, k, v = step(10)
    recorder = RecordingBackend()
    original = []

    class Spy(KVMixBackend):
        def __call__(self, gm, example_inputs):
            original.append(gm)
            return super().__call__(gm, example_inputs)

    backend = Spy(PLAN, recorder)
    with torch.no_grad():
        out = torch.compile(encode, backend=backend)(q, k, v)
    assert recorder.graphs[0] is original[0]
    assert torch.equal(out[0], attention(q, k * 2, v * 2))
    assert [s.action for s in backend.report.sites] == [LEAVE]
    assert "do not leave the graph" in backend.report.sites[0].reason


def test_in_place_operations_beside_a_rewrite_survive():
    """Dead-code elimination would delete them: Dynamo's graph is not functional."""

    def decode(q, k, v, past_k, past_v, counter):
        full_k, full_v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        weights = torch.zeros(2, 4)
        weights.scatter_(1, torch.tensor([[1], [2]]), 3.0)
        weights.clamp_(max=2.0)
        counter.add_(1)
        return attention(q, full_k, full_v) * weights.sum(), full_k, full_v

    past_k, past_v = caches()
    q, k, v = step()
    want = oracle(q, k, v, past_k, past_v) * 4
    counter = torch.zeros(())
    (out, _, _), _, _ = run(decode, q, k, v, past_k, past_v, counter)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    assert counter.item() == 1


def test_a_tuple_cache_kept_by_the_caller():
    model = sharpen(TupleCacheModel())
    plan = kvmix_fx.KVPlan.uniform(2, 2, 2, window=8)
    kvmix_fx.compile(model, plan, inner="eager")
    x = torch.randn(1, 150, 64)
    with torch.no_grad():
        _, past = model(x[:, :100])
        assert all(isinstance(t, QuantizedKVTensor) for kv in past for t in kv)
        # two continuations of one parent must not touch each other
        first, a = model(x[:, 100:101], past)
        second, b = model(x[:, 101:102], past)
        again, _ = model(x[:, 100:101], past)
        assert torch.equal(first, again)
        assert not torch.equal(first, second)
        assert a[0][0].shape[2] == b[0][0].shape[2] == 101
        for i in range(101, 150):
            _, a = model(x[:, i : i + 1], a)
        once_more, _ = model(x[:, 101:102], past)
        assert torch.equal(second, once_more)


def test_models_without_attention_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
    kvmix_fx.compile(model, PLAN)
    with torch.no_grad(), pytest.raises(NoSiteError, match="no attention was found"):
        model(torch.randn(2, 4))


def test_a_raw_half_stays_exact():
    plan = kvmix_fx.KVPlan.uniform(1, 16, 2, window=8)
    kf, vf = plan.layers[0].formats(32)
    x = torch.randn(2, 2, 2, 100, 32)
    past_k, past_v = QuantizedKVTensor.from_hp(x[0], kf), QuantizedKVTensor.from_hp(x[1], vf)
    assert torch.equal(past_k.dequantize(), x[0])
    q, k, v = step()

    def decode(q, k, v, past_k, past_v):
        full_k, full_v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return attention(q, full_k, full_v), full_k, full_v

    want = oracle(q, k, v, past_k, past_v)
    (out, new_k, _), _, _ = run(decode, q, k, v, past_k, past_v)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    assert torch.equal(new_k.dequantize(), torch.cat([x[0], k], 2))


def test_buffers_of_the_model_are_packed_after_the_first_step():
    model = sharpen(PositionCacheModel(), 1.0)
    plain = copy.deepcopy(model)
    plan = kvmix_fx.KVPlan.uniform(2, 2, 2, window=8)
    kvmix_fx.compile(model, plan, inner="eager")
    x = torch.randn(1, 150, 128)
    with torch.no_grad():
        first = model(x[:, :100], torch.arange(100))
        torch.testing.assert_close(first, plain(x[:, :100], torch.arange(100)))
        assert isinstance(model.k_cache_0, QuantizedKVTensor)
        assert model.v_cache_1.stored_tokens() == 100
        formats = plan.layers[0].formats(32)
        want = QuantizedKVTensor.from_hp(plain.k_cache_0[:, :, :100], formats[0]).dequantize()
        assert torch.equal(model.k_cache_0.dequantize()[:, :, :100], want)
        # the same numbers from plain buffers that hold what the packed ones hold
        for i in range(100, 104):
            for name, buffer in list(plain.named_buffers()):
                if "cache" in name:
                    buffer.copy_(getattr(model, name).dequantize())
            got, exact = (m(x[:, i : i + 1], torch.arange(i, i + 1)) for m in (model, plain))
            torch.testing.assert_close(got, exact, atol=1e-5, rtol=1e-4)
    assert model.k_cache_0.stored_tokens() == 104
    report = kvmix_fx.compiled(model).report
    assert [s.action for s in report.graphs[0].sites] == [LEAVE, LEAVE]
    assert [s.action for s in report.graphs[1].sites] == [ATTEND, ATTEND]
    assert report.rewritten_layers() == [0, 1]
