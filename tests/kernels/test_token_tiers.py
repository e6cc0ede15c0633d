"""Tiers of tokens: exact attention over both, who is in the high one, and what leaving it costs."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kvmix_fx.testing.tensors import error_budget
from kvmix_kernels import layout, ops
from kvmix_kernels.cached import Cached, allocate
from kvmix_kernels.cpu import native
from kvmix_kernels.errors import CapacityError, FormatError
from kvmix_kernels.importance import policy_of
from kvmix_kernels.layout import make_format, make_high, with_high
from kvmix_kernels.reference import attention as reference
from kvmix_kernels.tokens import append, places
from kvmix_kernels.tokens import ops as token_ops
from tests.depth import examples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
few = settings(max_examples=examples(16))
SCALE = 0.2
RAW_TOO = {"bits": 4, "axis": "channel", "tiers": ((16, 8), (4, 8), (2, 16))}
BY_CHANNEL = [
    RAW_TOO | {"order": "prompt"},
    RAW_TOO | {"order": "tile"},
    RAW_TOO | {"tiers": ((4, 8), (2, 24)), "order": "tile_keys"},
]
"""Of keys whose channels have bits of their own."""


def formats(high=None, bits=2, axis="token", tile=16, window=8, sink=0, **key):
    """Of keys and values that share a high tier."""
    high = high or make_high(25)
    fmt = make_format(bits, axis, 16, tile, sink, window, **key)
    value = make_format(bits, "token", 16, tile, sink, window)
    return with_high(fmt, high), with_high(value, high._replace(scored=0, balanced=0))


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where kernels run."""


def there(x):
    """A tensor on their device."""
    return None if x is None else x.to(DEVICE)


class Filled:
    """A fixed cache that is filled step by step, and what went into it."""

    def __init__(self, both, B=2, Hkv=2, group=2, D=32, capacity=200, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.B, self.Hkv, self.Hq, self.D = B, Hkv, Hkv * group, D
        self.capacity = capacity
        self.caches = [
            allocate(
                *(B, Hkv, D, layout.fixed_tiles(f, capacity), layout.fixed_slots(f, capacity)),
                *(f, torch.float32, "cpu"),
            )
            for f in both
        ]
        self.k, self.v = self.caches
        self.formats = [f.encode() for f in both]
        self.keys, self.values, self.queries = (torch.zeros(B, h, 0, D) for h in (Hkv, Hkv, self.Hq))
        self.spread = torch.exp2(4 * torch.rand(D, generator=self.generator))

    @property
    def length(self):
        return self.keys.shape[2]

    def normal(self, heads, n):
        return torch.randn(self.B, heads, n, self.D, generator=self.generator)

    def step(self, n, mask=None, mass=None, softcap=0.0, sinks=None):
        """Attend to the cache and n tokens, then store them; what `attend_tiers` returned."""
        k, v, q = self.normal(self.Hkv, n) * self.spread, self.normal(self.Hkv, n), self.normal(self.Hq, n)
        start, found = torch.tensor(self.length), None
        if self.length:
            found = token_ops.attend_tiers(
                *(q, k, v, self.k.tensors, self.v.tensors, mask, start, self.capacity, SCALE),
                *(*self.formats, softcap, sinks),
            )
            mass = found[1] if mass is None else mass
        # a first step is known to be one without asking the device
        place = (None, 0) if self.length == 0 else (start, self.capacity)
        token_ops.append_tiers_(
            *(self.k.tensors, self.v.tensors, k, v, mask, *place, *self.formats),
            *(q, mass, SCALE, softcap, sinks),
        )
        self.keys, self.values, self.queries = (
            torch.cat([old, new], 2)
            for old, new in zip((self.keys, self.values, self.queries), (k, v, q), strict=True)
        )
        return found

    def stored(self):
        start = torch.tensor(self.length)
        return [
            token_ops.dequantize(c.tensors, start, self.capacity, f)[:, :, : self.length]
            for c, f in zip(self.caches, self.formats, strict=True)
        ]

    def members(self):
        """Positions in the high tier, for each row and head."""
        inside = places.in_tier(self.k, self.length)
        return [
            [set(p[m].tolist()) for p, m in zip(*row, strict=True)]
            for row in zip(self.k.positions, inside, strict=True)
        ]


def causal(length, n, B=1, hidden=0):
    mask = torch.ones(n, length + n, dtype=torch.bool).tril(length).expand(B, 1, n, -1).clone()
    mask[0, :, :, :hidden] = False
    return mask


def exact(q, k, v, mask, softcap, sinks=None):
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * SCALE
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sink], 3).softmax(-1)[..., :-1] @ v
    return scores.softmax(-1) @ v


