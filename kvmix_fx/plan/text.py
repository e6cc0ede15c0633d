"""One layer as short text: "k4v2 g64 w128 s4" is read here, and the label "K4V2" is made here."""

from __future__ import annotations

import re
from typing import NamedTuple

from kvmix_fx.errors import PlanFieldError

_BITS = re.compile(r"(?:k(?P<key>\d+))?(?:v(?P<value>\d+))?", re.IGNORECASE | re.ASCII)
_NUMBER = re.compile(r"(?P<letter>[gws])(?P<number>\d+)", re.IGNORECASE | re.ASCII)
_FIELDS = {"g": "group_size", "w": "window", "s": "sink_length"}


class LayerText(NamedTuple):
    """What a text such as "k4v2 g64 w128 s4" says; None where it says nothing."""

    key_bits: int
    value_bits: int
    group_size: int | None = None
    window: int | None = None
    sink_length: int | None = None


def parse_layer(text: str) -> LayerText:
    """Read "k4v2 g64 w128 s4": bits of keys and values, group size, window, sink; the bits come first.

    Raises:
        PlanFieldError: a word means nothing, comes twice, or the bits of keys or values are missing.
    """
    first, *words = text.split() or [""]
    key, value = parse_bits(first)
    if key is None or value is None:
        raise PlanFieldError(f"{text!r} must start with bits of keys and of values, such as k4v2", "bits")
    found: dict[str, int] = {}
    for word in words:
        match = _NUMBER.fullmatch(word)
        field = "" if match is None else _FIELDS[match["letter"].lower()]
        if match is None or field in found:
            raise PlanFieldError(
                f"cannot read {word!r} in {text!r}; after the bits come, each at most once, a group size "
                '(g64), a window (w128) and a sink (s4), as in "k4v2 g64 w128 s4"',
                field,
            )
        found[field] = int(match["number"])
    return LayerText(key, value, **found)


def parse_bits(text: str) -> tuple[int | None, int | None]:
    """Read "k4v2", "k16" or "v8": bits of keys and of values, None for what is not named.

    Raises:
        PlanFieldError: the text names neither, or says more.
    """
    match = _BITS.fullmatch(text)
    if not text or match is None:
        raise PlanFieldError(f'cannot read {text!r} as bits; write "k4v2", "k4" or "v2"', "bits")
    key, value = (None if number is None else int(number) for number in match.group("key", "value"))
    return key, value


def pair_label(key: str, value: str) -> str:
    """The labels of keys and of values as one: "K4V2"."""
    return f"K{key}V{value}"
