"""What a step of many sequences does, as one tensor of numbers on the device, for kernels.

A kernel that reads these needs nothing of the host, so a step of sequences with one token can be recorded
once and run again with other numbers in the same place. The tensor is int32: a head, a row for each sequence,
the pages that are due, then the blocks of all pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from kvmix_kernels.paged.step import Request, Step

FIRST, COUNT, PAST, BEGIN, TAIL, SINKS, PAGES, KEYS = range(8)
"""Columns of a row: those of `Request`; where its blocks begin among all; and where its tokens begin, if
those of all sequences with several tokens in this step, stored ones included, were side by side."""
ROW = 8
HEAD = 4
"""Numbers of the head, of which the first is how many pages are due."""
DUE = 2
"""Numbers of a page that is due: the row of its sequence, and its place in it."""


class Room(tuple[int, int, int]):
    """How many sequences, pages that are due, and blocks of pages there is room for."""

    __slots__ = ()

    def __new__(cls, sequences: int, due: int, pages: int) -> Room:
        """As they are called; `due` is made even, so that all parts begin at multiples of 16 bytes."""
        return super().__new__(cls, (sequences, due + due % 2, pages))

    @property
    def numbers(self) -> int:
        """Of all of it."""
        sequences, due, pages = self
        return HEAD + ROW * sequences + DUE * due + pages


class Tables:
    """The numbers of a step on the device; sequences with one token come first.

    Attributes:
        step: what they are of.
        singles: rows of sequences with one token.
        rows: of all, those without a sequence included, which have no token.
        longest: most packed pages that a sequence with one token may have.
        most: most tokens of a sequence in the step.
        numbers: int32, on the device.
    """

    def __init__(self, step: Step, room: Room, longest: int, numbers: Tensor) -> None:
        """Put the numbers of `step` into `numbers`, which has room for them.

        room: for at least what the step has; rows that are left over are of sequences without a token, and if
            the step has only ones with one token, so are these.
        longest: at least what the step has.
        """
        self.step, self.numbers, self.longest = step, numbers, max(1, longest)
        self.due_room = room[1]
        ordered = sorted(step.requests, key=lambda request: request.count > 1)
        self.runs: list[Request] = [request for request in ordered if request.count > 1]
        self.rows = room[0]
        self.singles = self.rows - len(self.runs)
        self.most = max((request.count for request in ordered), default=1)
        flat, keys = [0] * HEAD, 0
        blocks: list[int] = []
        for request in ordered:
            stored = request.past + request.count if request.count > 1 else 0
            flat += request[:4]
            flat += (request.tail, max(0, request.sinks), len(blocks), keys)
            blocks += request.pages
            keys += stored
        self.keys = keys
        flat += [0] * (HEAD + ROW * self.rows - len(flat))
        due = [(row, page) for row, one in enumerate(ordered) for page in step.filled(one)]
        flat[0] = len(due)
        for pair in due:
            flat += pair
        flat += [0] * (HEAD + ROW * self.rows + DUE * room[1] - len(flat))
        flat += blocks
        host = torch.tensor(flat, dtype=torch.int32)
        if numbers.is_cuda:
            # memory that is not pinned would make the host wait; the allocator keeps it until it is read
            host = host.pin_memory()
        numbers[: len(flat)].copy_(host, non_blocking=True)

    @cached_property
    def single_tokens(self) -> Tensor:
        """Places in the step of the tokens of sequences with one, int64 [singles]."""
        return self.requests.as_strided((self.singles,), (ROW,)).long()

    @cached_property
    def run_tokens(self) -> slice | Tensor:
        """Places in the step of the tokens of sequences with several, in their order."""
        ranges = [range(run.first, run.first + run.count) for run in self.runs]
        if all(one.stop == other.start for one, other in pairwise(ranges)):
            return slice(ranges[0].start, ranges[-1].stop)
        return self._moved(torch.tensor([place for one in ranges for place in one]))

    @cached_property
    def run_lengths(self) -> Tensor:
        """Where queries, and keys, of sequences with several tokens begin and end, int32 [2, runs + 1]."""
        counts = [[run.count for run in self.runs], [run.past + run.count for run in self.runs]]
        return self._moved(torch.tensor([[0, *accumulate(row)] for row in counts], dtype=torch.int32))

    def _moved(self, host: Tensor) -> Tensor:
        """On the device, without waiting for it."""
        if not self.numbers.is_cuda:
            return host
        return host.pin_memory().to(self.numbers.device, non_blocking=True)

    @property
    def requests(self) -> Tensor:
        """The rows."""
        return self.numbers[HEAD:]

    @property
    def due(self) -> Tensor:
        """Pages that the step fills."""
        return self.numbers[HEAD + ROW * self.rows :]

    @property
    def pages(self) -> Tensor:
        """Blocks of pages, sequence by sequence."""
        return self.numbers[HEAD + ROW * self.rows + DUE * self.due_room :]


def room_for(step: Step) -> tuple[Room, int]:
    """What a step needs, and the most packed pages of a sequence with one token in it."""
    pages = sum(len(request.pages) for request in step.requests)
    due = sum(len(step.filled(request)) for request in step.requests)
    return Room(len(step.requests), due, pages), longest_of(step.requests, step.layout.tokens)


def longest_of(requests: Sequence[Request], tokens: int) -> int:
    """Most packed pages of a sequence with one token."""
    return max((request.raw_from // tokens for request in requests if request.count == 1), default=0)


def tables_for(step: Step, device: torch.device) -> Tables:
    """Numbers of a step that is not to be recorded."""
    room, longest = room_for(step)
    numbers = torch.empty(room.numbers, dtype=torch.int32, device=device)
    return Tables(step, room, longest, numbers)
