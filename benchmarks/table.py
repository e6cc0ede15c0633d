"""Print Markdown tables of committed rows; `--write` renews those in the documents.

python -m benchmarks.table quality
python -m benchmarks.table --write
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import campaigns as rounds
from benchmarks import support
from benchmarks.coverage import tables as sweep
from benchmarks.rows import Row, load
from kvmix_fx.plan import KVPlan, shipped_plans

HERE = Path(__file__).resolve().parent
QUALITY = ("kl", "perplexity", "perplexity change", "top-1 agreement")
"""Metrics of the token-by-token runs; those of the planner have names of their own."""

LEADING = ("kvmix default", "best uniform", "mean of 5 random", "kvmix paper rule", "kivi")
"""Named first in the planner's table."""

SIZES = ("longest_context", "largest_batch")
"""Metrics of `benchmarks.e2e.capacity`."""

DOCUMENTS = (*sorted((HERE.parent / "docs").rglob("*.md")), HERE.parent / "README.md")
"""Where tables may stand."""


def markdown(head: Iterable[str], body: Iterable[Iterable[str]], align: str = "---:") -> str:
    """A table; all columns but the first aligned right, unless told."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + [align] * (len(head) - 1)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in body)])


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, dict[str, Row]]]:
    """(case, machine) -> provider -> metric -> row, in the order of the files."""
    found: dict[tuple[str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        found.setdefault((row.case, row.machine), {}).setdefault(row.provider, {})[row.metric] = row
    return found


def number(value: float | None, form: str) -> str:
    """Formatted, or a dash."""
    return "-" if value is None else format(value, form)


def quality() -> str:
    """Perplexity, KL and agreement per plan; p20 and p80 over the chunks for KL."""
    parts = []
    rows = (row for row in load("quality") if row.metric in QUALITY)
    for (case, machine), providers in grouped(rows).items():
        if " one layer " in case:
            parts.append(f"{case}, {machine}\n\n{_layers(providers)}")
            continue
        body = []
        for provider, by in _by_kl(providers):
            kl = by["kl"]
            body.append(
                [
                    provider,
                    number(kl.effective_bits, ".2f"),
                    number(by["perplexity"].value, ".3f"),
                    number(by["perplexity change"].value, "+.2f"),
                    number(kl.value, ".5f"),
                    f"{kl.p20:.5f} to {kl.p80:.5f}" if kl.p80 else "-",
                    number(by["top-1 agreement"].value, ".2f"),
                ]
            )
        head = ["provider", "bits", "perplexity", "change %", "KL, nats/token", "p20 to p80", "top-1 %"]
        parts.append(f"{case}, {machine}\n\n{markdown(head, body)}")
    return "\n\n".join(parts)


def _by_kl(providers: dict[str, dict[str, Row]]) -> list[tuple[str, dict[str, Row]]]:
    """Best first; what was simulated comes after what was measured."""

    def rank(entry: tuple[str, dict[str, Row]]) -> tuple[float, str]:
        measured = providers.get(entry[0].replace("simulated", "kvmix"), entry[1])
        return measured["kl"].value, entry[0]

    return sorted(providers.items(), key=rank)


def _layers(providers: dict[str, dict[str, Row]]) -> str:
    found: dict[str, list[tuple[float, str]]] = {}
    for provider, by in providers.items():
        _, _, layer, tensor = provider.split()
        found.setdefault(tensor, []).append((by["kl"].value, layer))
    body = []
    for tensor, costs in found.items():
        costs.sort(reverse=True)
        for label, part in (("most", costs[:6]), ("least", costs[-3:])):
            layers = ", ".join(f"{layer} ({1000 * kl:.2f})" for kl, layer in part)
            body.append([f"{tensor}s that cost {label}", layers])
    return markdown(["one tensor at 2 bits", "layer (KL in thousandths of a nat)"], body)


def planner() -> str:
    """KL by budget: the default, the controls, then every signal and allocator."""
    rows = [row for row in load("quality") if row.metric == "kl_nats"]
    parts = []
    for text in ("prose", "code"):
        found: dict[str, dict[float, float]] = {}
        for row in rows:
            match = re.fullmatch(rf"smollm2 {text} ([\d.]+) bits", row.case)
            if match is not None:
                found.setdefault(row.provider, {})[float(match[1])] = row.value
        random = [found.pop(provider) for provider in list(found) if provider.startswith("random ")]
        if random:
            found["mean of 5 random"] = {
                bits: sum(by[bits] for by in random) / len(random)
                for bits in set.intersection(*(set(by) for by in random))
            }
        budgets = sorted({bits for by in found.values() for bits in by})
        best = found.get("best uniform", {})
        body = []
        for provider, by in sorted(found.items(), key=lambda entry: (entry[0] not in LEADING, entry[0])):
            cells = (
                f"{by[bits]:.4f} ({by[bits] / best[bits]:.2f})" if bits in by and bits in best else "-"
                for bits in budgets
            )
            body.append([provider, *cells])
        head = ["provider", *(f"{bits} bits" for bits in budgets)]
        parts.append(f"{text}: KL in nats/token (over the best uniform)\n\n{markdown(head, body)}")
    return "\n\n".join(parts)


def tiers() -> str:
    """KL of `benchmarks.planner.tiers`, mean and worst chunk, on the planner's chunks and on others."""
    cases = [f"smollm2 {text} tiers{part}" for part in ("", " held out") for text in ("prose", "code")]
    found: dict[str, dict[tuple[str, str], Row]] = {}
    for row in load("quality"):
        if row.case in cases:
            found.setdefault(row.provider, {})[row.case, row.metric] = row
    body = []
    for provider, by in sorted(found.items(), key=lambda entry: _bits_of(entry[1])):
        cells = []
        for case in cases:
            mean, worst = (by.get((case, f"kl_nats{kind}")) for kind in ("", " worst chunk"))
            cells.append(f"{mean.value:.4f} ({worst.value:.3f})" if mean and worst else "-")
        body.append([provider, f"{_bits_of(by):.3f}", *cells])
    head = ["provider", "bits", "prose", "code", "held out, prose", "held out, code"]
    return f"KL in nats/token: mean (worst chunk)\n\n{markdown(head, body)}"


