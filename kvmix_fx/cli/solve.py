"""`kvmix plan solve`: from a profile and a budget to a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvmix_fx.cli.common import Answer, answers
from kvmix_fx.cli.plan import described, view
from kvmix_fx.cli.profile import check_target
from kvmix_fx.errors import CommandError
from kvmix_fx.plan.schema import DEFAULT_SINK


@answers
def solve(
    file: Annotated[Path, typer.Argument(metavar="PROFILE", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where the plan goes.", show_default=False)],
    bits: Annotated[
        float | None,
        typer.Option(help="The budget: effective bits per element, scales and offsets included."),
    ] = None,
    bytes_per_token: Annotated[
        float | None, typer.Option(help="Instead of --bits: of one row, all layers and ranks.")
    ] = None,
    total_bytes: Annotated[
        int | None, typer.Option(help="Instead of --bits: with --batch and --length.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows, for --total-bytes.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens, for --total-bytes.")] = None,
    tp: Annotated[
        int, typer.Option(min=1, help="Ranks that share the KV heads; --total-bytes is then one rank's.")
    ] = 1,
    signal: Annotated[
        str | None, typer.Option(help="What to go by; the best that was measured.", show_default=False)
    ] = None,
    allocator: Annotated[str, typer.Option(help="How to spend the budget.")] = "exact",
    order: Annotated[
        str, typer.Option(help="Of channels with bits of their own: plan, as measured, or prompt.")
    ] = "plan",
    max_drop_kl: Annotated[
        float | None,
        typer.Option(
            help="Nats that dropping channels of one layer may have cost for a plan to do so; 0 for none.",
            show_default=False,
        ),
    ] = None,
    sink: Annotated[int, typer.Option(min=0, help="Leading tokens kept at 16 bits.")] = DEFAULT_SINK,
    window: Annotated[int, typer.Option(min=0, help="Recent tokens kept at 16 bits.")] = 32,
    force: Annotated[bool, typer.Option("--force", help="Replace the plan if it exists.")] = False,
) -> Answer:
    """Make a plan from a profile under a budget; needs no model."""
    from kvmix_fx.profiling.report import MAX_DROP_KL, Profile

    check_target(out, force)
    if order not in ("plan", "prompt"):
        raise CommandError(f"--order is plan or prompt, got {order!r}")
    _check_budget(
        {"--bits": bits, "--bytes-per-token": bytes_per_token, "--total-bytes": total_bytes},
        {"--batch": batch, "--length": length, "--tp": None if tp == 1 else tp},
    )
    found = Profile.load(file)
    plan = found.plan(
        bits=bits,
        bytes_per_token=bytes_per_token,
        total_bytes=total_bytes,
        batch=batch,
        length=length,
        tp_size=tp,
        signal=signal,
        allocator=allocator,
        order="plan" if order == "plan" else "prompt",
        max_drop_kl=MAX_DROP_KL if max_drop_kl is None else max_drop_kl,
        sink_length=sink,
        window=window,
    )
    plan.save(out)
    return Answer({"path": str(out), **described(plan)}, f"{view(plan)}\nwritten to {out}")


def _check_budget(budgets: dict[str, float | None], of_total: dict[str, int | None]) -> None:
    """Raise CommandError unless one budget is given, with what goes with it."""
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        raise CommandError(
            f"a plan has one budget: pass one of {', '.join(budgets)}; got {' and '.join(given) or 'none'}"
        )
    beside = [name for name, value in of_total.items() if value is not None]
    if given != ["--total-bytes"] and beside:
        raise CommandError(f"{beside[0]} is for --total-bytes; {given[0]} does not depend on it")
    if given == ["--total-bytes"] and not {"--batch", "--length"} <= set(beside):
        raise CommandError("--total-bytes needs --batch and --length of the cache that must fit")
