"""Orders of channels as plan files have them: one text for a layer, whose heads follow each other."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from kvmix_fx.errors import PlanFieldError

_BYTES = 2
"""Of one channel's number, little-endian."""


def encode_order(order: Sequence[Sequence[int]]) -> str:
    """The text for the order of channels of each KV head, the most important channel first."""
    numbers = b"".join(int(channel).to_bytes(_BYTES, "little") for head in order for channel in head)
    return base64.b64encode(numbers).decode()


@lru_cache(1024)
def decode_order(text: str, head_dim: int) -> tuple[tuple[int, ...], ...]:
    """The order of channels of each KV head.

    Raises:
        PlanFieldError: the text is damaged, or not all heads have each of `head_dim` channels once.
    """
    try:
        numbers = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PlanFieldError(f"channel_order cannot be read ({error})", "channel_order") from error
    size = _BYTES * head_dim
    if not size or not numbers or len(numbers) % size:
        raise PlanFieldError(
            f"channel_order has {len(numbers)} bytes, which are no heads of {head_dim} channels: it is of "
            "another model, or the file is damaged",
            "channel_order",
        )
    heads = tuple(
        tuple(int.from_bytes(numbers[i : i + _BYTES], "little") for i in range(at, at + size, _BYTES))
        for at in range(0, len(numbers), size)
    )
    for number, head in enumerate(heads):
        if sorted(head) != list(range(head_dim)):
            raise PlanFieldError(
                f"channel_order of head {number} is no order of {head_dim} channels: each must occur once",
                "channel_order",
            )
    return heads


def checked_tiers(tiers: Any) -> tuple[tuple[int, int], ...]:
    """Tiers as pairs of integers, from lists as JSON has them.

    Raises:
        PlanFieldError: they are something else.
    """
    pairs = tiers if isinstance(tiers, (list, tuple)) else (tiers,)
    for pair in pairs:
        whole = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not whole or not all(isinstance(n, int) and not isinstance(n, bool) for n in pair):
            raise PlanFieldError(f"tiers must be pairs of bits and channels, got {pair!r}", "tiers")
    return tuple((bits, channels) for bits, channels in pairs)
