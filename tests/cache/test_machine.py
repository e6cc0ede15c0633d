"""Packed tensors driven through random sequences, against plain lists of tokens (`plain.py`)."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from safetensors.torch import load, save

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.cache.growth import prepare_append
from kvmix_fx.errors import CacheMutationError, CapacityError
from kvmix_fx.testing.tensors import error_budget, formats, split_sums_lose, values
from kvmix_kernels import layout, ops
from kvmix_kernels.cached import as_packed
from tests.cache.plain import Tokens, attention

HEADS, GROUP, D = 2, 2, 32
FAMILIES = ("normal", "normal", "outlier channels", "constant", "tiny", "offset", "signed zeros")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ELSEWHERE = "cuda" if torch.cuda.is_available() else "cpu"
"""A device that tensors are moved to and back."""
COUNTS = st.sampled_from((1, 1, 1, 2, 3, 8, 17, 40))


@dataclass(frozen=True)
class Pair:
    """Keys and values of a layer, and the tokens they must read as. pad: hidden leading tokens, per row."""

    keys: QuantizedKVTensor
    values: QuantizedKVTensor
    tokens: tuple[Tokens, Tokens]
    pad: torch.Tensor

    @property
    def both(self):
        return self.keys, self.values

    def __len__(self):
        return len(self.tokens[0])


@st.composite
def two_formats(draw):
    """Of keys and values, which share sink, window and tile as in a plan; keys may have a plan's order."""
    key, value = draw(formats(D)), draw(formats(D, keys=False))
    tile = key.tile if value.is_raw or value.axis == layout.AXIS_TOKEN else value.tile
    if not key.is_raw and key.axis == layout.AXIS_CHANNEL:
        tile = max(tile, key.tile) if not max(tile, key.tile) % key.group_size else key.tile
        if value.axis == layout.AXIS_CHANNEL and tile % value.group_size:
            tile = key.group_size * value.group_size
    same = {"sink": key.sink, "window": key.window, "tile": tile}
    key = key._replace(**same)
    if key.order == layout.ORDER_PROMPT and draw(st.booleans()):
        key = key._replace(order=layout.ORDER_PLAN)
    return key, value._replace(**same)


