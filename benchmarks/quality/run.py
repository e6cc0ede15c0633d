"""Quality of really packed caches: perplexity, KL and top-1 agreement of SmolLM2 on real text.

Chunks of evaluation text are read as generation reads: a short prefill, then token by token, on a model
compiled with `kvmix_fx.compile`, whose cache is packed. Every prediction is compared with the unquantized
model's own in the same dtype. Ends with exit status 1 if one of these does not hold:

* a plan of 16 bits everywhere gives bit for bit the logits of the untouched model;
* 8 bits predict the same token as no quantization at 99 % of the positions or more;
* the cache occupies the bytes that the plan announces;
* `kvmix_fx.testing.simulate` on an untouched model loses what the packed cache loses (three plans).

    python -m benchmarks.quality.run            # all plans, 4 chunks of 1024 tokens: an hour on one core
    python -m benchmarks.quality.run --quick    # 2 chunks of 256 tokens, three plans, writes no rows
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import kvmix_fx
from benchmarks.quality.measure import Quality, decode_quality, reference_predictions, reference_quality
from benchmarks.quality.plans import PLANS
from benchmarks.rows import Row, make_row, percentiles, save
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.plan import KVPlan
from kvmix_fx.testing import texts
from kvmix_fx.testing.simulate import SimulatedCache, teacher_forced
from kvmix_fx.testing.smollm2 import load_smollm2

SIMULATED = ("k4v4 g32 w32", "k4v2 g32 w32", "k2v2 g32 w32")
QUICK = ("k8v8 g32 w32", "k4v4 g32 w32", "k2v2 g32 w32")

WHOLE_CHUNKS = {
    "k8v8 g32 w32": (0.00002, 99.9),
    "k4v4 g32 w32": (0.0045, 97.0),
    "k4v4 g32 w0": (0.0181, 93.5),
    "k4v4 g32 w128": (0.0026, 97.7),
    "k4v4 g64 w32": (0.0069, 95.8),
    "k4v2 g32 w32": (0.0394, 90.6),
    "k2v4 g32 w32": (0.1570, 80.7),
    "k3v3 g32 w32": (0.0243, 92.7),
    "k3v2 g32 w32": (0.0573, 88.3),
    "k2v2 g32 w32": (0.236, 76.8),
    "k2v2 g32 w0": (0.679, 59.7),
    "k2v2 g32 w128": (0.148, 82.0),
    "k2v2 g64 w32": (0.415, 69.1),
    "k2v2 g32 w32 s4": (0.136, 81.8),
}
"""(KL, top-1 %) of a coarser estimate on other chunks: printed beside the measured figures, never a row.

It rounds every key older than the window, in one forward over the whole chunk. A cache rounds whole tiles, so
up to a tile less one token more stay raw, and its first tokens are computed before anything is rounded.
"""

METRICS = (
    ("perplexity", "perplexity", ""),
    ("perplexity_change", "perplexity change", "%"),
    ("kl", "kl", "nats/token"),
    ("agreement", "top-1 agreement", "%"),
)


def rows_of(case: str, provider: str, quality: Quality, **rest: object) -> Iterator[Row]:
    """One row per metric; p20 and p80 are taken over the chunks."""
    for name, metric, unit in METRICS:
        low, _, high = percentiles(getattr(quality, name))
        yield make_row(
            "quality",
            case,
            provider,
            metric,
            quality.mean(name),
            unit,
            p20=low,
            p80=high,
            baseline="unquantized",
            **rest,
        )


def packed_bytes(cache: object) -> int:
    """Bytes of every tensor the cache keeps."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(
        t.packed_nbytes if isinstance(t, QuantizedKVTensor) else t.numel() * t.element_size() for t in tensors
    )


def check(holds: bool, claim: str, failures: list[str]) -> None:
    """Print and remember."""
    print(f"{'holds' if holds else 'FAILS'}: {claim}", flush=True)
    if not holds:
        failures.append(claim)


def measure_packed(
    model: nn.Module, plan: KVPlan, ids: Tensor, reference: Tensor, prefill: int, label: str
) -> tuple[Quality, int]:
    """Figures with the cache really packed, and its bytes."""
    torch._dynamo.reset()  # a process that compiles many plans would reach the limit on recompilations
    kvmix_fx.compile(model, plan, inner="eager")
    try:
        quality, cache = decode_quality(model, ids, reference, prefill, label=label)
    finally:
        kvmix_fx.restore(model)
    return quality, packed_bytes(cache)


