"""Timing GPU work by replaying a CUDA graph, and inputs to time attention on."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.cached import Cached, allocate
from kvmix_kernels.layout import TensorFormat

L2_BYTES = 256 << 20
"""Inputs that rotate are together larger than this, several times any L2 cache."""


class Timing(NamedTuple):
    """Microseconds per call."""

    median: float
    p20: float
    p80: float


def graph_time(calls: Sequence[Callable[[], object]], replays: int = 20, least: float = 1000.0) -> Timing:
    """Median time of one call; the calls (equal work on different inputs) take turns in one graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    rounds = max(1, min(50, int(least / (begin.elapsed_time(end) * 1000.0)) + 1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000.0 / (rounds * len(calls)))
    times.sort()
    return Timing(statistics.median(times), times[len(times) // 5], times[len(times) * 4 // 5])


class Case(NamedTuple):
    """A decode step: `batch` sequences, `heads` KV heads with `group` query heads each, `tokens` cached."""

    batch: int
    heads: int
    group: int
    tokens: int
    head_dim: int

    @property
    def name(self) -> str:
        """Stable name used in benchmark rows."""
        return f"b{self.batch} h{self.heads}x{self.group} n{self.tokens} d{self.head_dim}"

    @classmethod
    def parse(cls, name: str) -> Case:
        """Inverse of `name`."""
        batch, heads, tokens, head_dim = name.split()
        count, group = heads[1:].split("x")
        return cls(int(batch[1:]), int(count), int(group), int(tokens[1:]), int(head_dim[1:]))


def random_cache(case: Case, fmt: TensorFormat, capacity: int, dtype: torch.dtype) -> Cached:
    """A full cache of random bits with scales and offsets as of normally distributed tokens."""
    cache = allocate(
        case.batch, case.heads, case.head_dim, layout.fixed_tiles(fmt, capacity), layout.fixed_slots(fmt, capacity),
        fmt, dtype, "cuda",
    )  # fmt: skip
    if not fmt.is_raw:
        top = 2**fmt.bits - 1
        cache.qdata.random_(-(1 << 15), 1 << 15)
        if cache.scale.is_floating_point():
            cache.scale.uniform_(3.0 / top, 6.0 / top)
            cache.zero_point.uniform_(-3.0, -1.5)
        else:
            # float16 between 0.5 and 2, offsets in quarters of them
            cache.scale.random_(0x70, 0x80)
            cache.zero_point.random_(-12, -4)
    if cache.order is not None:
        cache.order.copy_(torch.rand(cache.order.shape, device="cuda").argsort(-1))
    for part in cache.apart:
        if part is not None:
            part.normal_()
            # channels that are apart have no code, and no grid
            for grid in (cache.scale, cache.zero_point):
                grid[..., case.head_dim - fmt.apart_channels :] = 0
    cache.residual.normal_()
    return cache


def decode_inputs(
    case: Case, k: TensorFormat, v: TensorFormat, dtype: torch.dtype = torch.bfloat16
) -> list[Any]:
    """Arguments of `attend` for one decode step on a fixed cache that is full but for the new token."""
    capacity = case.tokens + 1
    shape = (case.batch, case.heads, 1, case.head_dim)
    new = [torch.randn(shape, dtype=dtype, device="cuda") for _ in range(2)]
    query = torch.randn(case.batch, case.heads * case.group, 1, case.head_dim, dtype=dtype, device="cuda")
    start = torch.tensor(case.tokens, device="cuda")
    return [
        query, *new, *(random_cache(case, fmt, capacity, dtype).tensors for fmt in (k, v)),
        None, start, capacity, case.head_dim**-0.5, k.encode(), v.encode(),
    ]  # fmt: skip


def input_sets(nbytes: int) -> int:
    """How many sets of inputs of this size have to take turns."""
    return max(1, min(64, -(-L2_BYTES // max(1, nbytes))))


def nbytes(args: Sequence[object]) -> int:
    """Bytes of all tensors among the arguments."""
    flat = (x for a in args for x in (a if isinstance(a, tuple) else (a,)))
    return sum(x.numel() * x.element_size() for x in flat if isinstance(x, Tensor))
