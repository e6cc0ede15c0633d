"""The interface of policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

EVERY_QUERY = -1


def by_score(scores: Tensor, _positions: Tensor, _length: Tensor | int) -> Tensor:
    """Rank by the score alone."""
    return scores


class Policy(NamedTuple):
    """How importance is counted.

    queries: of a prompt, how many of its last queries are looked at; EVERY_QUERY, or 0 for policies without
    attention. decay: what a score keeps of itself per later token while the attention that its token gets is
    added; 0 for policies that do not count it. of_keys: a score from keys [B, H, n, D] and their positions
    [n], for policies without attention. rank: from scores [B, H, n], positions (which broadcast to them) and
    the number of tokens stored to what tokens are sorted by, the most important first.
    """

    queries: int = 0
    decay: float = 0.0
    of_keys: Callable[[Tensor, Tensor], Tensor] | None = None
    rank: Callable[[Tensor, Tensor, Tensor | int], Tensor] = by_score
