"""The longest context and the largest batch that fit in a GPU's memory, tried.

    python -m benchmarks.e2e.capacity --case b1 --case n8192

`b1` asks for the longest context of one row, `n8192` for the largest batch of rows of 8192 tokens. What is
tried is that weights, cache and decode steps fit, not a prefill: prompts of this size take too long to
read. A cache is allocated for the context and a few more tokens, filled with random codes and scales or
random 16-bit tokens, and told that it holds the context; then the model decodes on it, 8 steps to warm up
and 8 timed ones, each a call of its forward as in a plain loop. What a prefill takes at its peak is in the
rows of `benchmarks.e2e.generate`.

kvmix runs compiled over its cache of fixed capacity; a size counts only if its steps could be recorded as
CUDA graphs. transformers' caches run eagerly, because a static one would be compiled for every size that is
tried: their sizes are what this is about, their speed is not the best they can do. `DynamicCache` needs
room for a second copy of a layer's keys or values, `StaticCache` for a copy of them with a head for every
query head, since its mask keeps attention from kernels that share heads.

`--memory 80` (GB of 10^9 bytes, the default) bounds all that PyTorch allocates; what CUDA takes for itself,
some 0.5 GB, comes on top. The search starts where two small sizes say that memory ends and stops when one
size fits and one that is larger by `--resolution` does not; only the first is a row, the other one is
printed, with the reason. What the try before recorded is freed only when the next one is recorded, so kvmix
sees a little less room than it would alone.

With `--turns FILE` several such processes may run at once: they compile together and measure one by one,
and while one waits it gives its weights' memory away.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import kvmix_fx
from benchmarks.e2e.generate import KVMIX, cache_bytes, turn
from benchmarks.e2e.models import build, set_weights
from benchmarks.rows import RESULTS, Row, load, machine_name, make_row, percentiles, save
from kvmix_fx import KVPlan
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.integrations.transformers import KVMixStaticCache
from kvmix_fx.integrations.transformers.layers import KVMixStaticLayer

WARM_STEPS = 8
TIMED_STEPS = 8
PROBE_STEPS = 3
"""Of the small sizes: the third step is the first that is replayed."""
ROOM = 32
"""Tokens that a cache of fixed capacity can take after its context."""
PROBES = (0.1, 0.2)
"""Shares of the guess from whose peaks the size that fits is predicted."""
TRANSFORMERS = ("transformers dynamic", "transformers static")
DEFAULT_PROVIDERS = (*TRANSFORMERS, "kvmix k2.2v2.4 g128 w32")


class Case(NamedTuple):
    """What is fixed, and so what grows: the context of `batch` rows, or the rows of `context` tokens."""

    batch: int | None
    context: int | None

    @classmethod
    def parse(cls, text: str) -> Case:
        """From "b1" or "n8192"; ValueError for anything else."""
        size = int(text[1:])
        if text[0] not in "bn" or size < 1:
            raise ValueError(
                f'a case is a batch size such as "b1" or a context such as "n8192", got {text!r}'
            )
        return cls(size, None) if text[0] == "b" else cls(None, size)

    @property
    def unit(self) -> int:
        """Sizes are multiples of this."""
        return 1 if self.batch is None else 1024

    @property
    def metric(self) -> str:
        """Of the row that holds the size."""
        return "largest_batch" if self.batch is None else "longest_context"

    def shape(self, size: int) -> tuple[int, int]:
        """(batch, context) of a size."""
        return (size, self.context) if self.context is not None else (self.batch or 1, size)

    def name(self, shape: str, memory: float) -> str:
        """Of the rows."""
        part = f"n{self.context} largest batch" if self.batch is None else f"b{self.batch} longest"
        return f"{shape} {part} in {memory:g} GB"


class Tried(NamedTuple):
    """A size that fitted: seconds of the timed steps, peak bytes of the process, bytes of the cache."""

    size: int
    seconds: list[float]
    peak: int
    cache: int


def randomize(tensor: Tensor) -> None:
    """Random contents in place: numbers, or codes of every value and scales that make such numbers."""
    if not isinstance(tensor, QuantizedKVTensor):
        tensor.normal_()
        return
    tensor.qdata.random_(-(1 << 15), 1 << 15)
    tensor.scale.uniform_(0.5, 1.5)
    tensor.zero_point.uniform_(-2, -1)
    tensor.residual.normal_()


def no_tokens(model: Any, batch: int) -> Tensor:
    """The keys or values of no token, from which a layer takes its shapes."""
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    return torch.empty((batch, heads, 0, size), dtype=model.dtype, device=model.device)


def filled_packed(model: Any, plan: KVPlan, batch: int, context: int) -> KVMixStaticCache:
    """A packed cache of random contents, as after a prompt of `context` tokens without padding."""
    cache = KVMixStaticCache(plan, model.config, context + ROOM)
    empty = no_tokens(model, batch)
    live = None
    for layer in cache.layers:
        if isinstance(layer, KVMixStaticLayer):
            layer.lazy_initialization(empty, empty, live)
            live = layer.keys.live
            live.fill_(context)
        else:
            layer.lazy_initialization(empty, empty)
        randomize(layer.keys)
        randomize(layer.values)
        layer.cumulative_length.fill_(context)
        layer.host_length = context
        layer.has_tokens = True
    cache.full_rows = True
    return cache


def filled_static(model: Any, batch: int, context: int) -> StaticCache:
    """transformers' cache of fixed capacity, likewise."""
    cache = StaticCache(config=model.config, max_cache_len=context + ROOM)
    empty = no_tokens(model, batch)
    for layer in cache.layers:
        layer.lazy_initialization(empty, empty)
        randomize(layer.keys)
        randomize(layer.values)
        layer.cumulative_length.fill_(context)
    return cache


