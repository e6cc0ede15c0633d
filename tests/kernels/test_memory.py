"""Memory that nobody wrote does not show in results, and places are right where 32 bits do not hold them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # before the kernels are imported: afterwards it has no effect
    os.environ["TRITON_INTERPRET"] = "1"

from kvmix_kernels import layout
from kvmix_kernels import triton as kernels
from kvmix_kernels.cached import allocate
from kvmix_kernels.errors import CapacityError
from kvmix_kernels.layout import TensorFormat, make_format
from tests.kernels import steps
from tests.kernels.steps import DEVICE, HEADS, ON_GPU, SCALE, D, OneCache, Pages, Prompt, same, step_of

# interpreted, a step takes seconds
SOME = ("tiers of tiles, a mask", "tokens and channels apart, a learned sink", "pages, tiers of tiles")
BUFFERS_FROM = 5
"""Results of a step over a cache without a high tier, in front of the buffers."""


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory of new tensors holds NaN, and of integers the largest."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        assert torch.ones(1, device=DEVICE).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", steps.ALL if ON_GPU else SOME)
def test_a_step_reads_no_memory_that_it_did_not_write(name: str) -> None:
    step = step_of(name)
    clean = [x.clone() for x in step.run()]
    with poisoned():
        found = step.run()
    assert all(x.isfinite().all() for x in found)
    assert same(found, clean)


@pytest.mark.parametrize("name", steps.FORMS if ON_GPU else SOME[:1])
def test_a_prompt_is_packed_into_memory_that_holds_anything(name: str) -> None:
    prompt = Prompt(name)
    clean = [x.clone() for x in prompt.run()]
    with poisoned():
        found = prompt.run()
    assert all(x.isfinite().all() for x in found)
    assert same(found, clean)


@pytest.mark.parametrize("name", steps.FORMS if ON_GPU else SOME[:1])
def test_what_another_prompt_left_in_a_cache_is_not_read(name: str) -> None:
    clean, stale = OneCache(name), OneCache(name, stale=True)
    assert any(x.isnan().any() for c in stale.full for x in c.tensors if x.is_floating_point())
    found = stale.run()[:BUFFERS_FROM]
    assert all(x.isfinite().all() for x in found)
    assert same(found, clean.run()[:BUFFERS_FROM])


BEYOND = 1 << 31


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Of what is far apart: the less memory."""
    monkeypatch.setattr(steps, "DTYPE", torch.float16)
    return torch.float16


