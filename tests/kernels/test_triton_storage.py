"""The Triton quantize_pack, append_ and dequantize against the reference, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if not torch.cuda.is_available():
    # before the kernels are imported: afterwards it has no effect
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl

from kvmix_fx.testing.tensors import extras
from kvmix_kernels import layout, ops
from kvmix_kernels import triton as kernels
from kvmix_kernels.cached import Cached, allocate
from kvmix_kernels.errors import CapacityError
from kvmix_kernels.layout import TensorFormat, make_format
from kvmix_kernels.reference import storage
from kvmix_kernels.triton.storage import flushes_ring
from tests.depth import examples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# an interpreted program takes about 30 ms
# on a GPU nearly every example compiles a kernel: shards are for pytest-xdist
SHARDS = range(8 if torch.cuda.is_available() else 1)
EXAMPLES = 8 if torch.cuda.is_available() else 12
FAMILIES = ("gauss", "outlier channel", "constant", "huge", "tiny", "zeros", "non-finite")


@triton.jit
def square_minus(x_ptr, y_ptr, out_ptr):
    x = tl.load(x_ptr + tl.arange(0, 2))
    tl.store(out_ptr + tl.arange(0, 2), tl.fma(x, x, -tl.load(y_ptr + tl.arange(0, 2))))


def rounds_once() -> bool:
    """Whether `tl.fma` is one, which it is on GPUs; older interpreters round the product as well."""
    x = torch.full((2,), 1 + 2**-12, device=DEVICE)
    out = torch.empty_like(x)
    square_minus[(1,)](x, x * x, out)
    return bool((out == 2**-24).all())


needs_fma = pytest.mark.skipif(not rounds_once(), reason="this Triton's interpreter rounds tl.fma twice")
quick = settings(max_examples=examples(EXAMPLES), deadline=None, suppress_health_check=[HealthCheck.too_slow])


def values(
    family: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Random tokens of a family that is hard on quantizers."""
    x = torch.randn(shape, generator=generator)
    if family == "outlier channel":
        x[..., ::7] *= 50.0
    elif family == "constant":
        x = x[..., :1, :1].expand(shape).clone()
    elif family == "huge":
        x = x * (torch.finfo(dtype).max / 4)
        x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    elif family == "tiny":
        # no subnormal numbers, nor steps of any width: the interpreter misreads those of bfloat16
        x = x * torch.finfo(dtype).tiny * (4 if dtype == torch.float16 else 1024)
        x = torch.where(x.abs() < torch.finfo(dtype).tiny, 0.0, x)
    elif family == "zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    elif family == "non-finite":
        kind = torch.randint(0, 12, shape, generator=generator)
        for code, value in ((0, torch.inf), (1, -torch.inf), (2, torch.nan)):
            x = x.masked_fill(kind == code, value)
    return x.to(dtype).to(DEVICE)


@st.composite
def formats(draw: st.DrawFn, head_dim: int) -> TensorFormat:
    bits = draw(st.sampled_from(layout.BITS))
    axis = draw(st.sampled_from(("channel", "token")))
    if axis == "channel":
        group = draw(st.sampled_from((16, 32)))
        tile = group * draw(st.sampled_from((1, 2)))
    else:
        group = draw(st.sampled_from([g for g in (16, 32) if head_dim % g == 0] + [0]))
        tile = draw(st.sampled_from((8, 24, 32)))
    more = {"bits": bits}
    if bits != layout.RAW_BITS and draw(st.booleans()):
        more |= draw(extras(head_dim, axis))
    return make_format(
        axis=axis,
        group_size=group,
        tile=tile,
        sink=draw(st.sampled_from((0, 3))),
        window=draw(st.sampled_from((0, 5, 32))),
        scale_dtype=draw(st.sampled_from(layout.SCALE_DTYPES)),
        **more,
    )


def masks(kind: str, B: int, heads: int, Lq: int, S: int, generator: torch.Generator) -> torch.Tensor | None:
    if kind == "none":
        return None
    seen = (torch.rand(B, heads, Lq, S, generator=generator) > 0.4).to(DEVICE)
    if kind == "bool":
        return seen
    return torch.zeros(seen.shape, device=DEVICE).masked_fill(~seen, torch.finfo(torch.float32).min)


