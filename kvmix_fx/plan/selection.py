"""Layer selections: the short-hands that name layers of a plan, and back."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from itertools import pairwise
from typing import TypeAlias

from kvmix_fx.errors import PlanFieldError, PlanLayerError

LayerSelection: TypeAlias = int | str | slice | Iterable[int]
"""Layers of a plan.

An int, or an iterable of ints, counts from the end when negative. A slice or range means what it means
to Python (its end is not included). A string lists comma-separated parts, ends included:
"5", "-1", "0-3", "28-" (to the last), "-4--1", "first:2", "last:2", "all".
"""

_SPAN = re.compile(r"(?P<first>-?\d+)(?P<dash>-(?P<last>-?\d+)?)?", re.ASCII)
_END = re.compile(r"(?P<end>first|last):(?P<count>\d+)", re.ASCII)


def select_layers(selection: LayerSelection, num_layers: int) -> tuple[int, ...]:
    """The selected layers as ascending indices in [0, num_layers).

    Raises:
        PlanLayerError: a layer does not exist, or nothing is selected.
        PlanFieldError: the selection cannot be read.
    """
    if isinstance(selection, slice):
        found = set(range(num_layers)[selection])
    elif isinstance(selection, str):
        found = {layer for part in selection.split(",") for layer in _part(part.strip(), num_layers)}
    elif isinstance(selection, Iterable):
        found = {_index(layer, num_layers) for layer in selection}
    else:
        found = {_index(selection, num_layers)}
    if not found:
        raise PlanLayerError(f"{selection!r} selects none of the {num_layers} layers")
    return tuple(sorted(found))


def join_layers(layers: Iterable[int]) -> str:
    """The shortest text that selects ascending `layers`: (0, 1, 2, 7) gives "0-2,7"."""
    indices = list(layers)
    starts = [indices[0], *(after for before, after in pairwise(indices) if after != before + 1)]
    stops = [*(before for before, after in pairwise(indices) if after != before + 1), indices[-1]]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True))


def _index(layer: object, num_layers: int) -> int:
    if isinstance(layer, bool):
        raise PlanFieldError(f"a layer is an integer, got {layer!r}", "layers")
    try:
        index = operator.index(layer)  # type: ignore[arg-type]
    except TypeError as error:
        raise PlanFieldError(
            f'layers are selected by int, range, slice or a text such as "0-3,-1", got {layer!r}', "layers"
        ) from error
    if not -num_layers <= index < num_layers:
        raise PlanLayerError(
            f"there is no layer {index}: the plan has {num_layers} layers, 0 to {num_layers - 1}"
        )
    return index % num_layers


def _part(part: str, num_layers: int) -> range:
    if part == "all":
        return range(num_layers)
    if match := _END.fullmatch(part):
        count = int(match["count"])
        if count > num_layers:
            raise PlanLayerError(f"{part!r} asks for more layers than the plan has ({num_layers})")
        return range(count) if match["end"] == "first" else range(num_layers - count, num_layers)
    match = _SPAN.fullmatch(part)
    if match is None:
        raise PlanFieldError(
            f'cannot read {part!r} as layers; write parts such as "5", "-1", "0-3", "28-", "last:2" or "all"',
            "layers",
        )
    first = _index(int(match["first"]), num_layers)
    if match["dash"] is None:
        return range(first, first + 1)
    last = num_layers - 1 if match["last"] is None else _index(int(match["last"]), num_layers)
    if last < first:
        raise PlanLayerError(f"{part!r} runs backwards: from layer {first} to layer {last}")
    return range(first, last + 1)
