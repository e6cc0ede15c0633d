"""Figures of the planner benchmark, from committed rows and the committed profile.

python -m benchmarks.planner.figures    # needs matplotlib; writes results/figures/planner-*.svg
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from benchmarks.planner import plans
from benchmarks.rows import RESULTS, Row, load
from kvmix_fx.plan import KVPlan
from kvmix_fx.plan.prices import Scores
from kvmix_fx.profiling import Profile

TEXTS = ("prose", "code")
NAMED = {
    "kvmix default": {"color": "tab:red", "marker": "o", "zorder": 5},
    "best uniform": {"color": "black", "marker": "s", "zorder": 4},
    "kvmix paper rule": {"color": "tab:purple", "marker": "v", "linestyle": "none"},
    "kivi": {"color": "tab:brown", "marker": "P", "linestyle": "none"},
    "kv-adaquant k4v2": {"color": "tab:olive", "marker": "X", "linestyle": "none"},
}
COLORS = dict(
    zip(plans.ALLOCATORS, ("tab:red", "tab:orange", "tab:green", "tab:cyan", "tab:blue"), strict=True)
)


def by_provider(rows: list[Row], text: str) -> dict[str, list[Row]]:
    """KL rows of the budgets on one text, by what each plan really costs."""
    found = defaultdict(list)
    for row in rows:
        if row.metric == "kl_nats" and re.fullmatch(rf"smollm2 {text} [\d.]+ bits", row.case):
            found[row.provider].append(row)
    return {name: sorted(group, key=lambda row: row.effective_bits) for name, group in found.items()}


def quality(rows: list[Row], path: Path) -> None:
    """KL against effective bits: all signals as thin lines, one colour per allocator."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for axis, text in zip(axes, TEXTS, strict=True):
        found = by_provider(rows, text)
        seen = set()
        for provider, group in found.items():
            name, _, allocator = provider.rpartition(" ")
            bits, kl = [row.effective_bits for row in group], [row.value for row in group]
            if provider in NAMED:
                axis.plot(bits, kl, label=provider, **NAMED[provider])
            elif name == "random":
                axis.plot(bits, kl, ".", color="0.6", label=None if "random" in seen else "random (5 seeds)")
                seen.add("random")
            elif allocator in COLORS:
                label = None if allocator in seen else f"{allocator}, any signal"
                axis.plot(bits, kl, color=COLORS[allocator], alpha=0.5, linewidth=0.8, label=label)
                seen.add(allocator)
        axis.set(title=text, xlabel="effective bits per element", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("KL, nats per token")
    axes[1].legend(fontsize="small")
    figure.suptitle("SmolLM2-135M, packed cache: quality against bits")
    figure.savefig(path, metadata={"Date": None})


FAMILIES = {
    "uniform": {"color": "black", "marker": "s"},
    "planner untiered": {"color": "tab:orange", "marker": "o"},
    "kvmix default": {"color": "tab:red", "marker": "o"},
    "kvmix tiers": {"color": "tab:blue", "marker": "D"},
    "kvmix tiers, order from the prompt": {"color": "tab:cyan", "marker": "D"},
    "kvmix tiers, shuffled": {"color": "0.6", "marker": "x"},
    "kvmix tiers, without tiers": {"color": "tab:brown", "marker": "v"},
}
"""Of the providers of `benchmarks.planner.tiers`, by what their names start with; others by their names."""


def family(provider: str) -> str:
    """Providers that differ in bits alone are one line."""
    for word, name in (
        ("prompt", "order from the prompt"),
        ("shuffled", "shuffled"),
        ("without", "without tiers"),
    ):
        if provider.startswith("kvmix tiers") and word in provider:
            return f"kvmix tiers, {name}"
    return next((name for name in FAMILIES if provider.startswith(name)), provider)


def tiers(rows: list[Row], path: Path) -> None:
    """KL against bits with precision inside a layer; filled marks on the planner's chunks, open held out."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5.5), sharey=True, layout="constrained")
    for axis, text in zip(axes, TEXTS, strict=True):
        for part, style in (("", {}), (" held out", {"fillstyle": "none", "linestyle": ":"})):
            found = defaultdict(list)
            for row in rows:
                if row.metric == "kl_nats" and row.case == f"smollm2 {text} tiers{part}":
                    found[family(row.provider)].append(row)
            for name, group in found.items():
                group.sort(key=lambda row: row.effective_bits)
                look = {"linestyle": "-", "linewidth": 0.8} | FAMILIES.get(name, {"marker": "*"}) | style
                axis.plot(
                    [row.effective_bits for row in group],
                    [row.value for row in group],
                    label=None if part else name,
                    **look,
                )
        axis.set(title=text, xlabel="effective bits per element", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("KL, nats per token")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=4)
    figure.suptitle("SmolLM2-135M, packed cache: precision inside a layer (open marks: held-out text)")
    figure.savefig(path, metadata={"Date": None})


def scores(profile: Profile, path: Path) -> None:
    """Every signal by layer, as a share of its largest."""
    figure, axes = pyplot.subplots(2, 1, figsize=(10, 7), sharex=True, layout="constrained")
    for name in profile.signals:
        signal = profile.signal(name)
        for axis, role in zip(axes, ("keys", "values"), strict=True):
            rows = getattr(signal, role)
            # of prices, those of the first format: the fewest bits
            numbers = [number**2 if isinstance(signal, Scores) else number[0] for number in rows]
            axis.plot([number / max(numbers) for number in numbers], label=name, linewidth=1)
    for axis, role in zip(axes, ("keys", "values"), strict=True):
        axis.set(title=role, yscale="log", ylabel="share of the largest")
        axis.grid(alpha=0.3)
    axes[1].set_xlabel("layer")
    axes[0].legend(fontsize="x-small", ncols=2)
    figure.suptitle("SmolLM2-135M: what each signal says of each layer (norms squared; prices at 2 bits)")
    figure.savefig(path, metadata={"Date": None})


def bits_per_layer(solved: dict[float, KVPlan], path: Path) -> None:
    """Effective bits of each layer's keys and values under the default, by budget."""
    figure, axes = pyplot.subplots(
        len(solved), 1, figsize=(10, 9), sharex=True, sharey=True, layout="constrained"
    )
    for axis, (bits, plan) in zip(axes, solved.items(), strict=True):
        for role, shift, color in (("key", -0.2, "tab:red"), ("value", 0.2, "tab:blue")):
            specs = [getattr(layer, role) for layer in plan.layers]
            sizes = [plan.geometry.head_dim if s.group_size == "head" else s.group_size for s in specs]
            heights = [s.bits + 32 / size for s, size in zip(specs, sizes, strict=True)]
            places = [layer + shift for layer in range(len(specs))]
            axis.bar(places, heights, 0.4, color=color, label=f"{role}s")
        axis.set_ylabel(f"{bits} bits")
        axis.grid(alpha=0.3, axis="y")
    axes[0].legend(fontsize="small", ncols=2)
    axes[-1].set_xlabel("layer")
    figure.suptitle("SmolLM2-135M: effective bits per layer, " + " ".join(plans.DEFAULT))
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Draw all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "figures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    pyplot.rcParams["svg.hashsalt"] = "kvmix"  # the same file from the same rows
    profile = Profile.load(RESULTS / "planner" / "profile.safetensors")
    quality(load("quality"), out / "planner-quality.svg")
    tiers(load("quality"), out / "planner-tiers.svg")
    scores(profile, out / "planner-scores.svg")
    signal, allocator = plans.DEFAULT
    solved = {
        bits: plans.of_signal(profile.signal(signal), allocator, bits, profile.geometry)
        for bits in plans.BUDGETS
    }
    bits_per_layer(solved, out / "planner-bits.svg")


if __name__ == "__main__":
    main()
