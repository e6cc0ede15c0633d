"""Layers of caches driven eagerly through random sequences, against plain lists of tokens (`plain.py`)."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.integrations.transformers.layers import KVMixDynamicLayer, KVMixStaticLayer
from kvmix_fx.testing.tensors import values
from kvmix_kernels import layout
from tests.cache.plain import Tokens
from tests.cache.test_machine import PHASES, SEQUENCES, D, two_formats

HEADS = 2


class Layers(RuleBasedStateMachine):
    """Two layers of one cache, all of whose tensors share a counter if their capacity is fixed."""

    @initialize(
        both=two_formats(), fixed=st.booleans(), batch=st.integers(1, 2), seed=st.integers(0, 1 << 20)
    )
    def start(self, both, fixed, batch, seed):
        # a plan gives its order to the pass, and here nobody does
        self.formats = tuple(f._replace(order=layout.ORDER_PROMPT) if f.order == 1 else f for f in both)
        self.fixed, self.batch, self.seed, self.capacity = fixed, batch, seed, 40
        planned = SimpleNamespace(formats=lambda *_: self.formats, key=SimpleNamespace(channel_order=None))
        if fixed:
            self.layers = [KVMixStaticLayer(self.capacity, planned) for _ in range(2)]
        else:
            self.layers = [KVMixDynamicLayer(planned) for _ in range(2)]
        if fixed:
            empty = torch.zeros(batch, HEADS, 0, D)
            self.layers[0].lazy_initialization(empty, empty)
            self.layers[1].lazy_initialization(empty, empty, self.layers[0].keys.live)
        self.forget()

    def forget(self):
        nothing = torch.zeros(self.batch, HEADS, 0, D)
        self.tokens = [[Tokens.none(f, nothing) for f in self.formats] for _ in self.layers]

    @property
    def length(self):
        return len(self.tokens[0][0])

    @rule(n=st.sampled_from((1, 1, 1, 2, 5, 30)))
    def update(self, n):
        n = min(n, self.capacity - self.length) if self.fixed else n
        if not n:
            return
        first = not self.length
        for layer, tokens in zip(self.layers, self.tokens, strict=True):
            new = []
            for _ in range(2):
                self.seed += 1
                new.append(values("normal", (self.batch, HEADS, n, D), self.seed))
            got = layer.update(*new)
            for i, t in enumerate((layer.keys, layer.values)):
                tokens[i] = tokens[i].append(new[i], None, t.cached.order)
                expected = new[i] if first else tokens[i].reads()
                assert torch.equal(plain(got[i])[:, :, : expected.shape[2]], expected)

    @rule(back=st.integers(1, 50))
    def crop(self, back):
        back = min(back, self.length)
        if back and (self.fixed or back < self.length):
            for layer in self.layers:
                layer.crop(-back)
            self.tokens = [[t.crop(len(t) - back) for t in pair] for pair in self.tokens]

    @rule()
    def reset(self):
        if self.length:
            for layer in self.layers:
                layer.reset()
            self.forget()

    @rule(more=st.integers(0, 50))
    def enlarge(self, more):
        if self.fixed:
            self.capacity += more
            for layer in self.layers:
                layer.enlarge(self.capacity)

    @rule(more=st.integers(1, 50), one=st.booleans())
    def enlarge_and_take_back(self, more, one):
        """As if there had been no memory for the second layer, or after it."""
        if self.fixed:
            for layer in self.layers[: 1 if one else 2]:
                layer.enlarge(self.capacity + more)
            for layer in self.layers:
                layer.narrow(self.capacity)

    @rule(rows=st.lists(st.integers(0, 1), min_size=1, max_size=2), way=st.integers(0, 2))
    def other_rows(self, rows, way):
        if not self.length:
            return
        index = torch.tensor([i % self.batch for i in rows])
        if way == 0 and self.batch == 1:
            for layer in self.layers:
                layer.batch_repeat_interleave(2)
            index = torch.zeros(2, dtype=torch.int64)
        elif way == 1 and len(index) == self.batch:
            for layer in self.layers:
                layer.reorder_cache(index)
        else:
            for layer in self.layers:
                layer.batch_select_indices(index)
        self.batch = len(index)
        self.tokens = [[t.map(lambda x: x[index]) for t in pair] for pair in self.tokens]

    @invariant()
    def layers_read_as_their_tokens(self):
        if not hasattr(self, "tokens"):
            return
        for layer, pair in zip(self.layers, self.tokens, strict=True):
            assert int(layer.get_seq_length()) == self.length
            for t, tokens in zip((layer.keys, layer.values), pair, strict=True):
                if self.length:
                    read = t.dequantize()
                    assert torch.equal(read[:, :, : len(tokens)], tokens.reads())
                    assert not read[:, :, len(tokens) :].any()


def plain(x):
    return x.dequantize() if isinstance(x, QuantizedKVTensor) else x


Layers.TestCase.settings = settings(max_examples=SEQUENCES // 2, stateful_step_count=12, phases=PHASES)
TestLayers = Layers.TestCase


def test_tensors_that_share_a_counter_keep_their_own_tokens():
    """The second one to be written in a step saw the counter moved on, and took that for a rollback."""
    fmt = layout.make_format(2, "channel", 8, 8, 0, 8)
    planned = SimpleNamespace(formats=lambda *_: (fmt, fmt), key=SimpleNamespace(channel_order=None))
    layer = KVMixStaticLayer(64, planned)
    x = values("normal", (1, HEADS, 40, D), 0)
    for i in range(40):
        layer.update(x[:, :, i : i + 1], x[:, :, i : i + 1])
    assert layer.keys.live is layer.values.live
    want = QuantizedKVTensor.from_hp(x, fmt).dequantize()
    assert torch.equal(layer.keys.dequantize()[:, :, :40], want)
    assert torch.equal(layer.values.dequantize()[:, :, :40], want)
