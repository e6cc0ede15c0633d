"""What a signal hands to an allocator: scores of tensors, or prices of every way to keep them.

A tensor here is the keys or the values of one layer. Losses of different tensors are taken to add up, which
holds as long as each is small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvmix_fx.errors import PlanFieldError
from kvmix_fx.plan.schema import QuantSpec


@dataclass(frozen=True)
class Menu:
    """The ways in which keys and values may be kept.

    Attributes:
        keys: formats offered for the keys of every layer.
        values: formats offered for the values of every layer.
    """

    keys: tuple[QuantSpec, ...]
    values: tuple[QuantSpec, ...]


@dataclass(frozen=True)
class Scores:
    """How much each tensor matters, larger for those that quantization harms more; no unit.

    Attributes:
        signal: what was measured.
        keys: one number per layer.
        values: one number per layer.

    Raises:
        PlanFieldError: lengths differ, or a number is negative or not finite.
    """

    signal: str
    keys: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_layers(self.signal, self.keys, self.values)
        _check_numbers(self.signal, (*self.keys, *self.values))


@dataclass(frozen=True)
class Prices:
    """Predicted loss of every tensor under every format of a menu.

    Attributes:
        signal: what was measured.
        menu: the formats.
        keys: loss by layer and position in `menu.keys`.
        values: loss by layer and position in `menu.values`, in the same unit as the keys'.

    Raises:
        PlanFieldError: a table does not fit the menu, or a loss is negative or not finite.
    """

    signal: str
    menu: Menu
    keys: tuple[tuple[float, ...], ...]
    values: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        _check_layers(self.signal, self.keys, self.values)
        for role, rows, options in (
            ("keys", self.keys, self.menu.keys),
            ("values", self.values, self.menu.values),
        ):
            for row in rows:
                if len(row) != len(options):
                    raise PlanFieldError(
                        f"signal {self.signal!r}: {len(row)} prices for the {len(options)} formats of the {role}",
                        role,
                    )
                _check_numbers(self.signal, row)


def _check_layers(signal: str, keys: tuple[object, ...], values: tuple[object, ...]) -> None:
    if not keys or len(keys) != len(values):
        raise PlanFieldError(
            f"signal {signal!r}: needs one entry per layer for keys and for values, "
            f"got {len(keys)} and {len(values)}",
            "keys",
        )


def _check_numbers(signal: str, numbers: tuple[float, ...]) -> None:
    bad = [number for number in numbers if not math.isfinite(number) or number < 0]
    if bad:
        raise PlanFieldError(f"signal {signal!r}: a score must be finite and at least 0, got {bad[0]}", "scores")
