"""Rows of the sweep: one JSON object a line, known by its case."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from benchmarks.rows import RESULTS, stamps

FILE = RESULTS / "coverage" / "transformers.jsonl"
_STAMPS = ("torch", "transformers", "commit", "date")


class Key(NamedTuple):
    """A case: the mapping that lists the model, its type and class, attention, kind of cache."""

    task: str
    kind: str
    model: str
    attention: str
    cache: str


def load() -> dict[Key, dict[str, Any]]:
    """All rows."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    return {key_of(row): row for row in map(json.loads, lines)}


def key_of(row: dict[str, Any]) -> Key:
    """The case that a row is about."""
    return Key(*(row[name] for name in Key._fields))


def save(key: Key, row: dict[str, Any]) -> None:
    """Write a row in its place, sorted by case."""
    rows = load()
    now = stamps()
    rows[key] = key._asdict() | row | {name: now[name] for name in _STAMPS}
    FILE.parent.mkdir(parents=True, exist_ok=True)
    draft = FILE.with_suffix(".draft")
    draft.write_text("".join(json.dumps(rows[one]) + "\n" for one in sorted(rows)))
    draft.replace(FILE)
