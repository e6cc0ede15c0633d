"""Bytes: what a packed cache allocates, and what a whole process needs.

Stops with exit status 1 unless, in bfloat16,

* every cache occupies to the byte what its plan announces, growing and static;
* with tiles of 32 tokens it lies within 10 % of the effective bits that the plan states. These do not count
  slots that are allocated and empty: up to a tile and more of raw ones, up to 128 tokens of packed ones. With
  longer tiles both weigh more;
* a process that reads and continues a long prompt peaks lower with a packed cache than with a 16-bit one,
  counted from where it stood before that prompt; with 8 rows also in full.

    python -m benchmarks.memory.run
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import kvmix_fx
from benchmarks.quality.plans import PLANS
from benchmarks.rows import make_row, save
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.integrations.transformers import KVMixStaticCache
from kvmix_fx.plan import KVPlan
from kvmix_fx.testing.smollm2 import random_smollm2, smollm2_config

BATCH, LENGTH = 4, 2048
NEW_TOKENS = 32
PEAK_BATCHES = (4, 8)

CACHES: dict[str, Callable[[object], KVPlan]] = {
    name: PLANS[name]
    for name in (
        "k4v4 g32 w32",
        "k4v2 g32 w32",
        "k2v2 g32 w32",
        "k2v2 g64 w32",
        "k2v2 g128 w32",
        "k2v2 g32 w128",
    )
}
PEAKS: dict[str, Callable[[object], KVPlan] | None] = {
    "transformers": None,
    "kvmix 16 bits": lambda model: KVPlan.uniform(model, 16),
    "kvmix k4v2 g32 w32": PLANS["k4v2 g32 w32"],
}
"""Providers of the peak; "kvmix 16 bits" is traced like the packed one and packs nothing."""


def thin_model() -> nn.Module:
    """SmolLM2's layers, heads and head size with next to nothing between them: a cache of the same bytes."""
    from transformers import LlamaForCausalLM

    config = smollm2_config()
    config.hidden_size, config.intermediate_size, config.vocab_size = 64, 64, 128
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def allocated(cache: object) -> int:
    """Bytes of the memory behind every tensor the cache keeps, each counted once."""
    storages = {}
    for layer in cache.layers:
        for kept in (layer.keys, layer.values):
            for tensor in kept.cached.tensors if isinstance(kept, QuantizedKVTensor) else (kept,):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    storages.pop(0, None)
    return sum(storages.values())


