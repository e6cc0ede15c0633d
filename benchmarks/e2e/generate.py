"""generate() of models of true shape on a GPU: tokens a second, prefill, memory.

    python -m benchmarks.e2e.generate --shape llama-3.1-8b --case "b16 n8192" --case "b1 n4096"

Every provider reads the same prompt with transformers' own `generate()`. The first call of a provider
compiles and warms up; its time is a row of its own. In the second, tokens are timed one by one:
`tokens_per_second` counts generated tokens alone, from the sixth on (by then steps are recorded),
`prefill` ends with the first token. `peak_bytes` is the allocator's maximum over the second call, weights
included; `cache_bytes` what the cache's tensors take.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kvmix_fx
from benchmarks.e2e.models import build
from benchmarks.rows import RESULTS, Row, make_row, save
from kvmix_fx import KVPlan, QuantSpec

WARM_TOKENS = 6
HIGH_LAYERS = (0, 1, 2, 13, 14, 31)


class Clock:
    """Notes when each token is there; handed to generate() as a stopping criterion that never stops."""

    def __init__(self) -> None:
        """Start now."""
        torch.cuda.synchronize()
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """Called once a token."""
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def kvmix_plan(group: int, window: int) -> Callable[[nn.Module], KVPlan]:
    """KVmix's split (six of 32 layers with 3-bit keys and 4-bit values, else 2 bits)."""

    def make(model: nn.Module) -> KVPlan:
        v_group = "head" if group >= model.config.head_dim else group  # type: ignore[union-attr]
        plan = KVPlan.uniform(model, 2, 2, window=window).with_layers(
            "all",
            key=QuantSpec(2, "channel", group),
            value=QuantSpec(2, "token", v_group),
            tile=max(group, 32),
        )
        return plan.with_layers(HIGH_LAYERS, key=3, value=4)

    return make


KVMIX: dict[str, Callable[[nn.Module], KVPlan]] = {
    "kvmix k2.2v2.4 g128 w32": kvmix_plan(128, 32),
    "kvmix k2.2v2.4 g32 w32": kvmix_plan(32, 32),
    "kvmix k4v2 g128 w32": lambda model: KVPlan.uniform(model, 4, 2, window=32).with_layers(
        "all", key=QuantSpec(4, "channel", 128), value=QuantSpec(2, "token", "head"), tile=128
    ),
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "transformers dynamic": {},
    "transformers static": {"cache_implementation": "static"},
    "transformers quanto 4 bit": {
        "cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4},
    },
    "transformers quanto 2 bit": {
        "cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 2},
    },
}  # fmt: skip


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors of a cache's keys and values."""
    total = 0
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            packed = getattr(tensor, "packed_nbytes", None)
            total += packed if packed is not None else tensor.numel() * tensor.element_size()
    return total


def run(model: nn.Module, ids: torch.Tensor, new: int, settings: dict[str, Any]) -> tuple[Clock, int, int]:
    """One generate(): (times, peak bytes, cache bytes)."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    generate: Any = model.generate
    out = generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
        stopping_criteria=[clock], return_dict_in_generate=True, **settings,
    )  # fmt: skip
    size = cache_bytes(out.past_key_values) if "quantized" not in settings.values() else 0
    return clock, torch.cuda.max_memory_allocated(), size


def measure(model: nn.Module, case: str, provider: str, ids: torch.Tensor, new: int) -> list[Row]:
    """Rows of one provider; what it raises is printed and gives none."""
    settings = TRANSFORMERS.get(provider, {})
    bits: float | None = 16.0 if provider in ("transformers dynamic", "transformers static") else None
    if provider in KVMIX:
        plan = KVMIX[provider](model)
        kvmix_fx.compile(model, plan)
        bits = plan.bits_per_element(ids.shape[1])
    try:
        first, _, _ = run(model, ids, new, settings)
        print(f"{case:32} {provider:28} first call: {_spread(first)}", flush=True)
        clock, peak, size = run(model, ids, new, settings)
    except (RuntimeError, ImportError, ValueError) as problem:
        print(f"{case:32} {provider:28} {type(problem).__name__}: {str(problem)[:300]}", flush=True)
        return []
    finally:
        if provider in KVMIX:
            print("\n".join(str(kvmix_fx.compiled(model).report).splitlines()[:2]), flush=True)
            kvmix_fx.restore(model)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    steps = sorted(
        b - a for a, b in zip(clock.times[WARM_TOKENS:], clock.times[WARM_TOKENS + 1 :], strict=False)
    )
    median, p20, p80 = (steps[len(steps) * share // 100] for share in (50, 20, 80))
    batch = ids.shape[0]
    facts = {"effective_bits": bits, "bytes": size or None}
    rows = [
        make_row(
            "generate", case, provider, "tokens_per_second", batch / median, "tokens/s",
            p20=batch / p80, p80=batch / p20, **facts,
        ),
        make_row("generate", case, provider, "prefill", clock.times[1] - clock.times[0], "s", **facts),
        make_row("generate", case, provider, "first_call", first.times[-1] - first.times[0], "s", **facts),
        make_row("generate", case, provider, "peak_bytes", peak, "bytes", **facts),
    ]  # fmt: skip
    if size:
        rows.append(make_row("generate", case, provider, "cache_bytes", size, "bytes", **facts))
    print(
        f"{case:32} {provider:28} {batch / median:8.1f} tok/s ({1000 * median:.2f} ms a step), prefill "
        f"{rows[1].value:.2f} s, peak {peak / 2**30:.2f} GiB, cache {size / 2**20:.0f} MiB",
        flush=True,
    )
    return rows


def _spread(clock: Clock) -> str:
    steps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    return " ".join(f"{step:.3f}" for step in steps[:6]) + f" .. {steps[-1]:.4f} s"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--case", action="append", required=True, help='such as "b16 n8192"; repeatable')
    parser.add_argument("--provider", action="append", help="repeatable; default: all")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the rows")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(100, repeat=True, file=sys.stderr)
    model = build(options.shape)
    for text in options.case:
        batch, context = (int(part[1:]) for part in text.split())
        ids = torch.randint(1, 30000, (batch, context), generator=torch.Generator().manual_seed(1)).cuda()
        case = f"{options.shape} {text} +{options.new}"
        for provider in options.provider or [*TRANSFORMERS, *KVMIX]:
            save(measure(model, case, provider, ids, options.new), options.output)


if __name__ == "__main__":
    main()