@few
@given(
    high=st.builds(
        make_high,
        share=st.sampled_from((10, 25, 60)),
        bits=st.sampled_from(layout.HIGH_BITS),
        policy=st.sampled_from(layout.POLICIES),
        recent=st.sampled_from((0, 50, 100)),
        balanced=st.booleans(),
    ),
    sink=st.sampled_from((0, 3)),
    prompt=st.integers(1, 90),
    chunks=st.lists(st.sampled_from((1, 1, 1, 5, 40)), min_size=2, max_size=5),
    hidden=st.sampled_from((0, 0, 7)),
    softcap=st.sampled_from((0.0, 20.0)),
    on_device=st.booleans(),
    learned=st.booleans(),
    channels=st.sampled_from(({}, {}, *BY_CHANNEL)),
)
def test_attention_over_both_tiers_is_attention_over_what_they_hold(
    high, sink, prompt, chunks, hidden, softcap, on_device, learned, channels
):
    hidden = min(hidden, prompt - 1)
    cache = Filled(formats(high, sink=sink, **channels), capacity=300)
    sinks = torch.randn(4) * 3 if learned else None
    with pytest.MonkeyPatch.context() as patch:
        if on_device:
            patch.setattr(places, "count_of", lambda start, length: length if start is None else start)
        cache.step(prompt, causal(0, prompt, 2, hidden), softcap=softcap, sinks=sinks)
        for n in chunks:
            mask = causal(cache.length, n, 2, hidden) if hidden or n > 1 else None
            kept, before = cache.stored(), cache.length
            out, mass = cache.step(n, mask, softcap=softcap, sinks=sinks)
            new = [x[:, :, before:] for x in (cache.keys, cache.values)]
            both = [torch.cat(pair, 2) for pair in zip(kept, new, strict=True)]
            want = exact(cache.queries[:, :, before:], *both, mask, softcap, sinks)
            low = scaled_dot_product_attention(
                cache.queries[:, :, before:],
                *(x.repeat_interleave(2, 1) for x in both),
                mask,
                scale=SCALE,
            )
            budget = 1e-4 if softcap else error_budget(low, want, 20)
            assert (out.double() - want).abs().max() <= budget
            assert mass.isfinite().all()
    # the same tokens in both, and no token twice
    assert torch.equal(cache.k.positions, cache.v.positions)
    packed = cache.k.format.packed_tiles(cache.length) * 16
    for row in cache.members():
        for head in row:
            # padding is never in the tier
            assert len(head) <= high.share * packed // 100
    inside = places.in_tier(cache.k, cache.length)
    assert [[len(h) for h in row] for row in cache.members()] == inside.sum(2).tolist()


def test_a_control_without_the_tier_differs():
    cache = Filled(formats())
    cache.step(100)
    low = ops.dequantize(cache.k.low.tensors, None, 100, cache.k.low.format.encode())
    tiered = cache.stored()[0]
    changed = (low != tiered).any(3)
    members = torch.zeros_like(changed)
    for row, b in zip(cache.members(), members, strict=True):
        for head, h in zip(row, b, strict=True):
            h[list(head)] = True
    assert torch.equal(changed, members)
    exactly = (tiered == cache.keys).all(3)
    assert exactly[members].all()
    assert not exactly[:, :, :64][~members[:, :, :64]].any()


