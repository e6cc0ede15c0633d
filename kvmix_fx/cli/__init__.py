"""The `kvmix` command: a thin layer over the API.

Results go to stdout, or one JSON object with --json; progress and notes go to stderr. The exit code is 0, or
1 with a message for anything that cannot be done (2 for a command line that cannot be read). Commands import
torch and transformers when they run, so help is immediate.
"""

from __future__ import annotations

from typing import Annotated

import typer

from kvmix_fx.cli import (
    auto,
    compare,
    demo,
    env,
    evaluate,
    explain,
    generate,
    plan,
    profile,
    serve,
    solve,
    tokens,
    tune,
)

app = typer.Typer(
    name="kvmix",
    help="Keep a model's KV cache in 2 to 4 bits.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.command("explain")(explain.explain)
app.command("profile")(profile.profile)
app.command("eval")(evaluate.evaluate)
plan.app.command("auto")(auto.auto)
plan.app.command("solve")(solve.solve)
plan.app.command("tokens")(tokens.tokens)
plan.app.command("compare")(compare.compare)
app.add_typer(plan.app, name="plan")
app.command("tune")(tune.tune)
app.command("env")(env.env)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvmix {env.version('kvmix-fx') or 'of a source tree'}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    del version  # answered by the callback


def main() -> None:
    """Run the command line; the entry point."""
    app(prog_name="kvmix")


__all__ = ["app", "main"]
