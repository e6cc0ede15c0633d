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
    load_model,
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

    network, tokenizer = load_model(model, placement)
    chosen = choice.build(network)
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
    table = Table("graph", "layer", "step", "idiom", "action", "bits", "bytes per token")
    for number, graph in enumerate(report.graphs):
        for site in graph.sites:
            table.add_row(
                str(number),
                "?" if site.layer is None else str(site.layer),
                {"1": "decode", "?": "?"}.get(site.query_length, "prefill"),
                site.idiom,
                site.action,
                site.label,
                "" if site.bytes_per_token is None else f"{site.bytes_per_token:.0f}",
            )
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
