"""Figures of the planner benchmark, from committed rows and the committed profile.

python -m benchmarks.planner.figures    # needs matplotlib; writes docs/figures/planner-*.svg
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path

from matplotlib import pyplot
from matplotlib.figure import Figure

from benchmarks.planner import plans
from benchmarks.rows import RESULTS, Row, load
from benchmarks.style import FIGURES, Theme, colours, drawn
from kvmix_fx.plan import KVPlan
from kvmix_fx.plan.prices import Scores
from kvmix_fx.profiling import Profile

TEXTS = ("prose", "code")
NAMED = {
    "kvmix default": {"color": "ours", "marker": "o", "zorder": 5, "linewidth": 2},
    "best uniform": {"color": "text", "marker": "s", "zorder": 4},
    "kvmix paper rule": {"color": "green", "marker": "v", "linestyle": "none"},
    "kivi": {"color": "sky", "marker": "P", "linestyle": "none"},
    "kv-adaquant k4v2": {"color": "purple", "marker": "X", "linestyle": "none"},
}
"""Looks; colours are those of a `Theme`."""

COLORS = dict(zip(plans.ALLOCATORS, ("ours", "blue", "green", "purple", "sky"), strict=True))


def by_provider(rows: list[Row], text: str) -> dict[str, list[Row]]:
    """KL rows of the budgets on one text, by what each plan really costs."""
    found = defaultdict(list)
    for row in rows:
        if row.metric == "kl_nats" and re.fullmatch(rf"smollm2 {text} [\d.]+ bits", row.case):
            found[row.provider].append(row)
    return {name: sorted(group, key=lambda row: row.effective_bits) for name, group in found.items()}


def quality(theme: Theme, rows: list[Row]) -> Figure:
    """KL against effective bits: all signals as thin lines, one colour per allocator."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 5.6), sharey=True)
    for axis, text in zip(axes, TEXTS, strict=True):
        found = by_provider(rows, text)
        seen = set()
        for provider, group in found.items():
            name, _, allocator = provider.rpartition(" ")
            bits, kl = [row.effective_bits for row in group], [row.value for row in group]
            if provider in NAMED:
                look = NAMED[provider] | {"color": getattr(theme, NAMED[provider]["color"])}
                axis.plot(bits, kl, label=provider, **look)
            elif name == "random":
                label = None if "random" in seen else "random (5 seeds)"
                axis.plot(bits, kl, ".", color=theme.plain, label=label)
                seen.add("random")
            elif allocator in COLORS:
                label = None if allocator in seen else f"{allocator}, any signal"
                color = getattr(theme, COLORS[allocator])
                axis.plot(bits, kl, color=color, alpha=0.5, linewidth=0.8, label=label)
                seen.add(allocator)
        axis.set(title=text, xlabel="effective bits per element", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("KL, nats per token")
    axes[0].set_yticks([0.01, 0.03, 0.1, 0.3], ["0.01", "0.03", "0.1", "0.3"])
    axes[0].minorticks_off()
    figure.legend(*axes[1].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=3)
    figure.suptitle("SmolLM2-135M, packed cache: quality against bits")
    return figure


FAMILIES = {
    "uniform": {"color": "text", "marker": "s"},
    "planner untiered": {"color": "purple", "marker": "o"},
    "kvmix default": {"color": "ours", "marker": "o"},
    "kvmix tiers": {"color": "blue", "marker": "D"},
    "kvmix tiers, order from the prompt": {"color": "sky", "marker": "D"},
    "kvmix tiers, shuffled": {"color": "plain", "marker": "x"},
    "kvmix tiers, without tiers": {"color": "green", "marker": "v"},
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


def tiers(theme: Theme, rows: list[Row]) -> Figure:
    """KL against bits with precision inside a layer; filled marks on the planner's chunks, open held out."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 5.6), sharey=True)
    for axis, text in zip(axes, TEXTS, strict=True):
        for part, style in (("", {}), (" held out", {"fillstyle": "none", "linestyle": ":"})):
            found = defaultdict(list)
            for row in rows:
                if row.metric == "kl_nats" and row.case == f"smollm2 {text} tiers{part}":
                    found[family(row.provider)].append(row)
            for name, group in found.items():
                group.sort(key=lambda row: row.effective_bits)
                look = FAMILIES.get(name, {"color": "text", "marker": "*"})
                look = {"linestyle": "-", "linewidth": 0.8} | look | style
                look["color"] = getattr(theme, look["color"])
                axis.plot(
                    [row.effective_bits for row in group],
                    [row.value for row in group],
                    label=None if part else name,
                    **look,
                )
        axis.set(title=text, xlabel="effective bits per element", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("KL, nats per token")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=3)
    figure.suptitle("SmolLM2-135M, packed cache: precision inside a layer (open marks: held-out text)")
    return figure


def scores(theme: Theme, profile: Profile) -> Figure:
    """Every signal by layer, as a share of its largest."""
    figure, axes = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True)
    shades = list(colours(theme).values())
    looks = [(line, shade) for line in ("-", "--", ":") for shade in shades]
    for name, (line, shade) in zip(profile.signals, looks, strict=False):
        signal = profile.signal(name)
        for axis, role in zip(axes, ("keys", "values"), strict=True):
            rows = getattr(signal, role)
            # of prices, those of the first format: the fewest bits
            numbers = [number**2 if isinstance(signal, Scores) else number[0] for number in rows]
            axis.plot([number / max(numbers) for number in numbers], label=name, linewidth=1.3,
                      color=shade, linestyle=line)  # fmt: skip
    for axis, role in zip(axes, ("keys", "values"), strict=True):
        axis.set(title=role, yscale="log", ylabel="share of the largest")
        axis.grid(alpha=0.3)
    axes[1].set_xlabel("layer")
    axes[0].legend(fontsize="x-small", ncols=2)
    figure.suptitle("SmolLM2-135M: what each signal says of each layer (norms squared; prices at 2 bits)")
    return figure


def bits_per_layer(theme: Theme, solved: dict[float, KVPlan]) -> Figure:
    """Effective bits of each layer's keys and values under the default, by budget."""
    figure, axes = pyplot.subplots(len(solved), 1, figsize=(9, 8), sharex=True, sharey=True)
    for axis, (bits, plan) in zip(axes, solved.items(), strict=True):
        for role, shift, color in (("key", -0.2, theme.ours), ("value", 0.2, theme.blue)):
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
    return figure


def main() -> None:
    """Draw all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FIGURES)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    profile = Profile.load(RESULTS / "planner" / "profile.safetensors")
    signal, allocator = plans.DEFAULT
    solved = {
        bits: plans.of_signal(profile.signal(signal), allocator, bits, profile.geometry)
        for bits in plans.BUDGETS
    }
    rows = load("quality")
    drawn("planner-quality", lambda theme: quality(theme, rows), out)
    drawn("planner-tiers", lambda theme: tiers(theme, rows), out)
    drawn("planner-scores", lambda theme: scores(theme, profile), out)
    drawn("planner-bits", lambda theme: bits_per_layer(theme, solved), out)


if __name__ == "__main__":
    main()
