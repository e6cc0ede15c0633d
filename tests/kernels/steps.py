"""Steps of every form that kernels have, each of which can be done again and again on the same inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels import triton as kernels
from kvmix_kernels.cached import Cached, allocate
from kvmix_kernels.layout import TensorFormat, make_format, make_high, with_high
from kvmix_kernels.paged.pages import LayerShape, PagePool, page_layout
from kvmix_kernels.paged.step import Request
from kvmix_kernels.paged.step import Step as PagedStep
from kvmix_kernels.paged.tables import tables_for
from kvmix_kernels.reference import storage
from kvmix_kernels.tokens import ops as token_ops
from kvmix_kernels.triton import paged, tiers

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
B, HEADS, GROUP = 1 + ON_GPU, 2, 2
D, TILE, TILES, SINK, WINDOW = (128, 128, 8, 4, 32) if ON_GPU else (32, 32, 2, 3, 8)
LENGTH = SINK + WINDOW + TILES * TILE - 1
"""With one token more a tile is packed."""
SPARE = 40
PAGE, EACH = max(64, TILE), 4
"""Tokens of a page, and pages that a sequence has room for."""
SCALE = 0.2
RAW_TOO = ((16, 8), (4, 8), (2, D - 16))


def keys(bits: int = 4, axis: str = "channel", size: int = TILE, **more: object) -> TensorFormat:
    return make_format(bits, axis, size, TILE, SINK, WINDOW, **more)


def values(bits: int = 2, size: int = layout.WHOLE_HEAD, **more: object) -> TensorFormat:
    return make_format(bits, "token", size, TILE, SINK, WINDOW, **more)


TURNED = values(2, scale_dtype="byte", rotation=True, symmetric=True)
TWO = ((4, D // 4), (2, D - D // 4))
FORMS = {
    "2 bits": (keys(2), values(2)),
    "3 bits, a learned sink": (keys(3), values(3, 16)),
    "4 bits, a mask": (keys(4), values(4)),
    "6 and 8 bits, an added mask, capped": (keys(6), values(8, scale_dtype="float32")),
    "by token and by channel": (keys(4, "token", 16), keys(2)),
    "raw": (make_format(16), make_format(16)),
    "tiers, rotated values, bytes": (keys(scale_dtype="byte", tiers=TWO, order="prompt"), TURNED),
    "tiers of tiles, a mask": (keys(scale_dtype="byte", tiers=TWO, order="tile"), TURNED),
    "channels apart, a learned sink": (keys(tiers=RAW_TOO, order="prompt"), values(2)),
}
"""Keys and values, and in words what attention has beside them."""


def high(pair: tuple[TensorFormat, TensorFormat], **more: object) -> tuple[TensorFormat, TensorFormat]:
    tier = make_high(25, **more)
    return with_high(pair[0], tier), with_high(pair[1], tier._replace(scored=0, balanced=0))


TOKEN_TIERS = {
    "tokens apart, balanced, a mask": high((keys(2), values(2)), balanced=True),
    "tokens and channels apart, a learned sink": high(
        (keys(tiers=TWO, order="prompt"), TURNED), policy="mean"
    ),
    "evicted, capped": high((keys(2), values(2)), evicting=True),
}
PAGED = {
    "pages, 4 and 2 bits": (keys(4), values(2)),
    "pages, tiers of tiles": (keys(scale_dtype="byte", tiers=TWO, order="tile_keys"), TURNED),
    "pages, raw values": (keys(3), make_format(16)),
}
ALL = (*FORMS, *TOKEN_TIERS, *PAGED)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers of heads that lie as models have them, behind tokens in memory."""
    rows, heads, tokens, channels = shape
    x = torch.randn(rows, tokens, heads, channels, generator=generator)
    return x.to(DTYPE).transpose(1, 2).to(DEVICE)