def _bits_of(by: dict[tuple[str, str], Row]) -> float:
    return max(row.effective_bits or 0.0 for row in by.values())


def shipped() -> str:
    """The plans that come with the package, as their files say; the preset beside them from rows."""
    body = []
    for name in shipped_plans():
        plan = KVPlan.from_pretrained(name)
        judged = plan.provenance["evaluation"]
        costs = [(one["kl_mean"]["value"], one["kl_mean"]["standard_error"]) for one in judged]
        body.append(
            [
                f"`{name}`",
                f"{plan.bits_per_element():.2f}",
                *(f"{value:.4f} ± {error:.4f}" for value, error in costs),
                *(f"{100 * one['same_top']['value']:.1f}" for one in judged),
            ]
        )
    metrics = ("kl mean", "same top token")
    preset = [row for row in load("quality") if row.provider == "preset tiers" and row.metric in metrics]
    if preset:
        costs, shares = ([row.value for row in preset if row.metric == metric] for metric in metrics)
        cells = (*(f"{value:.4f}" for value in costs), *(f"{value:.1f}" for value in shares))
        body.append(["preset `tiers`, not calibrated", number(preset[0].effective_bits, ".2f"), *cells])
    head = ["plan", "bits", "KL, prose", "KL, code", "same top %, prose", "code"]
    return markdown(head, body)


def memory() -> str:
    """Cache bytes and process peaks."""
    parts = []
    for (case, machine), providers in grouped(load("memory")).items():
        metrics = list(next(iter(providers.values())))
        head = ["provider", "bits", *(f"{metric}, MiB" for metric in metrics), "less than the baseline by"]
        body = []
        for provider, by in providers.items():
            first = by[metrics[0]]
            body.append(
                [
                    provider,
                    number(first.effective_bits, ".2f"),
                    *(f"{by[metric].value / 2**20:.1f}" for metric in metrics),
                    "-" if first.ratio is None else f"{first.ratio:.2f}x",
                ]
            )
        parts.append(f"{case}, {machine}\n\n{markdown(head, body)}")
    return "\n\n".join(parts)


def cpu() -> str:
    """Decode speed on CPUs, and the ops that take most of a step."""
    return _speeds([row for row in load("generate") if row.machine.startswith("cpu-")])


def decode() -> str:
    """Decode speed on GPUs, of every method and run."""
    return _speeds([row for row in load("generate") if not row.machine.startswith("cpu-")])


