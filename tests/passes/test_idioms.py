"""One tiny model per way of writing a cache: graph before and after, and numbers against an oracle."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
import torch.nn.functional as F

import kvmix_fx
from kvmix_fx.backend import KVMixBackend
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.errors import NoSiteError
from kvmix_fx.passes.sites import ADOPT, APPEND, ATTEND, LEAVE, STORAGE
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


@pytest.mark.parametrize("idiom", ["index_copy_", "setitem"])
@pytest.mark.parametrize("n", [1, 5])
def test_writes_by_position(idiom, n):
    def decode(q, k, v, past_k, past_v, positions, mask):
        if idiom == "index_copy_":
            past_k.index_copy_(2, positions, k)
            past_v.index_copy_(2, positions, v)
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
        past_k.index_copy_(2, positions, k)
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


def in_place(q, k, v, mask, cap=None):
    scores = (q @ k.transpose(-1, -2)).mul_(32**-0.5)
    if cap is not None:
        scores = scores.div_(cap).tanh().mul_(cap)
    if mask is not None:
        scores = scores.add_(mask)
    return scores.softmax(dim=-1) @ v


@pytest.mark.parametrize(
    "written", [as_transformers_writes_it, with_operators, with_a_scaled_query, in_place]
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


def scaled_by_a_tensor(q, k, v):
    return torch.softmax(q @ k.transpose(2, 3) * q.amax(), -1) @ v


def added_to_the_mask(q, k, v):
    mask = torch.zeros(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    mask += q @ k.transpose(2, 3) * 32**-0.5
    return torch.softmax(mask, -1) @ v


def two_are_added(q, k, v):
    return torch.softmax(q @ k.transpose(2, 3) * 32**-0.5 + q.amax() + q[..., :1], -1) @ v


@pytest.mark.parametrize(
    "written",
    [
        weights_are_read,
        scores_are_read,
        product_is_read,
        some_weights_are_dropped,
        weights_go_to_a_sink,
        softmax_over_queries,
        scaled_by_a_tensor,
        added_to_the_mask,
        two_are_added,
    ],
)
def test_attention_of_another_form_keeps_packed_storage(written):
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
    (out, new_k, new_v), graphs, _ = run(decode, q, k, v, past_k, past_v)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    assert count_ops(graphs[0], ops.attend) == 0
    assert count_ops(graphs[0], ops.append_) == 1
    assert count_ops(graphs[0], ops.dequantize) == 2
    assert new_k.shape[2] == new_v.shape[2] == 101
    assert torch.equal(new_k.dequantize(), torch.cat([past_k, k], 2).dequantize())


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
