from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvmix_fx.cache import QuantizedKVTensor, dispatch
from kvmix_fx.errors import CacheMutationError, CacheVersionError, CapacityError, DequantizeWarning
from kvmix_fx.testing.tensors import formats, values
from kvmix_kernels import layout, ops
from tests.depth import examples

FMT = layout.make_format(2, "channel", 32, 32, 4, 32)


def packed(length=200, fmt=FMT, seed=0, dtype=torch.float32):
    x = values("normal", (2, 2, length, 64), seed, dtype)
    return QuantizedKVTensor.from_hp(x, fmt), x


def fixed(capacity=256, fmt=FMT, batch=2):
    return QuantizedKVTensor.empty_fixed(batch, 2, capacity, 64, fmt, torch.float32, "cpu")


def positions(start, n):
    return torch.arange(start, start + n)


@given(formats(64), st.integers(1, 100), st.integers(1, 40))
def test_concatenation_appends(fmt, length, extra):
    x = values("normal", (2, 2, length + extra, 64), 1)
    grown = torch.cat([QuantizedKVTensor.from_hp(x[:, :, :length], fmt), x[:, :, length:]], -2)
    assert isinstance(grown, QuantizedKVTensor)
    assert torch.equal(grown.dequantize(), QuantizedKVTensor.from_hp(x, fmt).dequantize())