def test_the_tokens_with_the_best_scores_are_in_the_tier_and_the_newest_have_their_part():
    high = make_high(25, policy="oracle", recent=50)
    cache = Filled(formats(high))
    scores = torch.rand(2, 2, 100)
    cache.step(100, mass=scores)
    packed = cache.k.format.packed_end(100)
    many = packed // 4
    newest = set(range(packed - many // 2, packed))
    for b in range(2):
        for h in range(2):
            older = scores[b, h, : packed - many // 2].topk(many - many // 2).indices.tolist()
            assert cache.members()[b][h] == newest | set(older)


@pytest.mark.parametrize("on_device", [False, True])
def test_who_leaves_the_tier_is_read_from_its_first_codes_and_never_comes_back(on_device, monkeypatch):
    if on_device:
        monkeypatch.setattr(places, "count_of", lambda start, length: length if start is None else start)
    both = formats(make_high(0, 10, recent=100), tile=16)
    cache = Filled(both)
    cache.step(60)
    codes = [c.low.map(torch.clone) for c in cache.caches]
    before, packed = cache.members(), cache.k.format.packed_end(60)
    for _ in range(40):
        cache.step(1)
    after = cache.members()
    assert before != after
    for old, new in zip(codes, cache.caches, strict=True):
        assert torch.equal(old.qdata[:, :, :packed], new.qdata[:, :, :packed])
    low = ops.dequantize(cache.k.low.tensors, None, 100, cache.k.low.format.encode())
    stored = cache.stored()[0]
    for b, h in ((0, 0), (1, 1)):
        left = list(before[b][h] - after[b][h])
        assert left
        assert torch.equal(stored[b, h, left], low[b, h, left])
    # nothing that was packed before has come in
    assert all(p >= packed for row in after for head in row for p in head)


@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, 4.0, 8.0])])
def test_accumulated_scores_are_the_column_sums_of_all_attention(sinks):
    cache = Filled(formats(make_high(60, recent=0), bits=8, window=64), B=1, Hkv=1, group=3)
    cache.step(150, sinks=sinks)
    for _ in range(6):
        cache.step(1, sinks=sinks)
    q, k = cache.queries.double(), cache.keys.double().expand(1, 3, -1, -1)
    scores = (q @ k.mT * SCALE).masked_fill(~causal(0, 156), -torch.inf)
    # a learned sink takes its part and is in no tier
    first = torch.full((3,), -torch.inf) if sinks is None else sinks
    scores = torch.cat([first.double().view(1, 3, 1, 1).expand(-1, -1, 156, -1), scores], 3)
    weights = scores.softmax(-1)[..., 1:]
    sums = weights.sum((1, 2))[0]
    inside = places.in_tier(cache.k, 156)[0, 0]
    members = cache.k.positions[0, 0][inside].long()
    # later queries saw rounded keys
    assert torch.allclose(cache.k.named("scores")[0, 0][inside].double(), sums[members], atol=0.02)
    slots, live = places.ring_positions(cache.k, 156)
    assert torch.allclose(cache.k.named("waiting")[0, 0][live].double(), sums[slots[live]], atol=0.02)
    last = 150 - 150 % 16 - 64
    assert set(sums[:last].topk(8).indices.tolist()) <= set(members.tolist())