def raw_plan_changes_nothing(model: nn.Module, ids: Tensor, prefill: int) -> bool:
    """Whether a plan of 16 bits gives the untouched model's logits bit for bit, step by step."""
    kvmix_fx.compile(model, KVPlan.uniform(model, 16), inner="eager")
    try:
        compiled = [logits for _, logits in teacher_forced(model, ids, prefill)]
    finally:
        kvmix_fx.restore(model)
    return all(
        torch.equal(a, b) for a, (_, b) in zip(compiled, teacher_forced(model, ids, prefill), strict=True)
    )


def line(name: str, quality: Quality, bits: float | None = None, nbytes: int | None = None) -> str:
    """One line of the printed table."""
    kl, top = WHOLE_CHUNKS.get(name, (None, None))
    known = f"{kl:.5f} {top:.1f}" if kl is not None else "-"
    size = f"{bits:6.2f} {nbytes / 2**20:7.1f}" if bits and nbytes else " " * 14
    return (
        f"{name:28} {size} {quality.mean('perplexity'):8.3f} {quality.mean('perplexity_change'):+8.2f} "
        f"{quality.mean('kl'):9.5f} {quality.mean('agreement'):7.2f}   [{known}]"
    )


def main() -> int:
    """Measure, check, write rows; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="PLAN", choices=PLANS, help=f"of {', '.join(PLANS)}")
    parser.add_argument("--text", choices=("prose", "code"), default="prose")
    parser.add_argument("--prefill", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    chunks, length = (2, 256) if options.quick else (4, 1024)
    model, tokenizer = load_smollm2()
    text = getattr(texts, options.text)()
    # apart from each other, because single chunks vary: one is a grammar, another a tutorial
    ids = torch.cat(
        [texts.chunks(tokenizer, text, length, 1, skip=16 * 1024 // length * n) for n in range(chunks)]
    )
    case = f"smollm2-135m {options.text} {chunks}x{length} prefill {options.prefill} float32"
    keep = list if options.quick else save
    failures: list[str] = []

    check(
        raw_plan_changes_nothing(model, ids[:2, :160], options.prefill),
        "16 bits everywhere: the untouched model's logits, bit for bit",
        failures,
    )
    reference = reference_predictions(model, ids)
    exact = reference_quality(ids, reference, options.prefill)
    keep(rows_of(case, "unquantized", exact))
    print(f"{'plan':28} {'bits':>6} {'MiB':>7} {'ppl':>8} {'change %':>8} {'KL':>9} {'top-1 %':>7}", end="")
    print("   [simulated, whole chunks: KL, top-1]")
    print(line("unquantized", exact), flush=True)

    for name in options.only or (QUICK if options.quick else PLANS):
        plan = PLANS[name](model)
        bits = plan.bits_per_element(length)
        quality, nbytes = measure_packed(model, plan, ids, reference, options.prefill, name)
        print(line(name, quality, bits, nbytes), flush=True)
        keep(rows_of(case, f"kvmix {name}", quality, effective_bits=bits, bytes=nbytes))
        announced = plan.nbytes(chunks, length, itemsize=4)
        check(nbytes == announced, f"{name}: {nbytes} bytes allocated, {announced} announced", failures)
        if plan.nominal_bits() == 8:
            check(quality.mean("agreement") >= 99, f"{name}: top-1 agreement of 99 % or more", failures)
        if name in SIMULATED:
            again, _ = decode_quality(
                model, ids, reference, options.prefill, SimulatedCache(plan), f"simulated {name}"
            )
            print(line(f"simulated {name}", again), flush=True)
            keep(rows_of(case, f"simulated {name}", again, effective_bits=bits))
            real, other = quality.mean("kl"), again.mean("kl")
            check(
                abs(real - other) < 0.05 * other,
                f"{name}: KL {real:.5f} packed, {other:.5f} simulated, 5 % apart at most",
                failures,
            )
    print(f"{len(failures)} checks failed" if failures else "all checks hold")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
