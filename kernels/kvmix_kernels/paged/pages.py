"""Where the tokens of many sequences lie in one pool of bytes.

A *page* holds `tokens` consecutive tokens of one sequence, of all layers: per layer the buffers of its
packed keys, then those of its values (`TensorFormat.buffer_names`, each [Hkv, ...], 16 bytes aligned).
Formats differ by layer, so offsets are a table. A page is written once, when all its tokens are known, and
belongs to whoever has them as a prefix. Tensors that stay at 16 bits lie in pages as they are.

Two things beside pages:

    tail   of one running sequence: its last tokens, raw, per layer keys [Hkv, ring, D] then values; token p
           is in slot p % ring. ring = tokens + window: the window stays raw for whoever computed it
    sinks  of one first page: the first tokens, raw, per layer keys [Hkv, sink, D] then values

Page j has tokens j * tokens .. (j + 1) * tokens - 1, sinks included: their codes widen no group and are never
read. So a page depends on its tokens alone, and not on what comes after them.

Blocks of `nbytes` (pages, sinks) are counted through the whole pool; `blocks_per_tail` of them in a row make
room for a tail. A pool is a one-dimensional uint8 tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.cached import Cached, as_packed, shapes
from kvmix_kernels.errors import FormatError
from kvmix_kernels.layout import ORDER_PLAN, TensorFormat

ALIGNMENT = 16
"""Bytes at whose multiples buffers start."""
POOL_ALIGNMENT = 128
"""Bytes of which tails are multiples."""


class LayerShape(NamedTuple):
    """What a layer keeps: formats of keys and values, its KV heads, channels of a key and of a value."""

    key: TensorFormat
    value: TensorFormat
    heads: int
    key_dim: int
    value_dim: int


class Part(NamedTuple):
    """One buffer in a block: [Hkv, *shape] from byte `offset` on."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Side(NamedTuple):
    """The keys or the values of one layer.

    format: without sinks and window. parts: its buffers in a page, as `format.buffer_names`; None for an
    order of channels that the plan has. tail, sinks: its raw tokens.
    """

    format: TensorFormat
    parts: tuple[Part | None, ...]
    tail: Part
    sinks: Part


class PagedLayer(NamedTuple):
    """Where one layer's share of a page begins and ends, and what is in it."""

    heads: int
    first: int
    last: int
    keys: Side
    values: Side