class Machine(RuleBasedStateMachine):
    """Every living pair reads as its tokens, whatever happened to it and to the others."""

    @initialize(
        both=two_formats(),
        seed=st.integers(0, 1 << 20),
        batch=st.integers(1, 3),
        length=st.integers(1, 70),
        padded=st.booleans(),
        fixed=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        queried=st.booleans(),
    )
    def start(self, both, seed, batch, length, padded, fixed, dtype, queried):
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)
        self.pool: list[Pair] = []
        k, v = (self.draw("normal", batch, length, dtype) for _ in range(2))
        pad = torch.zeros(batch, dtype=torch.int64)
        if padded:
            pad = torch.randint(0, length, (batch,), generator=self.generator)
        mask = self.mask(pad, 0, length) if padded else None
        orders = [torch.randperm(D, generator=self.generator) for _ in range(HEADS)]
        self.plan_order = torch.stack(orders).to(torch.int32)
        query = self.draw("normal", batch, length, dtype, HEADS * GROUP) if queried else None
        tensors = []
        for x, fmt in zip((k, v), both, strict=True):
            hint = self.plan_order if fmt.order == layout.ORDER_PLAN else None
            if fixed:
                capacity = length + int(torch.randint(0, 90, (), generator=self.generator))
                t = QuantizedKVTensor.empty_fixed(batch, HEADS, capacity, D, fmt, dtype, "cpu", order=hint)
            else:
                t = QuantizedKVTensor.from_hp(x, fmt, mask, query if fmt.asks_queries else hint)
            tensors.append(t)
        if fixed:
            self.capacity = tensors[0].shape[2]
            tensors[1] = tensors[1].enlarged(max(t.shape[2] for t in tensors))
            tensors[0] = tensors[0].enlarged(tensors[1].shape[2])
            self.fixed_step(tensors, k, v, mask, query)
        valid = None if mask is None else mask[:, 0, -1]
        tokens = [
            Tokens.none(t.format, x).append(x, valid, t.cached.order)
            for t, x in zip(tensors, (k, v), strict=True)
        ]
        self.add(Pair(*tensors, tuple(tokens), pad))

    def draw(self, family, batch, n, dtype, heads=HEADS):
        self.seed += 1
        return values(family, (batch, heads, n, D), self.seed, dtype)

    def mask(self, pad, before, n):
        """Causal, without padding: bool [B, 1, n, before + n]."""
        places = torch.arange(before + n)
        causal = places <= (before + torch.arange(n))[:, None]
        return (places >= pad[:, None, None]).unsqueeze(1) & causal

    def add(self, pair, instead=None):
        if instead is not None:
            self.pool[instead % len(self.pool)] = pair
        else:
            self.pool = [*self.pool, pair][-3:]

    def pair(self, which) -> Pair:
        return self.pool[which % len(self.pool)]

    def more(self, pair, n, family):
        return [self.draw(family, len(pair.pad), n, pair.keys.dtype) for _ in range(2)]

    def room(self, pair):
        return pair.keys.shape[2] - len(pair) if pair.keys.is_fixed else 1000

    def fixed_step(self, tensors, k, v, mask, query):
        """As a compiled step writes a fixed cache."""
        buffers = [t.cached.tensors for t in tensors]
        numbers = [t.format.encode() for t in tensors]
        ops.append_(*buffers, k, v, mask, tensors[0].live, tensors[0].shape[2], *numbers, query)
        for t in tensors:
            t.live.add_(k.shape[2])

    def appended(self, pair, tensors, new, valid):
        found = [
            tokens.append(x, valid, t.cached.order)
            for tokens, t, x in zip(pair.tokens, tensors, new, strict=True)
        ]
        return replace(pair, keys=tensors[0], values=tensors[1], tokens=tuple(found))

    which = st.integers(0, 2)

    @rule(which=which, n=COUNTS, family=st.sampled_from(FAMILIES), way=st.integers(0, 3))
    def append(self, which, n, family, way):
        """Eagerly: nobody says what is padding."""
        pair = self.pair(which)
        if not pair.keys.is_fixed:
            new = self.more(pair, n, family)
            tensors = [torch.cat([t, x], -2) for t, x in zip(pair.both, new, strict=True)]
            return self.add(self.appended(pair, tensors, new, None))
        n = min(n, self.room(pair))
        if n:
            self.write(pair, len(pair), n, family, way, which)
        return None

    def write(self, pair, start, n, family, way, which):
        new = self.more(pair, n, family)
        places = torch.arange(start, start + n)
        for t, x in zip(pair.both, new, strict=True):
            if way == 0:
                t.index_copy_(2, places, x)
            elif way == 1:
                t[:, :, places] = x
            elif way == 2:
                t[:, :, start : start + n] = x
            else:
                torch.ops.aten.index_put_(t, [None, None, places], x)
        self.add(self.appended(pair, pair.both, new, None), which)

    @rule(which=which, n=COUNTS, family=st.sampled_from(FAMILIES), queried=st.booleans())
    def step(self, which, n, family, queried):
        """As a compiled step does it, with the mask and the queries."""
        pair = self.pair(which)
        n = min(n, self.room(pair))
        if not n:
            return
        k, v = self.more(pair, n, family)
        query = self.draw("normal", len(k), n, k.dtype, HEADS * GROUP) if queried else None
        mask = self.mask(pair.pad, len(pair), n)
        if pair.keys.is_fixed:
            tensors = pair.both
            self.fixed_step(tensors, k, v, mask, query)
        else:
            ready = [prepare_append(t.cached, t.lease, n) for t in pair.both]
            buffers, numbers = [c.tensors for c, _ in ready], [c.format.encode() for c, _ in ready]
            ops.append_(*buffers, k, v, mask, None, len(pair), *numbers, query)
            tensors = [QuantizedKVTensor(c, len(pair) + n, store=store) for c, store in ready]
        new = self.appended(pair, tensors, (k, v), mask[:, 0, -1])
        self.add(new, which if pair.keys.is_fixed else None)

    @rule(which=which, back=st.integers(1, 60), n=COUNTS, way=st.integers(0, 1))
    def rewind(self, which, back, n, way):
        """A growing pair is cropped, a fixed one is written at an earlier place."""
        pair = self.pair(which)
        length = max(1 if not pair.keys.is_fixed else 0, len(pair) - back)
        shorter = tuple(tokens.crop(length) for tokens in pair.tokens)
        if not pair.keys.is_fixed:
            tensors = [t[..., :length, :] if way else t[:, :, : length - len(pair)] for t in pair.both]
            if length < len(pair):
                self.add(Pair(*tensors, shorter, pair.pad))
            return
        n = min(n, pair.keys.shape[2] - length)
        self.write(replace(pair, tokens=shorter), length, n, "normal", way, which)

    @rule(which=which, rows=st.lists(st.integers(0, 2), min_size=1, max_size=3), way=st.integers(0, 4))
    def other_rows(self, which, rows, way):
        pair = self.pair(which)
        index = torch.tensor([i % len(pair.pad) for i in rows])
        last = int(index.max()) + 1
        if way == 3 and 2 * len(pair.pad) > 4:
            way = 0
        pick = (
            lambda t: t.index_select(0, index),
            lambda t: t[index],
            lambda t: t[index, ...],
            lambda t: t.repeat_interleave(2, dim=0),
            lambda t: t[:last].clone(),  # all rows of a fixed tensor are itself
        )[way]
        tensors = [pick(t) for t in pair.both]
        self.add(Pair(*tensors, tuple(tokens.map(pick) for tokens in pair.tokens), pick(pair.pad)))

    @rule(which=which, way=st.integers(0, 7))
    def copied(self, which, way):
        pair = self.pair(which)
        same = (
            torch.clone,
            copy.deepcopy,
            lambda t: pickle.loads(pickle.dumps(t)),
            saved,
            lambda t: QuantizedKVTensor.from_state(load(save(t.to_state("a.key."))), "a.key."),
            lambda t: t.to(ELSEWHERE, copy=True).to("cpu"),
            copied_over,
            # one that shares its data may not be written by two
            torch.clone if pair.keys.is_fixed else torch.detach,
        )[way]
        self.add(replace(pair, keys=same(pair.keys), values=same(pair.values)))

    @rule(which=which, dtype=st.sampled_from((*DTYPES, torch.float64)))
    def other_dtype(self, which, dtype):
        pair = self.pair(which)
        tensors = [t.to(dtype) for t in pair.both]
        if dtype != pair.keys.dtype:
            self.add(Pair(*tensors, tuple(tokens.to(dtype) for tokens in pair.tokens), pair.pad))

    @rule(which=which)
    def zero(self, which):
        pair = self.pair(which)
        for t in pair.both:
            t.zero_()
        empty = tuple(t.crop(0) if pair.keys.is_fixed else t.zeros() for t in pair.tokens)
        pad = torch.zeros_like(pair.pad) if pair.keys.is_fixed else pair.pad
        self.add(Pair(*pair.both, empty, pad), which)

    @rule(which=which, extra=st.integers(0, 70))
    def enlarge(self, which, extra):
        pair = self.pair(which)
        if pair.keys.is_fixed:
            larger = [t.enlarged(pair.keys.shape[2] + extra) for t in pair.both]
            self.add(replace(pair, **dict(zip(NAMES, larger, strict=True))), which)

    @rule(which=which, tiles=st.integers(1, 3), room=st.integers(0, 200))
    def leave_at_the_front(self, which, tiles, room):
        pair = self.pair(which)
        fmt = pair.tokens[0].fmt
        known = all(t.format.order in (0, 1, 2) and not t.format.apart for t in pair.both)
        raw = all(tokens.fmt.is_raw for tokens in pair.tokens)
        have = len(pair) // fmt.tile if raw else fmt.packed_tiles(len(pair))
        if pair.keys.is_fixed or fmt.sink or not known:
            return
        tiles = min(tiles, have)
        left = len(pair) - tiles * fmt.tile
        tensors = [t.without_front(tiles, left + room) for t in pair.both]
        shorter = tuple(tokens.without_front(tiles) for tokens in pair.tokens)
        self.add(Pair(*tensors, shorter, (pair.pad - tiles * fmt.tile).clamp(min=0)))

    @rule(which=which)
    def drop(self, which):
        if len(self.pool) > 1:
            del self.pool[which % len(self.pool)]

    @rule(which=which, n=st.integers(1, 50))
    def refused(self, which, n):
        pair = self.pair(which)
        new = self.more(pair, n, "normal")[0]
        if not pair.keys.is_fixed:
            with pytest.raises(CacheMutationError):
                pair.keys[:, :, :n] = new
            return
        gap = torch.arange(len(pair) + 1, len(pair) + 1 + n)
        with pytest.raises((CacheMutationError, CapacityError)):
            pair.keys.index_copy_(2, gap, new)
        over = torch.arange(len(pair), len(pair) + n)
        if n > self.room(pair):
            with pytest.raises(CapacityError):
                pair.keys[:, :, over] = new

    @rule(
        which=which,
        Lq=st.integers(1, 3),
        n=st.integers(0, 2),
        softcap=st.sampled_from((0.0, 0.0, 1.5)),
        kind=st.sampled_from(("none", "padding", "random", "additive")),
    )
    def attend(self, which, Lq, n, softcap, kind):
        pair = self.pair(which)
        n = n if len(pair) else 1
        k, v = self.more(pair, n, "normal")
        query = self.draw("normal", len(pair.pad), Lq, k.dtype, HEADS * GROUP)
        S = len(pair) + n
        mask = None
        if kind == "padding":
            mask = (torch.arange(S) >= pair.pad[:, None])[:, None, None]
        elif kind == "random":
            mask = torch.rand(len(k), HEADS * GROUP, Lq, S, generator=self.generator) < 0.6
        elif kind == "additive":
            mask = torch.randn(len(k), 1, Lq, S, generator=self.generator)
        new = (k, v) if n else (None, None)
        fixed = pair.keys.is_fixed
        got = ops.attend(
            query, *new, pair.keys.cached.tensors, pair.values.cached.tensors, mask,
            pair.keys.live, pair.keys.shape[2] if fixed else len(pair), D**-0.5,
            pair.keys.format.encode(), pair.values.format.encode(), softcap,
        )  # fmt: skip
        wide = [torch.cat([t.numbers(), x.float()], 2) for t, x in zip(pair.tokens, (k, v), strict=True)]
        given_ = query.to(wide[0].dtype), *wide, mask, D**-0.5, softcap
        low = attention(*given_).to(query.dtype)
        exact = attention(query.double(), *(t.double() for t in wide), *given_[3:])
        if not bool(exact.isfinite().all()):
            return
        budget = error_budget(low, exact, 4.0)
        budget += split_sums_lose(query, pair.keys.cached.low, pair.values.cached.low, D**-0.5, exact)
        error = (got.double() - exact).abs().max().item()
        assert got.dtype == query.dtype
        assert error <= budget, (error, budget)

    @invariant()
    def all_read_as_their_tokens(self):
        for pair in getattr(self, "pool", []):
            for t, tokens in zip(pair.both, pair.tokens, strict=True):
                assert t.stored_tokens() == len(tokens)
                got, want = t.dequantize(), tokens.reads()
                assert got.dtype == want.dtype
                assert torch.equal(got[:, :, : len(tokens)], want), t
                assert not got[:, :, len(tokens) :].any()
                self.check_order(t, tokens)

    def check_order(self, t, tokens):
        order = t.cached.order
        if order is None:
            return
        tiles = tokens.packed.shape[2] // t.format.tile
        used = order[:, :, :tiles] if t.format.by_tile else order
        assert torch.equal(used.sort(-1).values.long(), torch.arange(D).expand(used.shape))
        if t.format.order == layout.ORDER_PLAN:
            planned = as_packed(self.plan_order, t.format)
            assert torch.equal(order, planned.expand(order.shape))


NAMES = ("keys", "values")


def saved(t):
    stream = io.BytesIO()
    torch.save(t, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def copied_over(t):
    """Onto a tensor of as many other tokens."""
    other = t.clone().zero_()
    other.copy_(t)
    return other


PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
SEQUENCES = max(200, settings.default.max_examples)
Machine.TestCase.settings = settings(max_examples=SEQUENCES, stateful_step_count=12, phases=PHASES)
TestMachine = Machine.TestCase