@torch.no_grad()
def fill(model: nn.Module, plan: KVPlan | None, kind: str, vocabulary: int) -> object:
    """The cache after a prompt of all tokens but two, and two single steps."""
    ids = torch.randint(0, vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    cache = KVMixStaticCache(plan, model.config, LENGTH) if plan and kind == "fixed" else None
    for piece in (slice(0, LENGTH - 2), slice(LENGTH - 2, LENGTH - 1), slice(LENGTH - 1, LENGTH)):
        result = model(input_ids=ids[:, piece], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = result.past_key_values
    return cache


def measure_caches(names: list[str], failures: list[str]) -> None:
    """Allocated bytes of every plan, growing and static, against what the plan says."""
    case = f"smollm2-135m b{BATCH} n{LENGTH} bfloat16"
    model = thin_model()
    raw = allocated(fill(model, None, "growing", 128))
    save([make_row("memory", case, "transformers", "cache bytes", raw, "B", effective_bits=16.0, bytes=raw)])
    print(f"{'plan':24} {'cache':8} {'bytes':>11} {'stated bits':>11} {'allocated':>9} {'smaller':>8}")
    print(f"{'transformers':24} {'growing':8} {raw:11} {16:11.2f} {16:9.2f}", flush=True)
    elements = raw // 2
    for name in names:
        plan = CACHES[name](model)
        for kind in ("growing", "fixed"):
            torch._dynamo.reset()
            kvmix_fx.compile(model, plan, inner="eager")
            try:
                nbytes = allocated(fill(model, plan, kind, 128))
            finally:
                kvmix_fx.restore(model)
            bits = plan.bits_per_element(LENGTH)
            announced = plan.nbytes(BATCH, LENGTH, itemsize=2, cache=kind)
            taken = 8 * nbytes / elements
            print(
                f"{name:24} {kind:8} {nbytes:11} {bits:11.2f} {taken:9.2f} {raw / nbytes:7.2f}x", flush=True
            )
            if nbytes != announced:
                failures.append(f"{name} {kind}: {nbytes} bytes allocated, {announced} announced")
            stated = bits * elements / 8
            if plan.layers[0].tile_length == 32 and abs(nbytes - stated) > 0.1 * stated:
                failures.append(f"{name} {kind}: {nbytes} bytes allocated, {bits:.2f} bits are {stated:.0f}")
            save(
                [
                    make_row(
                        "memory",
                        case,
                        f"kvmix {name} {kind}",
                        "cache bytes",
                        nbytes,
                        "B",
                        baseline="transformers",
                        ratio=raw / nbytes,
                        effective_bits=bits,
                        bytes=nbytes,
                    )
                ]
            )


def resident(field: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at the peak. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@torch.no_grad()
def run_alone(provider: str, batch: int, threads: int) -> None:
    """In a process of its own: read a long prompt, continue it, print the peak as JSON.

    A short prompt comes first. It leaves behind what compiling needs once, and that is part of "started".
    """
    torch.set_num_threads(threads)
    model = random_smollm2(torch.bfloat16)
    make = PEAKS[provider]
    if make is not None:
        kvmix_fx.compile(model, make(model), inner="eager")
    ids = torch.randint(0, 49152, (batch, LENGTH), generator=torch.Generator().manual_seed(0))
    read_and_continue(model, ids[:, :48], 3)
    gc.collect()
    # making the model needed more memory than what follows: forget that peak
    Path("/proc/self/clear_refs").write_text("5")
    started = resident("VmHWM")
    cache = read_and_continue(model, ids, NEW_TOKENS)
    peak = resident("VmHWM")
    print(json.dumps({"started": started, "peak": peak, "above": peak - started, "cache": allocated(cache)}))


def read_and_continue(model: nn.Module, ids: torch.Tensor, count: int) -> object:
    """The cache after a prompt [B, L] and `count` greedy tokens."""
    result = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    for _ in range(count):
        token = result.logits[:, -1].argmax(-1, True)
        result = model(input_ids=token, past_key_values=result.past_key_values)
    return result.past_key_values


def measure_peaks(batch: int, threads: int, failures: list[str]) -> None:
    """Peak resident memory of one process per provider."""
    case = f"smollm2-135m b{batch} prompt {LENGTH} new {NEW_TOKENS} bfloat16"
    peaks: dict[str, dict[str, int]] = {}
    for provider in PEAKS:
        begun = time.perf_counter()
        module = [sys.executable, "-m", "benchmarks.memory.run"]
        command = [*module, "--alone", provider, "--batches", str(batch), "--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the run of {provider!r} failed:\n{done.stderr}")
        peaks[provider] = json.loads(done.stdout.splitlines()[-1])
        texts = (f"{name} {value / 2**20:.0f}" for name, value in peaks[provider].items())
        print(f"{provider:24} MiB: {', '.join(texts)}; {time.perf_counter() - begun:.0f} s", flush=True)
    plain = peaks["transformers"]
    for provider, found in peaks.items():
        compared = {} if provider == "transformers" else {"baseline": "transformers"}
        save(
            make_row(
                "memory",
                case,
                provider,
                metric,
                found[name],
                "B",
                bytes=found["cache"],
                **compared | ({"ratio": plain[name] / found[name]} if compared else {}),
            )
            for name, metric in (("peak", "peak resident"), ("above", "peak above the start"))
        )
        if PEAKS[provider] is not None and provider != "kvmix 16 bits":
            for other in ("transformers", "kvmix 16 bits"):
                for name in ("peak", "above") if batch == max(PEAK_BATCHES) else ("above",):
                    if found[name] >= peaks[other][name]:
                        failures.append(f"{name}: {found[name]} {provider}, {peaks[other][name]} {other}")


def main() -> int:
    """Measure, check, write rows; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--alone", choices=PEAKS, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("caches", "peaks"))
    parser.add_argument(
        "--plans", nargs="+", choices=CACHES, metavar="PLAN", help="caches of these plans alone"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=list(PEAK_BATCHES), help="of the peaks")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.alone:
        run_alone(options.alone, options.batches[0], options.threads)
        return 0
    failures: list[str] = []
    if options.only != "peaks":
        measure_caches(options.plans or list(CACHES), failures)
    if options.only != "caches":
        for batch in options.batches:
            measure_peaks(batch, options.threads, failures)
    print("\n".join(f"FAILS: {failure}" for failure in failures) or "all checks hold")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