@given(formats(64), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_writes_by_position_append_to_a_fixed_cache(fmt, pieces):
    total = sum(pieces)
    x = values("normal", (2, 2, total, 64), 2)
    cache, start = fixed(256, fmt), 0
    for n in pieces:
        cache.index_copy_(2, positions(start, n), x[:, :, start : start + n])
        start += n
    assert cache.stored_tokens() == total
    want = QuantizedKVTensor.from_hp(x, fmt).dequantize()
    assert torch.equal(cache.dequantize()[:, :, :total], want)
    assert not cache.dequantize()[:, :, total:].any()


def test_setitem_by_position_appends():
    cache = fixed()
    x = values("normal", (2, 2, 3, 64), 0)
    cache[:, :, positions(0, 3)] = x
    assert torch.equal(cache.dequantize()[:, :, :3], x)


def test_overflow_changes_nothing():
    cache = fixed(64)
    cache.index_copy_(2, positions(0, 60), torch.randn(2, 2, 60, 64))
    before = cache.dequantize()
    with pytest.raises(CapacityError, match="exceed the capacity of 64"):
        cache.index_copy_(2, positions(60, 5), torch.randn(2, 2, 5, 64))
    assert torch.equal(before, cache.dequantize())
    assert cache.stored_tokens() == 60


@pytest.mark.parametrize("where", [positions(70, 2), torch.tensor([10, 12])])
def test_gaps_are_refused(where):
    cache = fixed()
    cache.index_copy_(2, positions(0, 10), torch.randn(2, 2, 10, 64))
    with pytest.raises(CacheMutationError, match=r"gap|consecutive"):
        cache.index_copy_(2, where, torch.randn(2, 2, 2, 64))


def test_writing_an_earlier_position_rewinds():
    x = values("normal", (2, 2, 120, 64), 0)
    cache = fixed()
    cache.index_copy_(2, positions(0, 120), x)
    new = values("normal", (2, 2, 1, 64), 5)
    cache.index_copy_(2, positions(119, 1), new)
    assert cache.stored_tokens() == 120
    assert torch.equal(cache.dequantize()[:, :, 119:120], new)
    assert torch.equal(cache.dequantize()[:, :, 100:119], x[:, :, 100:119])


def test_rows_can_be_reordered_selected_and_repeated():
    t, _ = packed()
    full = t.dequantize()
    rows = torch.tensor([1, 0, 1])
    for got, want in (
        (t.index_select(0, rows), full.index_select(0, rows)),
        (t[rows, ...], full[rows, ...]),
        (t.repeat_interleave(2, dim=0), full.repeat_interleave(2, dim=0)),
        (t[:1], full[:1]),
    ):
        assert isinstance(got, QuantizedKVTensor)
        assert torch.equal(got.dequantize(), want)
        got = torch.cat([got, torch.randn(got.shape[0], 2, 1, 64)], 2)
        assert torch.equal(t.dequantize(), full)


def test_copies_and_files_keep_every_bit():
    t, _ = packed(dtype=torch.bfloat16)
    stream = io.BytesIO()
    torch.save(t, stream)
    stream.seek(0)
    from safetensors.torch import load, save

    for other in (
        t.clone(),
        t.detach(),
        copy.deepcopy(t),
        pickle.loads(pickle.dumps(t)),
        torch.load(stream, weights_only=True),
        QuantizedKVTensor.from_state(load(save(t.to_state("layers.0.key."))), "layers.0.key."),
        t.to("cpu", copy=True),
    ):
        assert isinstance(other, QuantizedKVTensor)
        assert other.dtype == torch.bfloat16
        assert all(torch.equal(a, b) for a, b in zip(t.cached.tensors, other.cached.tensors, strict=True))


@pytest.mark.parametrize(
    ("bits", "version", "readable"), [(3, 1, False), (2, 1, True), (3, 2, True), (2, 9, False)]
)
def test_a_saved_cache_in_another_layout_is_refused(bits, version, readable):
    fmt = layout.make_format(bits)
    state = QuantizedKVTensor.from_hp(torch.randn(1, 2, 70, 64), fmt).to_state()
    # version 1 was not written down
    state["meta"] = (
        state["meta"][:-1] if version == 1 else torch.cat([state["meta"][:-1], torch.tensor([version])])
    )
    if readable:
        assert QuantizedKVTensor.from_state(state).format == fmt
    else:
        with pytest.raises(CacheVersionError, match=f"version {version} of the packed layout"):
            QuantizedKVTensor.from_state(state)


def test_a_fixed_cache_survives_files_and_reset():
    cache = fixed()
    cache.index_copy_(2, positions(0, 100), torch.randn(2, 2, 100, 64))
    again = pickle.loads(pickle.dumps(cache))
    assert again.stored_tokens() == 100
    assert torch.equal(again.dequantize(), cache.dequantize())
    cache.zero_()
    assert cache.stored_tokens() == 0
    assert not cache.dequantize().any()
    assert again.stored_tokens() == 100


def test_zero_leaves_forks_alone():
    t, _ = packed()
    fork, before = t.detach(), t.dequantize()
    t.zero_()
    assert not t.dequantize().any()
    assert torch.equal(fork.dequantize(), before)


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_zeroing_keeps_the_order_of_channels(kind):
    """Zeros would be no permutation, and reads would take in memory that nobody has written."""
    fmt = layout.make_format(4, "channel", 8, 8, 0, 0, tiers=((4, 16), (2, 48)), order="plan")
    order = torch.stack([torch.randperm(64), torch.randperm(64)]).to(torch.int32)
    x = values("normal", (2, 2, 40, 64), 0)
    t = QuantizedKVTensor.from_hp(x, fmt, hint=order)
    if kind == "fixed":
        t = QuantizedKVTensor(t.cached, 40, torch.tensor(40))
    want = t.dequantize()
    t.zero_()
    assert not t.dequantize().any()
    if kind == "growing":
        assert torch.equal(torch.cat([t, x], 2).dequantize()[:, :, 40:], want)
    else:
        assert torch.equal(t.index_copy_(2, positions(0, 40), x).dequantize(), want)


def test_copying_over_a_growing_tensor_leaves_forks_alone():
    t, _ = packed()
    fork, before = t.detach(), t.dequantize()
    other, _ = packed(seed=3)
    t.copy_(other)
    assert torch.equal(t.dequantize(), other.dequantize())
    assert torch.equal(fork.dequantize(), before)
    # of another length, though its buffers are as large
    with pytest.raises(CacheMutationError):
        t.copy_(packed(201)[0])
    assert torch.equal(t.dequantize(), other.dequantize())


def test_repr_tells_bits_and_bytes():
    t, _ = packed()
    assert "2 bits per channel in groups of 32" in repr(t)
    assert f"{t.packed_nbytes} bytes" in repr(t)


def test_reads_outside_the_table_unpack_with_one_warning():
    t, _ = packed()
    dispatch._warned.clear()
    with pytest.warns(DequantizeWarning, match="bytes were unpacked"):
        total = t.sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(t.sum(), total)
        assert torch.equal(total, t.dequantize().sum())


@pytest.mark.parametrize(
    "operation",
    [
        lambda t: t.mul_(2),
        lambda t: t.add_(1),
        lambda t: t.index_fill_(0, torch.tensor([0]), 1.0),
        lambda t: t.__setitem__((slice(None), slice(None), slice(0, 2)), torch.zeros(2, 2, 2, 64)),
        lambda t: t.copy_(torch.zeros(t.shape)),
    ],
)
def test_mutations_outside_the_table_raise(operation):
    t, _ = packed()
    before = t.dequantize()
    with pytest.raises(CacheMutationError, match=r"in place|packed"):
        operation(t)
    assert torch.equal(t.dequantize(), before)


def test_no_cache_operation_makes_a_16_bit_copy():
    """Appending, cropping and reordering allocate a fraction of the logical size."""
    t, x = packed(4096)
    logical = x.numel() * x.element_size()
    for operation in (
        lambda: torch.cat([t, x[:, :, :1]], 2),
        lambda: t[..., :-1, :],
        lambda: t.index_select(0, torch.tensor([1, 0])),
    ):
        with torch.profiler.profile(profile_memory=True) as profile:
            operation()
        allocated = sum(max(0, e.self_cpu_memory_usage) for e in profile.events())
        assert allocated < logical / 3


def test_a_parent_can_be_continued_twice():
    t, x = packed()
    a = b = t
    for i in range(100):
        a = torch.cat([a, x[:, :, i : i + 1]], 2)
    for i in range(100):
        b = torch.cat([b, x[:, :, 100 + i : 101 + i]], 2)
    want_a = QuantizedKVTensor.from_hp(torch.cat([x, x[:, :, :100]], 2), FMT).dequantize()
    want_b = QuantizedKVTensor.from_hp(torch.cat([x, x[:, :, 100:]], 2), FMT).dequantize()
    assert torch.equal(a.dequantize(), want_a)
    assert torch.equal(b.dequantize(), want_b)


def test_steady_appends_copy_nothing():
    t, x = packed(150)
    data = t.qdata.data_ptr()
    for i in range(20):
        t = torch.cat([t, x[:, :, i : i + 1]], 2)
    assert t.qdata.data_ptr() == data


class Forks(RuleBasedStateMachine):
    """Whatever happens to one tensor, no other living one ever changes."""

    @initialize(fmt=formats(64, (2, 16)), seed=st.integers(0, 1000), length=st.integers(1, 90))
    def start(self, fmt, seed, length):
        self.fmt, self.seed = fmt, seed
        x = self.tokens(length)
        self.pool = [(QuantizedKVTensor.from_hp(x, fmt), x)]
        self.remember()

    def tokens(self, n):
        self.seed += 1
        return values("normal", (2, 1, n, 64), self.seed)

    def add(self, t, x):
        self.pool.append((t, x))
        self.pool = self.pool[-4:]
        self.remember()

    def remember(self):
        self.seen = [(t, t.dequantize()) for t, _ in self.pool]

    @rule(which=st.integers(0, 3), n=st.sampled_from((1, 1, 1, 2, 33, 70)))
    def append(self, which, n):
        t, x = self.pool[which % len(self.pool)]
        new = self.tokens(n)
        child = torch.cat([t, new], 2)
        # the step's own last token always survives exactly if there is a window
        if self.fmt.window or self.fmt.is_raw:
            assert torch.equal(child.dequantize()[:, :, -1], new[:, :, -1])
        self.add(child, torch.cat([x, new], 2))

    @rule(which=st.integers(0, 3), back=st.integers(1, 60))
    def crop(self, which, back):
        t, x = self.pool[which % len(self.pool)]
        if t.shape[2] > back:
            full = t.dequantize()[:, :, :-back]
            child = t[..., :-back, :]
            assert torch.equal(child.dequantize(), full)
            self.add(child, x[:, :, :-back])

    @rule(which=st.integers(0, 3))
    def drop(self, which):
        if len(self.pool) > 1:
            del self.pool[which % len(self.pool)]
            self.remember()

    @rule(which=st.integers(0, 3))
    def flip(self, which):
        t, x = self.pool[which % len(self.pool)]
        rows = torch.tensor([1, 0])
        self.add(t.index_select(0, rows), x[rows])

    @invariant()
    def nothing_changed(self):
        for t, before in getattr(self, "seen", []):
            assert torch.equal(t.dequantize(), before)

    @invariant()
    def tokens_are_close(self):
        for t, x in getattr(self, "pool", []):
            assert t.shape == x.shape
            # rounded at most a few times over a range of about 8
            assert (t.dequantize() - x).abs().max() < 8


Forks.TestCase.settings = settings(max_examples=examples(20), stateful_step_count=15, deadline=None)
TestForks = Forks.TestCase


def test_a_slice_is_written_like_positions():
    new = torch.randn(1, 2, 5, 64)
    by_slice, by_position = fixed_pair()
    by_slice[:, :, 40:45] = new
    by_position.index_copy_(2, torch.arange(40, 45), new)
    assert by_slice.stored_tokens() == by_position.stored_tokens() == 45
    assert torch.equal(by_slice.dequantize(), by_position.dequantize())
    by_slice[:, :, :3], by_position[:, :, torch.arange(3)] = new[:, :, :3], new[:, :, :3]
    assert by_slice.stored_tokens() == 3
    assert torch.equal(by_slice.dequantize(), by_position.dequantize())


@pytest.mark.parametrize(
    ("index", "count"),
    [
        (0, 100),
        ((slice(None), 1), 100),
        ((slice(None), slice(None), 40), 1),
        ((slice(None), slice(None), slice(40, None)), 60),
        ((slice(None), slice(None), slice(40, 50, 2)), 5),
        ((slice(None), slice(None), slice(-60, -50)), 10),
        ((slice(None), slice(None), slice(40, 44)), 3),
        ((slice(0, 1), slice(None), torch.arange(40, 44)), 4),
        ((slice(None), torch.arange(2)), 100),
        ((slice(None), slice(None), torch.arange(100) < 50), 50),
        ((slice(None), slice(None), slice(41, 44)), 3),
    ],
)
def test_an_assignment_that_would_be_lost_or_leave_a_gap_is_refused(index, count):
    """PyTorch would write to an unpacked copy."""
    x, same = fixed_pair()
    with pytest.raises(CacheMutationError):
        x[index] = torch.randn(1, 2, count, 64)
    assert x.stored_tokens() == 40
    assert torch.equal(x.dequantize(), same.dequantize())


def test_a_growing_tensor_is_not_assigned_to():
    x = QuantizedKVTensor.from_hp(torch.randn(1, 2, 50, 64), layout.make_format(4))
    with pytest.raises(CacheMutationError, match=r"torch\.cat"):
        x[:, :, 48:50] = torch.randn(1, 2, 2, 64)


def fixed_pair():
    """Two fixed tensors of the same 40 tokens, with room for 100."""
    x = torch.randn(1, 2, 40, 64)
    pair = []
    for _ in range(2):
        t = QuantizedKVTensor.empty_fixed(1, 2, 100, 64, layout.make_format(4), torch.float32, "cpu")
        pair.append(t.write_(torch.arange(40), x))
    return pair


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_orders_of_tiles_and_what_was_seen_go_where_the_tokens_go(kind):
    from safetensors.torch import load, save

    fmt = layout.make_format(
        4, "channel", 16, 32, 2, 8, tiers=((16, 8), (4, 8), (2, 48)), order="tile"
    )  # fmt: skip
    x, query = values("normal", (2, 2, 120, 64), 1), values("normal", (2, 4, 120, 64), 2)
    tensor = QuantizedKVTensor.from_hp(x, fmt, hint=query)
    if kind == "fixed":
        tensor, raw = fixed(256, fmt), layout.make_format(16)
        other = ops.quantize_pack(x, None, raw.encode())
        step = (x, x, None, None, 0, fmt.encode(), raw.encode(), query)
        ops.append_(tensor.cached.tensors, other, *step)
        tensor.live.fill_(120)
    read, flip = tensor.dequantize(), torch.tensor([1, 0])
    for same in (
        QuantizedKVTensor.from_state(load(save(tensor.to_state()))),
        pickle.loads(pickle.dumps(tensor)),
        copy.deepcopy(tensor),
        tensor.index_select(0, flip).index_select(0, flip),
    ):
        assert torch.equal(same.dequantize(), read)
        assert torch.equal(same.cached.seen, tensor.cached.seen)
        assert same.cached.seen.all()
    assert torch.equal(tensor.index_select(0, flip).dequantize(), read[flip])
    # what is packed keeps its order, whatever comes later, also where another tensor reads it
    new = values("normal", (2, 2, 60, 64), 3)
    if kind == "fixed":
        longer = tensor.index_copy_(2, positions(120, 60), new)
    else:
        longer = torch.cat([tensor[:, :, :100], new], 2)
        assert torch.equal(tensor.dequantize(), read)
    packed_end = fmt.packed_end(100)
    assert torch.equal(longer.dequantize()[:, :, :packed_end], read[:, :, :packed_end])