class OneCache:
    """A step over a fixed cache: attention, its log-sum-exp, the append, which packs a tile, and a read."""

    def __init__(self, name: str, seed: int = 0, stale: bool = False) -> None:
        """stale: what the prompt does not write has been left there by another."""
        self.tiered = name in TOKEN_TIERS
        self.formats = (TOKEN_TIERS if self.tiered else FORMS)[name]
        g = torch.Generator().manual_seed(seed)
        self.capacity = LENGTH + SPARE
        shapes = ((HEADS, LENGTH), (HEADS, LENGTH), (HEADS * GROUP, LENGTH))
        prompt = [torch.randn(B, *shape, D, generator=g).to(DTYPE) for shape in shapes]
        self.full = [c.map(lambda x: x.to(DEVICE)) for c in self.filled(*prompt, stale)]
        self.caches = [c.map(torch.clone) for c in self.full]
        self.query, *self.new = (normal(g, B, n, 1, D) for n in (HEADS * GROUP, HEADS, HEADS))
        self.start = torch.tensor(LENGTH, device=DEVICE)
        self.mask = None
        if "mask" in name:
            seen = torch.rand(B, 1, 1, self.capacity + 1, generator=g).to(DEVICE) > 0.2
            self.mask = seen
            if "added" in name:
                lowest = torch.finfo(DTYPE).min
                self.mask = torch.zeros(seen.shape, dtype=DTYPE, device=DEVICE).masked_fill(~seen, lowest)
        self.softcap = 20.0 if "capped" in name else 0.0
        sinks = torch.linspace(-1, 6, HEADS * GROUP)
        self.sinks = sinks.to(DTYPE).to(DEVICE) if "learned" in name else None

    def filled(self, k: Tensor, v: Tensor, q: Tensor, stale: bool) -> list[Cached]:
        """Caches on the CPU that hold a prompt, by the plain ops."""
        caches = [
            allocate(
                *(B, HEADS, D, layout.fixed_tiles(f, self.capacity), layout.fixed_slots(f, self.capacity)),
                *(f, DTYPE, "cpu"),
            )
            for f in self.formats
        ]
        if stale:
            for buffer in (buffer for cache in caches for buffer in cache.tensors):
                buffer.fill_(float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).max)
        if self.tiered:
            token_ops.append_tiers_(
                *(*(c.tensors for c in caches), k, v, None, None, 0, *self.encoded, q, None, SCALE)
            )
        else:
            storage.append(caches[0], k, None, 0, q)
            storage.append(caches[1], v, None, 0)
        return caches

    @property
    def encoded(self) -> list[list[int]]:
        return [f.encode() for f in self.formats]

    def run(self) -> list[Tensor]:
        """What attention gives and, after the append, the buffers and all tokens as numbers."""
        for full, cache in zip(self.full, self.caches, strict=True):
            for saved, buffer in zip(full.tensors, cache.tensors, strict=True):
                buffer.copy_(saved)
        k, v = (c.tensors for c in self.caches)
        stored = (k, v, self.mask, self.start, self.capacity, SCALE, *self.encoded, self.softcap, self.sinks)
        if self.tiered:
            out, mass = tiers.attend_tiers(self.query, *self.new, *stored)
            tiers.append_tiers_(
                *(k, v, *self.new, self.mask, self.start, self.capacity, *self.encoded),
                *(self.query, mass, SCALE, self.softcap, self.sinks),
            )
            return [out, mass, *k, *v]
        found = [kernels.attend(self.query, *self.new, *stored)]
        found += kernels.attend_lse(self.query, *self.new, *stored)
        kernels.append_(k, v, *self.new, self.mask, self.start, self.capacity, *self.encoded, self.query)
        found += [
            kernels.dequantize(c, self.start + 1, self.capacity, f)
            for c, f in zip((k, v), self.encoded, strict=True)
        ]
        return [*found, *k, *v]


