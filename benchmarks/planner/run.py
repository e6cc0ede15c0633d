"""Which signal and which allocator spend the bits best: SmolLM2, real text, packed caches, equal bits.

Every plan reads 12 chunks of prose and 12 of code from the evaluation parts of the texts: 416 tokens of
prompt, then 32 tokens in steps of 16, which are judged (`evaluate.py` says how). Signals see calibration text
only. The best uniform configuration is the best *measured* one on the very text it is judged on, an advantage
that no other plan has.

Rows are saved as they come, and what is there already is not measured again.

    python -m benchmarks.planner.run                 # everything
    python -m benchmarks.planner.run --only uniform  # the controls without a signal
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from benchmarks.planner import plans
from benchmarks.planner.evaluate import Evaluator, Loss
from benchmarks.rows import load, machine_name, make_row, percentiles, save
from kvmix_fx.plan import KVPlan, ModelGeometry
from kvmix_fx.testing import texts
from kvmix_fx.testing.smollm2 import load_smollm2

PROMPT, JUDGED, STEP, CHUNKS = 416, 32, 16, 12
TEXTS = {"prose": texts.prose, "code": texts.code}


def evaluation_chunks(tokenizer: object, name: str) -> torch.Tensor:
    """Chunks of one text, spread over its evaluation part."""
    text, length = TEXTS[name](), PROMPT + JUDGED
    return torch.cat([texts.chunks(tokenizer, text, length, 1, skip=11 * n) for n in range(CHUNKS)])


class Bench:
    """The model, the texts, and what has been measured."""

    def __init__(self) -> None:
        model, tokenizer = load_smollm2()
        self.geometry = ModelGeometry.of(model)
        self.model, self.tokenizer = model, tokenizer
        ids = torch.cat([evaluation_chunks(tokenizer, name) for name in TEXTS])
        self.evaluate = Evaluator(model, ids, PROMPT, STEP)
        self.known = {row.key: row for row in load("quality", machine_name())}
        self.losses: dict[str, Loss] = {}

    def measure(self, case: str, provider: str, plan: KVPlan) -> dict[str, float]:
        """KL by text; rows of `case`, in which "{}" stands for the text."""
        cases = {name: case.format(name) for name in TEXTS}
        keys = {name: ("quality", cases[name], provider, "kl_nats", machine_name()) for name in TEXTS}
        if not all(key in self.known for key in keys.values()):
            started = time.perf_counter()
            if plan.digest not in self.losses:
                self.losses[plan.digest] = self.evaluate(plan)
            for number, name in enumerate(TEXTS):
                part = self.losses[plan.digest].part(slice(number * CHUNKS, (number + 1) * CHUNKS))
                self.save(cases[name], provider, part, plan.bits_per_element())
            print(
                f"{case:24} {provider:34} {plan.bits_per_element():.3f} bits  "
                + "  ".join(f"{name} {self.known[key].value:.5f}" for name, key in keys.items())
                + f"  {time.perf_counter() - started:.1f} s",
                flush=True,
            )
        return {name: self.known[key].value for name, key in keys.items()}

    def save(self, case: str, provider: str, loss: Loss, bits: float) -> None:
        """Rows of one plan on one text; p20 and p80 over the chunks."""
        low, _, high = percentiles(loss.kl)
        figures = (
            ("kl_nats", loss.mean_kl, "nats/token", {"p20": low, "p80": high}),
            ("perplexity increase", loss.perplexity_increase, "%", {}),
        )
        rows = [
            make_row("quality", case, provider, metric, value, unit, effective_bits=bits, **rest)
            for metric, value, unit, rest in figures
        ]
        save(rows)
        self.known |= {row.key: row for row in rows}


def measure_uniform(bench: Bench) -> None:
    """All candidates, once each, and the best of each budget."""
    for bits in plans.BUDGETS:
        found = {
            plan.name: bench.measure("smollm2 {} uniform", plan.name, plan)
            for plan in plans.uniform_candidates(bits, bench.geometry)
        }
        for text in TEXTS:
            name = min(found, key=lambda name: found[name][text])
            print(f"best uniform, {text}, {bits} bits: {name}, KL {found[name][text]:.5f}", flush=True)
            for metric in ("kl_nats", "perplexity increase"):
                row = bench.known["quality", f"smollm2 {text} uniform", name, metric, machine_name()]
                save([replace(row, case=f"smollm2 {text} {bits} bits", provider="best uniform")])


def measure_controls(bench: Bench) -> None:
    """Random plans and published pairs of widths."""
    for bits in plans.BUDGETS:
        for provider, plan in plans.controls(bits, bench.geometry):
            bench.measure(f"smollm2 {{}} {bits} bits", provider, plan)


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"uniform": measure_uniform, "controls": measure_controls}
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench()
    for part in options.only:
        parts[part](bench)


if __name__ == "__main__":
    main()
