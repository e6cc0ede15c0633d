"""Appends and counters that were taken out of a graph (`passes/defer.py`), done when the graph is done."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvmix_fx.runtime.branches import side_by_side


@dataclass(frozen=True)
class FromInput:
    """An argument of an append that is input `index` of the graph."""

    index: int


@dataclass(frozen=True)
class FromOutput:
    """An argument of an append that is flat output `index` of the graph."""

    index: int


@dataclass(frozen=True)
class Deferred:
    """The appends of one graph.

    appends: their ops and arguments; all but `FromInput` and `FromOutput` are meant as they are. outputs: how
    many outputs the graph had before it returned what the appends store. counters: by a number, the inputs to
    which it is added in the end.
    """

    appends: list[tuple[Any, tuple[Any, ...]]]
    outputs: int
    counters: dict[int, list[int]]

    def wrap(self, inner: Callable[..., Any], forks: bool = False) -> Callable[..., Any]:
        """A function like `inner`, the compiled graph, that also appends and returns the first outputs.

        forks: whether a recording of it may do the appends side by side.
        """

        def run(*args: Any) -> Sequence[Any]:
            results = inner(*args)

            def do(append: Any, arguments: tuple[Any, ...]) -> None:
                append(*(_value(argument, args, results) for argument in arguments))

            # each writes to a layer of its own
            tasks = [functools.partial(do, *one) for one in self.appends]
            side_by_side(tasks, forks)
            # the last of all: where tokens are appended may be a view of a counter
            for number, counters in self.counters.items():
                torch._foreach_add_([args[index] for index in counters], number)
            return results[: self.outputs]

        return run


def _value(argument: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
    if isinstance(argument, list):
        return [_value(item, inputs, outputs) for item in argument]
    if isinstance(argument, FromInput):
        return inputs[argument.index]
    return outputs[argument.index] if isinstance(argument, FromOutput) else argument
