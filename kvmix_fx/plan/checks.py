"""Checks of single fields, shared by the plan's dataclasses."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvmix_fx.errors import PlanFieldError

LARGEST = 2**31 - 1
"""Of any count of tokens, heads or bytes: positions are numbers of 32 bits."""


def check_integer(field: str, value: object, minimum: int) -> None:
    """Raise PlanFieldError unless `value` is an integer (not a bool) from `minimum` to LARGEST."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise PlanFieldError(f"{field} must be an integer, got {value!r}", field)
    if value < minimum:
        raise PlanFieldError(f"{field} must be at least {minimum}, got {value}", field)
    if value > LARGEST:
        raise PlanFieldError(f"{field} must be at most {LARGEST}, got {value}", field)


def check_positive(field: str, value: object) -> None:
    """Raise PlanFieldError unless `value` is a number (not a bool) above 0 and finite."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise PlanFieldError(f"{field} must be a number, got {value!r}", field)
    if not 0 < value < math.inf:
        raise PlanFieldError(f"{field} must be positive and finite, got {value}", field)


def check_choice(field: str, value: object, choices: Sequence[int] | Sequence[str]) -> None:
    """Raise PlanFieldError unless `value` is one of `choices`, in type too (2.0 is not 2)."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        listed = ", ".join(repr(choice) for choice in choices)
        raise PlanFieldError(f"{field} must be one of {listed}; got {value!r}", field)


def check_type(field: str, value: object, kind: type) -> None:
    """Raise PlanFieldError unless `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        raise PlanFieldError(f"{field} must be a {kind.__name__}, got {value!r}", field)