def on_cpu(args: tuple[object, ...]) -> tuple[object, ...]:
    """Copies for the reference, which is exact on a CPU (elsewhere PyTorch divides by multiplying)."""
    return tuple(
        on_cpu(a) if isinstance(a, tuple) else a.detach().clone().cpu() if isinstance(a, torch.Tensor) else a
        for a in args
    )


def assert_same(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for name, (a, b) in enumerate(zip(got, expected, strict=True)):
        a = a.cpu()
        if a.dtype == torch.float64:
            # sums of queries, whose order does not show in float32
            a, b = a.float(), b.float()
        assert a.shape == b.shape, name
        assert a.dtype == b.dtype, name
        assert (
            torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) if a.is_floating_point() else torch.equal(a, b)
        ), name


@pytest.mark.parametrize("shard", SHARDS)
@needs_fma
@quick
@given(data=st.data())
def test_quantize_pack_gives_the_bits_of_the_reference(shard: int, data: st.DataObject) -> None:
    D = data.draw(st.sampled_from((16, 48, 64, 80)))
    fmt = data.draw(formats(D))
    B, H = data.draw(st.sampled_from(((1, 1), (2, 1), (1, 2))))
    L = data.draw(st.integers(1, 150))
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x = values(data.draw(st.sampled_from(FAMILIES)), (B, L, H, D), dtype, generator).transpose(1, 2)
    mask = masks(data.draw(st.sampled_from(("none", "bool", "additive"))), B, 1, 2, L, generator)
    queries = torch.randn(B, 2 * H, L, D, generator=generator).to(dtype).to(DEVICE)
    hint = queries if data.draw(st.booleans()) else None
    args = (x, mask, fmt.encode(), hint)
    assert_same(kernels.quantize_pack(*args), ops._quantize_pack(*on_cpu(args)))


KINDS = {
    64: (((4, 16), (2, 48)), "plan", "non-finite", "bool", torch.bfloat16, "byte"),
    80: (((4, 24), (2, 40), (0, 16)), "prompt", "outlier channel", "none", torch.float32, "bfloat16"),
    128: (((16, 8), (4, 32), (2, 88)), "tile", "non-finite", "additive", torch.float16, "byte"),
    256: (((4, 64), (2, 192)), "tile_keys", "non-finite", "bool", torch.bfloat16, "float16"),
    # places in the order have more than 8 bits
    512: (((4, 128), (2, 384)), "plan", "gauss", "none", torch.bfloat16, "byte"),
}
"""Tiers of a head size, who orders its channels, and what keys are like."""


@pytest.mark.parametrize("queries", [1, 100])
@pytest.mark.parametrize("order", ["prompt", "tile"])
def test_queries_of_attention_across_are_not_those_of_the_tokens(order: str, queries: int) -> None:
    """The mask is about the tokens: it hides no query. Orders of tiles come from keys alone."""
    generator = torch.Generator().manual_seed(3)
    fmt = make_format(4, "channel", 32, 32, 2, 5, "byte", tiers=((4, 16), (2, 48)), order=order)
    x = torch.randn(2, 2, 80, 64, generator=generator).to(DEVICE)
    query = (torch.randn(2, 4, queries, 64, generator=generator) * torch.arange(64)).to(DEVICE)
    mask = torch.ones(2, 1, 1, 80, dtype=torch.bool, device=DEVICE)
    mask[0, ..., :40] = False
    args = x, mask, fmt.encode(), query
    packed = kernels.quantize_pack(*args)
    assert_same(packed, ops._quantize_pack(*on_cpu(args)))
    found, alone = (Cached.of(p, fmt.encode()).order for p in (packed, kernels.quantize_pack(*args[:3])))
    # the control: queries count where they may
    assert torch.equal(found, alone) is (order == "tile")
    if order == "prompt":
        # of the row that is padded, too: the largest queries are first
        assert found[0, 0, :8].float().mean() > 40


