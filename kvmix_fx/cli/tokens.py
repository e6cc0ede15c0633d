"""`kvmix plan tokens`: shares of tokens at more bits for each layer of a plan, measured and chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvmix_fx.cli.common import Answer, ModelName, Placement, answers, load_config, note, text_source
from kvmix_fx.cli.plan import PlanChoice, described, view
from kvmix_fx.cli.profile import check_target


@answers
def tokens(
    model: ModelName,
    choice: PlanChoice,
    placement: Placement,
    bits: Annotated[float, typer.Option(help="The budget: effective bits per element, tiers included.")],
    out: Annotated[Path, typer.Option(help="Where the plan goes.")] = Path("plan.json"),
    policy: Annotated[
        str, typer.Option(help="How importance is counted: accumulated, mean, last or norm.")
    ] = "last",
    tier_bits: Annotated[int, typer.Option(help="Of the tokens that matter: 16, 8 or 4.")] = 4,
    share: Annotated[
        list[float] | None,
        typer.Option(help="Of the packed tokens, to choose from; repeatable.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text to measure on: a file, or 'datasets:ID'; a short text of the package unless told.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Pieces of it.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the plan if it exists.")] = False,
) -> Answer:
    """Give each layer of a plan the share of tokens at more bits that buys most."""
    from kvmix_fx.plan.budget import Budget
    from kvmix_fx.profiling.shares import PROMPTS, SHARES, check_budget, choose_shares, tiers_of

    check_target(out, force)
    budget = Budget(bits=bits)
    # what means nothing is found before the work
    asked: dict[str, Any] = {"policy": policy, "bits": tier_bits, "shares": share or SHARES}
    count = len(tiers_of(**asked))
    check_budget(choice.build(load_config(model), model), budget)
    text = text_source("--data", data)
    network, tokenizer, plan = choice.load(model, placement)
    reads = (prompts or PROMPTS) * (1 + len(plan.layers) * (1 + count))
    note(f"up to {prompts or PROMPTS} prompts, {reads} reads, each from one layer on")
    found = choose_shares(network, plan, budget, text, tokenizer=tokenizer, prompts=prompts, **asked)
    found.save(out)
    return Answer({"path": str(out), **described(found)}, f"{view(found)}\nwritten to {out}")
