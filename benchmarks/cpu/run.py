"""Decode speed on a CPU, plain cache against packed, and where a packed step spends its time.

Both models decode in turns of a few steps, so that a busy moment of the machine hits both. To be run while
the machine does nothing else:

    python -m benchmarks.cpu.run
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import kvmix_fx
from benchmarks.quality.plans import PLANS
from benchmarks.rows import Row, make_row, percentiles, save
from kvmix_fx.integrations.transformers import KVMixCache
from kvmix_fx.plan import KVPlan
from kvmix_fx.testing.smollm2 import random_smollm2

PLAN = "k4v2 g32 w32"
CASES = ((1, 1024), (1, 2048), (8, 1024), (8, 2048))
TURN = 5
"""Steps that one model takes before the other's turn."""


class Decoder:
    """A model with a filled cache that takes one step at a time."""

    def __init__(self, model: nn.Module, cache: object, token: Tensor) -> None:
        self.model, self.cache, self.token = model, cache, token

    @torch.no_grad()
    def step(self) -> float:
        """Decode one token per row; seconds it took."""
        begun = time.perf_counter()
        result = self.model(input_ids=self.token, past_key_values=self.cache)
        taken = time.perf_counter() - begun
        self.cache, self.token = result.past_key_values, result.logits[:, -1].argmax(-1, True)
        return taken


@torch.no_grad()
def decoders(
    plain: nn.Module, packed: nn.Module, plan: KVPlan, batch: int, length: int
) -> tuple[Decoder, Decoder]:
    """Both models after the same prompt, which is read once."""
    ids = torch.randint(0, 49152, (batch, length), generator=torch.Generator().manual_seed(0))
    result = plain(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = result.logits[:, -1].argmax(-1, True)
    cache = KVMixCache(plan, packed.config)
    for index, layer in enumerate(result.past_key_values.layers):
        cache.update(layer.keys, layer.values, index)
    return Decoder(plain, result.past_key_values, token), Decoder(packed, cache, token)


def in_turns(first: Decoder, second: Decoder, steps: int) -> tuple[list[float], list[float]]:
    """Seconds per step of each, taken in alternating turns after two steps that do not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for decoder in (first, second):
        decoder.step(), decoder.step()
    while len(times[1]) < steps:
        for decoder, taken in zip((first, second), times, strict=True):
            taken.extend(decoder.step() for _ in range(TURN))
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


def speed_rows(case: str, seconds: tuple[list[float], list[float]], batch: int, **sizes: float) -> list[Row]:
    """A row for the plain cache, and one for the packed cache compared with it."""
    plain, packed = (percentiles([batch / taken for taken in times]) for times in seconds)
    ratio = packed[1] / plain[1]
    print(f"{case}: {plain[1]:.2f} plain, {packed[1]:.2f} packed, {ratio:.2f}x", flush=True)
    against = {"baseline": "transformers", "ratio": ratio, **sizes}
    return [
        make_row("generate", case, provider, "decode", middle, "token/s", p20=slow, p80=fast, **rest)
        for provider, (slow, middle, fast), rest in (
            ("transformers", plain, {}),
            (f"kvmix {PLAN}", packed, against),
        )
    ]


def share_rows(case: str, decoder: Decoder) -> list[Row]:
    """Rows that say what a packed step spends its time on."""
    took, whole, alone = shares(decoder.step)
    print(f"  a packed step of {took:.0f} ms under the profiler")
    rows = []
    for label, found in (("with what it calls", whole), ("alone", alone)):
        for op, share in found.items():
            print(f"    {op:28} {100 * share:5.1f} % {label}")
            metric = f"time in {op}, {label}"
            rows.append(make_row("generate", case, f"kvmix {PLAN}", metric, 100 * share, "%"))
    return rows


def main() -> None:
    """Measure, write rows, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    plain, packed = random_smollm2(), random_smollm2()
    plan = PLANS[PLAN](packed)
    kvmix_fx.compile(packed, plan)
    for batch, length in (case for case in CASES if case[0] in options.batches):
        case = f"smollm2-135m b{batch} n{length} float32 {options.threads} threads"
        baseline, ours = decoders(plain, packed, plan, batch, length)
        seconds = in_turns(baseline, ours, options.steps)
        bits, nbytes = plan.bits_per_element(length), plan.nbytes(batch, length, itemsize=4)
        rows = speed_rows(case, seconds, batch, effective_bits=bits, bytes=nbytes)
        if (batch, length) == CASES[-1]:
            rows += share_rows(case, ours)
        save(rows)


if __name__ == "__main__":
    main()