@needs_fma
@pytest.mark.parametrize("D", KINDS)
def test_channels_in_any_order_are_packed_as_the_reference_packs_them(D: int) -> None:
    """By append, too: a prompt, and then tokens of which some share a tile with what is in the ring."""
    tiers, order, family, kind, dtype, scale_dtype = KINDS[D]
    fmt = make_format(4, "channel", 32, 32, 3, 5, scale_dtype, tiers=tiers, order=order)
    raw, L = make_format(16), 75
    generator = torch.Generator().manual_seed(D)
    x = values(family, (1, L, 2, D), dtype, generator).transpose(1, 2)
    mask = masks(kind, 1, 1, 2, L, generator)
    query = torch.randn(1, 4, L, D, generator=generator).to(dtype).to(DEVICE)
    hint = torch.rand(2, D, generator=generator).argsort(1).to(torch.int32) if order == "plan" else query
    args = (x, mask, fmt.encode(), hint.to(DEVICE))
    packed = kernels.quantize_pack(*args)
    assert_same(packed, ops._quantize_pack(*on_cpu(args)))
    # a control: other places are other words
    assert order != "plan" or not torch.equal(
        packed[0], kernels.quantize_pack(*args[:3], hint.flip(1).to(DEVICE))[0]
    )
    if D > 256:
        return
    caches = [
        allocate(
            1, 2, D, layout.fixed_tiles(f, 2 * L), layout.fixed_slots(f, 2 * L), f, dtype, DEVICE
        ).tensors
        for f in (fmt, raw)
    ]
    expected = on_cpu(tuple(caches))
    for length in (0, L):
        step = (x, x, None, None, length, fmt.encode(), raw.encode(), query)
        kernels.append_(*caches, *step)
        ops._append_(*expected, *on_cpu(step))
    for got, wanted in zip(caches, expected, strict=True):
        assert_same(got, wanted)


@pytest.mark.parametrize("shard", SHARDS)
@needs_fma
@quick
@given(data=st.data())
def test_append_gives_the_bits_of_the_reference(shard: int, data: st.DataObject) -> None:
    D, Dv = data.draw(st.sampled_from(((16, 16), (64, 48), (80, 32))))
    k, v = data.draw(formats(D)), data.draw(formats(Dv))
    B, H = data.draw(st.sampled_from(((1, 1), (2, 1))))
    before, count = data.draw(st.integers(0, 120)), data.draw(st.sampled_from((1, 1, 2, 40, 130)))
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    family = data.draw(st.sampled_from(FAMILIES))
    mask = masks(data.draw(st.sampled_from(("none", "bool", "additive"))), B, 2, 1, before + count, generator)
    on_device = data.draw(st.booleans())
    capacity = before + count + data.draw(st.sampled_from((0, 33)))
    buffers, new = [], []
    for fmt, size in ((k, D), (v, Dv)):
        cache = allocate(
            B,
            H,
            size,
            layout.fixed_tiles(fmt, capacity),
            layout.fixed_slots(fmt, capacity),
            fmt,
            dtype,
            DEVICE,
        )
        for part in cache.tensors:
            if part.dtype != torch.int32:
                part.fill_(-21846 if part.dtype == torch.int16 else 3)
        storage.append(cache, values(family, (B, H, before, size), dtype, generator), None, 0)
        buffers.append(cache.tensors)
        new.append(values(family, (B, H, count, size), dtype, generator))
    expected = on_cpu(tuple(buffers))
    start = torch.tensor(before, device=DEVICE) if on_device else None
    # the device's length is not asked for: an order from the prompt stays what it is
    has_query = not on_device or k.order == layout.ORDER_TILE
    query = torch.randn(B, 2, count, D, generator=generator).to(dtype).to(DEVICE) if has_query else None
    step = (*new, mask, start, capacity if on_device else before, k.encode(), v.encode(), query)
    ops._append_(*expected, *on_cpu(step))
    kernels.append_(*buffers, *step)
    for got, wanted in zip(buffers, expected, strict=True):
        assert_same(got, wanted)


