"""Figures of the documents, from committed rows: light and dark, in docs/figures.

python -m benchmarks.figures    # needs matplotlib; the planner's: python -m benchmarks.planner.figures
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.rows import Row, load
from benchmarks.style import FIGURES, Theme, drawn

PACKED = "kvmix k2.2v2.4 g128 w32"
CASE = "b64 h8x4 n8192 d128"


def rows_of(suite: str, case: str, metric: str, machine: str | None = None) -> dict[str, Row]:
    """provider -> row."""
    return {row.provider: row for row in load(suite, machine) if (row.case, row.metric) == (case, metric)}


def quality(theme: Theme) -> Figure:
    """KL divergence against bits: what plans of one size cost a small model."""
    figure, axis = pyplot.subplots(figsize=(6.2, 5.8))
    budgets = ("2.5", "2.8", "3.0", "3.5", "4.0")
    found = [rows_of("quality", f"smollm2 prose {bits} bits", "kl_nats") for bits in budgets]
    tiers = rows_of("quality", "smollm2 prose tiers", "kl_nats")

    def curve(provider: str, rows: Sequence[dict[str, Row]], label: str, **look: Any) -> None:
        points = sorted({(by[provider].effective_bits, by[provider].value) for by in rows if provider in by})
        axis.plot(*zip(*points, strict=True), label=label, **look)

    curve("kivi", found[2:3], "KIVI, 2 bits in groups of 32", color=theme.sky, marker="P", linestyle="none")
    curve("kv-adaquant k4v2", found, "KV-AdaQuant's K4V2", color=theme.purple, marker="X", linestyle="none")
    curve("kvmix paper rule", found[1:], "KVmix's own rule", color=theme.green, marker="v", linestyle="none")
    curve("best uniform", found, "best of all uniform plans", color=theme.plain, marker="s")
    curve("kvmix default", found, "plan from a profile", color=theme.ours, marker="o", linewidth=2)
    curve("uniform K2V2 g32", [tiers], "K2V2 g32 in the run of tiers", color=theme.blue, marker="D",
          linestyle="none", fillstyle="none")  # fmt: skip
    curve("kvmix tiers 2.4", [tiers], "preset tiers, order from a profile", color=theme.blue, marker="D",
          linestyle="none", markersize=9)  # fmt: skip
    curve("kvmix tiers 2.4 prompt", [tiers], "preset tiers, no calibration", color=theme.blue, marker="*",
          linestyle="none", markersize=11, markeredgecolor=theme.text)  # fmt: skip
    axis.set(
        yscale="log",
        xlabel="bits per cached element, with scales and offsets",
        ylabel="KL divergence, nats per token",
        title="Lower is better, further left is smaller (SmolLM2-135M, prose, CPU)",
    )
    axis.set_yticks([0.01, 0.03, 0.1, 0.3], ["0.01", "0.03", "0.1", "0.3"])
    axis.minorticks_off()
    axis.grid()
    figure.legend(fontsize=9, loc="outside lower center", ncols=2)
    return figure


def bars(
    axis: Any, theme: Theme, values: Iterable[tuple[str, float, str]], title: str, ours: str = "kvmix"
) -> None:
    """Horizontal bars of (label, value, written value), the first on top."""
    values = list(values)
    labels = [label for label, _, _ in values]
    sizes = [value for _, value, _ in values]
    shades = [theme.ours if label.startswith(ours) else theme.plain for label in labels]
    axis.barh(range(len(values)), sizes, 0.62, color=shades)
    for place, (_, value, written) in enumerate(values):
        axis.text(value + max(sizes) * 0.015, place, written, va="center")
    axis.set_yticks(range(len(values)), labels)
    axis.set_xlim(0, max(sizes) * 1.28)
    axis.invert_yaxis()
    axis.set_title(title)
    axis.xaxis.set_visible(False)
    axis.spines[["bottom", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def speed(theme: Theme) -> Figure:
    """Decode speed, cache size and what fits, on one GPU."""
    names = {
        "transformers dynamic": "dynamic cache",
        "transformers static": "static, compiled",
        PACKED: "kvmix, 2.3 bits",
    }

    def read(case: str, metric: str) -> dict[str, Row]:
        return rows_of("generate", f"llama-3.1-8b {case}", metric, "h100-80gb")

    def entries(rows: dict[str, Row], form: str, scale: float = 1) -> list[tuple[str, float, str]]:
        return [
            (label, rows[name].value / scale, form.format(rows[name].value / scale))
            for name, label in names.items()
            if name in rows
        ]

    figure, axes = pyplot.subplots(4, 1, figsize=(6.2, 6.6))
    bars(axes[0], theme, entries(read("b16 n8192 +40", "tokens_per_second"), "{:,.0f} tokens/s"),
         "Decode, 16 sequences of 8k tokens")  # fmt: skip
    bars(axes[1], theme, entries(read("b16 n8192 +40", "cache_bytes"), "{:.1f} GiB", 2**30),
         "Cache of these 16 sequences, allocated")  # fmt: skip
    bars(axes[2], theme, entries(read("b1 longest in 80 GB", "longest_context"), "{:.2f} M tokens", 1e6),
         "Longest context in 80 GB")  # fmt: skip
    bars(axes[3], theme, entries(read("n8192 largest batch in 80 GB", "largest_batch"), "{:,.0f}"),
         "Most sequences of 8k tokens in 80 GB")  # fmt: skip
    figure.suptitle("One H100 80GB, Llama-3.1-8B's shape, bfloat16, torch 2.11", fontsize=11, x=0.5)
    figure.get_layout_engine().set(hspace=0.08, h_pad=0.08)
    return figure


def attention(theme: Theme) -> Figure:
    """Attention of one decode step, as times faster than the fastest at 16 bits."""
    figure, axis = pyplot.subplots(figsize=(6.2, 4.4))
    for group, color, marker in ((128, theme.ours, "o"), (64, theme.blue, "s"), (32, theme.green, "^")):
        found = rows_of("decode_attention", CASE, "time", "h100-80gb")
        points = sorted(
            (row.effective_bits, row.ratio)
            for bits in (2, 3, 4)
            for provider, row in found.items()
            if provider == f"kvmix k{bits}v{bits} g{group}"
        )
        label = f"groups of {group}, H100"
        axis.plot(*zip(*points, strict=True), color=color, marker=marker, label=label)
        for (bits, ratio), width in zip(points, (2, 3, 4), strict=True):
            axis.annotate(f"K{width}V{width}", (bits, ratio), (4, 5), textcoords="offset points", fontsize=9)
    found = rows_of("decode_attention", CASE, "time", "nvidia-h200")
    tiers = sorted((row.effective_bits, row.ratio, name.removeprefix("kvmix tiers "))
                   for name, row in found.items() if name.startswith("kvmix tiers "))  # fmt: skip
    axis.plot([bits for bits, _, _ in tiers], [ratio for _, ratio, _ in tiers], "D", color=theme.purple,
              label="tiers of channels, H200")  # fmt: skip
    for number, (bits, ratio, name) in enumerate(tiers):
        # neighbours on different sides, so that they do not touch
        axis.annotate(name, (bits, ratio), (0, 8 if number % 2 else -14), textcoords="offset points",
                      fontsize=9, ha="center")  # fmt: skip
    axis.axhline(1, color=theme.plain, linewidth=1, linestyle="--")
    axis.set(
        ylim=(0, None),
        xlabel="bits per cached element, with scales and offsets",
        ylabel="times faster than 16 bits",
        title="64 sequences of 8k tokens, 8 KV heads, 32 query heads, size 128",
    )
    axis.grid()
    axis.legend(fontsize=9)
    return figure


def cpu(theme: Theme) -> Figure:
    """generate() on two CPU cores, packed and plain."""
    figure, axes = pyplot.subplots(1, 2, figsize=(6.2, 3.7))
    lengths = (1024, 2048, 4096)
    for axis, batch in zip(axes, (1, 8), strict=True):
        for provider, color, label in (
            ("transformers", theme.plain, "plain cache"),
            ("kvmix k4v2 g32 w32", theme.ours, "kvmix K4V2"),
        ):
            rows = [
                rows_of("generate", f"smollm2-135m b{batch} n{n} float32 2 threads", "decode", "cpu-2core")
                for n in lengths
            ]
            values = [by[provider] for by in rows]
            errors = [[row.value - row.p20 for row in values], [row.p80 - row.value for row in values]]
            axis.errorbar(lengths, [row.value for row in values], errors, color=color, marker="o", capsize=3,
                          label=label)  # fmt: skip
        axis.set(
            title=f"{batch} sequence{'s' if batch > 1 else ''}", ylim=(0, None), xlabel="tokens in the cache"
        )
        axis.set_xticks(lengths, ["1k", "2k", "4k"])
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid()
    axes[0].set_ylabel("tokens per second, p20 to p80")
    axes[0].legend(fontsize=9, loc="lower left")
    return figure


def memory(theme: Theme) -> Figure:
    """Bytes of a cache as allocated, by plan."""
    found = rows_of("memory", "smollm2-135m b4 n2048 bfloat16", "cache bytes")
    figure, axis = pyplot.subplots(figsize=(6.2, 3.6))
    shown = {"transformers": "16 bits (transformers)"} | {
        name: name.removesuffix(" growing") for name in found if name.endswith(" growing")
    }
    entries = [
        (label, found[name].value / 2**20, f"{found[name].value / 2**20:.1f} MiB")
        for name, label in shown.items()
    ]
    bars(
        axis, theme, sorted(entries, key=lambda entry: -entry[1]), "4 sequences of 2048 tokens, SmolLM2-135M"
    )
    return figure


DRAWN: dict[str, Callable[[Theme], Figure]] = {
    "quality": quality,
    "speed": speed,
    "attention": attention,
    "cpu": cpu,
    "memory": memory,
}


def main() -> None:
    """Draw all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FIGURES)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWN.items():
        drawn(name, draw, out)


if __name__ == "__main__":
    main()
