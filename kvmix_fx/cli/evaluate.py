"""`kvmix eval`: what a plan costs a model, in figures that people know."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvmix_fx.cli.common import (
    Answer,
    ModelName,
    Placement,
    answers,
    as_options,
    dtype_name,
    size,
    text_source,
)
from kvmix_fx.cli.plan import PlanChoice, summary
from kvmix_fx.cli.profile import check_target
from kvmix_fx.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmix_fx.evaluation import Evaluation, Figure, Retrieval


@answers
def evaluate(
    model: ModelName,
    choice: PlanChoice,
    placement: Placement,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text to judge on: a file, or 'datasets:ID'; Python's language reference unless told. None "
            "that the plan was made from.",
            show_default=False,
        ),
    ] = None,
    chunks: Annotated[int, typer.Option(min=1, help="Pieces of text.")] = 8,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each that are packed first.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Tokens of each that are then read and judged.")] = 128,
    step: Annotated[int, typer.Option(min=1, help="Tokens read at a time; 1 is what decoding does.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Pieces read together, at most.")] = 4,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Instead of figures on a text: what is found again in made-up ones, separated by commas: "
            "passkey, niah_single, niah_multikey, niah_multivalue, niah_multiquery, variable_tracking, "
            "common_words, frequent_words.",
            show_default=False,
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the tasks' texts.")] = "512,1024",
    depths: Annotated[str, typer.Option(help="Places of what is asked for.")] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(min=1, help="Texts per task, length and depth.")] = 2,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the result to this file.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the picture if it exists.")] = False,
) -> Answer:
    """Measure what a plan costs a model: perplexity, KL divergence, same tokens, bytes, speed.

    The unquantized cache and the packed one read the same text side by side. With --tasks: answers to
    questions about texts that were packed before the question is read.
    """
    import kvmix_fx

    if plot is not None:
        check_target(plot, force)
    asked = None if tasks is None else _asked(tasks, lengths, depths, samples)
    text = text_source("--data", data)
    network, tokenizer, chosen = choice.load(model, placement)
    told = {
        "model": model,
        "plan": summary(chosen),
        "bits_per_element": chosen.bits_per_element(),
        "dtype": dtype_name(network.dtype),
        "device": str(network.device),
        "plot": None if plot is None else str(plot),
    }
    head = Text(f"{model}, {chosen.name}: {chosen.bits_per_element():.2f} bits per element in long contexts")
    if asked is not None:
        from kvmix_fx.evaluation import plot_retrieval, retrieve

        both = {
            name: retrieve(network, plan, tokenizer, **asked)
            for name, plan in (("unquantized", None), (chosen.name, chosen))
        }
        if plot is not None:
            with _picture(plot):
                plot_retrieval(both, plot)
        plain, packed = both.values()
        content = {"retrieval": packed.to_dict(), "retrieval_16bit": plain.to_dict()}
        return Answer({**told, **content}, Group(head, _scores(plain, packed)))
    with as_options("chunks", "prompt", "steps"):
        found = kvmix_fx.evaluate(
            network,
            chosen,
            text,
            tokenizer=tokenizer,
            chunks=chunks,
            prompt=prompt,
            steps=steps,
            step=step,
            batch=batch,
        )
    if plot is not None:
        with _picture(plot):
            found.plot(plot)
    parts = (head, figures(found), _curve(found), Text(_remarks(found, plot)))
    return Answer({**told, **found.to_dict()}, Group(*parts))


@contextlib.contextmanager
def _picture(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # a kind of picture that matplotlib does not know
        raise CommandError(f"{path} cannot be drawn: {error}") from error


def _asked(tasks: str, lengths: str, depths: str, samples: int) -> dict[str, Any]:
    """Arguments of `retrieve`, checked before a model is loaded."""
    from kvmix_fx.evaluation.tasks import check_task

    names = [name.strip() for name in tasks.split(",")]
    for name in names:
        check_task(name)
    return {
        "tasks": names,
        "lengths": _numbers("--lengths", lengths, int),
        "depths": _numbers("--depths", depths, float),
        "samples": samples,
    }


def _numbers(option: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise CommandError(f"{option} takes numbers separated by commas, got {text!r}") from error


def _scores(plain: Retrieval, packed: Retrieval) -> Table:
    table = Table("task", "tokens", "depth", "unquantized", "packed", title="share of the answers found")
    for one, other in zip(plain.scores, packed.scores, strict=True):
        depth = "" if one.depth is None else f"{one.depth:.0%}"
        table.add_row(one.task, str(one.length), depth, f"{one.value:.0%}", f"{other.value:.0%}")
    table.caption = f"{plain.scores[0].samples} texts each"
    return table


def figures(found: Evaluation) -> Table:
    """What a plan costs, for people."""
    table = Table("", "packed", "standard error", "unquantized")
    ratio, plain = found.perplexity_ratio, found.perplexity_16bit
    table.add_row("perplexity ratio", *_told(ratio), f"perplexity {plain.value:.2f}")
    table.add_row("KL mean, nats per token", *_told(found.kl_mean))
    table.add_row("KL of the worst chunk", *_told(found.kl_worst_chunk))
    for name, share in (("median", 0.5), ("99 %", 0.99), ("99.9 %", 0.999), ("max", 1.0)):
        table.add_row(f"KL {name}", *_told(found.kl_quantile(share)))
    table.add_row("same top token", *_told(found.same_top_share, percent=True))
    table.add_row("RMS probability change", *_told(found.rms_probability_change, percent=True))
    table.add_row("cache of a chunk", size(found.cache_bytes), "", size(found.cache_bytes_16bit))
    bits = found.effective_bits
    table.add_row(
        "bits per element", f"{bits:.2f}", "", f"{bits * found.cache_bytes_16bit / found.cache_bytes:.0f}"
    )
    speed, plain_speed = found.tokens_per_second, found.tokens_per_second_16bit
    table.add_row("tokens/s", f"{speed:.1f}", "", f"{plain_speed:.1f}")
    return table


def _told(figure: Figure, percent: bool = False) -> tuple[str, str]:
    def told(value: float) -> str:
        return f"{value:.1%}" if percent else f"{value:.4f}"

    return told(figure.value), "" if figure.standard_error is None else told(figure.standard_error)


def _curve(found: Evaluation) -> Table:
    parts = found.kl_by_step()
    highest = max(part.kl.value for part in parts)
    table = Table("generated steps", "KL mean", "standard error", "")
    for part in parts:
        bar = "█" * round(20 * part.kl.value / highest) if highest > 0 else ""
        span = str(part.first) if part.first == part.last else f"{part.first} to {part.last}"
        table.add_row(span, *_told(part.kl), bar)
    return table


def _remarks(found: Evaluation, plot: Path | None) -> str:
    settings, data = found.settings, found.data
    lines = [
        f"{data['prompts']} chunks of {data['source']}: {settings['prompt']} tokens packed, then "
        f"{settings['steps']} read {settings['step']} at a time, {settings['batch']} chunks together."
    ]
    if plot is not None:
        lines.append(f"drawn to {plot}")
    return "\n".join(lines)