@given(data=st.data())
def test_the_ring_is_flushed_where_a_due_tile_has_tokens_in_it(data: st.DataObject) -> None:
    fmt = data.draw(formats(64))
    length, count = data.draw(st.integers(0, 200)), data.draw(st.integers(2, 200))
    due = range(fmt.packed_tiles(length), fmt.packed_tiles(length + count))
    expected = any(fmt.sink + tile * fmt.tile < length for tile in due)
    assert flushes_ring(fmt, length, count) is expected
    assert flushes_ring(fmt, None, count) is not fmt.is_raw
    assert not flushes_ring(fmt, 0, count)


@pytest.mark.parametrize("bits", [2, 16])
@pytest.mark.parametrize("append", [kernels.append_, ops._append_])
def test_append_beyond_the_buffers_raises_and_writes_nothing(bits: int, append: Callable[..., None]) -> None:
    fmt = make_format(bits, "channel", 16, 16, 3, 5)
    capacity = 64
    tiles, slots = layout.fixed_tiles(fmt, capacity), layout.fixed_slots(fmt, capacity)
    cache = allocate(1, 1, 16, tiles, slots, fmt, torch.float32, DEVICE).tensors
    before = on_cpu(cache)
    most = slots if fmt.is_raw else 3 + 16 * tiles + 5 + 15
    assert capacity <= most < capacity + 16 + 3
    for length, count in ((0, most + 1), (most - 1, 2), (most, 1)):
        new = torch.ones(1, 1, count, 16, device=DEVICE)
        with pytest.raises(CapacityError, match=f"exceed the capacity of {most}"):
            append(cache, cache, new, new, None, None, length, fmt.encode(), fmt.encode())
        assert_same(cache, before)
    new = torch.ones(1, 1, most, 16, device=DEVICE)
    append(cache, cache, new, new, None, None, 0, fmt.encode(), fmt.encode())
    assert torch.equal(storage.read(Cached(fmt, cache), 0, most, most), new)


def test_append_beyond_the_capacity_on_the_device_writes_nothing() -> None:
    fmt = make_format(2, "channel", 16, 16, 0, 0)
    cache = allocate(1, 1, 16, 2, fmt.residual_slots, fmt, torch.float32, DEVICE).tensors
    before = on_cpu(cache)
    new = torch.ones(1, 1, 3, 16, device=DEVICE)
    start = torch.tensor(30, device=DEVICE)
    kernels.append_(cache, cache, new, new, None, start, 32, fmt.encode(), fmt.encode())
    assert_same(cache, before)


def test_append_refuses_buffers_whose_rows_are_not_dense() -> None:
    fmt = make_format(2, "channel", 16, 16, 0, 0)
    cache = list(allocate(1, 1, 16, 2, fmt.residual_slots, fmt, torch.float32, DEVICE).tensors)
    cache[3] = cache[3].mT.contiguous().mT
    new = torch.ones(1, 1, 1, 16, device=DEVICE)
    with pytest.raises(ops.CapacityError.__mro__[1], match="last two dimensions must be contiguous"):
        kernels.append_(cache, cache, new, new, None, None, 0, fmt.encode(), fmt.encode())


@pytest.mark.parametrize("shard", SHARDS)
@quick
@given(data=st.data())
def test_dequantize_equals_the_reference(shard: int, data: st.DataObject) -> None:
    D = data.draw(st.sampled_from((16, 48, 64)))
    fmt = data.draw(formats(D))
    L, extra = data.draw(st.integers(1, 100)), data.draw(st.sampled_from((0, 20)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x = values(
        data.draw(st.sampled_from(("gauss", "outlier channel"))), (2, 1, L, D), torch.float32, generator
    )
    cache = allocate(
        2,
        1,
        D,
        layout.fixed_tiles(fmt, L + extra),
        layout.fixed_slots(fmt, L + extra),
        fmt,
        torch.float32,
        DEVICE,
    )
    storage.append(cache, x, None, 0)
    start = torch.tensor(L, device=DEVICE) if extra else None
    expected = ops._dequantize(cache.tensors, start, L + extra, fmt.encode())
    torch.testing.assert_close(kernels.dequantize(cache.tensors, start, L + extra, fmt.encode()), expected)
