"""What one step of many sequences does to a pool, worked out once for all layers.

The host knows every length, so all of it is plain integers, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kvmix_kernels.paged.pages import PageLayout


class Request(NamedTuple):
    """One sequence in a step.

    first, count: its tokens among those of the step; past: tokens stored before; raw_from: the first of
    them that is raw, a multiple of a page; pages: blocks of its pages, those included that this step fills;
    tail: number of its tail; sinks: block of its raw first tokens, -1 for none.
    """

    first: int
    count: int
    past: int
    raw_from: int
    pages: Sequence[int]
    tail: int
    sinks: int


class Singles(NamedTuple):
    """The sequences that have one token in a step, N of them, as tensors.

    tokens: their places in the step, [N]; pages: blocks of all their packed pages, [P], sequence by sequence;
    starts: where each one's begin, [N + 1]; owners: whose they are, [P]; counted: which rows of pages count,
    bool [P, 1, 1, tokens], None for all; tails: [N]; sinks: [N]; raw: which raw tokens count, bool
    [N, sink + ring].
    """

    tokens: Tensor
    pages: Tensor
    starts: Tensor
    owners: Tensor
    counted: Tensor | None
    tails: Tensor
    sinks: Tensor
    raw: Tensor


class Writes(NamedTuple):
    """Tokens that are kept raw: their places in the step, the blocks and the slots they go to, each [n]."""

    tokens: Tensor
    blocks: Tensor
    slots: Tensor


class Step:
    """Sequences of one step, side by side, each as long as it is."""

    def __init__(self, layout: PageLayout, requests: Sequence[Request], device: torch.device | str) -> None:
        """`requests`: in the order of their tokens."""
        self.layout, self.requests, self.device = layout, list(requests), device
        # the same for kernels (`tables.Tables`), from where it is first needed
        self.tables: object = None

    @cached_property
    def runs(self) -> list[Request]:
        """The sequences that have several tokens in the step."""
        return [request for request in self.requests if request.count > 1]

    @cached_property
    def singles(self) -> Singles | None:
        """Those that have one."""
        chosen = [request for request in self.requests if request.count == 1]
        if not chosen:
            return None
        size, ring, sink = self.layout.tokens, self.layout.ring, self.layout.sink
        pages: list[int] = []
        starts = [0]
        owners: list[int] = []
        places: list[int] = []
        for number, request in enumerate(chosen):
            count = request.raw_from // size
            pages += request.pages[:count]
            starts.append(len(pages))
            owners += [number] * count
            places += range(count)
        counted = None
        if sink and pages:
            rows = torch.tensor(places).unsqueeze(1) * size + torch.arange(size)
            counted = self._put((rows >= sink).view(-1, 1, 1, size))
        past = torch.tensor([request.past for request in chosen]).unsqueeze(1)
        begin = torch.tensor([request.raw_from for request in chosen]).unsqueeze(1)
        # the newest token that a slot can have
        newest = past - 1 - (past - 1 - torch.arange(ring)) % ring
        raw = torch.cat([torch.arange(sink) < begin, newest >= begin], 1)
        return Singles(
            self._numbers([request.first for request in chosen]),
            self._numbers(pages),
            self._numbers(starts),
            self._numbers(owners),
            counted,
            self._numbers([request.tail for request in chosen]),
            self._numbers([max(0, request.sinks) for request in chosen]),
            self._put(raw),
        )

    def filled(self, request: Request) -> range:
        """The pages, by their places in the sequence, whose last token is in this step."""
        size = self.layout.tokens
        return range(request.past // size, (request.past + request.count) // size)

    @cached_property
    def packed(self) -> Tensor:
        """Blocks of the pages that this step fills, int64 [n], sequence by sequence."""
        return self._numbers([r.pages[j] for r in self.requests for j in self.filled(r)])

    @cached_property
    def packed_mask(self) -> Tensor | None:
        """Which of their tokens may widen a group, bool [n, 1, 1, tokens]; None for all."""
        sink, size = self.layout.sink, self.layout.tokens
        places = [j for request in self.requests for j in self.filled(request)]
        if not sink or not any(j * size < sink for j in places):
            return None
        rows = torch.tensor(places).unsqueeze(1) * size + torch.arange(size)
        return self._put((rows >= sink).view(-1, 1, 1, size))

    @cached_property
    def kept(self) -> Writes:
        """What goes into tails."""
        tokens: list[int] = []
        tails: list[int] = []
        slots: list[int] = []
        for request in self.requests:
            end = request.past + request.count
            for position in range(max(request.past, end - self.layout.ring), end):
                tokens.append(request.first + position - request.past)
                tails.append(request.tail)
                slots.append(position % self.layout.ring)
        return Writes(self._numbers(tokens), self._numbers(tails), self._numbers(slots))

    @cached_property
    def kept_sinks(self) -> Writes | None:
        """What goes into sinks."""
        tokens: list[int] = []
        blocks: list[int] = []
        slots: list[int] = []
        for request in self.requests:
            for position in range(request.past, min(self.layout.sink, request.past + request.count)):
                tokens.append(request.first + position - request.past)
                blocks.append(request.sinks)
                slots.append(position)
        if not tokens:
            return None
        return Writes(self._numbers(tokens), self._numbers(blocks), self._numbers(slots))

    def slots(self, first: int, last: int) -> Tensor:
        """Slots of a tail that have the tokens first..last-1."""
        return self._put(torch.arange(first, last) % self.layout.ring)

    def page_tensor(self, pages: Sequence[int]) -> Tensor:
        """Blocks as an index."""
        return self._numbers(pages)

    def _numbers(self, numbers: Sequence[int]) -> Tensor:
        return self._put(torch.tensor(numbers, dtype=torch.int64))

    def _put(self, x: Tensor) -> Tensor:
        return x if str(self.device) == "cpu" else x.to(self.device, non_blocking=True)
