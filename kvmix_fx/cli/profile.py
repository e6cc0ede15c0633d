"""`kvmix profile`: measure a model, so that plans can be made for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from kvmix_fx.cli.common import (
    Answer,
    ModelName,
    Placement,
    answers,
    as_options,
    duration,
    load_model,
    note,
    text_source,
)
from kvmix_fx.errors import CommandError

if TYPE_CHECKING:
    from kvmix_fx.profiling import Profile

BACKWARDS = 4
"""Forwards that the backwards of one prompt take as long as."""

BAR = 16
"""Characters of the longest bar."""


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
    from kvmix_fx.profiling.calibration import LENGTH, PROMPTS, check_sizes
    from kvmix_fx.profiling.measure import check_signals

    for path in (out, plot):
        if path is not None:
            check_target(path, force)
    signals = signal or DEFAULT_SIGNALS
    check_signals(signals)
    with as_options("prompts", "length"):
        check_sizes(prompts or PROMPTS, length or LENGTH)
    text = text_source("--data", data)
    network, tokenizer = load_model(model, placement)
    tell_time(network, signals, prompts or PROMPTS, length or LENGTH)
    found = kvmix_fx.profile(
        network,
        text,
        tokenizer=tokenizer,
        signals=signals,
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
    return Answer(content, Group(_table(found), Text(f"{found.describe()}\nwritten to {out}")))


def _table(profile: Profile) -> Table:
    """How sensitive each layer's keys and values are by the best signal: rank, and bars on one scale."""
    name = profile.signals[0]
    roles = profile.per_layer(name)
    largest = max(map(max, roles))
    ranks = [_ranks(numbers) for numbers in roles]
    columns = (Column("layer", justify="right"), Column("rank", justify="right"), Column("keys"))
    table = Table(*columns, Column("rank", justify="right"), Column("values"))
    for layer in range(profile.geometry.num_layers):
        cells: list[str] = []
        for numbers, places in zip(roles, ranks, strict=True):
            bar = "█" * round(BAR * numbers[layer] / largest) if largest > 0 else ""
            cells += [str(places[layer]), f"{bar or '▏'} {numbers[layer]:.2g}"]
        table.add_row(str(layer), *cells)
    table.caption = f"{name}; rank 1 suffers most. The file and --json have the numbers of all signals."
    return table


def _ranks(numbers: Sequence[float]) -> list[int]:
    order = sorted(range(len(numbers)), key=lambda n: -numbers[n])
    return [order.index(n) + 1 for n in range(len(numbers))]


def tell_time(network: Any, signals: Sequence[str], prompts: int, length: int) -> None:
    """Say roughly how long it will take, from one prompt of tokens that mean nothing."""
    import torch

    from kvmix_fx.plan import ModelGeometry
    from kvmix_fx.profiling.run import reads

    ids = torch.zeros((1, length), dtype=torch.int64, device=network.device)
    with torch.no_grad():
        # the first look at a file of weights is slower than all others
        network(input_ids=ids[:, :1], use_cache=True).logits.cpu()
        started = time.perf_counter()
        # moved to the host, so that the device has finished
        network(input_ids=ids, use_cache=True).logits[:, -1].cpu()
    # the traced model is run layer by layer, its first reads with backwards
    count = reads(signals, ModelGeometry.of(network), prompts)
    seconds = (count + prompts * BACKWARDS) * (time.perf_counter() - started)
    note(f"up to {prompts} prompts of {length} tokens, {count} reads: about {duration(seconds)}")


def check_target(path: Path, force: bool) -> None:
    """Raise CommandError unless a file can be written there; asked before the work, not after."""
    if path.exists() and not force:
        raise CommandError(f"{path} exists; pass --force to replace it")
    if not path.parent.is_dir():
        raise CommandError(f"{path} cannot be written: there is no folder {path.parent}")
