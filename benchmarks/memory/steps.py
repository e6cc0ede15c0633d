"""Does memory stay flat over many decode steps? A tiny model, its cache filled and cut back again.

    python -m benchmarks.memory.steps --steps 100000                    # of the host
    python -m benchmarks.memory.steps --steps 100000 --device cuda      # and of the GPU

Each kind of cache goes from 64 to 512 tokens, is cut back or emptied, and is exchanged for a new one every
20th time. Resident memory is read when the first twentieth of the steps is done, by when everything has been
compiled and allocated, and at the end. Every 100th step checks that its logits are finite and that the cache
holds the tokens it was given.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch

import kvmix_fx
from benchmarks.rows import Row, make_row, save
from kvmix_fx.contracts import cache_argument
from kvmix_fx.integrations.transformers import KVMixCache, KVMixStaticCache
from kvmix_fx.testing.models import tiny_llama

SHORT, LONG = 64, 512
ROUNDS = 20
"""A cache is exchanged for a new one after so many times."""


def resident() -> int:
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmRSS: run this on Linux")


class Steps:
    """Decode steps of one compiled model, with caches of one kind."""

    def __init__(self, kind: str, device: str = "cpu") -> None:
        self.kind = kind
        self.model = tiny_llama(num_hidden_layers=1).to(device)
        plan = kvmix_fx.KVPlan.uniform(self.model, 2, window=8, group_size=16)
        kvmix_fx.compile(self.model, plan, inner="eager")
        self.plan = kvmix_fx.compiled(self.model).plan
        ids = torch.randint(1, 128, (1, LONG), generator=torch.Generator().manual_seed(0))
        self.ids = ids.to(device)
        self.rounds = self.done = 0
        self.start()

    def start(self) -> None:
        """A new cache with the first tokens in it."""
        config = self.model.config
        growing = self.kind == "growing"
        self.cache: Any = (
            KVMixCache(self.plan, config) if growing else KVMixStaticCache(self.plan, config, LONG)
        )
        self.call(self.ids[:, :SHORT])
        self.length = SHORT

    def call(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of a step."""
        with torch.no_grad():
            out = self.model(ids, use_cache=True, **cache_argument(self.model, self.cache))
        return out.logits

    def step(self) -> None:
        """One token; before it, what has to be done to have room."""
        if self.length == LONG:
            self.rounds += 1
            if self.rounds % ROUNDS == 0:
                self.start()
            elif self.rounds % 3 == 0:
                self.cache.reset()
                self.call(self.ids[:, :SHORT])
                self.length = SHORT
            else:
                self.length = SHORT + self.rounds % 7
                self.cache.crop(self.length - LONG)
        logits = self.call(self.ids[:, self.length : self.length + 1])
        self.length += 1
        self.done += 1
        if self.done % 100 == 0:
            held = int(self.cache.get_seq_length())
            if held != self.length or not bool(logits.isfinite().all()):
                raise RuntimeError(f"step {self.done}: the cache holds {held} tokens of {self.length}")


def measure(kind: str, steps: int, device: str) -> list[Row]:
    """Memory after the first twentieth, and after all; of a GPU that of tensors, and all it has given."""
    torch.set_num_threads(1)
    run = Steps(kind, device)
    found, start = [], time.monotonic()
    for part in (steps // 20, steps - steps // 20):
        for _ in range(part):
            run.step()
        gc.collect()
        sizes = {"resident": resident()}
        if device == "cuda":
            torch.cuda.synchronize()
            sizes["allocated on the GPU"] = torch.cuda.memory_allocated()
            sizes["reserved on the GPU"] = torch.cuda.memory_reserved()
        found.append(sizes)
        text = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items())
        print(f"{kind}: {run.done} steps, {time.monotonic() - start:.0f} s, {text}", flush=True)
    case = f"{steps} steps of {SHORT} to {LONG} tokens"
    return [
        make_row("endurance", case, f"kvmix {kind}", f"{name} {when}", size / 2**20, "MiB")
        for when, sizes in zip(("after a twentieth", "at the end"), found, strict=True)
        for name, size in sizes.items()
    ]


def main() -> int:
    """Rows of both kinds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100_000, help="of each kind of cache")
    parser.add_argument("--kind", choices=("growing", "fixed"), action="append")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    for kind in options.kind or ("growing", "fixed"):
        save(measure(kind, options.steps, options.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
