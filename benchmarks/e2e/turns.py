"""Decode steps of two revisions side by side, a few at a time in turns, so that a busy host slows both alike.

    mkdir /tmp/turns
    (cd OLD && PYTHONPATH=.:kernels python NEW/benchmarks/e2e/turns.py 0 /tmp/turns) &
    python -m benchmarks.e2e.turns 1 /tmp/turns

Both processes compile, wait for each other, and then have 20 steps each, of which the last 15 count. The
second one prints the ratio of its median step to those of the other's turns before and after it, with an
interval of 95 % (bootstrap). Runs one after another differ by 10 % on a shared host; this tells 1 %.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import kvmix_fx
from benchmarks.e2e import generate
from benchmarks.e2e.models import build

STEPS, SKIPPED = 20, 5
PROVIDER = "kvmix k2.2v2.4 g128 w32"


class Turns:
    """A stopping criterion that never stops, and waits for the other process after every `STEPS` tokens."""

    def __init__(self, place: int, folder: Path, count: int) -> None:
        """`place`: 0 begins. `folder`: where both leave their marks. `count`: of turns."""
        self._place, self._folder, self._count = place, folder, count
        self._steps: list[float] = []
        self._tokens = self._turn = 0
        self._last = 0.0
        self.medians: list[float] = []

    def mark(self, name: object) -> None:
        """Tell the other."""
        (self._folder / f"{self._place}.{name}").touch()

    def wait(self, name: object) -> None:
        """Wait for a mark of the other."""
        path = self._folder / f"{1 - self._place}.{name}"
        while not path.exists():
            time.sleep(0.0005)

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """Called once a token."""
        torch.cuda.synchronize()
        now = time.perf_counter()
        if self._tokens % STEPS >= SKIPPED:
            self._steps.append(now - self._last)
        self._tokens += 1
        if self._tokens % STEPS == 0:
            self.medians.append(statistics.median(self._steps))
            self._steps.clear()
            self.mark(self._turn)
            self._turn += 1
            if self._turn < self._count:
                self.wait(self._turn - (self._place == 0))
            now = time.perf_counter()
        self._last = now
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def compared(old: list[float], new: list[float]) -> tuple[float, float, float]:
    """(low, median, high) of the ratio of each new turn to the old ones around it, the first left out."""
    ratios = [new[i] / statistics.mean(old[i : i + 2]) for i in range(1, min(len(old) - 1, len(new)))]
    drawn = random.Random(0)
    found = sorted(statistics.median(drawn.choices(ratios, k=len(ratios))) for _ in range(2000))
    return found[50], statistics.median(ratios), found[1950]


def main() -> None:
    """One of the two processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("place", type=int, choices=(0, 1), help="0: the old revision")
    parser.add_argument("folder", type=Path, help="empty, the same for both")
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=150)
    options = parser.parse_args()
    turns = Turns(options.place, options.folder, options.turns)
    model = build(options.shape)
    kvmix_fx.compile(model, generate.KVMIX[PROVIDER](model))
    ids = torch.randint(1, 30000, (1, options.context), generator=torch.Generator().manual_seed(1)).cuda()
    for new in (8, 60):
        generate.run(model, ids, new, {})
    turns.mark("ready")
    turns.wait("ready")
    if options.place:
        turns.wait(0)
    generation: Any = model.generate
    generation(
        ids, do_sample=False, max_new_tokens=STEPS * options.turns, stopping_criteria=[turns], pad_token_id=0
    )
    (options.folder / f"{options.place}.json").write_text(json.dumps(turns.medians))
    turns.mark("done")
    if options.place:
        turns.wait("done")
        old, new = (json.loads((options.folder / f"{place}.json").read_text()) for place in (0, 1))
        low, ratio, high = compared(old, new)
        print(
            f"step {1e6 * statistics.median(old):.0f} -> {1e6 * statistics.median(new):.0f} us, "
            f"ratio {ratio:.4f} ({low:.4f} .. {high:.4f})"
        )


if __name__ == "__main__":
    main()