def filled_dynamic(model: Any, batch: int, context: int) -> DynamicCache:
    """transformers' growing cache, likewise."""
    cache = DynamicCache(config=model.config)
    empty = no_tokens(model, batch)
    for layer in cache.layers:
        layer.lazy_initialization(empty, empty)
        layer.keys, layer.values = (empty.new_empty(*empty.shape[:2], context, empty.shape[3]) for _ in "kv")
        randomize(layer.keys)
        randomize(layer.values)
    return cache


def any_batch(cache: KVMixStaticCache, tokens: Tensor) -> None:
    """Have the next graph compiled for every batch size at once, instead of for this one and then for all."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    tensors += [b for t in tensors if isinstance(t, QuantizedKVTensor) for b in t.cached.tensors]
    for tensor in (tokens, *tensors):
        # by hand: torch._dynamo.maybe_mark_dynamic would extend a set that all packed tensors share
        known = getattr(tensor, "_dynamo_weak_dynamic_indices", set())
        tensor._dynamo_weak_dynamic_indices = {0, *known}


def decode(model: Any, cache: Any, tokens: Tensor, steps: int) -> list[float]:
    """Seconds of each of `steps` greedy decode steps that continue with `tokens` [B, 1]."""
    times = []
    with torch.no_grad():
        for _ in range(steps):
            torch.cuda.synchronize()
            start = time.perf_counter()
            logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return times


def attempt(
    model: Any, make: Callable[[int, int], Any], case: Case, size: int, steps: int, first: bool = False
) -> Tried | str:
    """Fill a cache of a size and decode on it; a string says why that failed.

    Args:
        model: compiled or not.
        make: takes batch and context, returns a filled cache.
        case: how a size becomes a batch and a context.
        size: to be tried.
        steps: of which the last `TIMED_STEPS` count.
        first: whether this is the call that compiles.
    """
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    batch, context = case.shape(size)
    try:
        cache = make(batch, context)
        tokens = torch.ones((batch, 1), dtype=torch.int64, device=model.device)
        if first and batch > 1:
            any_batch(cache, tokens)
        with warnings.catch_warnings():
            # a step that cannot be recorded for want of memory does not fit
            warnings.filterwarnings("error", message="decode steps are not replayed")
            seconds = decode(model, cache, tokens, steps)
    except (RuntimeError, UserWarning, ValueError) as problem:
        text = str(problem)
        memory = isinstance(problem, torch.OutOfMemoryError) or "out of memory" in text
        return (
            "out of memory" if memory else f"not for want of memory: {type(problem).__name__}: {text[:300]}"
        )
    return Tried(size, seconds[-TIMED_STEPS:], torch.cuda.max_memory_allocated(), cache_bytes(cache))


def predict(small: Tried, large: Tried, limit: float) -> int:
    """The size at which the peak reaches `limit` bytes, if it goes on growing as from `small` to `large`."""
    slope = (large.peak - small.peak) / (large.size - small.size)
    return int(small.size + (limit - small.peak) / slope)


def largest(fits: Callable[[int], bool], predicted: int, stride: int) -> tuple[int, int]:
    """(largest size that fits, smallest that does not), multiples of `stride`, one stride apart.

    The first is 0 if nothing fits. Doubles its steps away from the prediction until both are known, then
    halves.
    """
    good, bad = 0, 0
    at, step = max(1, predicted // stride), 1
    while not bad or bad - good > 1:
        if fits(at * stride):
            good = at
        else:
            bad = at
        if not bad:
            at = good + step
        elif not good:
            at = max(1, bad - step)
        else:
            at = (good + bad) // 2
        step *= 2
    return good * stride, bad * stride


def search(
    attempt: Callable[[int, int], Tried | str], guess: int, limit: float, unit: int, resolution: float
) -> tuple[Tried | None, int, str]:
    """(largest that fitted, smallest size that did not, why not).

    Args:
        attempt: takes a size and a number of steps.
        guess: roughly the largest size; shares of it are tried first and must fit for a prediction.
        limit: bytes that there are.
        unit: sizes are multiples of it.
        resolution: share of the predicted size between two sizes that are told apart.
    """

    def whole(size: float) -> int:
        return max(1, int(size / unit)) * unit

    probes = [attempt(whole(share * guess), PROBE_STEPS) for share in PROBES]
    small, large = probes
    predicted = guess
    if isinstance(small, Tried) and isinstance(large, Tried) and large.peak > small.peak:
        predicted = predict(small, large, limit)
    print(
        f"  probes {[p if isinstance(p, str) else (p.size, p.peak) for p in probes]}, predicted {predicted}"
    )
    fitted: dict[int, Tried] = {}
    reasons: dict[int, str] = {}

    def fits(size: int) -> bool:
        result = attempt(size, WARM_STEPS + TIMED_STEPS)
        if isinstance(result, str):
            reasons[size] = result
        else:
            fitted[size] = result
        print(f"  {size}: {result if isinstance(result, str) else 'fits'}", flush=True)
        return size in fitted

    good, bad = largest(fits, whole(predicted), whole(resolution * predicted))
    return fitted.get(good), bad, reasons[bad]


def rows_of(case: Case, name: str, provider: str, found: Tried, bits: float | None) -> list[Row]:
    """The rows of the largest size."""
    batch, _ = case.shape(found.size)
    p20, median, p80 = percentiles(found.seconds)
    facts = {"effective_bits": bits, "bytes": found.cache}
    unit = "rows" if case.batch is None else "tokens"
    return [
        make_row("generate", name, provider, case.metric, found.size, unit, **facts),
        make_row(
            "generate", name, provider, "tokens_per_second", batch / median, "token/s",
            p20=batch / p80, p80=batch / p20, **facts,
        ),
        make_row("generate", name, provider, "peak_bytes", found.peak, "bytes", **facts),
    ]  # fmt: skip


def compare(name: str, metric: str, folder: Path) -> None:
    """Compare the sizes in `folder` with the best of transformers', whichever were measured first."""
    rows = [
        row for row in load("generate", machine_name(), folder) if (row.case, row.metric) == (name, metric)
    ]
    plain = [row for row in rows if row.provider in TRANSFORMERS]
    if plain:
        best = max(plain, key=lambda row: row.value)
        others = [row for row in rows if row.provider not in TRANSFORMERS]
        compared = [
            replace(row, baseline=best.provider, ratio=round(row.value / best.value, 4)) for row in others
        ]
        save(compared, folder)


