"""A plan as a short table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from kvmix_fx.errors import PlanGeometryError
from kvmix_fx.plan.schema import KVPlan, LayerPlan, QuantSpec
from kvmix_fx.plan.selection import join_layers

WIDTH = 80
"""Characters of a line, where that can be had."""

NARROWEST = 12
"""Characters that a list of layers has at least."""

_HEADER = ("layers", "bits", "keys", "values", "window", "sink", "tile")


def describe(plan: KVPlan) -> str:
    """A line on the whole plan, then one row for layers planned alike, whatever their channels' orders.

    What is too wide is broken: lists of layers at commas, after columns that say the same of all layers.
    """
    alike: dict[tuple[str, ...], list[int]] = {}
    for index, layer in enumerate(plan.layers):
        alike.setdefault(_cells(layer), []).append(index)
    rows = [_HEADER, *((join_layers(indices), *cells) for cells, indices in alike.items())]
    lines = textwrap.wrap(_summary(plan), WIDTH, subsequent_indent="  ")
    if _width(rows) > WIDTH:
        columns = list(zip(*rows, strict=True))
        same = {column[0]: column[1] for column in columns[2:] if len(set(column[1:])) == 1}
        if same:
            lines.append("all layers: " + ", ".join(f"{name} {value}" for name, value in same.items()))
        rows = list(zip(*(column for column in columns if column[0] not in same), strict=True))
        room = WIDTH - _width([("", *row[1:]) for row in rows])
        rows = [part for row in rows for part in _broken(row, max(room, NARROWEST))]
    widths = _widths(rows)
    lines += (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
    return "\n".join(lines)


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _width(rows: Sequence[Sequence[str]]) -> int:
    widths = _widths(rows)
    return sum(widths) + 2 * (len(widths) - 1)


def _broken(row: Sequence[str], room: int) -> Iterator[Sequence[str]]:
    """A row in several, whose lists of layers end after commas and within `room`, if no range is longer."""
    layers, *cells = row
    line = ""
    for part in layers.replace(",", ", ").split(" "):
        if line and len(line) + len(part) > room:
            yield (line, *cells)
            line, cells = "", [""] * len(cells)
        line += part
    yield (line, *cells)


def _summary(plan: KVPlan) -> str:
    text = f"{plan.name}: {len(plan.layers)} layers, {plan.nominal_bits():.2f} bits a code"
    try:
        text += f", {plan.bits_per_element():.2f} bits per element"
    except PlanGeometryError:
        return f"{text}, groups of one head (unknown size)"
    return text if plan.geometry is None else f"{text}, {plan.bytes_per_token:,.0f} bytes per token"


def _cells(layer: LayerPlan) -> tuple[str, ...]:
    if layer.is_raw:
        return (layer.label, "raw", "raw", "", "", "")
    kept = (layer.window.length, layer.sink_length, layer.tile_length)
    label = layer.label
    if (tier := layer.token_tier) is not None:
        many = f"{tier.tokens} tokens" if tier.tokens else f"{tier.share:.0%}"
        how = tier.policy + ", balanced" * tier.balancer + ", others ignored" * tier.evict
        label += f", {many} at {tier.bits} ({how})"
    return (label, _spec(layer.key), _spec(layer.value), *map(str, kept))


def _spec(spec: QuantSpec) -> str:
    if spec.is_raw:
        return "raw"
    group = "head" if spec.group_size == "head" else f"g{spec.group_size}"
    dtype = "" if spec.scale_dtype == "float16" else f" {spec.scale_dtype}"
    return f"{spec.axis} {group}{dtype}"
