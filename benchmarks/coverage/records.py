"""Rows of the sweep: one JSON object a line, known by its case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.rows import RESULTS, stamps

FOLDER = RESULTS / "coverage"
_STAMPS = ("torch", "transformers", "commit", "date")


class Key(NamedTuple):
    """A case: the mapping that lists the model, its type and class, attention, kind of cache."""

    task: str
    kind: str
    model: str
    attention: str
    cache: str


def file_of(variant: str) -> Path:
    """Where rows of a variant of the sweep are, "" for the sweep itself."""
    return FOLDER / ("-".join(["transformers", *filter(None, [variant])]) + ".jsonl")


def load(variant: str = "") -> dict[Key, dict[str, Any]]:
    """All rows of a variant."""
    file = file_of(variant)
    lines = file.read_text().splitlines() if file.exists() else []
    return {key_of(row): row for row in map(json.loads, lines)}


def key_of(row: dict[str, Any]) -> Key:
    """The case that a row is about."""
    return Key(*(row[name] for name in Key._fields))


def save(key: Key, row: dict[str, Any], variant: str = "") -> None:
    """Write a row in its place, sorted by case."""
    rows, file = load(variant), file_of(variant)
    now = stamps()
    rows[key] = key._asdict() | row | {name: now[name] for name in _STAMPS}
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    draft.write_text("".join(json.dumps(rows[one]) + "\n" for one in sorted(rows)))
    draft.replace(file)
