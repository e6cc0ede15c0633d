"""Work on streams of its own while a step is recorded, so that its replays do it side by side.

A product of a few rows with a weight waits for memory, most of all at its beginning and its end, and
a small one never gets as many bytes under way as the device could take. What does not depend on each
other fills these gaps: the products that make queries, keys and values, say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SIDES = 3
"""Streams beside the one that is recorded, at most."""

_library = torch.library.Library("kvmix", "FRAGMENT")
_library.define("products(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]")


def side_by_side(tasks: Sequence[Callable[[], object]], forks: bool = True) -> None:
    """Do what does not depend on each other, on several streams while the current one is recorded.

    Else one after another, on the current stream: to fork and to join takes the host longer than a launch.
    A task must not keep tensors that it allocates: memory belongs to the stream that it was asked on.

    forks: False never forks.
    """
    recorded = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    if len(tasks) < 2 or not forks or not recorded:
        for task in tasks:
            task()
        return
    current = torch.cuda.current_stream()
    sides = _streams(current.device_index)[: len(tasks) - 1]
    for side in sides:
        side.wait_stream(current)
    streams = [current, *sides]
    try:
        for i, task in enumerate(tasks):
            with torch.cuda.stream(streams[i % len(streams)]):
                task()
    finally:
        # a recording that ends with streams that were not joined fails for that, whatever was raised
        for side in sides:
            current.wait_stream(side)


@functools.cache
def _streams(device: int) -> list[torch.cuda.Stream]:
    # kept, for a matrix library has a workspace for each stream that it was ever used on
    return [torch.cuda.Stream(device) for _ in range(SIDES)]


def _products(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """`linear` of x [.., D] with each of the weights [N, D] and its bias [N]."""
    rows = x.reshape(-1, x.shape[-1])
    # on the current stream, where they are read
    results = [x.new_empty((rows.shape[0], weight.shape[0])) for weight in weights]

    def product(weight: Tensor, bias: Tensor | None, result: Tensor) -> None:
        if bias is None:
            torch.mm(rows, weight.t(), out=result)
        else:
            torch.addmm(bias, rows, weight.t(), out=result)

    given = zip(weights, biases, results, strict=True)
    side_by_side([functools.partial(product, *one) for one in given])
    return [result.view(*x.shape[:-1], result.shape[1]) for result in results]


def _fake_products(x: Tensor, weights: list[Tensor], _biases: list[Tensor | None]) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


_library.impl("products", _products, "CompositeExplicitAutograd")
torch.library.register_fake("kvmix::products", _fake_products, lib=_library)

products = torch.ops.kvmix.products.default
