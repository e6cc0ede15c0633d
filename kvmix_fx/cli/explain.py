"""`kvmix explain`: what a plan would do to each attention site of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvmix_fx.cli.common import (
    Answer,
    ModelName,
    Placement,
    answers,
    encode,
    note,
)
from kvmix_fx.cli.plan import PlanChoice, summary
from kvmix_fx.plan import join_layers

if TYPE_CHECKING:
    from kvmix_fx.passes.report import CompileReport, SiteReport

PROMPT = "One two three four five six seven eight nine ten."


@answers
def explain(model: ModelName, choice: PlanChoice, placement: Placement) -> Answer:
    """Show what a plan would do to each attention site of a model, or why not."""
    import kvmix_fx

    network, tokenizer, chosen = choice.load(model, placement)
    note("tracing a short prompt and one decode step")
    ids = encode(tokenizer, PROMPT, chat=False).to(network.device)
    report = kvmix_fx.explain(network, {"input_ids": ids, "use_cache": True}, chosen)

    rewritten, total = len(report.rewritten_layers()), len(chosen.layers)
    content = {
        "model": model,
        "plan": summary(chosen),
        "rewritten_layers": rewritten,
        "total_layers": total,
        "sites": [
            {"graph": number, **asdict(site), "rewritten": site.rewritten}
            for number, graph in enumerate(report.graphs)
            for site in graph.sites
        ],
    }
    lines = [f"{rewritten} of {total} layers are rewritten", *_reasons(report.skipped())]
    return Answer(content, Group(_table(report), Text("\n".join(lines))))


def _table(report: CompileReport) -> Table:
    """A row for all sites of a step to which the same is done."""
    alike: dict[tuple[str, ...], list[int | None]] = {}
    for graph in report.graphs:
        for site in graph.sites:
            row = (
                {"1": "decode", "?": "?"}.get(site.query_length, "prefill"),
                site.idiom,
                site.action,
                site.label,
                "" if site.bytes_per_token is None else f"{site.bytes_per_token:.0f}",
            )
            alike.setdefault(row, []).append(site.layer)
    table = Table("step", "layers", "idiom", "action", "bits", "bytes per token\nand layer")
    for (step, *rest), layers in alike.items():
        known = join_layers(sorted({layer for layer in layers if layer is not None}))
        unknown = ["?"] if None in layers else []
        table.add_row(step, ", ".join([known] * bool(known) + unknown), *rest)
    return table


def _reasons(sites: Iterable[SiteReport]) -> list[str]:
    """Why sites were not fully rewritten: a line per reason."""
    layers: dict[str, set[int]] = {}
    for site in sites:
        layers.setdefault(site.reason, set()).update(set() if site.layer is None else {site.layer})
    return [
        f"layers {join_layers(sorted(found))}: {reason}" if found else reason
        for reason, found in layers.items()
    ]
