"""`kvmix profile`: measure a model, so that plans can be made for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvmix_fx.cli.common import Answer, ModelName, Placement, answers, load_model
from kvmix_fx.errors import CommandError

SHOWN_SIGNALS = 4
"""Columns of the table; --json has all."""


@answers
def profile(
    model: ModelName,
    placement: Placement,
    out: Annotated[
        Path, typer.Option(help="Where the profile goes; a safetensors file.", show_default=False)
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: a file, or 'datasets:ID'; a short text of the package unless told.",
            show_default=False,
        ),
    ] = None,
    signal: Annotated[
        list[str] | None, typer.Option(help="What to measure; may be repeated.", show_default=False)
    ] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Pieces of text, at most.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of each.")] = None,
    window: Annotated[int, typer.Option(min=0, help="Recent tokens that plans will keep at 16 bits.")] = 32,
    plot: Annotated[Path | None, typer.Option(help="Draw the signals per layer to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> Answer:
    """Measure how much each layer's keys and values suffer from quantization."""
    import kvmix_fx
    from kvmix_fx.profiling import DEFAULT_SIGNALS

    for path in (out, plot):
        if path is not None:
            check_target(path, force)
    network, tokenizer = load_model(model, placement)
    text: Any = Path(data) if data is not None and not data.startswith("datasets:") else data
    found = kvmix_fx.profile(
        network,
        text,
        tokenizer=tokenizer,
        signals=signal or DEFAULT_SIGNALS,
        prompts=prompts,
        length=length,
        window=window,
    )
    found.save(out)
    if plot is not None:
        try:
            found.plot(plot)
        except ValueError as error:  # a kind of picture that matplotlib does not know
            raise CommandError(f"{plot} cannot be drawn: {error}") from error

    shown = found.signals[:SHOWN_SIGNALS]
    table = Table("layer", *(f"{name}\n{role}" for name in shown for role in ("keys", "values")))
    columns = [numbers for name in shown for numbers in found.per_layer(name)]
    for layer in range(found.geometry.num_layers):
        table.add_row(str(layer), *(f"{numbers[layer]:.3g}" for numbers in columns))
    content = {
        "path": str(out),
        "plot": None if plot is None else str(plot),
        "model": found.model.name,
        "data": dict(found.data),
        "settings": dict(found.settings),
        "signals": {
            name: dict(zip(("keys", "values"), found.per_layer(name), strict=True)) for name in found.signals
        },
        "unavailable": dict(found.unavailable),
        "skipped": {str(layer): reason for layer, reason in found.skipped.items()},
    }
    return Answer(content, Group(table, Text(f"{found.describe()}\nwritten to {out}")))


def check_target(path: Path, force: bool) -> None:
    """Raise CommandError unless a file can be written there; asked before the work, not after."""
    if path.exists() and not force:
        raise CommandError(f"{path} exists; pass --force to replace it")
    if not path.parent.is_dir():
        raise CommandError(f"{path} cannot be written: there is no folder {path.parent}")
