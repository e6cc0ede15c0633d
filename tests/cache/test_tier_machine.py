"""Tensors with a high tier of tokens in random sequences, against plain lists of tokens (`plain.py`)."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, replace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvmix_fx.cache import QuantizedKVTensor, tiers
from kvmix_fx.testing.tensors import values
from kvmix_kernels import layout
from kvmix_kernels.tokens.ops import append_tiers_
from kvmix_kernels.tokens.places import in_tier
from tests.cache.plain import Tokens, rounded
from tests.cache.test_machine import DTYPES, PHASES, SEQUENCES, copied_over, saved, two_formats

HEADS, D = 2, 32


@dataclass(frozen=True)
class Pair:
    """Keys and values. tokens: as stored, so keys times their factors, and all of them in the low tier.

    high: the packed ones as they would be in the high tier, [B, H, n * tile, D].
    """

    both: tuple[QuantizedKVTensor, QuantizedKVTensor]
    tokens: tuple[Tokens, Tokens]
    high: tuple[torch.Tensor, torch.Tensor]

    def map(self, of_tensor, of_rows):
        """The same done to the tensors and to what they must read as."""
        tokens = tuple(t.map(of_rows) for t in self.tokens)
        return Pair(tuple(map(of_tensor, self.both)), tokens, tuple(map(of_rows, self.high)))

    def __len__(self):
        return len(self.tokens[0])


high_tiers = st.builds(
    layout.make_high,
    share=st.sampled_from((25, 60)),
    bits=st.sampled_from(layout.HIGH_BITS),
    policy=st.sampled_from(("accumulated", "mean", "last", "norm", "random")),
    recent=st.sampled_from((0, 50)),
    balanced=st.booleans(),
)


def factor(t):
    return t.cached.named("balance").unsqueeze(2) if t.format.high.balanced else torch.ones(())


class Tiers(RuleBasedStateMachine):
    """A token reads as its tier has it: as it was, or rounded to the bits of the high or of the low tier."""

    @initialize(
        both=two_formats().filter(lambda f: f[0].tile >= 4 and not (f[0].is_raw or f[1].is_raw)),
        high=high_tiers,
        length=st.integers(1, 70),
        seed=st.integers(0, 1 << 20),
        batch=st.integers(1, 2),
        dtype=st.sampled_from(DTYPES),
        fixed=st.booleans(),
        queried=st.booleans(),
    )
    def start(self, both, high, length, seed, batch, dtype, fixed, queried):
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)
        low = [f._replace(order=layout.ORDER_PROMPT) if f.order == layout.ORDER_PLAN else f for f in both]
        of_values = high._replace(scored=0, balanced=0)
        key, value = (layout.with_high(f, h) for f, h in zip(low, (high, of_values), strict=True))
        k, v, query = (self.draw(batch, length, dtype) for _ in range(3))
        query = query if queried else None
        if fixed:
            made = (
                QuantizedKVTensor.empty_fixed(batch, HEADS, length + 90, D, f, dtype, "cpu")
                for f in (key, value)
            )
            tensors = tuple(made)
            self.write(tensors, k, v, query, None)
        else:
            tensors = tiers.pack(k, v, (key, value), query)
        nothing = tuple(Tokens.none(t.format, k) for t in tensors)
        self.pool = [self.appended(Pair(tensors, nothing, tuple(t.packed for t in nothing)), tensors, (k, v))]

    def draw(self, batch, n, dtype):
        self.seed += 1
        return values("normal", (batch, HEADS, n, D), self.seed, dtype)

    def write(self, both, k, v, query, mass):
        """As a compiled step writes a fixed cache."""
        buffers, numbers = [t.cached.tensors for t in both], [t.format.encode() for t in both]
        live, capacity = both[0].live, both[0].shape[2]
        append_tiers_(*buffers, k, v, None, live, capacity, *numbers, query, mass, D**-0.5)
        for t in both:
            t.live.add_(k.shape[2])

    def appended(self, pair, tensors, new):
        stored = (x.to(t.dtype) * factor(t) for t, x in zip(tensors, new, strict=True))
        grown, high = [], []
        for tokens, old, t, x in zip(pair.tokens, pair.high, tensors, stored, strict=True):
            grown.append(tokens.append(x.to(t.dtype), None, t.cached.order))
            # whoever is packed in this step has been what it was until now
            fresh = grown[-1].raw[:, :, tokens.end : grown[-1].end]
            if fresh.shape[2] and not t.format.high_format.is_raw:
                fresh = rounded(fresh, None, t.format.high_format, None)
            high.append(torch.cat([old, fresh.float()], 2))
        return Pair(tuple(tensors), tuple(grown), tuple(high))

    def add(self, pair, which, instead=False):
        if instead:
            self.pool[which % len(self.pool)] = pair
        else:
            self.pool = [*self.pool, pair][-3:]

    which = st.integers(0, 2)

    @rule(which=which, n=st.sampled_from((1, 1, 2, 3, 8, 40)), counted=st.booleans())
    def append(self, which, n, counted):
        pair = self.pool[which % len(self.pool)]
        keys = pair.both[0]
        if not len(pair):
            return  # a prompt again, whose balance would be another
        n = min(n, keys.shape[2] - len(pair)) if keys.is_fixed else n
        if not n:
            return
        k, v = (self.draw(keys.shape[0], n, keys.dtype) for _ in range(2))
        mass = None
        if counted:
            columns = keys.positions.shape[2] + keys.format.ring + n
            mass = torch.rand(keys.shape[0], HEADS, columns, generator=self.generator)
        if keys.is_fixed:
            self.write(pair.both, k, v, None, mass)
            tensors = pair.both
        else:
            tensors = tiers.append(*pair.both, k, v, mass)
        self.add(self.appended(pair, tensors, (k, v)), which, keys.is_fixed)

    @rule(which=which, back=st.integers(1, 60))
    def rewind(self, which, back):
        pair = self.pool[which % len(self.pool)]
        length = max(1, len(pair) - back)
        fixed = pair.both[0].is_fixed
        shorter = []
        for t, tokens in zip(pair.both, pair.tokens, strict=True):
            # what is raw again is what it read as
            read = (t.dequantize()[:, :, : len(tokens)] * factor(t)).to(t.dtype)
            kept = tokens.crop(length)
            first, last = kept.end, min(length, tokens.end)
            kept.raw[:, :, first:last] = read[:, :, first:last]
            shorter.append(kept)
        high = tuple(x[:, :, : t.packed.shape[2]] for x, t in zip(pair.high, shorter, strict=True))
        if fixed:
            for t in pair.both:
                t.rewind_(length, len(pair))
                t.live.fill_(length)
            self.add(Pair(pair.both, tuple(shorter), high), which, True)
        elif length < len(pair):
            self.add(Pair(tuple(t[:, :, :length] for t in pair.both), tuple(shorter), high), which)

    @rule(which=which, rows=st.lists(st.integers(0, 1), min_size=1, max_size=2), way=st.integers(0, 2))
    def other_rows(self, which, rows, way):
        pair = self.pool[which % len(self.pool)]
        index = torch.tensor([i % pair.both[0].shape[0] for i in rows])
        pick = (
            lambda t: t.index_select(0, index),
            lambda t: t[index],
            lambda t: t.repeat_interleave(2, dim=0)[:2].clone(),
        )[way]
        self.add(pair.map(pick, pick), which)

    @rule(which=which, way=st.integers(0, 4))
    def copied(self, which, way):
        pair = self.pool[which % len(self.pool)]
        same = (torch.clone, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t)), saved, copied_over)[way]
        self.add(replace(pair, both=tuple(map(same, pair.both))), which)

    @rule(which=which, dtype=st.sampled_from(DTYPES))
    def other_dtype(self, which, dtype):
        pair = self.pool[which % len(self.pool)]
        if dtype != pair.both[0].dtype:
            moved = tuple(t.to(dtype) for t in pair.both)
            high = tuple(
                x if t.format.high.bits != layout.RAW_BITS else x.to(dtype).float()
                for x, t in zip(pair.high, moved, strict=True)
            )
            self.add(Pair(moved, tuple(t.to(dtype) for t in pair.tokens), high), which)

    @rule(which=which, extra=st.integers(0, 70))
    def enlarge(self, which, extra):
        pair = self.pool[which % len(self.pool)]
        if pair.both[0].is_fixed:
            larger = tuple(t.enlarged(t.shape[2] + extra) for t in pair.both)
            self.add(replace(pair, both=larger), which, True)

    @invariant()
    def all_read_as_their_tokens(self):
        for pair in getattr(self, "pool", []):
            length = len(pair)
            assert torch.equal(pair.both[0].positions, pair.both[1].positions)
            for t, tokens, high in zip(pair.both, pair.tokens, pair.high, strict=True):
                fmt = t.format
                assert t.stored_tokens() == length
                inside = in_tier(t.cached, length)
                packed = tokens.packed.shape[2]
                # each token once
                there = torch.zeros(*inside.shape[:2], fmt.sink + packed + 1, dtype=torch.int64)
                where = t.positions.long().masked_fill(~inside, fmt.sink + packed)
                there.scatter_add_(2, where, inside.long())
                assert (there <= 1).all()
                expected = tokens.reads()
                span = slice(fmt.sink, fmt.sink + packed)
                if fmt.high.scored:
                    # kernels are told the same by token
                    apart = there[:, :, span].bool() | bool(fmt.high.evicting)
                    assert torch.equal(t.skipped[:, :, :packed], apart.to(torch.uint8))
                chosen = there[:, :, span].unsqueeze(3).bool()
                expected[:, :, span] = torch.where(chosen, high.to(t.dtype), expected[:, :, span])
                expected = (expected / factor(t)).to(t.dtype)
                assert torch.equal(t.dequantize()[:, :, :length], expected)


Tiers.TestCase.settings = settings(max_examples=SEQUENCES // 2, stateful_step_count=12, phases=PHASES)
TestTiers = Tiers.TestCase