def far_apart(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copies [B, H, L, D] whose last quarter is 2**31 elements behind the first token; few are used."""
    rows, _, length, channels = tensors[0].shape
    heads = sum(x.shape[1] for x in tensors)
    step = -(-BEYOND // (length * 3 // 4) // 64) * 64
    assert rows * heads * channels <= step
    room = torch.empty(length * step, dtype=tensors[0].dtype, device=tensors[0].device)
    found, first = [], 0
    for x in tensors:
        strides = (heads * channels, channels, step, 1)
        found.append(room.as_strided(x.shape, strides, first).copy_(x))
        first += x.shape[1] * channels
    return found


@pytest.mark.parametrize("name", steps.FORMS if ON_GPU else SOME[:1])
def test_tokens_of_a_prompt_may_be_far_apart(name: str, half: torch.dtype) -> None:
    prompt = Prompt(name)
    expected = [x.clone() for x in prompt.run()]
    *prompt.new, prompt.q = far_apart(*prompt.new, prompt.q)
    assert same(prompt.run(), expected)
    prompt.new[0][:, :, -1] += 1
    assert not same(prompt.run(), expected)


def test_queries_and_new_tokens_of_attention_may_be_far_apart(half: torch.dtype) -> None:
    step = OneCache("2 bits")
    g = torch.Generator().manual_seed(3)
    near = [steps.normal(g, steps.B, n, 67, D) for n in (2 * HEADS, HEADS, HEADS)]
    found = []
    for x in (near, far_apart(*near)):
        # three tokens: their strides are of 32 bits, where the last one is not
        given = (*(part[:, :, ::33] for part in x), *(c.tensors for c in step.full), None, step.start)
        found.append(kernels.attend(*given, step.capacity, SCALE, *step.encoded))
    assert torch.equal(*found)
    assert not torch.equal(found[0][:, :, 0], found[0][:, :, 2])


def test_a_head_of_more_numbers_than_there_are_places_is_refused() -> None:
    """What is refused is as large as it says, and takes no memory: it is one token, over and over."""
    fmt = make_format(16)
    x = torch.zeros(1, 1, 1, 128, device=DEVICE)
    tokens = x.expand(1, 1, BEYOND // 128, 128)
    rows = allocate(1, 1, 128, 0, 1, fmt, x.dtype, DEVICE).tensors
    cache = (*rows[:3], tokens)
    start, length = torch.tensor(1, device=DEVICE), BEYOND // 128
    both = fmt.encode(), fmt.encode()
    for call in (
        lambda: kernels.quantize_pack(tokens, None, fmt.encode()),
        lambda: kernels.dequantize(cache, start, length, fmt.encode()),
        lambda: kernels.attend(x, x, x, cache, cache, None, start, length, 1.0, *both),
        lambda: kernels.attend(x, x, x, cache, cache, None, None, length - 1, 1.0, *both),
        lambda: kernels.append_(rows, rows, x, x, None, start, length, *both),
    ):
        with pytest.raises(CapacityError, match=r"at most 16777215 tokens fit; set KVMIX_KERNELS"):
            call()


@pytest.mark.parametrize("name", steps.PAGED if ON_GPU else ["pages, 4 and 2 bits"])
def test_pages_may_be_anywhere_in_a_large_pool(name: str, half: torch.dtype) -> None:
    near = Pages(name)
    found = [x.clone() for x in near.run()]
    # raw tokens are of two bytes: their place is beyond as well
    first = BEYOND * half.itemsize // near.laid.tail_nbytes + 1
    assert same(Pages(name, at=first).run(), found)


def ends(x: torch.Tensor) -> list[torch.Tensor]:
    """Copies of the first and the last row."""
    return [x[row].clone() for row in (0, -1)]


def stored_and_read(
    pair: tuple[TensorFormat, TensorFormat],
    tokens: list[torch.Tensor],
    query: torch.Tensor,
    new: list[torch.Tensor],
) -> list[torch.Tensor]:
    """The ends of all that ops make of a prompt and a step behind it: first those of attention."""
    rows, heads, length, _ = tokens[0].shape
    encoded, capacity = [fmt.encode() for fmt in pair], length + 1
    found = []
    for x, fmt in zip(tokens, encoded, strict=True):
        for buffer in kernels.quantize_pack(x, None, fmt):
            found += ends(buffer) if buffer.numel() else []
    caches = [
        allocate(
            *(rows, heads, D, layout.fixed_tiles(fmt, capacity), layout.fixed_slots(fmt, capacity)),
            *(fmt, tokens[0].dtype, DEVICE),
        ).tensors
        for fmt in pair
    ]
    start = torch.tensor(length, device=DEVICE)
    kernels.append_(*caches, *tokens, None, torch.zeros_like(start), capacity, *encoded)
    out = kernels.attend(query, *new, *caches, None, start, capacity, SCALE, *encoded)
    kernels.append_(*caches, *new, None, start, capacity, *encoded)
    for cache, fmt in zip(caches, encoded, strict=True):
        for buffer in (*cache, kernels.dequantize(cache, start + 1, capacity, fmt)):
            found += ends(buffer) if buffer.numel() else []
    return ends(out) + found


LARGE = {
    "8 bits": ((make_format(8, "channel", 128, 128, 4, 32), make_format(8, "token", 0, 128, 4, 32)), 130),
    "raw": ((make_format(16), make_format(16)), 66),
}
"""Formats, and rows of 8 heads with 32,768 tokens of 128 channels: buffers of 2**31 elements and more."""
FEW = (make_format(8, "channel", 32, 32, 4, 8), make_format(16)), 3


@pytest.mark.parametrize("case", LARGE if ON_GPU else ["few"])
def test_rows_of_large_caches_are_what_they_are_alone(case: str) -> None:
    pair, rows = LARGE[case] if ON_GPU else FEW
    heads, length = (8, 32767) if ON_GPU else (1, 75)
    assert rows * heads * (length + 1) * (64 if case == "8 bits" else D) >= BEYOND or not ON_GPU
    g = torch.Generator(DEVICE).manual_seed(0)
    sizes = ((heads, length), (heads, length), (2 * heads, 1), (heads, 1), (heads, 1))
    one, other = (
        [
            torch.randn(1, n, h, D, generator=g, dtype=steps.DTYPE, device=DEVICE).transpose(1, 2)
            for h, n in sizes
        ]
        for _ in "ab"
    )
    many = [
        torch.cat([a.transpose(1, 2).expand(rows - 1, -1, -1, -1), b.transpose(1, 2)])
        for a, b in zip(one, other, strict=True)
    ]
    many = [x.transpose(1, 2) for x in many]
    together, first, last = (stored_and_read(pair, x[:2], x[2], x[3:]) for x in (many, one, other))
    # shares of attention are others where there are more heads
    for found, alone in zip(together[:2], (first[0], last[1]), strict=True):
        assert (found - alone).abs().max() < 0.02 * alone.abs().max()
    assert (together[0] - together[1]).abs().max() > 0.1 * together[0].abs().max()
    assert same(together[2::2], first[2::2])
    assert same(together[3::2], last[3::2])
    assert not same(together[2::2], together[3::2])
