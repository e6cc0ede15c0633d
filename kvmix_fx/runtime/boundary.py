"""The callable handed to Dynamo: unpacks packed inputs, runs the rewritten graph, repacks outputs.

This runs in every step, so it does no more than look up, extend and wrap. What it has to know of the graph
is a `Recipe`, made when the graph is compiled. Token counts that the graph knew only as symbols are functions
of the actual arguments there; asking a traced symbol would freeze the first value.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.cache.growth import prepare_append
from kvmix_fx.errors import NarrowScalesError, NarrowScalesWarning
from kvmix_fx.runtime.recording import Record, Replayed
from kvmix_fx.runtime.shortcut import Noted
from kvmix_kernels import layout
from kvmix_kernels.cached import Cached
from kvmix_kernels.layout import TensorFormat

Arguments = Sequence[Any]
Size = Callable[[Arguments], int]
"""From the inputs of a step to a number that its graph may know as a symbol only."""


@dataclass(frozen=True)
class Grown:
    """A graph output that is the growing packed input at index `past`, with its new tokens."""

    past: int


@dataclass(frozen=True)
class Adopted:
    """A graph output packed inside the graph: its format's buffers at flat outputs from `first` on."""

    first: int
    length: Size
    format: TensorFormat


@dataclass(frozen=True)
class Plain:
    """A graph output as it was, at flat output `index`."""

    index: int


@dataclass(frozen=True)
class Counted:
    """A graph output that is a number known from the inputs: what a layer counts on the host."""

    value: Size


@dataclass(frozen=True)
class PlainCache:
    """Input indices of plain fixed buffers, their formats once packed, and the keys' order of channels."""

    key: int
    value: int
    formats: tuple[TensorFormat, TensorFormat]
    order: torch.Tensor | None = None


@dataclass
class Recipe:
    """How to get from the original signature of a graph to that of its rewriting, and back.

    inputs: number of original inputs. packed: original input index -> number of tokens the graph appends.
    buffers: likewise -> number of buffers that stand in its place. counted: those of fixed capacity whose
    counter stands behind their buffers, for the graph reads them and does not know their length by then.
    unread: inputs of the rewriting that are numbers and that nothing in it reads.
    outputs: one entry per original output. fixed: inputs of fixed capacity that are written.
    live_output: flat output that holds the new token count of fixed caches. plain: buffers that may be
    packed after the step. peaks: flat output with the largest elements of tensors that are packed for the
    first time, if any has to be looked at. ranged: of each, layer, 0 for keys or 1 for values, format.
    """

    inputs: int
    packed: dict[int, Size]
    buffers: dict[int, int]
    counted: set[int]
    unread: frozenset[int]
    outputs: list[Grown | Adopted | Plain | Counted]
    fixed: list[int]
    live_output: int | None
    plain: list[PlainCache]
    peaks: int | None = None
    ranged: tuple[tuple[int | None, int, TensorFormat], ...] = ()


