"""Continuous batching over packed pages on a GPU, against transformers' own with as much memory.

    python -m benchmarks.serving.gpu --shape llama-3.1-8b --requests 64 --seconds 300

Parts, each on its own, errors printed and the next one tried:

check: a small model; requests side by side, steps recorded, against each alone, by the log-probabilities
    of what was chosen. 8 bits; the control, 2 bits alone, must differ.
kernels: what a step does in one layer, in microseconds, and attention over as many tokens in a fixed cache.
long: memory of the process and the GPU over `--minutes`, requests of other lengths coming and going; not
    among the parts that run by default.
serve: requests that come all at once, prompts of 1k to 8k tokens, until all are answered or `--each`
    seconds have passed. What is still running then counts with the tokens that it has.

"flash (torch)" is transformers' engine with the flash attention that is part of torch, registered here by
name: it reads what the engine gathers of its 16-bit pages in every step, as its sdpa does, but has no mask
and no padding. The engine's path without gathering needs a package that reads its pages (flash-attn).
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import kvmix_fx
from benchmarks.e2e.models import SHAPES, build
from benchmarks.rows import RESULTS, Row, machine_name, make_row, percentiles, save
from benchmarks.serving.run import Load, long, tiers
from kvmix_fx import KVPlan, QuantSpec
from kvmix_kernels import ops
from kvmix_kernels.cached import allocate
from kvmix_kernels.paged.pages import LayerShape, PagePool, page_layout
from kvmix_kernels.paged.step import Request, Step
from kvmix_kernels.paged.tables import tables_for

SUITE = "serving"
FLASH = "flash_torch"
GIB = 1 << 30
BEGUN = time.perf_counter()


def say(text: str) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.perf_counter() - BEGUN:7.1f}] {text}", flush=True)


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    scaling: float | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of the engine's sequences side by side, by what torch brings along."""
    if cache is not None:
        # from 5.24 on layers do it
        key, value = cache.update(key, value, module.layer_idx, kwargs)
    begin_q, begin_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    if query.is_cuda:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = torch.ops.aten._flash_attention_forward(
            q, k, v, begin_q, begin_k, kwargs["max_length_q"], kwargs["max_length_k"], 0.0, True, False,
            scale=scaling,
        )[0]  # fmt: skip
        return out.unsqueeze(0), None
    out = torch.zeros_like(query)
    bounds = (begin_q.tolist(), begin_k.tolist())
    for a, b, c, d in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:], strict=False):
        if b > a:
            seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
            out[:, :, a:b] = functional.scaled_dot_product_attention(
                query[:, :, a:b], key[:, :, c:d], value[:, :, c:d], seen, scale=scaling, enable_gqa=True
            )
    return out.transpose(1, 2), None


def k2v2(model: nn.Module) -> KVPlan:
    """2-bit keys in groups of 128 tokens, 2-bit values with one scale a token; 4 sinks, a window of 32."""
    return KVPlan.uniform(model, 2, 2, window=32, sink_length=4).with_layers(
        "all", key=QuantSpec(2, "channel", 128), value=QuantSpec(2, "token", "head"), tile=128
    )


PLANS: dict[str, Callable[[Any], KVPlan]] = {
    "kvmix k2v2 g128 w32 s4": k2v2,
    "kvmix tiers tile_keys w32 s4": tiers,
    "kvmix k4v2 g32 w32 s4": lambda model: KVPlan.uniform(model, 4, 2, window=32, sink_length=4),
}
ENGINE = {
    "transformers sdpa": ("sdpa", {}),
    "transformers flash (torch)": (FLASH, {}),
    "transformers flash (torch), no graphs": (FLASH, {"use_cuda_graph": False, "use_async_batching": False}),
}
OVERLAPPED = ", overlapped"
PLAIN = ", no graphs"
DEFAULT = (
    "kvmix k2v2 g128 w32 s4",
    "transformers flash (torch), no graphs",
    "kvmix k2v2 g128 w32 s4" + OVERLAPPED,
    "transformers flash (torch)",
    "kvmix tiers tile_keys w32 s4" + OVERLAPPED,
    "transformers sdpa",
)