class Prompt:
    """A prompt that is packed into growing caches, and tokens that follow it into a fixed one."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.one = OneCache(name, seed)
        g = torch.Generator().manual_seed(seed + 1)
        self.q, *self.new = (normal(g, B, n, LENGTH, D) for n in (HEADS * GROUP, HEADS, HEADS))

    def run(self) -> list[Tensor]:
        """The buffers of both."""
        one, found = self.one, []
        for x, fmt in zip(self.new, one.formats, strict=True):
            hint = self.q if fmt.asks_queries else None
            found += kernels.quantize_pack(x, None, fmt.encode(), hint)
        for full, cache in zip(one.full, one.caches, strict=True):
            for saved, buffer in zip(full.tensors, cache.tensors, strict=True):
                buffer.copy_(saved)
        buffers = [c.tensors for c in one.caches]
        more = [x[:, :, : SPARE - 1] for x in (*self.new, self.q)]
        kernels.append_(*buffers, *more[:2], None, one.start, one.capacity, *one.encoded, more[2])
        return [*found, *buffers[0], *buffers[1]]


class Pages:
    """A step over pages of two sequences: one token, which fills a page, and five."""

    def __init__(self, name: str, seed: int = 0, at: int = 0) -> None:
        """at: the first tail that is used, of so many bytes that blocks are counted from there on."""
        g = torch.Generator().manual_seed(seed)
        self.laid = page_layout({0: LayerShape(*PAGED[name], HEADS, D, D)}, DTYPE, PAGE)
        first = (at + 2) * self.laid.blocks_per_tail
        self.used = slice(at * self.laid.blocks_per_tail, first + 2 + 2 * EACH)
        size = self.used.stop * self.laid.nbytes
        self.pool = PagePool(self.laid, torch.empty(size, dtype=torch.uint8, device=DEVICE))
        self.pool.blocks[self.used].fill_(0)
        # tails, then the raw first tokens, then pages
        self.places = [
            (range(first + 2 + i * EACH, first + 2 + (i + 1) * EACH), at + i, first + i) for i in (0, 1)
        ]
        past = ((EACH - 1) * PAGE - 1, PAGE + WINDOW + 5)
        tables = self.tables((0, 0), past)
        paged.store(self.pool, 0, tables, *self.tokens(g, sum(past))[1:])
        self.saved = self.pool.blocks[self.used].clone()
        self.step = self.tables(past, (1, 5))
        self.new = self.tokens(g, 6)

    def tokens(self, g: torch.Generator, count: int) -> list[Tensor]:
        numbers = (torch.randn(count, n, D, generator=g) for n in (HEADS * GROUP, HEADS, HEADS))
        return [x.to(DTYPE).to(DEVICE) for x in numbers]

    def tables(self, past: tuple[int, int], counts: tuple[int, int]):
        requests, first = [], 0
        for (pages, tail, sinks), before, count in zip(self.places, past, counts, strict=True):
            requests.append(Request(first, count, before, self.laid.raw_from(before), pages, tail, sinks))
            first += count
        return tables_for(PagedStep(self.laid, requests, DEVICE), torch.device(DEVICE))

    def run(self) -> list[Tensor]:
        """Attention of the first sequence, all tokens of the other, and the blocks after the step."""
        self.pool.blocks[self.used].copy_(self.saved)
        found = [paged.attend_singles(self.pool, 0, self.step, *self.new, SCALE)]
        found += paged.gather(self.pool, 0, self.step, *self.new[1:])
        paged.store(self.pool, 0, self.step, *self.new[1:])
        return [*found, self.pool.blocks[self.used]]


def step_of(name: str, seed: int = 0) -> OneCache | Pages:
    return Pages(name, seed) if name in PAGED else OneCache(name, seed)


def bits(x: Tensor) -> Tensor:
    """Numbers as integers: equal only if they are the same bits."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(whole)


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether all are the same bits."""
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(got, expected, strict=True))
