"""SmolLM2 through lm-evaluation-harness: its own `hf` at 16 bits against packed caches, on local tasks.

Two tasks over a text that every Python brings along, of the part that no plan was made from. `goes_on`: which
of four pieces of 24 tokens goes on after 384 tokens; the wrong ones are from other places. `rolls`: what
pieces of 640 tokens take, in perplexity of a word. Each provider is one call of the harness's own command
line. Documents are few, so read the share of answers that are those of 16 bits before the accuracy.

    python -m benchmarks.quality.harness        # after `make lm-eval`; 20 minutes of a busy core
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, make_row, save
from kvmix_fx.plan import KVPlan
from kvmix_fx.testing import texts
from kvmix_fx.testing.smollm2 import load_smollm2

CONTEXT, PIECE, CHOICES, DOCUMENTS = 384, 24, 4, 20
APART = 5
"""Pieces between those that are offered together."""
ROLLED, ROLLED_DOCUMENTS = 640, 3
CASE = "smollm2 lm-eval {}"
BASELINE = "hf, 16 bits"
PROVIDERS = {
    BASELINE: None,
    "kvmix:smollm2-135m/2.5": "plan=kvmix:smollm2-135m/2.5",
    "preset tiers": "preset=tiers",
    "uniform K2V2 g32": "key_bits=2",
}
"""Model arguments; the last is a control, whose answers must differ."""


def write_tasks(folder: Path, tokenizer: Any) -> None:
    """The tasks' files and what they read."""

    def pieces(length: int, count: int) -> list[str]:
        return tokenizer.batch_decode(texts.chunks(tokenizer, texts.prose(), length, count))

    both = pieces(CONTEXT + PIECE, DOCUMENTS)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in both]
    contexts, ends = ([tokenizer.decode(one) for one in cut] for cut in (
        [row[:CONTEXT] for row in ids], [row[CONTEXT:] for row in ids],
    ))  # fmt: skip
    choose = [
        # the right one stands at another place each time
        {
            "text": contexts[n],
            "choices": [ends[(n + APART * (place - n % CHOICES)) % DOCUMENTS] for place in range(CHOICES)],
            "gold": n % CHOICES,
        }
        for n in range(DOCUMENTS)
    ]
    rolled = [{"text": text} for text in pieces(ROLLED, DOCUMENTS)[-ROLLED_DOCUMENTS:]]
    kinds = {
        "goes_on": (
            choose,
            {
                "output_type": "multiple_choice",
                "doc_to_text": "{{text}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{gold}}",
                "target_delimiter": "",
                "metric_list": [{"metric": "acc"}],
            },
        ),
        "rolls": (
            rolled,
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "word_perplexity"}],
            },
        ),
    }
    for name, (documents, task) in kinds.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(one) + "\n" for one in documents))
        files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **task}
        (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML


def run_harness(folder: Path, model: Path, arguments: str | None, threads: int) -> dict[str, Any]:
    """Results of one call of the command line, samples by task included."""
    out = Path(tempfile.mkdtemp(dir=folder))
    given = f"pretrained={model},dtype=float32" + (f",{arguments}" if arguments else "")
    command = [sys.executable, "-m", "kvmix_fx.integrations.lm_eval", "run", "--model"]
    command += ["kvmix" if arguments else "hf", "--model_args", given, "--tasks", "goes_on,rolls"]
    command += ["--include_path", str(folder), "--device", "cpu", "--batch_size", "4"]
    command += ["--output_path", str(out), "--log_samples"]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run(command, env=env, check=True)
    (file,) = out.rglob("results_*.json")
    found: dict[str, Any] = json.loads(file.read_text())
    found["samples"] = {}
    for task in found["results"]:
        (log,) = out.rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        found["samples"][task] = sorted(lines, key=lambda one: one["doc_id"])
    return found


def scores(found: dict[str, Any]) -> list[list[float]]:
    """Log-probabilities of the four choices of every document."""
    return [[float(one[0]) for one in sample["filtered_resps"]] for sample in found["samples"]["goes_on"]]


def rows_of(provider: str, bits: float | None, found: dict[str, Any], plain: dict[str, Any]) -> list[Row]:
    """What is kept of one call."""
    mine, other = scores(found), scores(plain)
    same = [a.index(max(a)) == b.index(max(b)) for a, b in zip(mine, other, strict=True)]
    apart = [abs(a - b) for x, y in zip(mine, other, strict=True) for a, b in zip(x, y, strict=True)]
    results = found["results"]
    figures = {
        ("goes_on", "accuracy", "%"): 100 * results["goes_on"]["acc,none"],
        ("goes_on", "same answer", "%"): 100 * sum(same) / len(same),
        ("goes_on", "log-likelihood, mean difference", "nats"): math.fsum(apart) / len(apart),
        ("rolls", "word perplexity", ""): results["rolls"]["word_perplexity,none"],
    }
    baseline = None if provider == BASELINE else BASELINE
    return [
        make_row(
            "quality",
            CASE.format(task),
            provider,
            metric,
            value,
            unit,
            effective_bits=bits,
            baseline=baseline,
        )
        for (task, metric, unit), value in figures.items()
    ]


def main() -> None:
    """Make the tasks, ask all providers, and write rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    model, tokenizer = load_smollm2()
    bits: dict[str, float | None] = {
        BASELINE: None,
        "preset tiers": KVPlan.preset("tiers", model).bits_per_element(),
        "uniform K2V2 g32": KVPlan.uniform(model, 2).bits_per_element(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder, tokenizer)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        plain: dict[str, Any] = {}
        for provider, arguments in PROVIDERS.items():
            found = run_harness(folder, folder / "model", arguments, given.threads)
            plain = plain or found
            if provider not in bits:
                bits[provider] = KVPlan.from_pretrained(provider).bits_per_element()
            rows = rows_of(provider, bits[provider], found, plain)
            save(rows)
            for row in rows:
                print(f"{provider:26} {row.metric:34} {row.value:.4g} {row.unit}", flush=True)


if __name__ == "__main__":
    main()