def test_each_policy_ranks_as_it_says():
    def chosen(policy):
        cache = Filled(formats(make_high(25, policy=policy, recent=0)), B=1, Hkv=1, group=2)
        cache.step(100)
        packed = cache.k.format.packed_end(100)
        q, k = cache.queries.double(), cache.keys.double().expand(1, 2, -1, -1)
        weights = (q @ k.mT * SCALE).masked_fill(~causal(0, 100), -torch.inf).softmax(-1)
        seen = torch.arange(100, 0, -1)
        score = {
            "accumulated": weights.sum((0, 1, 2)),
            "mean": weights.sum((0, 1, 2)) / seen,
            "last": weights[:, :, -32:].sum((0, 1, 2)),
            "norm": -cache.keys[0, 0].norm(dim=1),
        }.get(policy)
        members = cache.members()[0][0]
        assert len(members) == packed // 4
        if score is not None:
            assert members == set(score[:packed].topk(packed // 4).indices.tolist())
        return members

    found = [chosen(policy) for policy in ("accumulated", "mean", "last", "norm", "random")]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


@few
@given(
    policy=st.sampled_from(layout.POLICIES),
    bits=st.sampled_from(layout.HIGH_BITS),
    recent=st.sampled_from((0, 50, 100)),
    length=st.integers(20, 120),
    hidden=st.sampled_from((0, 7, 60)),
    data=st.data(),
)
def test_a_prompt_chooses_as_a_step_does_that_finds_an_empty_tier(policy, bits, recent, length, hidden, data):
    """Without tokens before it there is less to sort."""
    share = data.draw(st.sampled_from((0, 10, 40, 99)))
    high = make_high(share, 0 if share else 37, bits=bits, policy=policy, recent=recent, balanced=True)
    chosen = []
    for first in (append._choose_first, first_by_a_step):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(append, "_choose_first", first)
            run = Filled(formats(high, sink=3))
            run.step(length, causal(length, length, 2, hidden), mass=run.normal(2, length)[..., 0].round())
        chosen.append(run)
    a, b = (run.k.positions for run in chosen)
    assert torch.equal(a, b)
    assert (a >= 0).any() or length < 27 or hidden > 50
    for one, other in zip(*(run.caches for run in chosen), strict=True):
        held = one.positions >= 0
        for name in one.format.buffer_names:
            both = [run.named(name) for run in (one, other)]
            if name.startswith("high"):
                # slots of nobody may hold anything; packed tiers have a raw slot that is never used
                both = [x[held] if x.shape[:3] == held.shape else x[:, :, :0] for x in both]
            assert torch.equal(*both), name


def first_by_a_step(keys, values, new_keys, new_values, found, mask, end):
    append._choose(keys, values, new_keys, new_values, found, mask, 0, keys.format.sink, end)


def test_balancing_is_exact_and_helps_where_channels_differ():
    losses = {}
    for balanced in (False, True):
        cache = Filled(formats(make_high(10, balanced=balanced, recent=0)))
        cache.step(100)
        if balanced:
            factor = cache.k.named("balance")
            of_query = cache.queries.abs().amax(2).view(2, 2, 2, 32).amax(2)
            want = (of_query / cache.keys.abs().amax(2)).sqrt()
            assert ((factor / want).log2().abs() <= 0.5001).all()
            assert torch.equal(factor, torch.exp2(factor.log2().round()))
        stored = cache.stored()[0]
        # raw tokens and those of the tier are what they were
        assert torch.equal(stored[:, :, -4:], cache.keys[:, :, -4:])
        q = cache.queries[:, :, -1:].double()
        lost = (stored - cache.keys).double().repeat_interleave(2, 1)
        losses[balanced] = (q @ lost.mT).square().mean()
    assert losses[True] < 0.7 * losses[False]


def test_eviction_sees_the_tier_and_raw_tokens_alone():
    cache = Filled(formats(make_high(25, evicting=True)), B=1, Hkv=1)
    cache.step(100)
    (kept, _), before = cache.stored(), cache.length
    out, _ = cache.step(1)
    visible = torch.zeros(101, dtype=torch.bool)
    visible[list(cache.members()[0][0])] = True
    visible[cache.k.format.packed_end(100) :] = True
    keys = torch.cat([kept, cache.keys[:, :, before:]], 2)
    mask = visible.view(1, 1, 1, -1)
    want = exact(cache.queries[:, :, before:], keys, cache.values, mask, 0.0)
    # members have their own values, and nobody else is seen
    assert (out - want).abs().max() < 1e-5


def by_triton(*given):
    """`attend_lse` of CPU tensors by the Triton kernels, which take them on a GPU where there is one."""
    from kvmix_kernels import triton

    def moved(x):
        if isinstance(x, (list, tuple)):
            return [moved(part) for part in x]
        return x.to(DEVICE) if isinstance(x, torch.Tensor) else x

    return tuple(x.cpu() for x in triton.attend_lse(*moved(given)))


@pytest.mark.parametrize("sinks", [None, torch.tensor([-1.0, 0.5, 2.0, 6.0])])
def test_log_sum_exp_of_kernel_triton_and_reference_agree(sinks):
    fmt = make_format(4, "channel", 16, 16, 0, 8)
    x, q = torch.randn(1, 2, 70, 32), torch.randn(1, 4, 2, 32)
    k, v = (ops.quantize_pack(torch.randn(1, 2, 70, 32), None, fmt.encode()) for _ in range(2))
    mask = torch.rand(1, 4, 2, 72) < 0.7
    mask[:, 1, 0] = False
    new = x[:, :, :2]
    given = (q, new, new, k, v, mask, None, 70, SCALE, fmt.encode(), fmt.encode(), 0.0, sinks)
    keys = torch.cat([ops.dequantize(k, None, 70, fmt.encode()), new], 2).double().repeat_interleave(2, 1)
    want = (q.double() @ keys.mT * SCALE).masked_fill(~mask, -torch.inf).logsumexp(3)
    if sinks is not None:
        want = torch.logaddexp(want, sinks.double()[:, None])
    cached = [Cached.of(b, fmt.encode()) for b in (k, v)]
    for out, lse in (
        ops.attend_lse(*given),
        reference.attend_lse(q, new, new, *cached, mask, 70, SCALE, 0.0, sinks),
        by_triton(*given),
    ):
        assert torch.equal(lse.isinf(), want.isinf())
        assert (lse - want).nan_to_num(0).abs().max() < 5e-3
        assert out.dtype == torch.float32
        assert (out - ops.attend(*given)).abs().max() < 5e-3
    additive = torch.zeros(1, 4, 2, 72).masked_fill(~mask, torch.finfo(torch.float32).min)
    lse = by_triton(*given[:5], additive, *given[6:])[1]
    assert torch.allclose(lse[:, 0], want[:, 0].float(), atol=5e-3)
    if native.kernel() is not None:
        sums = torch.empty(1, 4, 2, 2)
        assert native.attend(q, new, new, *cached, mask, 70, SCALE, 0.0, sinks, sums) is not None


def test_both_tiers_by_the_triton_kernels(monkeypatch):
    for bits in (16, 4):
        high = make_high(25, bits=bits, balanced=True)
        key, value = formats(high, axis="channel", tile=32, window=8)
        found = []
        for lse in (ops.attend_lse, by_triton):
            monkeypatch.setattr(ops, "attend_lse", lse)
            cache = Filled((key, value), B=1, Hkv=1)
            cache.step(80)
            found.append(cache.step(1))
        (a, of_a), (b, of_b) = found
        assert (a - b).abs().max() < 5e-3
        assert torch.allclose(of_a, of_b, atol=5e-3)


def test_a_prompt_that_asks_across_is_refused_before_anything_is_written():
    cache = Filled(formats())
    k, v, q = cache.normal(2, 40), cache.normal(2, 40), cache.normal(4, 7)
    with pytest.raises(FormatError, match="got 7 queries for 40 tokens"):
        token_ops.append_tiers_(
            *(cache.k.tensors, cache.v.tensors, k, v, None, None, 0, *cache.formats, q, None, SCALE)
        )
    assert not cache.k.residual.any()


def test_opcheck():
    cache = Filled(formats(make_high(25, balanced=True)))
    cache.step(90)
    q, k, v = cache.normal(4, 1), cache.normal(2, 1), cache.normal(2, 1)
    buffers = list(cache.k.tensors), list(cache.v.tensors)
    start, mass = torch.tensor(90), torch.rand(2, 2, cache.k.positions.shape[2] + 24 + 1)
    opcheck(token_ops.attend_tiers, (q, k, v, *buffers, None, start, 200, SCALE, *cache.formats))
    more = (*cache.formats, q, mass, SCALE)
    opcheck(token_ops.append_tiers_, (*buffers, k, v, None, start, 200, *more))
    opcheck(token_ops.dequantize_tiers, (buffers[0], start, 200, cache.formats[0]))
    prompt = cache.queries, None, SCALE, 0.0, *cache.formats
    opcheck(token_ops.pack_tiers, (cache.keys, cache.values, *prompt))


BULK = {"axis": "channel", "tile": 32, "sink": 2}
STEPS = {
    "kernel for packed tokens, padding": (formats(make_high(25, balanced=True), **BULK), {"hidden": 7}),
    "its values rotated, a learned sink": (
        (
            with_high(make_format(4, "channel", 16, 32, 2, 8), make_high(25, policy="mean")),
            with_high(
                make_format(2, "token", layout.WHOLE_HEAD, 32, 2, 8, "byte", symmetric=True, rotation=True),
                make_high(25, policy="mean")._replace(scored=0),
            ),
        ),
        {"sinks": torch.tensor([1.0, 4.0]), "group": 2},
    ),
    "evicted, capped": (formats(make_high(25, evicting=True), **BULK), {"softcap": 20.0}),
    "any packed tokens, several queries": (formats(make_high(25, bits=4), tile=24), {"n": 3, "group": 4}),
    "keys with scales per token, padding": (
        formats(make_high(25, balanced=True), tile=32, sink=2),
        {"hidden": 7, "group": 2},
    ),
    "a policy that counts nothing": (
        formats(make_high(25, policy="norm"), **BULK),
        {"added": True, "hidden": 5},
    ),
}


@pytest.mark.parametrize("case", STEPS)
def test_kernels_for_both_tiers_are_the_plain_ops(case, monkeypatch):
    from kvmix_kernels import triton
    from kvmix_kernels.tokens import attend
    from kvmix_kernels.triton import tiers

    both, more = STEPS[case]
    hidden, n, softcap, sinks = (more.get(x) for x in ("hidden", "n", "softcap", "sinks"))
    cache = Filled(both, B=1 + bool(hidden), Hkv=1, group=more.get("group", 1))
    cache.step(76, causal(0, 76, cache.B, hidden or 0), softcap=softcap or 0.0, sinks=sinks)
    n = n or 1
    q, k, v = cache.normal(cache.Hq, n), cache.normal(1, n) * cache.spread, cache.normal(1, n)
    mask = causal(76, n, cache.B, hidden or 0) if hidden or n > 1 or "added" in more else None
    if "added" in more:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    place = (None, 76) if n > 1 else (torch.tensor(76), cache.capacity)
    rest = SCALE, softcap or 0.0, sinks
    want, of_want = attend.attend(q, k, v, cache.k, cache.v, mask, *place, *rest)

    q, k, v, mask, start, sinks = (there(x) for x in (q, k, v, mask, place[0], sinks))
    caches = [c.map(there) for c in cache.caches]

    def fast():
        found = tiers.attend_tiers(
            *(q, k, v, caches[0].tensors, caches[1].tensors, mask, start, place[1], SCALE),
            *(*cache.formats, softcap or 0.0, sinks),
        )
        return [x.cpu() for x in found]

    out, mass = fast()
    assert out.shape == want.shape
    assert (out - want).abs().max() < 2e-2
    assert mass.shape == of_want.shape
    assert torch.allclose(mass, of_want, rtol=2e-2, atol=1e-3)
    # what is left is how the kernels of one tier round
    monkeypatch.setattr(ops, "attend_lse", triton.attend_lse)
    found = attend.attend(q, k, v, *caches, mask, start, place[1], SCALE, softcap or 0.0, sinks)
    want, of_want = (x.cpu() for x in found)
    assert (out - want).abs().max() < 2e-5
    assert torch.allclose(mass, of_want, rtol=2e-3, atol=1e-6)
    # nobody skipped counts the tokens of the high tier twice
    skipped = caches[0].named(layout.SKIPPED_NAME)
    assert skipped.any()
    skipped.zero_()
    assert (fast()[0] - want).abs().max() > 2e-4


EXCHANGES = {
    "accumulated": (formats(make_high(25)), 0),
    "mean, sinks": (formats(make_high(60, policy="mean", recent=0), sink=3), 0),
    "faded, padding, no window": (formats(make_high(25, policy="last", recent=100), window=0), 37),
    "chance, a number of them": (formats(make_high(0, 7, policy="random", balanced=True)), 0),
    "evicted": (formats(make_high(25, evicting=True)), 0),
}


@pytest.mark.parametrize("case", EXCHANGES)
def test_the_kernel_of_a_step_stores_what_the_plain_ops_store(case, monkeypatch):
    from kvmix_kernels.tokens import append
    from kvmix_kernels.triton import tiers

    both, hidden = EXCHANGES[case]
    # several blocks of slots
    monkeypatch.setattr(tiers, "EXCHANGED", 16)
    cache = Filled(both, B=2, Hkv=1, group=1)
    cache.step(55, causal(0, 55, 2, hidden))
    kept, other = ([c.map(there) for c in cache.caches] for _ in range(2))
    other = [c.map(torch.clone) for c in other]
    first = kept[0].positions.clone()
    for length in range(55, 67):
        mask = there(causal(length, 1, 2, hidden)) if hidden else None
        place = (there(torch.tensor(length)), 67) if length % 2 else (None, length)
        new = there(cache.normal(1, 1)), there(cache.normal(1, 1))
        columns = cache.k.positions.shape[2] + cache.k.format.ring + 1
        # few different numbers: equals stay in their order
        mass = there(torch.randint(3, (2, 1, columns), generator=cache.generator).float() / 7)
        mass = mass if policy_of(cache.k.format).decay else None
        append.append(*kept, *new, mask, *place, None, mass, SCALE, 0.0)
        tiers.append_tiers_(
            *(*(c.tensors for c in other), *new, mask, *place, *cache.formats, None, mass, SCALE)
        )
        for c, o in zip(kept, other, strict=True):
            low = len(c.format.low.buffer_names)
            for name, a, b in zip(c.format.buffer_names, c.tensors, o.tensors, strict=True):
                high = c.format.buffer_names.index(name) >= low
                assert torch.equal(a, b) if high else torch.allclose(a.float(), b.float(), atol=1e-5), name
    assert not torch.equal(first, kept[0].positions)
    before = other[0].map(torch.clone)
    full = there(torch.tensor(67))
    given = (*(c.tensors for c in other), *new, None, full, 67, *cache.formats, None, None, SCALE)
    if full.is_cuda:
        tiers.append_tiers_(*given)
    else:
        with pytest.raises(CapacityError):
            tiers.append_tiers_(*given)
    assert torch.equal(other[0].positions, before.positions)
    assert torch.equal(other[0].residual, before.residual)


def test_too_many_tokens_are_refused_before_anything_is_written():
    cache = Filled(formats(), capacity=64)
    cache.step(60)
    before = [b.clone() for c in cache.caches for b in c.tensors]
    with pytest.raises(CapacityError, match="exceed the capacity of 64"):
        cache.step(5)
    assert all(
        torch.equal(a, b) for a, b in zip(before, (b for c in cache.caches for b in c.tensors), strict=True)
    )


def test_bad_parts_are_named():
    with pytest.raises(FormatError, match="less than one token"):
        with_high(make_format(2, "token", 16, 16), make_high(5))
    with pytest.raises(FormatError, match="16 bits has no high tier"):
        with_high(make_format(16), make_high(20))
    with pytest.raises(FormatError, match="either a share of the tokens or a fixed number"):
        make_high(20, 30)
    with pytest.raises(FormatError, match="policy must be one of"):
        make_high(20, policy="best")


@given(
    st.builds(
        make_high,
        st.integers(10, 99),
        bits=st.sampled_from(layout.HIGH_BITS),
        policy=st.sampled_from(layout.POLICIES),
        balanced=st.booleans(),
    )
)
def test_formats_are_what_was_encoded(high):
    for fmt in formats(high):
        assert layout.TensorFormat.decode(fmt.encode()) == fmt
        sizes = allocate(1, 1, 32, 3, fmt.residual_slots, fmt, torch.float16, "cpu")
        assert sum(b.numel() * b.element_size() for b in sizes.tensors) == layout.buffer_nbytes(
            fmt, 32, 3, fmt.residual_slots, 2
        )
