"""A plan as a short table."""

from __future__ import annotations

from kvmix_fx.errors import PlanGeometryError
from kvmix_fx.plan.schema import KVPlan, LayerPlan, QuantSpec
from kvmix_fx.plan.selection import join_layers

_HEADER = ("layers", "bits", "keys", "values", "window", "sink", "tile")


def describe(plan: KVPlan) -> str:
    """One line on the whole plan, then one row for layers planned alike, whatever their channels' orders."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for index, layer in enumerate(plan.layers):
        alike.setdefault(_cells(layer), []).append(index)
    rows = [_HEADER, *((join_layers(indices), *cells) for cells, indices in alike.items())]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    table = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
    return "\n".join((_summary(plan), *table))


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
        label += f", {many} at {tier.bits} ({tier.policy}{', balanced' if tier.balancer else ''})"
    return (label, _spec(layer.key), _spec(layer.value), *map(str, kept))


def _spec(spec: QuantSpec) -> str:
    if spec.is_raw:
        return "raw"
    group = "head" if spec.group_size == "head" else f"g{spec.group_size}"
    dtype = "" if spec.scale_dtype == "float16" else f" {spec.scale_dtype}"
    return f"{spec.axis} {group}{dtype}"
