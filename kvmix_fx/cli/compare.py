"""`kvmix plan compare`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from kvmix_fx.cli.common import Answer, answers, load_config, size
from kvmix_fx.cli.plan import read_plan, read_plan_for
from kvmix_fx.errors import CommandError
from kvmix_fx.plan import KVPlan, LayerPlan, QuantSpec, join_layers


@answers
def compare(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", show_default=False)],
    batch: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 4096,
    itemsize: Annotated[int, typer.Option(min=1, help="Bytes of the model's dtype.")] = 2,
    model: Annotated[str | None, typer.Option(help="Model whose sizes count, if not the plans'.")] = None,
) -> Answer:
    """Show what plans cost, and the layers in which they differ."""
    plans = _sized(files, model)
    rows = [
        {"file": file} | _costs(plan, batch, length, itemsize)
        for file, plan in zip(files, plans, strict=True)
    ]
    differences = _differences(plans)
    content = {"batch": batch, "length": length, "itemsize": itemsize, "plans": rows}
    content["differing_layers"] = [
        {"layers": layers, "formats": list(formats)} for layers, formats in differences.items()
    ]
    return Answer(content, Group(_cost_table(rows, batch, length), _layer_table(files, differences)))


def _sized(files: list[str], model: str | None) -> list[KVPlan]:
    """The plans, all with the sizes of one model.

    Raises:
        CommandError: fewer than two plans, of models of different sizes, or of no known size.
        PlanError, HeadSizeError: a plan cannot be read, or does not fit the model that is named.
    """
    if len(files) < 2:
        raise CommandError("compare needs two plans or more")
    if model is not None:
        config = load_config(model)
        return [read_plan_for(file, config, model) for file in files]
    plans = [read_plan(file) for file in files]
    counts = {len(plan.layers) for plan in plans}
    if len(counts) > 1:
        told = ", ".join(f"{file} {len(plan.layers)}" for file, plan in zip(files, plans, strict=True))
        raise CommandError(f"these plans are for models of different numbers of layers: {told}")
    known = {plan.geometry for plan in plans if plan.geometry is not None}
    if not known:
        raise CommandError("none of these plans says which sizes it is for: pass --model")
    if len(known) > 1:
        raise CommandError("these plans are for models of different sizes: pass --model to choose one")
    return [replace(plan, geometry=next(iter(known))) for plan in plans]


def _costs(plan: KVPlan, batch: int, length: int, itemsize: int) -> dict[str, Any]:
    assert plan.geometry is not None
    geometry = plan.geometry
    nbytes = plan.nbytes(batch, length, itemsize=itemsize)
    raw = batch * geometry.elements(length) * itemsize
    return {
        "name": plan.name,
        "digest": plan.digest,
        "nominal_bits": plan.nominal_bits(),
        "bits_per_element": plan.bits_per_element(),
        "nbytes": nbytes,
        "nbytes_16bit": raw,
        "ratio": raw / nbytes,
    }


def _differences(plans: list[KVPlan]) -> dict[str, tuple[str, ...]]:
    """Layers planned differently, by selection: what each plan does there."""
    rows = list(zip(*(plan.layers for plan in plans), strict=True))
    # windows, sinks and tiles are named only where one differs
    keeps_alike = all(len({_kept(layer) for layer in row}) == 1 for row in rows)
    found: dict[tuple[str, ...], list[int]] = {}
    for index, row in enumerate(rows):
        if len(set(row)) > 1:
            cells = tuple(_formats(layer) + ("" if keeps_alike else _kept(layer)) for layer in row)
            found.setdefault(cells, []).append(index)
    return {join_layers(indices): cells for cells, indices in found.items()}


def _formats(layer: LayerPlan) -> str:
    key, value = layer.labels
    return f"K{_spec(layer.key, key)} V{_spec(layer.value, value)}"


def _spec(spec: QuantSpec, label: str) -> str:
    if spec.is_raw:
        return label
    group = "head" if spec.group_size == "head" else f"g{spec.group_size}"
    usual = QuantSpec(spec.bits, spec.axis, spec.group_size)
    return f"{label} {spec.axis} {group}" + ("" if spec == usual else f" {spec.scale_dtype}")


def _kept(layer: LayerPlan) -> str:
    return f", window {layer.window.length}, sink {layer.sink_length}, tile {layer.tile_length}"


def _cost_table(rows: list[dict[str, Any]], batch: int, length: int) -> Table:
    table = Table("plan", "bits a code", "bits per element", "cache", "ratio")
    for row in rows:
        table.add_row(
            row["file"],
            f"{row['nominal_bits']:.2f}",
            f"{row['bits_per_element']:.2f}",
            size(row["nbytes"]),
            f"{row['ratio']:.2f}x",
        )
    table.caption = f"cache: batch {batch}, {length:,} tokens; bits: in the limit of long contexts"
    return table


def _layer_table(files: list[str], differences: dict[str, tuple[str, ...]]) -> Table | str:
    if not differences:
        return "all layers are planned alike"
    table = Table("layers", *files)
    for layers, cells in differences.items():
        table.add_row(layers, *cells)
    return table
