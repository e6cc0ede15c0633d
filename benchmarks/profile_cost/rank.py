"""How well every signal ranks what quantization costs: Spearman correlation with measured KL, SmolLM2.

Signals are measured on the calibration text that comes with the package. What they are compared with is
the KL divergence of one tensor of one layer at 2 bits (groups of 32), on other text: prose and code of the
evaluation parts. Keys, values, and both together: there a score stands for the price that an allocator makes
of it (`Prices.from_scores`), without which keys and values cannot be compared.

    python -m benchmarks.profile_cost.rank
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import kvmix_fx
from benchmarks.rows import make_row, save
from kvmix_fx.plan import ModelGeometry, QuantSpec
from kvmix_fx.plan.prices import Menu, Prices, Scores
from kvmix_fx.profiling import Profile
from kvmix_fx.profiling.signals import SIGNALS
from kvmix_fx.testing import texts
from kvmix_fx.testing.smollm2 import load_smollm2

CASE = "smollm2 signal rank correlation"
COMMAND = "python -m benchmarks.profile_cost.rank"
JUDGE = Menu((QuantSpec(2, "channel", 32),), (QuantSpec(2, "token", 32),))


def ranks(numbers: Sequence[float]) -> torch.Tensor:
    """Ranks from 0, equal numbers sharing the mean of theirs."""
    x = torch.tensor(numbers, dtype=torch.float64)
    below = (x[:, None] > x[None]).sum(1)
    equal = (x[:, None] == x[None]).sum(1)
    return below + (equal - 1) / 2


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation."""
    return float(torch.corrcoef(torch.stack((ranks(a), ranks(b))))[0, 1])


def column(prices: Prices, role: str) -> list[float]:
    """Prices of the format that is judged, by layer."""
    specs, wanted = getattr(prices.menu, role), getattr(JUDGE, role)[0]
    place = specs.index(wanted)
    return [row[place] for row in getattr(prices, role)]


def as_prices(found: Scores | Prices, geometry: ModelGeometry) -> Prices:
    """Scores by way of the allocators' own conversion."""
    if isinstance(found, Prices):
        return found
    return Prices.from_scores(found, JUDGE, geometry.head_dim)


def main() -> None:
    """Measure, write rows, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=512, help="tokens of each evaluation prompt")
    parser.add_argument("--judge", type=Path, help="profile file with the measured KL; written if missing")
    parser.add_argument("--signals", type=Path, help="profile file with the signals; written if missing")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model, tokenizer = load_smollm2()
    if options.judge is not None and options.judge.exists():
        judge = Profile.load(options.judge)
    else:
        ids = torch.cat(
            [
                texts.chunks(tokenizer, text, options.length, count, skip=3)
                for text, count in ((texts.prose(), 2), (texts.code(), 1))
            ]
        )
        judge = kvmix_fx.profile(model, ids, signals="kl", menu=JUDGE)
        if options.judge is not None:
            judge.save(options.judge)
    if options.signals is not None and options.signals.exists():
        measured = Profile.load(options.signals)
    else:
        measured = kvmix_fx.profile(model, tokenizer=tokenizer, signals=list(SIGNALS))
        if options.signals is not None:
            measured.save(options.signals)

    truth = {role: column(judge.prices["kl"], role) for role in ("keys", "values")}
    whole = [*truth["keys"], *truth["values"]]
    print(f"{'signal':28}{'keys':>8}{'values':>8}{'both':>8}{'predicted / measured':>24}")
    for name in measured.signals:
        found = measured.signal(name)
        prices = as_prices(found, measured.geometry)
        mine = {role: column(prices, role) for role in ("keys", "values")}
        both = [*mine["keys"], *mine["values"]]
        figures = {
            "spearman_keys": spearman(mine["keys"], truth["keys"]),
            "spearman_values": spearman(mine["values"], truth["values"]),
            "spearman_both": spearman(both, whole),
        }
        in_nats = isinstance(found, Prices) and name != "gradient_error"
        ratio = sum(both) / sum(whole) if in_nats else None
        print(
            f"{name:28}" + "".join(f"{v:8.2f}" for v in figures.values()),
            f"{ratio:23.2f}" if ratio else "",
        )
        if name not in SIGNALS:
            continue
        units = dict.fromkeys(figures, "rho")
        if ratio:
            figures["predicted_over_measured"], units["predicted_over_measured"] = ratio, "x"
        # the command without files that spare repeating a part
        save(
            make_row("quality", CASE, name, metric, value, units[metric], command=COMMAND)
            for metric, value in figures.items()
        )


if __name__ == "__main__":
    main()