def give_memory_away(model: nn.Module) -> None:
    """Free the weights' memory until `take_memory_back`. Compiled code stays good, recordings do not."""
    for parameter in model.parameters():
        parameter.untyped_storage().resize_(0)
    gc.collect()
    torch.cuda.empty_cache()


def take_memory_back(model: nn.Module) -> None:
    """Random weights after `give_memory_away`."""
    for parameter in model.parameters():
        parameter.untyped_storage().resize_(parameter.numel() * parameter.element_size())
    set_weights(model)


def run_provider(provider: str, options: argparse.Namespace) -> None:
    """Compile for all cases, then measure them."""
    limit = options.memory * 1e9
    with turn(options.turns, alone=False):
        model: Any = build(options.shape)
        plan = KVMIX[provider](model) if provider in KVMIX else None
        if plan is not None:
            kvmix_fx.compile(model, plan, inner=options.inner)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

        def make(batch: int, context: int) -> Any:
            if plan is not None:
                return filled_packed(model, plan, batch, context)
            filled = filled_static if provider == "transformers static" else filled_dynamic
            return filled(model, batch, context)

        def guess(case: Case) -> int:
            batch, context = case.shape(1)
            config = model.config
            elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
            bits = 16 if plan is None else plan.bits_per_element(case.context)
            tokens = (limit - weights) / (elements * bits / 8)
            return int(tokens / (batch if case.context is None else context))

        if plan is not None:
            for case in options.case:
                start = time.perf_counter()
                # odd, because a batch that equals another size that is open at compile time is tied to it
                size = max(case.unit, int(PROBES[0] * guess(case)) // case.unit * case.unit) | (
                    case.unit == 1
                )
                result = attempt(model, make, case, size, PROBE_STEPS, first=True)
                seconds = time.perf_counter() - start
                print(f"{case.name(options.shape, options.memory)} {provider}: first steps {seconds:.1f} s")
                if isinstance(result, str):
                    print(f"  {size}: {result}", flush=True)
        give_memory_away(model)
    with turn(options.turns, alone=True):
        take_memory_back(model)
        for case in options.case:
            measure(model, make, case, provider, plan, guess(case), options)
        if plan is not None:
            graphs = [graph.replay or "replayed" for graph in kvmix_fx.compiled(model).report.graphs]
            print(f"{provider}: graphs {graphs}", flush=True)
            kvmix_fx.restore(model)
        torch._dynamo.reset()
        # before the next process has its turn
        give_memory_away(model)


