"""Pages: what is stored in them is what a packed tensor stores, and attention over them is attention."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.cached import allocate
from kvmix_kernels.errors import FormatError
from kvmix_kernels.paged import attend, reference
from kvmix_kernels.paged.pages import LayerShape, PageLayout, PagePool, page_layout
from kvmix_kernels.paged.step import Request, Step
from kvmix_kernels.reference import storage
from tests.depth import examples

HEADS, QUERY_HEADS, D = 2, 4, 32
LAYERS = {
    0: LayerShape(
        layout.make_format(4, "channel", 16, 16, 4, 8),
        layout.make_format(2, "token", 0, 16, 4, 8, "byte", rotation=True, symmetric=True),
        HEADS,
        D,
        D,
    ),
    1: LayerShape(layout.make_format(8, "channel", 16, 16, 4, 8), layout.make_format(16), HEADS, D, D),
    2: LayerShape(
        layout.make_format(4, "channel", 32, 32, 0, 0, "byte", tiers=((4, 8), (2, 24)), order="tile_keys"),
        layout.make_format(3, "token", 16, 32, 0, 0),
        HEADS,
        D,
        D,
    ),
    3: LayerShape(
        layout.make_format(4, "channel", 32, 32, 0, 0, "byte", tiers=((4, 8), (2, 16), (0, 8)), order="plan"),
        layout.make_format(4, "token", 16, 32, 0, 0),
        HEADS,
        D,
        D,
    ),
}
# likewise, with channels kept in 16 bits
APART = LAYERS[3]._replace(
    key=layout.make_format(4, "channel", 32, 32, 0, 0, tiers=((16, 8), (4, 8), (2, 16)), order="plan")
)
ORDER = torch.stack([torch.arange(D), torch.arange(D).flip(0)]).int()


class Sequences:
    """Several sequences in one pool, that grow as an engine makes them, and what they should hold."""

    def __init__(self, laid: PageLayout, count: int, dtype: torch.dtype = torch.float32) -> None:
        self.laid = laid
        self.pool = PagePool(laid, torch.zeros(laid.tail_nbytes * (count + 8), dtype=torch.uint8), {3: ORDER})
        # what was there before is no number
        self.pool.storage.fill_(255)
        self.free = list(range(count * laid.blocks_per_tail, self.pool.blocks.shape[0]))
        self.past, self.pages = [0] * count, [[] for _ in range(count)]
        self.sinks = [self.free.pop() for _ in range(count)]
        self.shared = [0] * count
        self.made: dict[int, list[list[Tensor]]] = {n: [[] for _ in range(count)] for n in laid.layers}
        self.dtype = dtype

    def requests(self, counts: Sequence[int]) -> list[Request]:
        found, first = [], 0
        for i, count in enumerate(counts):
            while len(self.pages[i]) * self.laid.tokens < self.past[i] + count:
                self.pages[i].append(self.free.pop())
            if count:
                begin = self.laid.raw_from(self.past[i], self.shared[i])
                found.append(Request(first, count, self.past[i], begin, self.pages[i], i, self.sinks[i]))
            first += count
        return found

    def step(self, counts: Sequence[int], softcap: float = 0.0, sink: Tensor | None = None) -> None:
        """Attend and store in all layers; attention has to be that of the reference."""
        step = Step(self.laid, self.requests(counts), "cpu")
        n = sum(counts)
        for layer in self.laid.layers:
            q = torch.randn(n, QUERY_HEADS, D, dtype=self.dtype)
            k, v = (torch.randn(n, HEADS, D, dtype=self.dtype) for _ in range(2))
            given_ = (self.pool, layer, step, q, k, v, 0.3, softcap, sink)
            torch.testing.assert_close(
                attend.attend(*given_), reference.attend(*given_), atol=2e-4, rtol=1e-3
            )
            attend.store(self.pool, layer, step, k, v)
            first = 0
            for i, count in enumerate(counts):
                self.made[layer][i].append(torch.stack([k, v])[:, first : first + count])
                first += count
        self.past = [past + count for past, count in zip(self.past, counts, strict=True)]


def laid_out(*layers: int, **rest: int) -> PageLayout:
    return page_layout({n: LAYERS[n] for n in layers or LAYERS}, torch.float32, **rest)


def expected(tokens: Tensor, layer: int, role: int, laid: PageLayout, begin: int) -> Tensor:
    """Tokens [n, H, D] as they should be read: whole pages of them rounded, sinks and the rest exact."""
    shape, size = LAYERS[layer], laid.tokens
    fmt = shape[role]._replace(sink=0, window=0)
    out = tokens.transpose(0, 1).clone()
    for first in range(0, begin, size):
        page = tokens[first : first + size].transpose(0, 1).unsqueeze(0)
        if fmt.is_raw:
            continue
        one = allocate(1, HEADS, D, size // fmt.tile, fmt.residual_slots, fmt, tokens.dtype, "cpu")
        one.take_order(ORDER)
        valid = (torch.arange(first, first + size) >= laid.sink).unsqueeze(0)
        storage.append(one, page, valid, 0)
        out[:, first : first + size] = storage.read(one, 0, size, size)[0]
    out[:, : laid.sink] = tokens[: laid.sink].transpose(0, 1)
    return out


@settings(max_examples=examples(6))
@given(st.lists(st.lists(st.integers(0, 70), min_size=3, max_size=3), min_size=1, max_size=3), st.booleans())
def test_steps_of_any_lengths_attend_as_the_reference_and_store_what_a_packed_tensor_stores(steps, decoding):
    torch.manual_seed(len(steps))
    both = Sequences(laid_out(), 3)
    for counts in steps:
        both.step(counts)
    for _ in range(3 if decoding else 0):
        both.step([1, 1, 1])
    for request in Step(both.laid, both.requests([1, 1, 1]), "cpu").requests:
        for layer, made in both.made.items():
            tokens = torch.cat(made[request.tail], 1)
            for role in range(2):
                found = reference.stored(both.pool, layer, request, role)
                wanted = expected(tokens[role], layer, role, both.laid, request.raw_from)
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_the_first_channels_of_a_plans_order_are_those_kept_in_16_bits():
    laid = page_layout({3: APART}, torch.float32)
    pool = PagePool(laid, torch.zeros(4 * laid.tail_nbytes, dtype=torch.uint8), {3: ORDER})
    keys, values = torch.randn(32, HEADS, D), torch.randn(32, HEADS, D)
    page = laid.blocks_per_tail
    attend.store(pool, 3, Step(laid, [Request(0, 32, 0, 0, [page], 0, -1)], "cpu"), keys, values)
    found = reference.stored(pool, 3, Request(0, 1, 32, 32, [page], 0, -1), 0)
    error = (found - keys.transpose(0, 1)).abs().amax(1).gather(1, ORDER.long())
    assert error[:, :8].max() < 0.02
    assert error[:, 16:].min() > 0.1
    assert error.max() < 2


def test_caps_and_learned_sinks_count_in_both_ways_of_attending():
    torch.manual_seed(1)
    both = Sequences(laid_out(0, 2), 2)
    for counts in ((70, 3), (1, 40), (1, 1)):
        both.step(counts, 5.0, torch.randn(QUERY_HEADS))


def test_a_sequence_on_the_pages_of_another_attends_to_the_same_tokens():
    torch.manual_seed(2)
    both = Sequences(laid_out(0, 1), 2)
    both.step([64, 0])
    both.pages[1], both.sinks[1] = list(both.pages[0]), both.sinks[0]
    both.past[1] = both.shared[1] = 64
    both.step([1, 1])
    first, second = Step(both.laid, both.requests([1, 1]), "cpu").requests
    one, other = (reference.stored(both.pool, 0, request, 0) for request in (first, second))
    # what the first has raw in its window the second has as it is packed
    torch.testing.assert_close(one[:, :32], other[:, :32], atol=0, rtol=0)
    assert not torch.equal(one[:, 48:64], other[:, 48:64])
    torch.testing.assert_close(one[:, 48:64], other[:, 48:64], atol=0.3, rtol=0.3)


def test_bytes_of_a_page_are_those_of_its_formats():
    laid = laid_out(0, 1)
    element = layout.bits_per_packed_element
    bits = sum(element(fmt, D) for n in (0, 1) for fmt in LAYERS[n][:2])
    # layer 1 keeps values at 16 bits, here of single precision
    wanted = laid.tokens * HEADS * D * (bits + 16) / 8
    assert wanted <= laid.nbytes < wanted + 512
    assert laid.tail_nbytes >= 2 * 2 * HEADS * D * 4 * laid.ring
    assert (laid.tokens, laid.ring) == (16, 24)


def test_pages_are_long_enough_for_the_sinks_and_tails_are_multiples_of_what_shares_the_pool():
    low = LayerShape(
        layout.make_format(2, "channel", 32, 32, 16, 0),
        layout.make_format(2, "token", 32, 32, 16, 0),
        1,
        32,
        32,
    )
    # 16 sinks of 32 bits against 3 bits a token: more than 170 tokens, in tiles of 32
    assert page_layout({0: low}, torch.float32).tokens == 192
    other = page_layout({0: low}, torch.bfloat16, block_multiple=3 * 2**10)
    assert other.tail_nbytes % (3 * 2**10) == 0
    assert other.nbytes % 16 == 0
    with pytest.raises(FormatError, match=r"multiple of this plan's tile of 32: use 32"):
        page_layout({0: low}, torch.bfloat16, tokens=48)


def test_what_belongs_to_one_sequence_is_refused():
    tiers = ((4, 8), (2, 24))
    for order in ("prompt", "tile"):
        key = layout.make_format(4, "channel", 32, 32, 0, 0, tiers=tiers, order=order)
        with pytest.raises(FormatError, match=f'keys of layer 0: order="{order}" chooses'):
            page_layout({0: LAYERS[0]._replace(key=key)}, torch.float32)
    high = layout.with_high(LAYERS[0].value, layout.make_high(share=20))
    with pytest.raises(FormatError, match="values of layer 0: a high tier"):
        page_layout({0: LAYERS[0]._replace(value=high)}, torch.float32)