def _speeds(found: list[Row]) -> str:
    sizes = {row.case for row in found if row.metric in SIZES}
    rows = [row for row in found if row.unit == "token/s" and row.case not in sizes]
    body = [
        [
            f"{row.case}, {row.machine}",
            row.provider,
            number(row.value, ".2f"),
            f"{number(row.p20, '.2f')} to {number(row.p80, '.2f')}",
            "-" if row.ratio is None else f"{row.ratio:.2f}x",
        ]
        for row in rows
    ]
    parts = [markdown(["case", "provider", "token/s", "p20 to p80", "against the baseline"], body)]
    for (case, machine), providers in grouped(row for row in found if row.unit == "%").items():
        for provider, by in providers.items():
            ops = [
                [metric.removeprefix("time in ").replace(", ", " | ", 1), f"{row.value:.1f}"]
                for metric, row in by.items()
            ]
            table = markdown(["op", "counted", "% of a step"], ops)
            parts.append(f"{provider}, {case}, {machine}\n\n{table}")
    return "\n\n".join(parts)


def gpu() -> str:
    """generate() at true shape: decode, prefill, first call, memory."""
    body = []
    for (case, machine), providers in grouped(load("generate")).items():
        for provider, by in providers.items():
            if "peak_bytes" not in by or any(metric in by for metric in SIZES):
                continue
            speed, bits = by["tokens_per_second"], by["peak_bytes"].effective_bits
            sizes = (by[name].value / 2**20 if name in by else None for name in ("cache_bytes", "peak_bytes"))
            seconds = (
                by[name].value if name in by else None for name in ("prefill", "prefill_again", "first_call")
            )
            body.append(
                [
                    f"{case}, {machine}",
                    provider,
                    number(bits, ".2f"),
                    number(speed.value, ".1f"),
                    "-" if speed.ratio is None else f"{speed.ratio:.2f}x",
                    *(number(value, ".3g") for value in seconds),
                    *(number(value, ",.0f") for value in sizes),
                ]
            )
    head = [
        "case",
        "provider",
        "bits",
        "token/s",
        "ratio",
        "prefill, s",
        "again, s",
        "first call, s",
        "cache, MiB",
        "peak, MiB",
    ]
    return markdown(head, body)


GLANCE = (
    ("decode, batch 16, 8k tokens", "b16 n8192 +40", "tokens_per_second", "tokens/s"),
    ("decode, batch 1, 4k tokens", "b1 n4096 +40", "tokens_per_second", "tokens/s"),
    ("decode, Llama-2-7B, batch 16, 2k", "llama-2-7b b16 n2048 +40", "tokens_per_second", "tokens/s"),
    ("cache, batch 16, 8k tokens", "b16 n8192 +40", "cache_bytes", "GiB"),
    ("longest context in 80 GB", "b1 longest in 80 GB", "longest_context", "tokens"),
    ("most sequences of 8k tokens in 80 GB", "n8192 largest batch in 80 GB", "largest_batch", ""),
)
"""What `glance` shows: words, case (of Llama-3.1-8B's shape unless named), metric, unit."""


def glance() -> str:
    """The leading figures of one kind of machine, against the better of transformers' own caches."""
    body = []
    for words, case, metric, unit in GLANCE:
        case = case if case.startswith("llama") else f"llama-3.1-8b {case}"
        rows = {
            row.provider: row
            for row in load("generate", "h100-80gb")
            if (row.case, row.metric) == (case, metric)
        }
        ours = rows.pop("kvmix k2.2v2.4 g128 w32")
        best = (min if metric == "cache_bytes" else max)(rows.values(), key=lambda row: row.value)
        commits = ", ".join(dict.fromkeys(row.commit for row in (ours, best)))
        cells = (
            f"{row.value / 2**30:.1f} GiB" if unit == "GiB" else f"{row.value:,.0f} {unit}".strip()
            for row in (ours, best)
        )
        kind = best.provider.removeprefix("transformers ")
        body.append([words, next(cells), f"{next(cells)} ({kind})", commits])
    return markdown(["", "kvmix", "best of transformers' caches", "commits"], body)


def capacity() -> str:
    """The largest sizes that fit, and decode speed at them."""
    body = []
    for (case, machine), providers in grouped(load("generate")).items():
        for provider, by in providers.items():
            for size in (by[metric] for metric in SIZES if metric in by):
                speed = by.get("tokens_per_second")
                body.append(
                    [
                        f"{case}, {machine}",
                        provider,
                        number(size.effective_bits, ".2f"),
                        f"{size.value:,.0f} {size.unit}",
                        "-" if size.ratio is None else f"{size.ratio:.2f}x",
                        number(speed and speed.value, ".1f"),
                        *(f"{count / 2**30:.1f}" for count in (size.bytes or 0, by["peak_bytes"].value)),
                    ]
                )
    head = ["case", "provider", "bits", "largest", "ratio", "token/s", "cache, GiB", "peak, GiB"]
    return markdown(head, body)


