"""generate() of models of true shape on a GPU: tokens a second, prefill, memory.

    python -m benchmarks.e2e.generate --shape llama-3.1-8b --case "b16 n8192 +40" --case "b1 n4096 +40"

Every provider reads the same prompt with transformers' own `generate()`. Its first call compiles and warms
up; the time of that is a row of its own. In the next, tokens are timed one by one:
`tokens_per_second` counts generated tokens alone, from the sixth on (by then steps are recorded),
`prefill` ends with the first token. `peak_bytes` is the allocator's maximum over the call, weights
included; `cache_bytes` what the cache's tensors take. That call is mostly the first of its length, which
takes longer with any cache (cuDNN's attention plans for every shape); with `--prefills 9`, `prefill_again`
is the median of nine calls after it, as when prompts are read one after another. A case of one token, "+1",
has nothing but that: steps are not compiled.

A StaticCache's step takes as long as its capacity asks for, so `--capacity 131072` with a short prompt times
its step at that length where reading such a prompt does not fit.

`--loop` also times kvmix without `generate()`: greedy calls of the model over a `KVMixStaticCache`, as
provider "... loop".

With `--tp N` torchrun starts N ranks that share the heads of every layer, `--layers` of them if not all;
see `benchmarks.e2e.ranks`.

With `--turns FILE` several such processes may run at once: they compile together and measure one by one, none
before all have compiled. `--memory 24` allows a process 24 GB; a batch that does not fit is reported
and the next case is tried.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import kvmix_fx
from benchmarks.e2e.models import build
from benchmarks.rows import RESULTS, Row, load, machine_name, make_row, percentiles, save
from kvmix_fx import KVPlan, QuantSpec
from kvmix_fx.integrations.transformers import KVMixStaticCache

COLD_TOKENS = 8
WARM_TOKENS = 6
PROFILED_STEPS = 8
KINDS = {
    "attention": r"attend_kernel|combine_kernel|flash|fmha|sdpa",
    "append": r"append_kernel",
    "copies": r"Memcpy|Memset",
    "products": r"gemm|gemv|cutlass|nvjet|cublas|splitK|mm|mul_sum|dot",
}
"""Kinds of kernels by name, the first that matches."""
LONGEST_WAIT = 20.0
"""Microseconds between two kernels, above which the host is what the GPU waits for."""
HIGH_LAYERS = (0, 1, 2, 13, 14, 31)


def synchronize() -> None:
    """Wait for the device, if it is one that works on its own."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock:
    """Notes when each token is there; handed to generate() as a stopping criterion that never stops.

    beat: called with the number of tokens once a token.
    """

    def __init__(self, beat: Callable[[int], None] = lambda _: None) -> None:
        """Start now."""
        synchronize()
        self.times = [time.perf_counter()]
        self._beat = beat

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """Called once a token."""
        synchronize()
        self.times.append(time.perf_counter())
        self._beat(len(self.times) - 1)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def kvmix_plan(group: int, window: int) -> Callable[[nn.Module], KVPlan]:
    """KVmix's split (six of 32 layers with 3-bit keys and 4-bit values, else 2 bits)."""

    def make(model: nn.Module) -> KVPlan:
        v_group = "head" if group >= model.config.head_dim else group  # type: ignore[union-attr]
        plan = KVPlan.uniform(model, 2, 2, window=window, sink_length=0).with_layers(
            "all",
            key=QuantSpec(2, "channel", group),
            value=QuantSpec(2, "token", v_group),
            tile=max(group, 32),
        )
        return plan.with_layers([i for i in HIGH_LAYERS if i < len(plan.layers)], key=3, value=4)

    return make


def mikv_plan(policy: str, **options: Any) -> Callable[[nn.Module], KVPlan]:
    """A fifth of the tokens at 16 bits, all others at 2; policies differ in what they ask of attention."""
    return lambda model: KVPlan.preset("mikv", model, policy=policy, **options).with_layers("all", tile=128)


