"""`kvmix plan auto`: from a model and a budget to a plan and what it costs, in one go."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
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
    size,
    text_source,
)
from kvmix_fx.cli.evaluate import figures
from kvmix_fx.cli.plan import described, view
from kvmix_fx.cli.profile import check_target, tell_time
from kvmix_fx.errors import CommandError

if TYPE_CHECKING:
    from kvmix_fx.evaluation import Evaluation
    from kvmix_fx.plan import KVPlan
    from kvmix_fx.profiling import Profile

PACKED_STEP = 2.5
"""Steps of an unquantized cache that one of a packed cache takes as long as, on a CPU; less on GPUs."""

SIGNALS = ("fisher_scaled",)
"""What plans are made of; `kvmix profile` measures others besides, to compare with."""

SENSITIVE = 3
"""Layers that are named."""

LONG = 16384
"""Tokens at which bytes are told."""


@answers
def auto(
    model: ModelName,
    placement: Placement,
    bits: Annotated[float, typer.Option(help="Effective bits per element, scales and offsets included.")],
    out: Annotated[Path, typer.Option(help="Where the plan goes.")] = Path("plan.json"),
    profile: Annotated[
        Path | None,
        typer.Option(
            help="The profile: read if the file exists, else measured and written there; beside the plan, "
            "as .profile.safetensors, unless told.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text to profile: a file, or 'datasets:ID'; a short text of the package unless told.",
            show_default=False,
        ),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            help="Other text, to judge the plan on; Python's language reference unless told.",
            show_default=False,
        ),
    ] = None,
    chunks: Annotated[int, typer.Option(min=1, help="Pieces of it.")] = 8,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each that are packed first.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Tokens of each that are then judged.")] = 128,
    force: Annotated[bool, typer.Option("--force", help="Replace the plan if it exists.")] = False,
) -> Answer:
    """Profile a model, make a plan for a budget, measure what it costs, and save it.

    The profile is kept: for another budget, or after an interruption, it is not measured again.
    """
    import kvmix_fx
    from kvmix_fx.plan.budget import Budget
    from kvmix_fx.profiling import Profile

    check_target(out, force)
    Budget(bits=bits)  # what means nothing is found before the work
    kept = profile if profile is not None else out.with_suffix(".profile.safetensors")
    if data is not None and data == eval_data:
        raise CommandError("a plan is not judged on the text it was made from: give --eval-data another one")
    if not kept.exists():
        check_target(kept, force)
    measured = Profile.load(kept) if kept.exists() else None
    calibration = text_source("--data", data) if measured is None else None
    judged = text_source("--eval-data", eval_data)
    network, tokenizer = load_model(model, placement)
    note("1 of 3, profile")
    if measured is None:
        found = _profile(network, tokenizer, kept, calibration)
    else:
        found = measured
        found.check_model(network)
        if data is not None:
            note(f"--data is not read: {kept} has been measured on {found.data.get('source')}")
        note(f"taken from {kept}")
    note("2 of 3, plan")
    plan = found.plan(bits=bits)
    note(f"3 of 3, evaluation: {_told(network, chunks, prompt, steps)}")
    with as_options("chunks", "prompt", "steps"):
        result = kvmix_fx.evaluate(
            network, plan, judged, tokenizer=tokenizer, chunks=chunks, prompt=prompt, steps=steps
        )
    plan = replace(plan, provenance={**plan.provenance, "evaluation": [result.summary()]})
    plan.save(out)
    content = {
        "path": str(out),
        "profile": str(kept),
        **described(plan),
        "evaluation": result.to_dict(),
    }
    parts = (Text(view(plan)), figures(result), Text(_summary(plan, found, result, out, kept)))
    return Answer(content, Group(*parts))


def _profile(network: Any, tokenizer: Any, kept: Path, text: Any) -> Profile:
    """A new profile, left in the file."""
    import kvmix_fx
    from kvmix_fx.profiling.calibration import LENGTH, PROMPTS

    tell_time(network, SIGNALS, PROMPTS, LENGTH)
    found = kvmix_fx.profile(network, text, tokenizer=tokenizer, signals=SIGNALS)
    found.save(kept)
    note(f"kept in {kept}")
    return found


def _told(network: Any, chunks: int, prompt: int, steps: int) -> str:
    """Roughly how long judging takes, from a prompt and a step of tokens that mean nothing."""
    import torch
    from transformers import DynamicCache

    from kvmix_fx.contracts import cache_argument
    from kvmix_fx.evaluation.run import BATCH

    rows = min(BATCH, chunks)
    ids = torch.zeros((rows, prompt + 2), dtype=torch.int64, device=network.device)
    cache = DynamicCache(config=network.config)
    times = []
    with torch.no_grad():
        # the second step is timed: the first may still allocate
        for part in ids.split((prompt, 1, 1), 1):
            started = time.perf_counter()
            network(input_ids=part, use_cache=True, **cache_argument(network, cache)).logits[:, -1].cpu()
            times.append(time.perf_counter() - started)
    read, _, step = times
    seconds = -(-chunks // rows) * (2 * read + (1 + PACKED_STEP) * steps * step)
    return f"{chunks} pieces of text, {steps} steps each, with both caches: about {duration(seconds)}"


def _summary(plan: KVPlan, profile: Profile, result: Evaluation, out: Path, kept: Path) -> str:
    """What was found, in sentences."""
    kl, top, ratio = result.kl_mean, result.same_top_share, result.perplexity_ratio
    assert plan.geometry is not None  # a profile's plan has one
    lines = [
        f"{plan.bits_per_element():.2f} bits per element cost {kl.value:.4f} nats a token on "
        f"{result.data['source']}:",
        f"{top.value:.1%} of the likeliest tokens stay, perplexity is {ratio.value:.3f} times what it was.",
        f"At 16k tokens the cache takes {size(plan.nbytes(1, LONG))}, "
        f"{size(2 * plan.geometry.elements(LONG))} in 16 bits.",
        *_sensitive(profile),
        f"The profile is {kept}: for other --bits it is read, not measured again.",
        f"written to {out}",
    ]
    return "\n".join(lines)


def _sensitive(profile: Profile) -> list[str]:
    """The layers that suffer most."""
    keys, values = profile.per_layer(profile.signals[0])

    def first(numbers: tuple[float, ...]) -> str:
        order = sorted(range(len(numbers)), key=lambda n: -numbers[n])
        return ", ".join(str(n) for n in order[:SENSITIVE])

    return [f"Keys suffer most in layers {first(keys)}, values in {first(values)}."]