def attention() -> str:
    """One decode step of attention on a GPU against the fastest 16-bit attention."""
    parts = []
    for (case, machine), providers in grouped(load("decode_attention")).items():
        body = [
            [
                provider,
                number(by["time"].effective_bits, ".2f"),
                number(by["time"].value, ".1f"),
                "-" if by["time"].ratio is None else f"{by['time'].ratio:.2f}x",
                f"{by['copy_share'].value:.0%}",
            ]
            for provider, by in providers.items()
        ]
        head = ["provider", "bits", "us", "against the fastest at 16 bits", "of a device copy's bandwidth"]
        parts.append(f"{case}, {machine}\n\n{markdown(head, body)}")
    return "\n\n".join(parts)


def storage() -> str:
    """Writing a cache on a GPU: append to it, and pack a prompt."""
    body = []
    for (case, machine), providers in grouped(load("append")).items():
        for provider in dict.fromkeys(name.rsplit(" ", 1)[0] for name in providers if name.endswith(" mean")):
            plain, flush, mean = (providers[f"{provider} {kind}"] for kind in ("no flush", "flush", "mean"))
            times = (number(by["time"].value, ".1f") for by in (plain, flush, mean))
            share = mean["step_share"].value
            body.append([f"{case}, {machine}", provider, *times, f"{share:.1%}"])
    head = ["case", "provider", "us", "us with a flush", "us on average", "of append + attention"]
    parts = [markdown(head, body)]
    body = [
        [f"{case}, {machine}", provider, number(by["time"].value, ".1f"), f"{by['copy_share'].value:.0%}"]
        for suite in ("pack", "append")
        for (case, machine), providers in grouped(load(suite)).items()
        for provider, by in providers.items()
        if "copy_share" in by
    ]
    parts.append(markdown(["case", "provider", "us", "of a device copy's bandwidth"], body))
    return "\n\n".join(parts)


def retrieval() -> str:
    """The share of pass keys found again, by tokens of the text."""
    rows = [row for row in load("quality") if row.metric == "found"]
    # the cases of `benchmarks.tokens` have texts and a page section of their own
    rows = [row for row in rows if not row.case.endswith(" tokens")]
    cases = list(dict.fromkeys(row.case for row in rows))
    body = []
    for provider in dict.fromkeys(row.provider for row in rows):
        by = {row.case: row for row in rows if row.provider == provider}
        bits = next(iter(by.values())).effective_bits
        shares = (f"{by[case].value:.1%}" if case in by else "-" for case in cases)
        body.append([provider, number(bits, ".2f"), *shares])
    return markdown(["cache", "bits", *(case.removeprefix("smollm2 ") for case in cases)], body)


def harness() -> str:
    """lm-evaluation-harness on local tasks: the harness's own cache against packed ones."""
    metrics = ("accuracy", "same answer", "log-likelihood, mean difference", "word perplexity")
    by: dict[str, dict[str, Row]] = {}
    for row in load("quality"):
        if " lm-eval " in row.case:
            by.setdefault(row.provider, {})[row.metric] = row
    body = []
    for provider, found in by.items():
        bits = next(iter(found.values())).effective_bits
        forms = (".0f", ".0f", ".2f", ".2f")
        figures = (
            number(found[m].value if m in found else None, form)
            for m, form in zip(metrics, forms, strict=True)
        )
        body.append([provider, number(bits, ".2f"), *figures])
    return markdown(
        ["cache", "bits", "right, %", "same answer, %", "nats apart", "perplexity of a word"], body
    )


def summary() -> str:
    """What a reader wants first: quality against bits, and bytes, of the packed cache on real text."""
    quality_case = "smollm2-135m prose 4x1024 prefill 32 float32"
    memory_case = "smollm2-135m b4 n2048 bfloat16"
    sizes = {provider: by for (case, _), found in grouped(load("memory")).items() if case == memory_case
             for provider, by in found.items()}  # fmt: skip
    body = []
    for (case, _), providers in grouped(load("quality")).items():
        if case != quality_case:
            continue
        for provider, by in _by_kl(providers):
            if not provider.startswith("kvmix "):
                continue
            size = next(iter(sizes.get(f"{provider} growing", {}).values()), None)
            body.append([
                provider.removeprefix("kvmix "), number(by["perplexity change"].value, "+.1f"),
                number(by["kl"].value, ".4f"), number(by["top-1 agreement"].value, ".1f"),
                number(by["kl"].effective_bits, ".2f"), "-" if size is None else f"{size.ratio:.2f}x",
            ])  # fmt: skip
    head = ["plan", "perplexity, %", "KL, nats/token", "top-1 %", "bits at 1k", "smaller at 2k"]
    return markdown(head, body)


