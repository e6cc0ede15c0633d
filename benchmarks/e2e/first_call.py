"""What the first prompt and the first decode steps of a process take, in pieces and whole; needs no GPU.

    python -m benchmarks.e2e.first_call --layers 32

Each case is two processes, one after the other: the first with empty caches of compiled code, the second
with what the first one left. Inductor compiles decode steps, as on a GPU. The model is a Llama with random
weights, and narrow: what is measured is compiling. `step` is the median of later steps, on the CPU in plain
launches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from unittest import mock

import torch

import kvmix_fx
from benchmarks.rows import Row, make_row, save
from kvmix_fx import backend
from kvmix_fx.testing.models import tiny_llama

PROMPT, STEPS = 256, 64
PROVIDERS: dict[str, dict[str, bool]] = {
    "kvmix, pieces": {"pieces": True},
    "kvmix, whole": {"pieces": False},
    "kvmix, pieces, prompt traced": {"pieces": True, "trace_prompts": True},
}


def measure(layers: int, provider: str) -> dict[str, float]:
    """Seconds of this process."""
    model = tiny_llama(num_hidden_layers=layers)
    plan = kvmix_fx.KVPlan.preset("tiers", model)
    ids = torch.randint(0, 100, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    times = [time.perf_counter()]

    class Clock:
        """A streamer that looks at the clock."""

        def put(self, _: torch.Tensor) -> None:
            """Note the time."""
            times.append(time.perf_counter())

        def end(self) -> None:
            """Nothing is left to do."""

    with mock.patch.object(backend, "_on_accelerator", return_value=True), torch.no_grad():
        kvmix_fx.compile(model, plan, options=PROVIDERS[provider])
        model.generate(
            ids, max_new_tokens=STEPS, do_sample=False, cache_implementation="static", streamer=Clock()
        )
    # the prompt comes first, then each token
    spans = [b - a for a, b in itertools.pairwise(times[1:])]
    return {"prefill": spans[0], "decode": max(spans[1:]), "step": statistics.median(spans[8:])}


def rows(layers: int, provider: str, command: str) -> list[Row]:
    """Of two processes, the second of which finds compiled code."""
    found = []
    case = f"llama {layers} layers, p{PROMPT}"
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "again"):
            environment = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
            arguments = [sys.executable, "-m", __spec__.name, "--alone", str(layers), provider]
            done = subprocess.run(
                arguments, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True
            )
            seconds = json.loads(done.stdout.splitlines()[-1])
            print(f"{case} {provider}, {name} process: {seconds}", flush=True)
            for metric, value in seconds.items():
                found.append(
                    make_row("first_call", case, provider, f"{metric}_{name}", value, "s", command=command)
                )
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        layers, provider = options.alone
        print(json.dumps(measure(int(layers), provider)))
        return
    command = f"python -m benchmarks.e2e.first_call --layers {options.layers}"
    for provider in PROVIDERS:
        save(rows(options.layers, provider, command))


if __name__ == "__main__":
    main()