class Boundary:
    """Runs a rewritten graph under the original signature."""

    def __init__(
        self,
        recipe: Recipe,
        inner: Callable[..., Any],
        model: torch.nn.Module | None = None,
        record: Record | None = None,
        note: Callable[[Noted], None] | None = None,
        widens: bool = False,
    ) -> None:
        """Work out what does not depend on the arguments.

        Args:
            recipe: the graph's rewriting.
            inner: takes the rewritten module's inputs and returns its flat outputs.
            model: whose plain buffers may be exchanged for packed ones.
            record: how steps are recorded to be replayed; None runs every step as it is.
            note: told of every call that can be done `again`.
            widens: whether somebody traces the graph anew when scales turn out to have too small a range.
        """
        # `again` gives outputs back as they are
        self._note = note if all(isinstance(output, Plain | Counted) for output in recipe.outputs) else None
        self._unread = recipe.unread
        self._counts = sum(isinstance(output, Counted) for output in recipe.outputs)
        self._inner = inner
        self._model = model
        self._plain = list(recipe.plain)
        self._live_output = recipe.live_output
        self._fixed = recipe.fixed
        self._packed, self._counted = recipe.packed, recipe.counted
        self._order = sorted(self._packed)
        places = _buffer_places(self._order, [recipe.buffers[i] for i in self._order])
        self._width = recipe.inputs + len(places) - len(self._order)
        self._step: Callable[..., Any] = self._run
        self._step_again = self._step
        if record is not None:
            buffers = set(places)
            replayed = Replayed(self._run, lambda i: i in buffers or i >= self._width, record, recipe.unread)
            self._step, self._step_again = replayed, replayed.again
        self._outputs = recipe.outputs
        self._peaks, self._ranged, self._widens = recipe.peaks, recipe.ranged, widens

    def __call__(self, *args: Any) -> list[Any]:
        """Original inputs to original outputs."""
        flat: list[Any] = []
        prepared: dict[int, tuple[Cached, Any, int]] = {}
        position = 0
        for i in self._order:
            flat.extend(args[position:i])
            position = i + 1
            tensor: QuantizedKVTensor = args[i]
            cached = tensor.cached
            if tensor.lease is not None:
                extra = self._packed[i](args)
                length = tensor.lease.length + extra
                store: Any = tensor.lease.store
                if extra:
                    cached, store = prepare_append(cached, tensor.lease, extra)
                prepared[i] = (cached, store, length)
            flat.extend(cached.tensors)
            if i in self._counted:
                flat.append(tensor.live)
        flat.extend(args[position:])
        if self._live_output is not None:
            # the tensors of one cache usually share their counter
            flat.extend({id(args[i].live): args[i].live for i in self._fixed}.values())
        results = self._step(*flat)
        if self._peaks is not None:
            self._check_ranges(results[self._peaks].tolist())
        if self._plain and self._model is not None and self._live_output is not None:
            self._pack_plain(self._model, args, results[self._live_output])
        outputs = [self._repack(output, args, results, prepared) for output in self._outputs]
        if self._note is not None:
            self._note(Noted(self._again, flat, outputs, self._unread, self._counts))
        return outputs

    def _check_ranges(self, peaks: list[float]) -> None:
        """Have what does not fit its scales packed anew, or say so.

        Raises:
            NarrowScalesError: before anything of the caller's has changed that a second call does not write.
        """
        ranged = zip(self._ranged, peaks, strict=True)
        found = [(layer, role, peak) for (layer, role, fmt), peak in ranged if not layout.holds(fmt, peak)]
        if not found:
            return
        error = NarrowScalesError.of(found)
        if self._widens:
            raise error
        warnings.warn(str(error), NarrowScalesWarning, stacklevel=2)

    def _again(self, flat: Sequence[Any]) -> list[Any]:
        """A step on inputs that have been taken apart, which those of a fixed cache are once and for all.

        Who calls this counts tokens himself.
        """
        results = self._step_again(*flat)
        return [results[out.index] if isinstance(out, Plain) else None for out in self._outputs]

    def _run(self, *flat: Any) -> Any:
        """The graph on `flat`'s first inputs; the counters behind them get the new number of tokens."""
        results = self._inner(*flat[: self._width])
        for live in flat[self._width :]:
            live.copy_(results[self._live_output])
        return results

    def _repack(
        self,
        output: Grown | Adopted | Plain | Counted,
        args: Arguments,
        results: Sequence[Any],
        prepared: dict[int, tuple[Cached, Any, int]],
    ) -> Any:
        if isinstance(output, Grown):
            cached, store, total = prepared[output.past]
            return QuantizedKVTensor(cached, total, store=store)
        if isinstance(output, Adopted):
            buffers = results[output.first : output.first + len(output.format.buffer_names)]
            return QuantizedKVTensor(Cached(output.format, tuple(buffers)), output.length(args))
        return output.value(args) if isinstance(output, Counted) else results[output.index]

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
                packed = QuantizedKVTensor.empty_fixed(
                    B, H, capacity, D, fmt, x.dtype, x.device, order=cache.order if i == cache.key else None
                )
                packed.write_(torch.arange(stored, device=x.device), x[:, :, :stored])
                module, name = holders[id(x)]
                module._buffers[name] = packed


def _buffer_places(order: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Places of cache buffers among the flat inputs, for packed inputs at the sorted places `order`."""
    places: list[int] = []
    for number, (i, count) in enumerate(zip(order, counts, strict=True)):
        first = i + len(places) - number
        places += range(first, first + count)
    return places