def models() -> str:
    """Architectures that are tested."""
    head = ["architecture", "variant", "attn_implementation", "keys and values"]
    return markdown(head, support.models(), "---")


def modes() -> str:
    """Ways of decoding that are tested."""
    return markdown(["mode", "generate() is given", "prompts"], support.ways_of_decoding(), "---")


def also() -> str:
    """What else is tested, and where."""
    return markdown(["works", "shown by"], support.also_works(), "---")


def coverage() -> str:
    """How the models of transformers come out."""
    return markdown(*sweep.summary())


def coverage_models() -> str:
    """What becomes of each of them."""
    return markdown(*sweep.models(), "---")


def coverage_outside() -> str:
    """Those that could not be tried."""
    return markdown(*sweep.outside(), "---")


def campaigns() -> str:
    """Long runs of the property tests, and what failed in them."""
    head = ["campaign", "examples", "hours", "commit", "day", "failed"]
    body = [
        [
            line["campaign"],
            f"{line['examples']:,}",
            f"{line['seconds'] / 3600:.2f}",
            line["commit"],
            line["date"],
            ", ".join(f"`{name.split('::')[-1]}`" for name in line["failed"]) or "-",
        ]
        for line in rounds.read()
    ]
    return markdown(head, body)


def endurance() -> str:
    """Memory of a process over many steps."""
    parts = []
    for (case, machine), providers in grouped(load("endurance")).items():
        metrics = list(next(iter(providers.values())))
        body = [
            [provider, *(f"{by[metric].value:.1f}" for metric in metrics), by[metrics[0]].commit]
            for provider, by in providers.items()
        ]
        head = ["provider", *(f"{metric}, MiB" for metric in metrics), "commit"]
        parts.append(f"{case}, {machine}\n\n{markdown(head, body)}")
    return "\n\n".join(parts)


def serving() -> str:
    """Continuous batching on GPUs: a pool of one size, requests that come all at once."""
    parts = []
    columns = (
        ("new tokens a second", "new token/s", "{:.0f}"),
        ("time to first token, p50", "first token, s", "{:.1f}"),
        ("time to first token, p99", "p99", "{:.1f}"),
        ("time between tokens, p50", "between tokens, ms", "{:.1f}"),
        ("time between tokens, p99", "p99", "{:.0f}"),
    )
    for (case, machine), providers in grouped(load("serving")).items():
        if " requests of " not in case or " minutes of " in case or machine.startswith("cpu"):
            continue
        body = []
        for provider, by in providers.items():
            speed = by["new tokens a second"]
            cells = [form.format(by[metric].value) for metric, _, form in columns]
            body.append([provider, cells[0], number(speed.ratio, ".2f"), *cells[1:], speed.commit])
        head = ["provider", columns[0][1], "ratio", *(name for _, name, _ in columns[1:]), "commit"]
        parts.append(f"{case}, {machine}\n\n{markdown(head, body)}")
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[], str]] = {
    "serving": serving,
    "campaigns": campaigns,
    "endurance": endurance,
    "coverage": coverage,
    "coverage_models": coverage_models,
    "coverage_outside": coverage_outside,
    "models": models,
    "modes": modes,
    "also": also,
    "quality": quality,
    "planner": planner,
    "tiers": tiers,
    "shipped": shipped,
    "retrieval": retrieval,
    "harness": harness,
    "memory": memory,
    "cpu": cpu,
    "decode": decode,
    "gpu": gpu,
    "glance": glance,
    "capacity": capacity,
    "attention": attention,
    "storage": storage,
    "summary": summary,
}


def renew(text: str) -> str:
    """`text` with the tables between `<!-- table NAME -->` and `<!-- end -->` made anew."""

    def replacement(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table (\w+) -->).*?(<!-- end -->)", replacement, text, flags=re.DOTALL)


def main() -> int:
    """Print or write; with --check, the exit status says whether the tables are those of the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="?", choices=TABLES)
    parser.add_argument("--write", action="store_true", help="renew the tables of all documents")
    parser.add_argument("--check", action="store_true", help="exit status 1 if --write would change them")
    options = parser.parse_args()
    if options.write or options.check:
        old = [path.read_text() for path in DOCUMENTS]
        new = [renew(text) for text in old]
        if options.write:
            for path, text in zip(DOCUMENTS, new, strict=True):
                path.write_text(text)
        return int(options.check and new != old)
    print("\n\n".join(TABLES[name]() for name in ([options.suite] if options.suite else TABLES)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