KVMIX: dict[str, Callable[[nn.Module], KVPlan]] = {
    "kvmix k2.2v2.4 g128 w32": kvmix_plan(128, 32),
    "kvmix k2.2v2.4 g32 w32": kvmix_plan(32, 32),
    "kvmix k4v2 g128 w32": lambda model: KVPlan.uniform(model, 4, 2, window=32, sink_length=0).with_layers(
        "all", key=QuantSpec(4, "channel", 128), value=QuantSpec(2, "token", "head"), tile=128
    ),
    "kvmix tiers": lambda model: KVPlan.preset("tiers", model),
    "kvmix k2v2 g128 w32": lambda model: KVPlan.uniform(model, 2, 2, window=32, sink_length=0).with_layers(
        "all", key=QuantSpec(2, "channel", 128), value=QuantSpec(2, "token", "head"), tile=128
    ),
    **{f"kvmix mikv {policy}": mikv_plan(policy) for policy in ("accumulated", "last", "norm")},
    "kvmix mikv over tiers": mikv_plan("accumulated", channel_tiers=True),
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


def clocked(
    model: nn.Module, ids: torch.Tensor, new: int, settings: dict[str, Any], clock: Clock | None = None
) -> tuple[Clock, Any]:
    """One generate() and when its tokens were there."""
    clock = clock or Clock()
    generate: Any = model.generate
    out = generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
        stopping_criteria=[clock], return_dict_in_generate=True, **settings,
    )  # fmt: skip
    return clock, out


def run(model: nn.Module, ids: torch.Tensor, new: int, settings: dict[str, Any]) -> tuple[Clock, int, int]:
    """One generate(): (times, peak bytes, cache bytes)."""
    free()
    torch.cuda.reset_peak_memory_stats()
    clock, out = clocked(model, ids, new, settings)
    size = cache_bytes(out.past_key_values) if "quantized" not in settings.values() else 0
    return clock, torch.cuda.max_memory_allocated(), size


def prefill_again(
    model: nn.Module, case: str, provider: str, ids: torch.Tensor, settings: dict[str, Any], count: int
) -> Row:
    """Calls that generate one token, when one of that length was read before."""
    seconds = []
    for _ in range(1 + count):
        clock, _ = clocked(model, ids, 1, settings)
        seconds.append(clock.times[1] - clock.times[0])
    p20, median, p80 = percentiles(seconds[1:])
    print(f"{case:32} {provider:28} prefill again {median:.4f} s ({p20:.4f} .. {p80:.4f})", flush=True)
    return make_row("generate", case, provider, "prefill_again", median, "s", p20=p20, p80=p80)


def loop(model: nn.Module, plan: KVPlan, ids: torch.Tensor, new: int) -> tuple[Clock, int, int]:
    """The same without generate()."""
    free()
    torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    cache = KVMixStaticCache(plan, model.config, ids.shape[1] + new)
    tokens = ids
    with torch.no_grad():
        for _ in range(new):
            logits = model(input_ids=tokens, past_key_values=cache, logits_to_keep=1).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            clock(tokens, None)
    return clock, torch.cuda.max_memory_allocated(), cache_bytes(cache)


@contextlib.contextmanager
def turn(file: Path | None, alone: bool) -> Iterator[None]:
    """Hold `file`, shared with others that compile or alone."""
    if file is None:
        yield
        return
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def warm_up(
    model: nn.Module, case: str, provider: str, ids: torch.Tensor, new: int, settings: dict[str, Any]
) -> Row:
    """The row of a first call, which compiles."""
    first, _, _ = run(model, ids, min(new, COLD_TOKENS), settings)
    print(f"{case:32} {provider:28} first call: {_spread(first)}", flush=True)
    seconds = first.times[-1] - first.times[0]
    return make_row("generate", case, provider, "first_call", seconds, "s")


def best_of_transformers(case: str, folder: Path) -> Row | None:
    """The fastest of transformers' own caches in this case, if it was measured before on such a machine."""
    rows = load("generate", machine_name(), folder)
    rows = [row for row in rows if row.metric == "tokens_per_second" and row.case == case]
    rows = [row for row in rows if row.provider.split(",")[0] in TRANSFORMERS]
    return max(rows, key=lambda row: row.value, default=None)


def measured(
    case: str, provider: str, batch: int, found: tuple[Clock, int, int], bits: float | None, best: Row | None
) -> list[Row]:
    """Rows of one case; decode is compared with `best`."""
    rows: list[Row] = []
    clock, peak, size = found
    steps = [b - a for a, b in zip(clock.times[WARM_TOKENS:], clock.times[WARM_TOKENS + 1 :], strict=False)]
    p20, median, p80 = percentiles(steps)
    facts = {"effective_bits": bits, "bytes": size or None}
    rows += [
        make_row(
            "generate", case, provider, "tokens_per_second", batch / median, "token/s",
            p20=batch / p80, p80=batch / p20, baseline=best and best.provider,
            ratio=best and batch / median / best.value, **facts,
        ),
        make_row("generate", case, provider, "prefill", clock.times[1] - clock.times[0], "s", **facts),
        make_row("generate", case, provider, "peak_bytes", peak, "bytes", **facts),
    ]  # fmt: skip
    if size:
        rows.append(make_row("generate", case, provider, "cache_bytes", size, "bytes", **facts))
    print(
        f"{case:32} {provider:28} {batch / median:8.1f} tok/s ({1000 * median:.2f} ms a step), prefill "
        f"{clock.times[1] - clock.times[0]:.2f} s, peak {peak / 2**30:.2f} GiB"
        + (f", cache {size / 2**20:.0f} MiB" if size else ""),
        flush=True,
    )
    return rows


