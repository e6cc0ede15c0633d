from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from kvmix_kernels import layout, ops
from kvmix_kernels.cached import allocate
from kvmix_kernels.errors import CacheShapeError, CapacityError
from kvmix_kernels.reference import storage

KEY = layout.make_format(2, "channel", 32, 32, 2, 32).encode()
VALUE = layout.make_format(3, "token", 16, 32, 2, 32).encode()


def caches(length=120, dtype=torch.float32):
    x, y = torch.randn(2, 2, length, 64, dtype=dtype), torch.randn(2, 2, length, 64, dtype=dtype)
    return ops.quantize_pack(x, None, KEY), ops.quantize_pack(y, None, VALUE)


def fixed(capacity, length, fmt, dtype=torch.float32):
    f = layout.TensorFormat.decode(fmt)
    cached = allocate(
        2, 2, 64, layout.fixed_tiles(f, capacity), layout.fixed_slots(f, capacity), f, dtype, "cpu"
    )
    storage.append(cached, torch.randn(2, 2, length, 64, dtype=dtype), None, 0)
    return list(cached.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 3, 40])
def test_opcheck_attend_and_append(dtype, n):
    k, v = caches(dtype=dtype)
    query = torch.randn(2, 4, n, 64, dtype=dtype)
    new = torch.randn(2, 2, n, 64, dtype=dtype)
    mask = torch.ones(2, 1, n, 120 + n, dtype=torch.bool)
    opcheck(ops.attend, (query, new, new, k, v, mask, None, 120, 0.1, KEY, VALUE))
    opcheck(
        ops.attend,
        (
            query.transpose(1, 2).contiguous().transpose(1, 2),
            None,
            None,
            k,
            v,
            None,
            None,
            120,
            0.1,
            KEY,
            VALUE,
        ),
    )
    sinks = torch.randn(4, dtype=dtype)
    opcheck(ops.attend, (query, new, new, k, v, mask, None, 120, 0.1, KEY, VALUE, 0.0, sinks))
    opcheck(ops.append_, (k, v, new, new, None, None, 120, KEY, VALUE))


@pytest.mark.parametrize("n", [1, 70])
def test_opcheck_quantize_pack_and_dequantize(n):
    x = torch.randn(2, 2, n, 64)
    opcheck(ops.quantize_pack, (x, torch.ones(2, 1, n, n, dtype=torch.bool), KEY))
    opcheck(ops.dequantize, (ops.quantize_pack(x, None, KEY), None, n, KEY))
    opcheck(ops.dequantize, (fixed(100, n, KEY), torch.tensor(n), 100, KEY))


def test_opcheck_on_fixed_caches():
    k, v, start = fixed(200, 90, KEY), fixed(200, 90, VALUE), torch.tensor(90)
    new = torch.randn(2, 2, 1, 64)
    opcheck(ops.attend, (torch.randn(2, 4, 1, 64), new, new, k, v, None, start, 200, 0.1, KEY, VALUE))
    opcheck(ops.append_, (k, v, new, new, None, start, 200, KEY, VALUE))


def test_overflow_is_refused_before_anything_is_written():
    k, v = fixed(100, 99, KEY), fixed(100, 99, VALUE)
    before = [b.clone() for b in (*k, *v)]
    new = torch.randn(2, 2, 2, 64)
    with pytest.raises(CapacityError, match="exceed the capacity of 100"):
        ops.append_(k, v, new, new, None, torch.tensor(99), 100, KEY, VALUE)
    assert all(torch.equal(a, b) for a, b in zip(before, (*k, *v), strict=True))


def test_tokens_of_another_shape_are_refused():
    k, v = caches()
    with pytest.raises(CacheShapeError, match="cannot append"):
        ops.append_(k, v, torch.randn(3, 2, 1, 64), torch.randn(3, 2, 1, 64), None, None, 120, KEY, VALUE)


def test_the_live_length_on_the_device_equals_the_host_length():
    k, v = fixed(300, 120, KEY), fixed(300, 120, VALUE)
    query, new = torch.randn(2, 4, 2, 64), torch.randn(2, 2, 2, 64)
    host = ops.attend(query, new, new, k, v, None, None, 120, 0.1, KEY, VALUE)
    device = ops.attend(query, new, new, k, v, None, torch.tensor(120), 300, 0.1, KEY, VALUE)
    assert torch.equal(host, device)


def test_no_op_allocates_the_history():
    """Attention over 16 k packed tokens allocates blocks of bounded size, never the whole."""
    fmt = layout.make_format(2, "channel", 32, 32, 0, 32).encode()
    x = torch.randn(1, 8, 16384, 64)
    k = ops.quantize_pack(x, None, fmt)
    query = torch.randn(1, 8, 1, 64)
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        ops.attend(query, None, None, k, k, None, None, 16384, 0.1, fmt, fmt)
    largest = max(
        (event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0),
        default=0,
    )
    assert largest <= x.numel() * 4 // 2


def test_every_written_buffer_is_seen_to_be_written_when_it_is_compiled():
    """opcheck asks of a list only whether any of its tensors was written."""
    length = 129  # the next token flushes a tile
    k, v = fixed(200, length, KEY), fixed(200, length, VALUE)
    new = torch.randn(2, 2, 1, 64)

    def step(k, v):
        ops.append_(k, v, new, new, None, None, length, KEY, VALUE)
        return [b.clone() for b in (*k, *v)]

    expected = step([b.clone() for b in k], [b.clone() for b in v])
    before = [b.clone() for b in (*k, *v)]
    for backend in ("eager", "aot_eager"):
        mine = [b.clone() for b in k], [b.clone() for b in v]
        seen = torch.compile(step, backend=backend, fullgraph=True)(*mine)
        for got, kept, want, old in zip(seen, (*mine[0], *mine[1]), expected, before, strict=True):
            assert torch.equal(got, want)
            assert torch.equal(kept, want)
            assert not torch.equal(want, old)
