"""What caches can do works on packed tensors that share a high tier of tokens."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from kvmix_fx.cache import QuantizedKVTensor, tiers
from kvmix_fx.errors import TokenTierError
from kvmix_kernels import layout
from kvmix_kernels.tokens.ops import attend_tiers
from kvmix_kernels.tokens.places import in_tier

HIGH = layout.make_high(25, policy="norm", recent=0, balanced=True)
KEY = layout.with_high(layout.make_format(2, "token", 16, 16, 2, 8), HIGH)
VALUE = layout.with_high(layout.make_format(2, "token", 16, 16, 2, 8), HIGH._replace(scored=0, balanced=0))


def made(length=120, batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    k, v, q = (torch.randn(batch, 2, length, 32, generator=g) for _ in range(3))
    return tiers.pack(k, v, (KEY, VALUE), q), (k, v)


def more(both, n, seed=1):
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(both[0].shape[0], 2, n, 32, generator=g) for _ in range(2))
    return tiers.append(*both, k, v)


def numbers(both):
    return [t.dequantize() for t in both]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def members(keys):
    return in_tier(keys.cached, keys.shape[2]).sum(2)


def test_tokens_in_the_tier_are_exact_and_others_are_not():
    both, (k, v) = made()
    for tensor, x in zip(both, (k, v), strict=True):
        exact = (tensor.dequantize() == x).all(3)
        packed = KEY.packed_tiles(120) * 16
        assert (exact[:, :, 2 : 2 + packed].sum(2) == packed // 4).all()
        assert exact[:, :, :2].all()
        assert exact[:, :, 2 + packed :].all()


def test_forks_and_parents_keep_their_own_tier():
    both, _ = made()
    before, inside = numbers(both), both[0].positions.clone()
    first, second = more(both, 60, 1), more(both, 60, 2)
    again = more(both, 60, 1)
    assert same(numbers(both), before)
    assert torch.equal(both[0].positions, inside)
    assert same(numbers(first), numbers(again))
    assert not same(numbers(first), numbers(second))
    assert (members(first[0]) == (KEY.packed_tiles(180) * 16) // 4).all()


def test_steps_go_on_where_buffers_grow():
    high = HIGH._replace(policy=layout.POLICIES.index("accumulated"))
    key, value = KEY._replace(high=high), VALUE._replace(high=high._replace(scored=0, balanced=0))
    g = torch.Generator().manual_seed(5)
    k, v, q = (torch.randn(1, 2, 180, 32, generator=g) for _ in range(3))
    both = tiers.pack(k[:, :, :120], v[:, :, :120], (key, value), q[:, :, :120])
    slots = both[0].positions.shape[2]
    for i in range(120, 180):
        new = k[:, :, i : i + 1], v[:, :, i : i + 1]
        buffers = both[0].cached.tensors, both[1].cached.tensors
        _, mass = attend_tiers(
            *(q[:, :, i : i + 1], *new, *buffers, None, None, i, 0.2, key.encode(), value.encode())
        )
        both = tiers.append(*both, *new, mass)
    assert both[0].positions.shape[2] > slots
    assert (members(both[0]) == (KEY.packed_tiles(180) * 16) // 4).all()


def test_a_rollback_empties_slots_and_restores_the_window_from_the_tier():
    both, (k, _) = made()
    short = [t[:, :, :70] for t in both]
    assert all(isinstance(t, QuantizedKVTensor) for t in short)
    was = [x[:, :, :70] for x in numbers(both)]
    assert same(numbers(short), was)
    # of the tokens that were packed and are raw again, those of the tier are exact
    raw = slice(KEY.packed_end(70), 70)
    exact = (short[0].dequantize()[:, :, raw] == k[:, :, raw]).all(3)
    assert torch.equal(exact, (both[0].dequantize()[:, :, raw] == k[:, :, raw]).all(3))
    assert exact.any()
    assert (both[0].positions >= KEY.packed_end(70)).any()
    on = more(short, 40)
    assert (members(on[0]) <= (KEY.packed_tiles(110) * 16) // 4).all()
    assert same(numbers(short), was)


def test_rows_are_selected_repeated_and_reordered_with_their_tiers():
    both, _ = made()
    want = numbers(both)
    index = torch.tensor([2, 0])
    assert same(numbers([t.index_select(0, index) for t in both]), [x[index] for x in want])
    assert same(numbers([t[index] for t in both]), [x[index] for x in want])
    twice = [t.repeat_interleave(2, dim=0) for t in both]
    assert same(numbers(twice), [x.repeat_interleave(2, 0) for x in want])
    assert members(more(twice, 30)[0]).shape == (6, 2)


def test_copies_and_files_hold_both_tiers():
    both, _ = made()
    want = numbers(both)
    assert same(numbers(copy.deepcopy(both)), want)
    file = io.BytesIO()
    torch.save(list(both), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded[0].format == KEY
    # as files from before it was there, it is made of the positions
    assert "skipped" not in both[0].to_state()
    assert both[0].skipped.any()
    assert torch.equal(loaded[0].skipped, both[0].skipped)
    assert same(numbers(loaded), want)
    assert same(numbers(more(loaded, 50)), numbers(more(both, 50)))
    half = both[1].to(torch.float16)
    assert half.dequantize().dtype == torch.float16
    assert (half.dequantize() - want[1]).abs().max() < 1e-2
    assert "25 % at 16 bits" in repr(both[0])


def test_zeroing_and_enlarging():
    both, _ = made()
    want = numbers(both)
    for tensor, x in zip(both, want, strict=True):
        fixed = QuantizedKVTensor(tensor.cached, 120, torch.tensor(120)).enlarged(300)
        assert fixed.positions.shape[2] > tensor.positions.shape[2]
        assert torch.equal(fixed.dequantize()[:, :, :120], x)
    for tensor in both:
        tensor.zero_()
        assert not tensor.dequantize().any()
        assert not in_tier(tensor.cached, 120).any()


def test_eager_writes_that_tell_nothing_are_refused():
    both, (k, _) = made()
    with pytest.raises(TokenTierError, match="compiled model"):
        torch.cat([both[0], k], 2)
    with pytest.raises(TokenTierError, match="packed together"):
        QuantizedKVTensor.from_hp(k, KEY)
    fixed = QuantizedKVTensor.empty_fixed(3, 2, 128, 32, KEY, torch.float32, "cpu")
    with pytest.raises(TokenTierError, match="compiled model"):
        fixed[:, :, :4] = k[:, :, :4]


def test_scales_become_wide_where_tokens_ask_for_it():
    """A fixed number of tokens at 4 bits, the others at 2: half scales would be infinite in both tiers."""
    high = layout.make_high(0, 8, bits=4)
    fmt = layout.make_format(2, "token", 16, 16, 2, 8)
    both = layout.with_high(fmt, high), layout.with_high(fmt, high._replace(scored=0, balanced=0))
    x = torch.randn(1, 2, 80, 32) * 1e7
    for tensor in tiers.pack(x, x, both, x):
        assert layout.SCALE_DTYPES[tensor.format.scale_dtype] == "float32"
        assert (tensor.dequantize() - x).abs().max() < 2e7
