"""The callable handed to Dynamo: unpacks packed inputs, runs the rewritten graph, repacks outputs.

This runs in every step, so it does no more than look up, extend and wrap. Token counts that the
graph knew only as symbols are computed from the actual arguments; asking a traced symbol would
freeze the first value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kvmix_fx import dynamo
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.cache.growth import prepare_append
from kvmix_fx.passes.replay import Record, Replayed
from kvmix_fx.passes.rewrite import Adopted, Grown, Rewritten
from kvmix_fx.passes.shortcut import Noted
from kvmix_kernels.reference.storage import Buffers

Arguments = Sequence[Any]


class Boundary:
    """Runs a rewritten graph under the original signature."""

    def __init__(
        self,
        rewritten: Rewritten,
        inner: Callable[..., Any],
        model: torch.nn.Module | None = None,
        record: Record | None = None,
        note: Callable[[Noted], None] | None = None,
    ) -> None:
        """Work out what does not depend on the arguments.

        Args:
            rewritten: the graph's rewriting.
            inner: takes the rewritten module's inputs and returns its flat outputs.
            model: whose plain buffers may be exchanged for packed ones.
            record: how steps are recorded to be replayed; None runs every step as it is.
            note: told of every call.
        """
        self._note = note
        self._inner = inner
        self._model = model
        self._plain = list(rewritten.plain)
        self._live_output = rewritten.live_output
        self._fixed = rewritten.fixed
        values = rewritten.values
        self._packed = {i: size_evaluator(extra, values) for i, extra in rewritten.packed.items()}
        self._order = sorted(self._packed)
        self._width = len(values) + sum(len(Buffers._fields) - 1 for _ in self._order)
        self._step: Callable[..., Any] = self._run
        if record is not None:
            buffers = set(_buffer_places(self._order))
            self._step = Replayed(self._run, lambda i: i in buffers or i >= self._width, record)
        self._outputs = [
            (recipe, size_evaluator(recipe.length, values) if isinstance(recipe, Adopted) else None)
            for recipe in rewritten.outputs
        ]

    def __call__(self, *args: Any) -> list[Any]:
        """Original inputs to original outputs."""
        flat: list[Any] = []
        prepared: dict[int, tuple[Buffers, Any, int]] = {}
        position = 0
        for i in self._order:
            flat.extend(args[position:i])
            position = i + 1
            tensor: QuantizedKVTensor = args[i]
            buffers = tensor.buffers
            if tensor.lease is not None:
                extra = self._packed[i](args)
                length = tensor.lease.length + extra
                store: Any = tensor.lease.store
                if extra:
                    buffers, store = prepare_append(buffers, tensor.lease, extra, tensor.format)
                prepared[i] = (buffers, store, length)
            flat.extend(buffers)
        flat.extend(args[position:])
        if self._live_output is not None:
            # the tensors of one cache usually share their counter
            flat.extend({id(args[i].live): args[i].live for i in self._fixed}.values())
        results = self._step(*flat)
        if self._plain and self._model is not None and self._live_output is not None:
            self._pack_plain(self._model, args, results[self._live_output])
        outputs = [self._repack(recipe, length, args, results, prepared) for recipe, length in self._outputs]
        if self._note is not None:
            self._note(Noted(self, args, outputs))
        return outputs

    def _run(self, *flat: Any) -> Any:
        """The graph on `flat`'s first inputs; the counters behind them get the new number of tokens."""
        results = self._inner(*flat[: self._width])
        for live in flat[self._width :]:
            live.copy_(results[self._live_output])
        return results

    def _repack(
        self,
        recipe: Any,
        length: Callable[[Arguments], int] | None,
        args: Arguments,
        results: Sequence[Any],
        prepared: dict[int, tuple[Buffers, Any, int]],
    ) -> Any:
        if isinstance(recipe, Grown):
            buffers, store, total = prepared[recipe.past]
            return QuantizedKVTensor(buffers, total, args[recipe.past].format, store=store)
        if isinstance(recipe, Adopted):
            assert length is not None
            buffers = Buffers(*results[recipe.first : recipe.first + 4])
            return QuantizedKVTensor(buffers, length(args), recipe.format)
        return results[recipe.index]

    def _pack_plain(self, model: torch.nn.Module, args: Arguments, end: torch.Tensor) -> None:
        """Exchange plain buffers of the model for packed ones; afterwards they are packed inputs."""
        plain = list(self._plain)
        self._plain.clear()  # what cannot be exchanged now never can
        holders = {id(b): (m, n) for m in model.modules() for n, b in m._buffers.items()}
        for cache in plain:
            if id(args[cache.key]) not in holders or id(args[cache.value]) not in holders:
                continue
            stored = int(end)
            for i, fmt in zip((cache.key, cache.value), cache.formats, strict=True):
                x = args[i]
                B, H, capacity, D = x.shape
                packed = QuantizedKVTensor.empty_fixed(B, H, capacity, D, fmt, x.dtype, x.device)
                packed.write_(torch.arange(stored, device=x.device), x[:, :, :stored])
                module, name = holders[id(x)]
                module._buffers[name] = packed


def _buffer_places(order: Sequence[int]) -> Iterator[int]:
    """Places of cache buffers among the flat inputs, for packed inputs at the sorted places `order`."""
    more = len(Buffers._fields) - 1
    for number, i in enumerate(order):
        yield from range(i + number * more, i + (number + 1) * more + 1)


def size_evaluator(size: Any, values: Sequence[Any]) -> Callable[[Arguments], int]:
    """A function from the actual arguments to the number that `size` stood for.

    values: example values of the inputs; every symbol of `size` is a dimension of one of them.
    """
    if not dynamo.is_symbolic(size):
        number = int(size)
        return lambda _: number
    expression = dynamo.expression(size)
    readers = {symbol: _reader(symbol, values) for symbol in expression.free_symbols}
    if expression.is_Symbol:
        return readers[expression]
    return lambda args: int(expression.xreplace({s: read(args) for s, read in readers.items()}))


def _reader(symbol: Any, values: Sequence[Any]) -> Callable[[Arguments], int]:
    for i, value in enumerate(values):
        if dynamo.is_symbolic(value) and dynamo.expression(value) == symbol:
            return lambda args: int(args[i])
    for i, value in enumerate(values):
        if not isinstance(value, torch.Tensor):
            continue
        for dim, size in enumerate(value.shape):
            if dynamo.is_symbolic(size) and dynamo.expression(size) == symbol:
                return lambda args: int(args[i].shape[dim])
    raise LookupError(f"no input has the size {symbol}")
