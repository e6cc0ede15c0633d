"""How a plan was made, as frozen data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from kvmix_fx.errors import PlanFieldError


class Provenance(Mapping[str, Any]):
    """A read-only mapping of JSON values: which signal, solver, budget and texts led to a plan.

    Informative only; nothing interprets it. It is kept as JSON text, so that every value read from it is
    a copy that cannot alter the plan; tuples come back as lists, and all keys are text.
    """

    __slots__ = ("_text",)

    def __init__(self, items: Mapping[str, Any] | None = None) -> None:
        """Freeze `items`.

        Raises:
            PlanFieldError: a value has no exact JSON form (arrays, NaN, infinities, objects).
        """
        try:
            self._text = json.dumps(dict(items or {}), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PlanFieldError(
                f"provenance must hold plain JSON values ({error}); convert arrays with .tolist()",
                "provenance",
            ) from error

    def __getitem__(self, key: str) -> Any:
        return json.loads(self._text)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(json.loads(self._text))

    def __len__(self) -> int:
        return len(json.loads(self._text))

    def __hash__(self) -> int:
        return hash(frozenset(self))

    def __repr__(self) -> str:
        return f"Provenance({json.loads(self._text)!r})"
