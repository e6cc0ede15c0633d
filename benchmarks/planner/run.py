"""Which signal and which allocator spend the bits best: SmolLM2, real text, packed caches, equal bits.

Every plan reads 12 chunks of prose and 12 of code from the evaluation parts of the texts: 416 tokens of
prompt, then 32 tokens in steps of 16, which are judged (`evaluate.py` says how). With tiles of 128 no tile is
full before the end, so reading token by token would give the same. Signals see the calibration parts of the
same texts; for comparison, the default also sees only the text that comes with the package. The best
uniform configuration is the best *measured* one on the very text it is judged on, which no other plan is.

Rows are saved as they come, and what is there already is not measured again.

    python -m benchmarks.planner.run                 # everything
    python -m benchmarks.planner.run --only uniform  # the controls without a signal
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

import kvmix_fx
from benchmarks.planner import plans
from benchmarks.planner.evaluate import Evaluator, Loss
from benchmarks.rows import RESULTS, load, machine_name, make_row, percentiles, save
from kvmix_fx.plan import KVPlan, ModelGeometry, QuantSpec
from kvmix_fx.plan.prices import Menu, Prices, Scores
from kvmix_fx.profiling import Profile
from kvmix_fx.profiling.signals import SIGNALS
from kvmix_fx.testing import texts
from kvmix_fx.testing.smollm2 import load_smollm2

PARTS = ("uniform", "controls", "grid")

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


def calibration_chunks(tokenizer: object) -> torch.Tensor:
    """Four chunks of each text, spread over its calibration part."""
    length = PROMPT + JUDGED
    parts = [
        texts.chunks(tokenizer, text(), length, 1, skip=20 * n, part="calibration")
        for text in TEXTS.values()
        for n in range(4)
    ]
    return torch.cat(parts)


def profile_of(bench: Bench, path: Path, data: torch.Tensor | None, signals: Iterable[str]) -> Profile:
    """Quick signals on `data`, None for the text that comes with the package; kept in a file."""
    if path.exists():
        return Profile.load(path)
    print(f"profiling into {path}", flush=True)
    profile = kvmix_fx.profile(bench.model, data, tokenizer=bench.tokenizer, signals=tuple(signals))
    profile.save(path)
    return profile


def kl_prices(bench: Bench, path: Path) -> Prices:
    """KL of one tensor in one format at a time, by the evaluator, on the calibration parts of the texts.

    The reference that cheap signals stand for; 20 minutes of one core. Kept in a file as it comes.
    """
    offered = Menu.uniform(bench.geometry, bits=(2, 3, 4))
    known = json.loads(path.read_text()) if path.exists() else {}
    raw = KVPlan.uniform(bench.geometry, 16, window=plans.WINDOW, sink_length=0)
    evaluate = None
    for role, specs in (("key", offered.keys), ("value", offered.values)):
        for spec, layer in product(specs, range(bench.geometry.num_layers)):
            name = f"{role} {layer} {spec.bits} {spec.group_size}"
            if name not in known:
                evaluate = evaluate or Evaluator(
                    bench.model, calibration_chunks(bench.tokenizer), PROMPT, STEP
                )
                known[name] = evaluate(raw.with_layers(layer, **{role: spec}, tile=plans.TILE)).mean_kl
                path.write_text(json.dumps(known))

    def table(role: str, specs: tuple[QuantSpec, ...]) -> tuple[tuple[float, ...], ...]:
        return tuple(
            tuple(max(0.0, known[f"{role} {layer} {spec.bits} {spec.group_size}"]) for spec in specs)
            for layer in range(bench.geometry.num_layers)
        )

    return Prices("kl", offered, table("key", offered.keys), table("value", offered.values))


def measure_grid(bench: Bench, signals: dict[str, Scores | Prices]) -> None:
    """Every signal with every allocator; the default and KVmix's own rule under their names."""
    cells = product((3.0, 3.5, 2.5, 4.0, 2.8), plans.ALLOCATORS)
    for bits, allocator in sorted(cells, key=lambda cell: cell[1] != "exact"):  # the most telling first
        case = f"smollm2 {{}} {bits} bits"
        for name, signal in signals.items():
            plan = plans.of_signal(signal, allocator, bits, bench.geometry)
            bench.measure(case, f"{name} {allocator}", plan)
            if (name, allocator) == plans.DEFAULT:
                bench.measure(case, "kvmix default", plan)
        if allocator == "exact" and "weight_gradient" in signals:
            rule = plans.paper_rule(signals["weight_gradient"], bits, bench.geometry)
            if rule is not None:
                bench.measure(case, "kvmix paper rule", rule)


def measure_shipped(bench: Bench, profile: Profile) -> None:
    """Signals whose prices need no correction, calibrated on the text that comes with the package."""
    for name, bits in product(plans.SHIPPED_SIGNALS, plans.BUDGETS):
        plan = plans.of_signal(profile.signal(name), "exact", bits, bench.geometry)
        bench.measure(f"smollm2 {{}} {bits} bits", f"{name} exact, shipped text", plan)


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--signals", nargs="+", help="of the grid; all unless given")
    parser.add_argument(
        "--kept",
        type=Path,
        default=RESULTS / "planner",
        help="folder that keeps profiles",
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench()
    if "uniform" in options.only:
        measure_uniform(bench)
    if "controls" in options.only:
        measure_controls(bench)
    if "grid" in options.only:
        options.kept.mkdir(parents=True, exist_ok=True)
        shipped = profile_of(bench, options.kept / "shipped-text.safetensors", None, plans.SHIPPED_SIGNALS)
        measure_shipped(bench, shipped)
        ids = calibration_chunks(bench.tokenizer)
        profile = profile_of(bench, options.kept / "profile.safetensors", ids, (*SIGNALS, "fisher_scaled"))
        signals = {name: profile.signal(name) for name in profile.signals}
        signals["kl"] = kl_prices(bench, options.kept / "kl.json")
        measure_grid(bench, {name: signals[name] for name in options.signals or signals})


if __name__ == "__main__":
    main()
