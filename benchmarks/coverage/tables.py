"""Tables of the sweep's rows, for the documents."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks.coverage import one
from benchmarks.coverage.records import load

OUTSIDE = (one.NOT_OFFERED, one.NOT_BUILT, one.NOT_RUN, one.NO_CACHE, one.UNFINISHED, one.NO_WINDOW)
"""What is not about kvmix: no such attention, no tiny model, no plain run, nothing to pack, no time, no
window."""
SHOWN = (one.PACKED, one.PARTLY, one.LEFT, one.REFUSED, one.WRONG, one.CRASHED, one.BLIND)
WAYS = (("sdpa", "growing"), ("eager", "growing"), ("sdpa", "static"), ("eager", "static"))

USUAL_GRAPHS = 2
"""Of a prompt and of all steps after it."""

Table = tuple[list[str], list[list[str]]]
"""Head and rows."""


def summary() -> Table:
    """How many models come out how, by attention and cache."""
    head = ["attention", "cache", "tried", "run without kvmix and cache", *SHOWN, "packed in all layers"]
    body = []
    rows = list(load().values())
    for attention, cache in WAYS:
        tried = [row for row in rows if (row["attention"], row["cache"]) == (attention, cache)]
        if tried:
            body.append([f"`{attention}`", cache, *_counted(tried)])
    body.append(["all", "", *_counted(rows)])
    for variant, name in ((one.WINDOWS, "short windows"), (one.TIERS, "`tiers`")):
        if rows := list(load(variant).values()):
            body.append(["all", name, *_counted(rows)])
    return head, body


def _counted(rows: list[dict[str, Any]]) -> list[str]:
    outcomes = Counter(row["outcome"] for row in rows)
    inside = sum(count for outcome, count in outcomes.items() if outcome not in OUTSIDE)
    share = f"{outcomes[one.PACKED] / inside:.1%}" if inside else "-"
    return [str(len(rows)), str(inside), *(str(outcomes[outcome]) for outcome in SHOWN), share]


def models() -> Table:
    """Every model that runs without kvmix and has something to pack, and what becomes of it."""
    found: dict[tuple[str, str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for key, row in load().items():
        found.setdefault((key.kind, key.model, key.task), {})[key.attention, key.cache] = row
    body = [
        [f"`{kind}`", f"`{model}`", *(_cell(by.get(way)) for way in WAYS)]
        for (kind, model, _), by in sorted(found.items())
        if any(row["outcome"] not in OUTSIDE for row in by.values())
    ]
    return ["type", "class", *(f"`{attention}`, {cache}" for attention, cache in WAYS)], body


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not tried"
    outcome = row["outcome"]
    if outcome in OUTSIDE:
        return "-" if outcome == one.NOT_OFFERED else outcome
    of = f"{row.get('packed', 0)} of {row.get('layers', '?')}"
    if outcome == one.PACKED:
        graphs = row.get("graphs", USUAL_GRAPHS)
        more = f", {graphs} graphs" if graphs > USUAL_GRAPHS else ""
        return of + (", unpacked by steps" if _unpacks(row) else "") + more
    why = row.get("why") or "; ".join(row.get("reasons", ()))
    return f"{outcome}, {of}: {_plain(why)}" if outcome == one.PARTLY else f"{outcome}: {_plain(why)}"


def _unpacks(row: dict[str, Any]) -> bool:
    """Whether a step reads some of what is packed by unpacking it, one layer at a time."""
    return any(action in row["actions"] for action in ("not recognized", "packed storage only"))


def _plain(text: str) -> str:
    """Without what a table takes for its own, nor the place in a file."""
    return text.rpartition(" [")[0].replace("|", "/").replace("<", "").replace(">", "") or text


def outside() -> Table:
    """Models of which no case could be tried, and why."""
    by_model: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, row in load().items():
        by_model.setdefault((key.kind, key.model), []).append(row)
    body = []
    for (kind, model), rows in sorted(by_model.items()):
        if all(row["outcome"] in OUTSIDE for row in rows):
            told = [row for row in rows if row["outcome"] != one.NOT_OFFERED] or rows
            body.append([f"`{kind}`", f"`{model}`", told[0]["outcome"], _plain(told[0].get("why", ""))[:160]])
    return ["type", "class", "", "why"], body