def open_manager(model: Any, provider: str, memory: int, tokens: int, **more: Any) -> Any:
    """A manager that has `memory` bytes for its cache, and its model's attention set."""
    text = model.config
    config = GenerationConfig(eos_token_id=-1, pad_token_id=0, do_sample=False)
    if provider in ENGINE:
        name, given = ENGINE[provider]
        if name == FLASH:
            # the setter looks for the package of that name
            model.config._attn_implementation = name
        else:
            model.set_attn_implementation(name)
        page = ContinuousBatchingConfig().page_size
        block = (
            2
            * text.num_hidden_layers
            * text.num_key_value_heads
            * text.head_dim
            * page
            * model.dtype.itemsize
        )
        options = ContinuousBatchingConfig(
            max_batch_tokens=tokens,
            num_blocks=max(4, memory // block),
            auto_switch_to_flash=False,
            **given,
            **more,
        )
        return model.init_continuous_batching(generation_config=config, continuous_batching_config=options)
    given = {}
    plan = provider
    if provider.endswith(OVERLAPPED):
        plan, given = provider.removesuffix(OVERLAPPED), {"use_async_batching": True}
    elif provider.endswith(PLAIN):
        plan, given = provider.removesuffix(PLAIN), {"use_cuda_graph": False}
    options = ContinuousBatchingConfig(max_batch_tokens=tokens, **given, **more)
    return kvmix_fx.serve(
        model, PLANS[plan](model), memory=memory, generation_config=config, continuous_batching_config=options
    )


def close_manager(model: Any, manager: Any) -> None:
    """End it, whatever it does, and free what it had."""
    manager.stop(hard_stop=True, timeout=30)
    manager.destroy()
    model.set_attn_implementation("sdpa")
    del manager
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def finished(manager: Any, names: Sequence[str], seconds: float) -> dict[str, Any]:
    """Results that are there in time."""
    end = time.perf_counter() + seconds
    found: dict[str, Any] = {}
    said = time.perf_counter()
    while len(found) < len(names) and time.perf_counter() < end:
        result = manager.get_result(timeout=0.2)
        if result is not None and result.request_id in names and result.is_finished():
            found[result.request_id] = result
        if manager.background_thread_status.fatal_error is not None:
            raise RuntimeError(
                "the thread that steps ended"
            ) from manager.background_thread_status.fatal_error
        if time.perf_counter() - said > 5:
            said = time.perf_counter()
            scheduler = manager.batch_processor.scheduler
            counts = getattr(manager, "counts", "")
            say(
                f"    {len(found)} finished, {len(scheduler.active_requests)} active, "
                f"{len(scheduler.waiting_requests)} waiting, {counts}"
            )
    return found


# ---- check


def check(memory: int, new: int = 100) -> bool:
    """Whether requests side by side are what each is alone, on this device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    SHAPES["check"] = SHAPES["tiny"] | {
        "hidden_size": 512, "intermediate_size": 512, "head_dim": 128, "num_attention_heads": 8,
        "num_key_value_heads": 2, "num_hidden_layers": 3, "max_position_embeddings": 4096,
    }  # fmt: skip
    model = build("check", device, dtype=torch.bfloat16)
    with torch.no_grad():
        # as built logits hardly differ from token to token
        model.lm_head.weight.mul_(4)
    drawn = random.Random(1)
    prompts = [[drawn.randrange(32000) for _ in range(n)] for n in (130, 300, 700, 1100, 260, 520, 384, 900)]

    def answers(bits: int, alone: bool, **given: Any) -> list[Any]:
        plan = KVPlan.uniform(model, bits, bits, window=32, sink_length=4).with_layers(
            "all", key=QuantSpec(bits, "channel", 128), value=QuantSpec(bits, "token", "head"), tile=128
        )
        config = GenerationConfig(eos_token_id=-1, pad_token_id=0, do_sample=False)
        options = ContinuousBatchingConfig(
            max_batch_tokens=512, return_logprobs=True, allow_block_sharing=not alone, **given
        )
        with kvmix_fx.serve(
            model, plan, memory=memory, generation_config=config, continuous_batching_config=options
        ) as manager:
            found: list[Any] = []
            for group in [[prompt] for prompt in prompts] if alone else [prompts]:
                names = manager.add_requests(group, max_new_tokens=new)
                results = finished(manager, names, 60)
                for name in names:
                    if name not in results or results[name].error is not None:
                        raise RuntimeError(f"no answer: {results.get(name)}")
                found += [results[name] for name in names]
        say(f"check: {bits} bits, {'alone' if alone else 'side by side'}, {given}: {manager.counts}")
        return found

    graphs: dict[str, Any] = {}
    if device == "cuda":
        from kvmix_kernels.triton import paged  # noqa: F401  # whatever keeps it from being imported is said

        graphs = {"use_cuda_graph": (False, True)}
    side = answers(8, False, **graphs)
    eager = answers(8, True, use_cuda_graph=False)
    reports = {"side by side against alone": apart(side, eager)}
    if device == "cuda":
        reports["the same without graphs"] = apart(answers(8, False, use_cuda_graph=False), eager)
        reports["overlapped"] = apart(answers(8, False, **graphs, use_async_batching=True), eager)
    exact = []
    with torch.no_grad():
        for prompt, result in zip(prompts, side, strict=True):
            ids = torch.tensor([[*prompt, *result.generated_tokens[:-1]]], device=device)
            logits = model(ids).logits[0, len(prompt) - 1 :].float().log_softmax(-1)
            chosen = torch.tensor(result.generated_tokens, device=device).unsqueeze(1)
            exact.append((logits.gather(1, chosen).squeeze(1).cpu() - torch.tensor(result.logprobs)).abs())
    every = torch.cat(exact)
    coarse = apart(answers(2, False, **graphs), side)
    for what, (mean, most, share) in reports.items():
        say(f"check: {what}: mean {mean:.5f}, most {most:.5f}, choices before the first other {share:.3f}")
    say(f"check: against the model's own bfloat16 cache: mean {every.mean():.5f}, most {every.max():.5f}")
    say(
        f"check: control, 2 bits against 8: mean {coarse[0]:.5f}, "
        f"choices before the first other {coarse[2]:.3f}"
    )
    good = all(mean < 0.02 and share > 1.5 * coarse[2] for mean, _, share in reports.values())
    good = good and bool(every.mean() < 0.08)
    say(f"check: {'good' if good else 'NOT GOOD'}")
    return good


def apart(some: list[Any], others: list[Any]) -> tuple[float, float, float]:
    """(mean, largest difference of log-probabilities as long as choices agree, share that agrees)."""
    differences, agreed, total = [0.0], 0, 0
    for a, b in zip(some, others, strict=True):
        total += len(a.generated_tokens)
        for x, y, p, q in zip(a.generated_tokens, b.generated_tokens, a.logprobs, b.logprobs, strict=False):
            if x != y:
                break
            agreed += 1
            differences.append(abs(p - q))
    return sum(differences) / len(differences), max(differences), agreed / total


# ---- kernels


def timed(run: Callable[[], Any], count: int = 20) -> float:
    """Microseconds of one run, of many recorded as a graph."""
    run()
    synchronize()
    if not torch.cuda.is_available():
        return 0.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            run()
    graph.replay()
    synchronize()
    samples = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        synchronize()
        samples.append(start.elapsed_time(end) * 1000 / count)
    return percentiles(samples)[1]


def kernels(batch: int, length: int) -> list[Row]:
    """Times of what a step does in one layer."""
    from kvmix_kernels.layout import make_format
    from kvmix_kernels.triton import paged

    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads, group, D = 8, 4, 128
    pairs = {
        "kvmix k2v2 g128 w32 s4": (
            make_format(2, "channel", 128, 128, 4, 32), make_format(2, "token", 0, 128, 4, 32),
        ),
        "kvmix tiers tile_keys w32 s4": (
            make_format(4, "channel", 128, 128, 4, 32, "byte", tiers=((4, 32), (2, 96)), order="tile_keys"),
            make_format(2, "token", 0, 128, 4, 32, "byte", rotation=True, symmetric=True),
        ),
    }  # fmt: skip
    rows = []
    case = f"step over pages b{batch} h{heads}x{group} n{length} d{D}"
    for provider, (key, value) in pairs.items():
        try:
            laid = page_layout({0: LayerShape(key, value, heads, D, D)}, torch.bfloat16, 128)
            each = length // laid.tokens + 1
            blocks = batch * (each + 1) + 8
            sectors = batch + -(-blocks // laid.blocks_per_tail)
            pool = PagePool(laid, torch.zeros(sectors * laid.tail_nbytes, dtype=torch.uint8, device=device))
            pool.tails(0)[0].normal_()
            pool.tails(0)[1].normal_()
            first = batch * laid.blocks_per_tail
            order = (
                torch.randperm(batch * each, generator=torch.Generator().manual_seed(1)).add(first).tolist()
            )

            def request(
                i: int, place: int, past: int, count: int, laid: Any = laid, order: Any = order,
                each: int = each, first: int = first,
            ) -> Request:  # fmt: skip
                pages = order[i * each : (i + 1) * each]
                return Request(place, count, past, laid.raw_from(past), pages, i, first + batch * each + i)

            def tensors(n: int) -> list[Tensor]:
                return [
                    torch.randn(n, h, D, dtype=torch.bfloat16, device=device)
                    for h in (heads * group, heads, heads)
                ]

            # every page is a packed one
            for i in range(batch):
                step = Step(laid, [request(i, 0, 0, length)], device)
                _, k, v = tensors(length)
                paged.store(pool, 0, tables_for(step, torch.device(device)), k, v)
            plain = Step(laid, [request(i, i, length, 1) for i in range(batch)], device)
            full = Step(laid, [request(i, i, length + laid.tokens - 1, 1) for i in range(batch)], device)
            prompt = min(2048, length // 2)
            some = Step(laid, [request(0, 0, length - prompt, prompt)], device)
            a, b, c = (tables_for(step, torch.device(device)) for step in (plain, full, some))
            q, k, v = tensors(batch)
            _, k2, v2 = tensors(prompt)
            times = {
                "decode attention": timed(lambda: paged.attend_singles(pool, 0, a, q, k, v, D**-0.5)),  # noqa: B023
                "keep, no page due": timed(lambda: paged.store(pool, 0, a, k, v)),  # noqa: B023
                "keep, a page of each due": timed(lambda: paged.store(pool, 0, b, k, v)),  # noqa: B023
                "read of one history": timed(lambda: paged.gather(pool, 0, c, k2, v2)),  # noqa: B023
                f"keep, prompt of {prompt}": timed(lambda: paged.store(pool, 0, c, k2, v2)),  # noqa: B023
            }
            one = [
                allocate(batch, heads, D, length // f.tile, f.residual_slots, f, torch.bfloat16, device)
                for f in (key, value)
            ]
            for cached in one:
                for buffer in cached.tensors:
                    buffer.zero_()
            times["the same in fixed caches"] = timed(
                lambda: ops.attend(
                    q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2),  # noqa: B023
                    one[0].tensors, one[1].tensors, None, None,  # noqa: B023
                    length, D**-0.5, one[0].format.encode(), one[1].format.encode(),  # noqa: B023
                )
            )  # fmt: skip
            for metric, value_us in times.items():
                say(f"{case} {provider}: {metric} {value_us:.1f} us")
                rows.append(make_row(SUITE, case, provider, metric, value_us, "us"))
        except Exception:
            say(f"{provider}: ERROR\n{traceback.format_exc()}")
    return rows


# ---- serve


def measure(
    model: Any, provider: str, options: argparse.Namespace, prompts: list[list[int]], case: str
) -> list[Row]:
    """One provider's rows."""
    memory = int(options.memory * GIB)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    manager = open_manager(model, provider, memory, options.tokens)
    try:
        manager.start()
        while manager.batch_processor is None:
            time.sleep(0.01)
        cache = manager.batch_processor.cache
        size = cache.cache_tensor.numel()
        graphs = manager.batch_processor.cb_config.use_cuda_graph
        if provider not in ENGINE and not provider.endswith(PLAIN) and torch.cuda.is_available():
            # without kernels a measurement would be of something else
            assert graphs == (False, True), graphs
        say(f"{provider}: cache {size / GIB:.2f} GiB, {cache.num_blocks} blocks, graphs {graphs}")
        begun = time.perf_counter()
        drawn = random.Random(9)
        warm = [
            [drawn.randrange(1000) for _ in range(n)] for n in (options.longest, *[96] * (len(prompts) // 2))
        ]
        done = finished(manager, manager.add_requests(warm, max_new_tokens=4), options.each)
        say(f"{provider}: warm after {time.perf_counter() - begun:.1f} s ({len(done)} of {len(warm)})")
        if len(done) < len(warm):
            raise RuntimeError("not warm in time")
        begun = time.perf_counter()
        names = manager.add_requests(prompts, max_new_tokens=options.new, record_timestamps=True)
        found = finished(manager, names, options.each)
        seconds = time.perf_counter() - begun
        states = list(manager.batch_processor.scheduler.active_requests.values())
        stamps = [(r.created_time, list(r.timestamps or ())) for r in found.values()]
        failed = sum(r.error is not None for r in found.values())
        stamps += [(s.created_time, list(s._timestamps)) for s in states if s.request_id not in found]
        if options.profile and provider == options.profile:
            profile_steps(manager, options)
    finally:
        close_manager(model, manager)
    if len(found) == len(names):
        seconds = max(times[-1] for _, times in stamps) - begun
    tokens = sum(len(times) for _, times in stamps)
    first = [times[0] - created for created, times in stamps if times]
    between = [b - a for _, times in stamps for a, b in pairwise(times)]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    figures: list[tuple[str, float, str]] = [
        ("requests a second", len(found) / seconds, "request/s"),
        ("new tokens a second", tokens / seconds, "token/s"),
        ("finished", len(found) / len(names), "share"),
        ("failed", failed, "requests"),
        ("seconds", seconds, "s"),
        ("peak memory", peak, "byte"),
    ]
    for what, samples, factor, unit in (
        ("time to first token", first, 1, "s"), ("time between tokens", between, 1000, "ms"),
    ):  # fmt: skip
        if samples:
            ordered = sorted(samples)
            figures += [
                (f"{what}, p{p}", factor * ordered[min(len(ordered) - 1, len(ordered) * p // 100)], unit)
                for p in (50, 99)
            ]
    say(f"{provider}: " + ", ".join(f"{name} {value:.4g} {unit}" for name, value, unit in figures))
    return [make_row(SUITE, case, provider, name, value, unit, bytes=size) for name, value, unit in figures]


def profile_steps(manager: Any, options: argparse.Namespace) -> None:
    """Print what half a second of decoding consists of."""
    if not torch.cuda.is_available():
        return
    drawn = random.Random(5)
    count, length = min(48, options.requests), (options.shortest + options.longest) // 2
    prompts = [[drawn.randrange(1000) for _ in range(length)] for _ in range(count)]
    for state in list(manager.batch_processor.scheduler.active_requests):
        manager.cancel_request(state)
    names = manager.add_requests(prompts, max_new_tokens=400)
    end = time.perf_counter() + 25
    scheduler = manager.batch_processor.scheduler
    while time.perf_counter() < end:
        states = list(scheduler.active_requests.values())
        if not scheduler.waiting_requests and len(states) >= count and all(s.generated_len() for s in states):
            break
        time.sleep(0.05)
    steps, begun = getattr(manager, "counts", None) and manager.counts.steps, time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        time.sleep(0.5)
    took = time.perf_counter() - begun
    if steps is not None:
        say(f"    {manager.counts.steps - steps} steps of {count} requests of {length} in {took:.2f} s")
    print(
        found.key_averages().table(sort_by="cuda_time_total", row_limit=22, max_name_column_width=60),
        flush=True,
    )
    for name in names:
        manager.cancel_request(name)


def serve(options: argparse.Namespace, left: Callable[[], float]) -> None:
    """All providers in turn."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(options.shape, device, options.layers, dtype=torch.bfloat16)
    weights = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    say(f"{options.shape}: weights {weights / GIB:.1f} GiB")
    AttentionInterface.register(FLASH, varlen_attention)
    drawn = random.Random(3)
    lengths = [drawn.randint(options.shortest, options.longest) for _ in range(options.requests)]
    prompts = [[drawn.randrange(1000) for _ in range(n)] for n in lengths]
    layers = "" if options.layers is None else f" {options.layers} layers"
    case = (
        f"{options.shape}{layers} {options.requests} requests of {options.shortest}-{options.longest} tokens "
        f"and {options.new} new in {options.memory:g} GiB"
    )
    say(f"{case}: {sum(lengths)} tokens of prompts")
    every: dict[str, list[Row]] = {}
    for provider in options.providers:
        if left() < 15:
            say(f"{provider}: left out, no time")
            continue
        try:
            faulthandler.dump_traceback_later(2 * options.each + 60)
            every[provider] = measure(model, provider, options, prompts, case)
            keep(every[provider], options)
        except Exception:
            say(f"{provider}: ERROR\n{traceback.format_exc()}")
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        finally:
            faulthandler.cancel_dump_traceback_later()
    for base in (name for name in every if name in ENGINE):
        for name, rows in every.items():
            if name in ENGINE:
                continue
            for metric in ("requests a second", "new tokens a second"):
                a, b = (next(r.value for r in some if r.metric == metric) for some in (rows, every[base]))
                if b:
                    say(f"{name} against {base}: {metric} {a / b:.2f}x")
    best = [name for name in every if name in ENGINE]
    if best:
        base = max(
            best, key=lambda name: next(r.value for r in every[name] if r.metric == "new tokens a second")
        )
        for name, rows in every.items():
            if name != base:
                compared = []
                for row, other in zip(rows, every[base], strict=False):
                    if row.metric == other.metric and row.unit in ("request/s", "token/s") and other.value:
                        ratio = row.value / other.value
                        compared.append(
                            make_row(
                                SUITE, case, name, row.metric, row.value, row.unit,
                                bytes=row.bytes, baseline=base, ratio=ratio,
                            )
                        )  # fmt: skip
                keep(compared, options)


def run_long(options: argparse.Namespace) -> list[Row]:
    """Requests of all lengths for some minutes, in the pool that `serve` has."""
    model = build(options.shape, "cuda", options.layers, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = -1
    load = Load(
        options.shape, (options.shortest, options.longest), 1024, options.new, 48, options.tokens,
        int(options.memory * GIB),
    )  # fmt: skip
    return long(options.minutes, model, PLANS[DEFAULT[0]](model), DEFAULT[0], load)


def keep(rows: list[Row], options: argparse.Namespace) -> None:
    """Write rows now."""
    for path in save(rows, options.output):
        say(f"{len(rows)} rows in {path.name}")


def main() -> None:
    """Measure, print, write rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=["check", "kernels", "serve"])
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=8192)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--memory", type=float, default=8, help="GiB of the cache")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--each", type=float, default=45, help="seconds of a provider at most")
    parser.add_argument("--minutes", type=float, default=4, help="of the part long")
    parser.add_argument("--seconds", type=float, default=300, help="of all, after which the process ends")
    parser.add_argument("--providers", nargs="*", default=list(DEFAULT))
    parser.add_argument("--profile", default=DEFAULT[0], help="provider whose decode steps are profiled")
    parser.add_argument("--batch", type=int, default=64, help="of the part kernels")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    end = BEGUN + options.seconds

    def over() -> None:
        say("time is over; where the threads are:")
        faulthandler.dump_traceback(all_threads=True)
        sys.stdout.flush()
        os._exit(3)

    watch = threading.Timer(options.seconds, over)
    watch.daemon = True
    watch.start()
    say(f"{machine_name()}, torch {torch.__version__}, rows go to {options.output}")
    parts: dict[str, Callable[[], Any]] = {
        "check": lambda: check(256 << 20),
        "kernels": lambda: keep(kernels(options.batch, options.longest), options),
        "long": lambda: keep(run_long(options), options),
        "serve": lambda: serve(options, lambda: end - time.perf_counter()),
    }
    for part in options.parts:
        say(f"== {part}")
        try:
            parts[part]()
        except Exception:
            say(f"{part}: ERROR\n{traceback.format_exc()}")
    say("end")


if __name__ == "__main__":
    main()