def measure(
    model: Any, make: Callable[[int, int], Any], case: Case, provider: str, plan: KVPlan | None, guess: int,
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """Search the largest size of a case, print and save it."""
    name = case.name(options.shape, options.memory)
    start = time.perf_counter()
    found, too_large, reason = search(
        lambda size, steps: attempt(model, make, case, size, steps),
        guess, options.memory * 1e9, case.unit, options.resolution,
    )  # fmt: skip
    spent = time.perf_counter() - start
    if found is None:
        print(f"{name} {provider}: not even {too_large} fit: {reason}", flush=True)
        return
    bits = None if plan is None else plan.bits_per_element(case.shape(found.size)[1])
    rows = rows_of(case, name, provider, found, bits)
    save(rows, options.output)
    compare(name, case.metric, options.output)
    print(
        f"{name} {provider}: {found.size} fit, {too_large} did not ({reason}); {rows[1].value:.1f} tok/s, "
        f"cache {found.cache / 2**30:.2f} GiB, peak {found.peak / 2**30:.2f} GiB; found in {spent:.0f} s",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument(
        "--case", action="append", type=Case.parse, required=True,
        help='"b1": the longest context of one row; "n8192": the largest batch; repeatable',
    )  # fmt: skip
    parser.add_argument(
        "--provider", action="append", choices=[*TRANSFORMERS, *KVMIX], help="repeatable; default: three"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--inner", help="inner compiler of kvmix; default: its own choice")
    parser.add_argument("--memory", type=float, default=80, help="GB that there are; default: 80")
    parser.add_argument("--resolution", type=float, default=0.01, help="share of a size; default: 0.01")
    parser.add_argument("--turns", type=Path, help="a file that processes which measure in turns share")
    options = parser.parse_args()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory * 1e9 / total))
    for provider in options.provider or DEFAULT_PROVIDERS:
        run_provider(provider, options)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