def occupied(profiler: profile) -> tuple[float, float]:
    """Microseconds in which some kernel ran, and in which none did but only shortly.

    Kernels run side by side, and some begin before what they wait for has ended: sums of their times count
    such time twice. Longer waits are for the host.
    """
    events = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, waited, last = 0.0, 0.0, events[0][0] if events else 0.0
    for start, end in events:
        waited += start - last if 0 < start - last < LONGEST_WAIT else 0.0
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    return busy, waited


def profile_part(
    model: nn.Module, case: str, provider: str, ids: torch.Tensor, settings: dict[str, Any], prefill: bool
) -> list[Row]:
    """GPU time of prefill or of a decode step by kind of kernel.

    "between" is what the GPU waits between kernels, "host" what is left of the wall time: see `occupied`.
    """
    part, first, last = ("prefill", 0, 1) if prefill else ("step", 16, 16 + PROFILED_STEPS)
    window = Window(first, last)
    generate: Any = model.generate
    generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=last,
        stopping_criteria=[window], **settings,
    )  # fmt: skip
    times: dict[str, float] = defaultdict(float)
    kernels: list[tuple[float, int, str]] = []
    for event in window.profiler.key_averages():
        spent = event.self_device_time_total / (last - first)
        if spent:
            kind = next((k for k, pattern in KINDS.items() if re.search(pattern, event.key)), "other")
            times[kind] += spent
            kernels.append((spent, event.count // (last - first), event.key))
    wall = 1e6 * window.wall / (last - first)
    busy, waited = (spent / (last - first) for spent in occupied(window.profiler))
    times["between"], times["host"] = waited, wall - busy - waited
    shares = {k: round(t) for k, t in times.items()}
    print(f"{case} {provider}: {part} {wall:.0f} us, of which {shares}", flush=True)
    for spent, count, name in sorted(kernels, reverse=True)[:16]:
        print(f"  {spent:9.1f} us {count:5d}x {name[:120]}", flush=True)
    times[part] = wall
    named = {k if k == part else f"{part} {k}" if prefill else k: t for k, t in times.items()}
    return [
        make_row("generate", case, provider, f"{kind} time", spent, "us") for kind, spent in named.items()
    ]


class Window:
    """A stopping criterion that never stops; profiles from token `first` (0: the start) to token `last`."""

    def __init__(self, first: int, last: int) -> None:
        """Start at once if `first` is 0."""
        self.first, self.last, self.count, self.wall = first, last, 0, 0.0
        self.profiler = profile(activities=[ProfilerActivity.CUDA])
        if first == 0:
            self._start()

    def _start(self) -> None:
        torch.cuda.synchronize()
        self.profiler.__enter__()
        self.wall = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """Called once a token."""
        self.count += 1
        if self.count == self.first:
            self._start()
        elif self.count == self.last:
            torch.cuda.synchronize()
            self.wall = time.perf_counter() - self.wall
            self.profiler.__exit__(None, None, None)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _spread(clock: Clock) -> str:
    steps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    return " ".join(f"{step:.3f}" for step in steps[:6]) + f" .. {steps[-1]:.4f} s"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="only so many of the shape's layers; with --tp")
    parser.add_argument("--tp", type=int, help="ranks of tensor parallelism, one GPU each")
    parser.add_argument(
        "--graphs",
        choices=("off", "on"),
        action="append",
        help="whether ranks replay CUDA graphs; default: first off, then on",
    )
    parser.add_argument("--device", default="cuda", help="of the ranks")
    parser.add_argument("--machine", help="name of this machine in the rows; default: its GPU's")
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--case",
        action="append",
        required=True,
        help='such as "b16 n8192 +64": batch, prompt, new; repeatable',
    )
    parser.add_argument("--provider", action="append", help="repeatable; default: all")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--inner", help="inner compiler of kvmix; default: its own choice")
    parser.add_argument("--whole", action="store_true", help="compile kvmix's decode steps whole")
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        help="a case, or all: also say where its time goes; repeatable",
    )
    parser.add_argument("--prefill-chunk", type=int, help="read the prompt in pieces of so many tokens")
    parser.add_argument("--prefills", type=int, default=0, help="also time so many prompts one after another")
    parser.add_argument(
        "--capacity",
        type=int,
        help="tokens of a StaticCache, which it attends to whatever it holds; default: what is asked for",
    )
    parser.add_argument("--memory", type=float, help="GB that the process may take; default: all")
    parser.add_argument("--loop", action="store_true", help="also time kvmix in a loop without generate()")
    parser.add_argument("--turns", type=Path, help="a file that processes which measure in turns share")
    options = parser.parse_args()
    if options.machine:
        os.environ["KVMIX_MACHINE"] = options.machine
    if options.tp:
        from benchmarks.e2e import ranks

        sys.exit(ranks.main(options))
    if options.memory:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory * 1e9 / total))
    model = build(options.shape)
    for provider in options.provider or [*TRANSFORMERS, *KVMIX]:
        run_provider(model, provider, options)