class PageLayout(NamedTuple):
    """The table of a pool.

    tokens: of a page; ring: slots of a tail; sink: raw first tokens; window: raw recent ones; nbytes: of a
    block; blocks_per_tail; layers: by number, those that are paged; dtype: of raw tokens.
    """

    tokens: int
    ring: int
    sink: int
    window: int
    nbytes: int
    blocks_per_tail: int
    layers: dict[int, PagedLayer]
    dtype: torch.dtype

    @property
    def tail_nbytes(self) -> int:
        """Bytes set aside for a tail: whole blocks."""
        return self.nbytes * self.blocks_per_tail

    def raw_from(self, past: int, packed: int = 0) -> int:
        """First raw token of a sequence of `past` tokens that took its first `packed` ones from others."""
        return max(packed, max(0, past - self.window) // self.tokens * self.tokens)


def check_pageable(fmt: TensorFormat, what: str) -> None:
    """Raise FormatError for a format of which pages cannot be shared; `what` names the tensor."""
    if fmt.asks_queries:
        order = layout.ORDERS[fmt.order]
        raise FormatError(
            f'{what}: order="{order}" chooses channels from the queries of one sequence, and pages are '
            'shared: take the order from a profile (order="plan"), or from each tile (order="tile_keys")'
        )
    if fmt.high is not None:
        raise FormatError(
            f"{what}: a high tier of tokens belongs to one sequence, and pages are shared: leave it out"
        )


def page_layout(
    layers: Mapping[int, LayerShape],
    dtype: torch.dtype,
    tokens: int | None = None,
    block_multiple: int = 0,
) -> PageLayout:
    """Lay out pages for `layers`, whose sinks and windows become the largest of any layer.

    Args:
        layers: by number.
        dtype: of raw tokens.
        tokens: of a page, a multiple of every tile; None for the fewest that also make a page hold the sinks.
        block_multiple: bytes of which a tail has to be a multiple, for pools that hold something else too.

    Raises:
        FormatError: a format belongs to one sequence, or `tokens` is no multiple of the tiles.
    """
    for number, shape in layers.items():
        check_pageable(shape.key, f"keys of layer {number}")
        check_pageable(shape.value, f"values of layer {number}")
    formats = [fmt for shape in layers.values() for fmt in (shape.key, shape.value)]
    packed = [fmt for fmt in formats if not fmt.is_raw]
    tile = math.lcm(*(fmt.tile for fmt in packed)) if packed else 32
    sink = max((fmt.sink for fmt in packed), default=0)
    window = max((fmt.window for fmt in packed), default=0)
    if tokens is None:
        tokens = tile
        while _laid_out(layers, dtype, tokens, sink, tokens + window).sink_nbytes_exceed:
            tokens += tile
    elif tokens < 1 or tokens % tile:
        raise FormatError(
            f"a page of {tokens} tokens is no multiple of this plan's tile of {tile}: use {tile}"
        )
    laid = _laid_out(layers, dtype, tokens, sink, tokens + window)
    if laid.sink_nbytes_exceed:
        raise FormatError(
            f"{sink} raw first tokens do not fit into a page of {tokens}: use larger pages, or fewer sinks"
        )
    nbytes, blocks = _fitted(laid.page_nbytes, laid.tail_nbytes, block_multiple)
    return PageLayout(tokens, tokens + window, sink, window, nbytes, blocks, laid.layers, dtype)


class _Laid(NamedTuple):
    layers: dict[int, PagedLayer]
    page_nbytes: int
    tail_nbytes: int
    sink_nbytes_exceed: bool


def _laid_out(
    layers: Mapping[int, LayerShape], dtype: torch.dtype, tokens: int, sink: int, ring: int
) -> _Laid:
    found: dict[int, PagedLayer] = {}
    at = tail = sinks = 0
    for number, shape in layers.items():
        first = at
        sides: list[Side] = []
        for fmt, channels in ((shape.key, shape.key_dim), (shape.value, shape.value_dim)):
            plain = fmt._replace(sink=0, window=0)
            if fmt.is_raw:
                plain = plain._replace(tile=tokens)
            tiles, slots = (0, tokens) if fmt.is_raw else (tokens // fmt.tile, 0)
            parts: list[Part | None] = []
            named = shapes(plain, channels, tiles, slots, dtype)
            for name, (size, kind) in zip(plain.buffer_names, named, strict=True):
                if name == "order" and plain.order == ORDER_PLAN:
                    parts.append(None)
                    continue
                parts.append(Part(at, size, kind))
                at = _after(at, shape.heads, size, kind)
            rows = Part(tail, (ring, channels), dtype)
            firsts = Part(sinks, (sink, channels), dtype)
            tail = _after(tail, shape.heads, rows.shape, dtype)
            sinks = _after(sinks, shape.heads, firsts.shape, dtype)
            sides.append(Side(plain, tuple(parts), rows, firsts))
        found[number] = PagedLayer(shape.heads, first, at, *sides)
    return _Laid(found, at, tail, sinks > at)


def _after(at: int, heads: int, size: Sequence[int], kind: torch.dtype) -> int:
    end = at + heads * math.prod(size) * kind.itemsize
    return -(-end // ALIGNMENT) * ALIGNMENT


def _fitted(page: int, tail: int, multiple: int) -> tuple[int, int]:
    """Bytes of a block and blocks of a tail, so that tails are whole blocks and whole multiples."""
    unit = math.lcm(POOL_ALIGNMENT, multiple or 1)
    if not multiple:
        page = -(-page // POOL_ALIGNMENT) * POOL_ALIGNMENT
        return page, -(-tail // page)
    # of a few sizes, that which leaves the least of a block unused
    best: tuple[int, int] | None = None
    least = -(-max(tail, page) // unit)
    for count in range(least, least + 8):
        blocks = count * unit // page
        while blocks and count * unit % (blocks * ALIGNMENT):
            blocks -= 1
        if blocks and (best is None or count * unit // blocks < best[0]):
            best = count * unit // blocks, blocks
    assert best is not None  # one block always divides
    return best


class PagePool:
    """A pool of bytes as pages, tails and sinks of every layer. Views only: nothing is copied.

    Attributes:
        layout: where things lie.
        storage: uint8, one-dimensional, whole blocks.
        orders: by layer, the plan's order of channels of its keys, int32 [Hkv, D].
    """

    def __init__(
        self, layout: PageLayout, storage: Tensor, orders: Mapping[int, Tensor] | None = None
    ) -> None:
        """Look at `storage` as blocks of `layout`."""
        self.layout, self.storage = layout, storage
        self.orders = dict(orders or {})
        # as tiers lie: those that are apart come last
        self._placed = {
            number: as_packed(order, layout.layers[number].keys.format)
            for number, order in self.orders.items()
            if number in layout.layers
        }
        count = storage.numel() // layout.nbytes
        self.blocks = storage[: count * layout.nbytes].view(count, layout.nbytes)
        tails = count // layout.blocks_per_tail
        self._raw: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._pages: dict[int, tuple[Cached, Cached]] = {}
        for number, layer in layout.layers.items():
            keys, values = layer.keys, layer.values
            self._raw[number] = (
                _view(storage, keys.tail, layer.heads, layout.tail_nbytes, tails),
                _view(storage, values.tail, layer.heads, layout.tail_nbytes, tails),
                _view(storage, keys.sinks, layer.heads, layout.nbytes, count),
                _view(storage, values.sinks, layer.heads, layout.nbytes, count),
            )
            self._pages[number] = self._cached(number, storage, layout.nbytes, count, 0)

    def pages(self, number: int) -> tuple[Cached, Cached]:
        """Keys and values of a layer in all blocks, whose batch is the blocks; [blocks, Hkv, ...]."""
        return self._pages[number]

    def gathered(self, number: int, pages: Tensor) -> tuple[Cached, Cached]:
        """Keys and values of a layer in some pages, copied side by side as they are packed.

        Args:
            number: of the layer.
            pages: their blocks, int64 [P].
        """
        layer = self.layout.layers[number]
        own = self.blocks[:, layer.first : layer.last].index_select(0, pages).view(-1)
        return self._cached(number, own, layer.last - layer.first, len(pages), layer.first)

    def tails(self, number: int) -> tuple[Tensor, Tensor]:
        """Raw recent keys and values of a layer, [tails, Hkv, ring, D], by the tail's number."""
        return self._raw[number][:2]

    def sinks(self, number: int) -> tuple[Tensor, Tensor]:
        """Raw first keys and values of a layer, [blocks, Hkv, sink, D], by block."""
        return self._raw[number][2:]

    def order(self, number: int) -> Tensor | None:
        """The plan's order of a layer's channels, int32 [Hkv, D]."""
        return self.orders.get(number)

    def _cached(
        self, number: int, storage: Tensor, stride: int, count: int, before: int
    ) -> tuple[Cached, Cached]:
        layer = self.layout.layers[number]
        both = []
        for side in (layer.keys, layer.values):
            tensors = []
            for part in side.parts:
                if part is None:
                    order = self._placed[number]
                    tensors.append(order.expand(count, *order.shape))
                else:
                    moved = part._replace(offset=part.offset - before)
                    tensors.append(_view(storage, moved, layer.heads, stride, count))
            both.append(Cached(side.format, tuple(tensors)))
        return both[0], both[1]


def _view(storage: Tensor, part: Part, heads: int, stride: int, count: int) -> Tensor:
    """A part of each of `count` blocks of `stride` bytes, [count, heads, *shape]."""
    size = part.dtype.itemsize
    flat = storage.view(part.dtype)
    strides = [math.prod(part.shape[i + 1 :]) for i in range(len(part.shape))]
    return flat.as_strided(
        (count, heads, *part.shape),
        (stride // size, math.prod(part.shape), *strides),
        flat.storage_offset() + part.offset // size,
    )
