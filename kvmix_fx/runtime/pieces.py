"""A step that was compiled in pieces (`passes/pieces.py`), run one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Piece:
    """A compiled function, which many pieces may share; slots of its arguments and of its results.

    done: slots of which no later piece has need.
    """

    function: Callable[..., Any]
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    done: tuple[int, ...]


@dataclass(frozen=True)
class Pieces:
    """The pieces of one graph. The first slots are its inputs.

    results: of each output its slot, or None and what it always is. forms: how many functions were compiled.
    """

    pieces: list[Piece]
    slots: int
    results: tuple[tuple[int | None, Any], ...]
    forms: int

    def __call__(self, *args: Any) -> Sequence[Any]:
        """The outputs of the graph."""
        held = [*args, *(None for _ in range(self.slots - len(args)))]
        for piece in self.pieces:
            made = piece.function(*(held[slot] for slot in piece.arguments))
            for slot, value in zip(piece.results, made, strict=True):
                held[slot] = value
            for slot in piece.done:
                held[slot] = None
        return tuple(value if slot is None else held[slot] for slot, value in self.results)