def run_provider(model: nn.Module, provider: str, options: argparse.Namespace) -> None:
    """Compile for and measure all cases; what fails is printed."""
    settings: dict[str, Any] = dict(TRANSFORMERS.get(provider, {}))
    suffix = ""
    if options.prefill_chunk:
        settings["prefill_chunk_size"] = options.prefill_chunk
        suffix = f" chunk{options.prefill_chunk}"
    static = provider == "transformers static"
    if static and options.capacity:
        suffix += f" of {options.capacity}"
    plan = KVMIX[provider](model) if provider in KVMIX else None
    if plan is not None:
        kvmix_fx.compile(model, plan, inner=options.inner, options={"pieces": False} if options.whole else {})
        provider += " whole" if options.whole else ""

    def first_call(case: str, ids: torch.Tensor, new: int) -> list[Row]:
        rows = [warm_up(model, case, provider, ids, new, settings)]
        if plan is not None and options.loop:
            loop(model, plan, ids, COLD_TOKENS)
        return rows

    def timings(case: str, ids: torch.Tensor, new: int) -> list[Row]:
        profiled = any(name == "all" or f" {name}" in case for name in options.profile)
        bits = plan.bits_per_element(ids.shape[1]) if plan is not None else None
        best = None if plan is None else best_of_transformers(case, options.output)
        if new == 1:
            rows = [prefill_again(model, case, provider, ids, settings, options.prefills or 9)]
            return rows + (profile_part(model, case, provider, ids, settings, True) if profiled else [])
        rows = measured(case, provider, ids.shape[0], run(model, ids, new, settings), bits, best)
        if options.prefills:
            rows.append(prefill_again(model, case, provider, ids, settings, options.prefills))
        if plan is not None and options.loop:
            found = loop(model, plan, ids, new)
            rows += measured(case, f"{provider} loop", ids.shape[0], found, bits, best)
        for prefill in (False, True) if profiled else ():
            rows += profile_part(model, case, provider, ids, settings, prefill)
        return rows

    # a StaticCache is compiled for every size and keeps the largest it ever had: one case at a time
    for texts in [[text] for text in options.case] if static else [options.case]:
        # kvmix compiles once for one row and once for several
        warm: set[bool] = set()
        for alone, rows_of in ((False, first_call), (True, timings)):
            with turn(options.turns, alone):
                for text in texts:
                    batch, context, new = (int(part[1:]) for part in text.split())
                    if not alone and (batch > 1) in warm:
                        continue
                    warm.add(batch > 1)
                    if static:
                        # what the first call compiles is what is timed
                        model._previous_max_cache_length = max(options.capacity or 0, context + new)
                    case = f"{options.shape} {text}{suffix}"
                    ids = torch.randint(
                        1, 30000, (batch, context), generator=torch.Generator().manual_seed(1)
                    ).cuda()
                    try:
                        save(rows_of(case, ids, new), options.output)
                    except (RuntimeError, ImportError, ValueError) as problem:
                        reason = f"{type(problem).__name__}: {str(problem)[:300]}"
                        print(f"{case:32} {provider:28} {reason}", flush=True)
                # others may need the memory while they measure
                free()
        if static:
            torch._dynamo.reset()
            free()
    if plan is not None:
        replays = [graph.replay or "replayed" for graph in kvmix_fx.compiled(model).report.graphs]
        print(f"{provider}: graphs {replays}", flush=True)
        kvmix_fx.restore(model)
    for name in ("inductor", "aot_autograd"):
        found = {key: count for key, count in counters[name].items() if "cache" in key}
        print(f"{provider}: {name} artefacts {found}", flush=True)
    counters.clear()
    torch._dynamo.reset()
    free()


def free() -> None:
    """Give memory back that nothing refers to."""
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
