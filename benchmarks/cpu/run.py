"""Decode speed on a CPU, plain cache against packed ones, and where a packed step spends its time.

All models decode in turns of a few steps, so that a busy moment of the machine hits all. The caches are
filled with noise: what the tokens are does not change the work. To be run while the machine does nothing
else; where that cannot be had, one thread and the CPU time of that thread leave out the time it had to wait
(but not what the others' traffic costs it):

    python -m benchmarks.cpu.run
    python -m benchmarks.cpu.run --threads 1 --clock cpu
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaForCausalLM

import kvmix_fx
from benchmarks.quality.plans import PLANS
from benchmarks.rows import Row, make_row, percentiles, save
from kvmix_fx.integrations.transformers import KVMixCache
from kvmix_fx.plan import KVPlan
from kvmix_fx.testing.smollm2 import random_smollm2

PLAIN = "transformers"
NAMES = ("k2v2 g32 w32", "k3v3 g32 w32", "k4v2 g32 w32", "k4v4 g32 w32")
CASES = ((1, 1024), (1, 2048), (1, 4096), (8, 1024), (8, 2048), (8, 4096))
PROFILED = (8, 2048)
TURN = 3
"""Steps that one model takes before the next one's turn."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


Clock = Callable[[], float]


class Decoder:
    """A model with a filled cache that takes one step at a time."""

    def __init__(self, model: nn.Module, cache: object, token: Tensor, clock: Clock = CLOCKS["wall"]) -> None:
        self.model, self.cache, self.token, self.clock = model, cache, token, clock

    @torch.no_grad()
    def step(self) -> float:
        """Decode one token per row; seconds it took."""
        begun = self.clock()
        result = self.model(input_ids=self.token, past_key_values=self.cache)
        taken = self.clock() - begun
        self.cache, self.token = result.past_key_values, result.logits[:, -1].argmax(-1, True)
        return taken


def filled(
    models: Mapping[str, tuple[LlamaForCausalLM, KVPlan | None]], batch: int, length: int, clock: Clock
) -> dict[str, Decoder]:
    """Every model with `length` cached tokens a row, the same noise in all caches; None is a plain cache."""
    config, dtype = next(iter(models.values()))[0].config, next(iter(models.values()))[0].dtype
    generator = torch.Generator().manual_seed(0)
    caches = {name: KVMixCache(p, m.config) if p else DynamicCache() for name, (m, p) in models.items()}
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        for cache in caches.values():
            cache.update(keys, values, layer)
    token = torch.zeros(batch, 1, dtype=torch.long)
    return {name: Decoder(model, caches[name], token, clock) for name, (model, _) in models.items()}


def in_turns(decoders: Mapping[str, Decoder], steps: int) -> dict[str, list[float]]:
    """Seconds per step of each, taken in alternating turns after two steps that do not count."""
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for decoder in decoders.values():
        decoder.step(), decoder.step()
    for _ in range(0, steps, TURN):
        for name, decoder in decoders.items():
            times[name].extend(decoder.step() for _ in range(TURN))
    return times


def shares(step: Callable[[], object], count: int = 5) -> tuple[float, dict[str, float], dict[str, float]]:
    """Of `count` steps: milliseconds each, shares of kvmix ops with all they call, shares of ops alone."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        begun = time.perf_counter()
        for _ in range(count):
            step()
        total = time.perf_counter() - begun
    ours, alone = Counter[str](), Counter[str]()
    for event in recorded.key_averages():
        if event.key.startswith("kvmix::"):
            ours[event.key] += event.cpu_time_total / 1e6 / total
        alone[event.key] += event.self_cpu_time_total / 1e6 / total
    return (
        1e3 * total / count,
        dict(ours.most_common()),
        {op: share for op, share in alone.most_common() if share > 0.02},
    )


def speed_rows(
    case: str,
    metric: str,
    times: Mapping[str, list[float]],
    batch: int,
    sizes: Mapping[str, dict[str, float]],
) -> list[Row]:
    """A row for the plain cache, and one for each packed cache compared with it."""
    speeds = {name: percentiles([batch / taken for taken in each]) for name, each in times.items()}
    rows = []
    for name, (slow, middle, fast) in speeds.items():
        ratio = middle / speeds[PLAIN][1]
        print(f"{case}, {name}: {middle:.2f} token/s, {ratio:.2f}x", flush=True)
        rest: dict[str, object] = {} if name == PLAIN else {"baseline": PLAIN, "ratio": ratio, **sizes[name]}
        rows.append(make_row("generate", case, name, metric, middle, "token/s", p20=slow, p80=fast, **rest))
    return rows


def share_rows(case: str, provider: str, decoder: Decoder) -> list[Row]:
    """Rows that say what a packed step spends its time on."""
    took, whole, alone = shares(decoder.step)
    print(f"  a packed step of {took:.0f} ms under the profiler")
    rows = []
    for label, found in (("with what it calls", whole), ("alone", alone)):
        for op, share in found.items():
            print(f"    {op:28} {100 * share:5.1f} % {label}")
            metric = f"time in {op}, {label}"
            rows.append(make_row("generate", case, provider, metric, 100 * share, "%"))
    return rows


def main() -> None:
    """Measure, write rows, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--plans", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu measures one thread: add --threads 1")
    clock, metric = CLOCKS[options.clock], "decode" if options.clock == "wall" else "decode, CPU time"
    dtype = getattr(torch, options.dtype)

    models: dict[str, tuple[LlamaForCausalLM, KVPlan | None]] = {PLAIN: (random_smollm2().to(dtype), None)}
    for name in options.plans:
        model = random_smollm2().to(dtype)
        plan = PLANS[name](model)
        models[f"kvmix {name}"] = (model, plan)
        kvmix_fx.compile(model, plan)
    for batch, length in CASES:
        if batch not in options.batches or length not in options.lengths:
            continue
        case = f"smollm2-135m b{batch} n{length} {options.dtype} {options.threads} threads"
        sizes = {
            name: {
                "effective_bits": plan.bits_per_element(length),
                "bytes": plan.nbytes(batch, length, itemsize=dtype.itemsize),
            }
            for name, (_, plan) in models.items()
            if plan
        }
        decoders = filled(models, batch, length, clock)
        rows = speed_rows(case, metric, in_turns(decoders, options.steps), batch, sizes)
        if (batch, length) == PROFILED and options.clock == "wall":
            for name in sizes:
                rows += share_rows(case, name, decoders[name])
        save(rows)


if __name__ == "__main__":
    main()
