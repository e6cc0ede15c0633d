"""Continuous batching over packed pages on a CPU: are requests what they are alone, and how many fit.

SmolLM2, in float32 where logits are compared. Every part stands alone:

    python -m benchmarks.serving.run equality prefix capacity speed
    python -m benchmarks.serving.run long

equality: 32 prompts of 20 to 1500 tokens that arrive at random; of every request the logits side by side
    against those of the same request alone, at 8 bits. The control is the same with 2 bits alone.
prefix: 16 requests with a prefix in common; blocks that hold it, against those of 16 copies.
capacity: requests of 8192 tokens that a pool holds, against transformers' own of as many bytes.
speed: tokens a second of 16 requests, against transformers' own engine in the same run.
long: minutes of requests that come, share prefixes, end and are cancelled: what the process occupies, and the
    pool at the end. A tiny model, so that there are many.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.requests import RequestState

import kvmix_fx
from benchmarks.rows import Row, make_row, save
from kvmix_fx.plan import KVPlan
from kvmix_fx.testing.batching import Logits, free_share, results
from kvmix_fx.testing.models import tiny_llama
from kvmix_fx.testing.smollm2 import load_smollm2
from kvmix_fx.testing.texts import prose

SUITE = "serving"
NEW = 8
ENGINE = "transformers continuous batching"
MEMORY = 1 << 30


def tiers(model: PreTrainedModel) -> KVPlan:
    """The preset of 2.4 bits with orders of channels that pages can share: from the keys of each tile."""
    plan = KVPlan.preset("tiers", model)
    layers = tuple(replace(layer, key=replace(layer.key, order="tile_keys")) for layer in plan.layers)
    return replace(plan, layers=layers, name="tiers, tile_keys")


def plan_of(model: PreTrainedModel, bits: int) -> KVPlan:
    return KVPlan.uniform(model, bits, bits, sink_length=4)


def text_tokens(tokenizer: Any, count: int) -> list[int]:
    """The first tokens of the language reference."""
    return list(tokenizer(prose()[: 4 * count])["input_ids"][:count])


def make_prompts(tokens: Sequence[int], count: int, seed: int) -> list[list[int]]:
    """Pieces of the text of 20 to 1500 tokens, of any length between as likely."""
    drawn = random.Random(seed)
    lengths = [20, 1500, *(drawn.randint(20, 1500) for _ in range(count - 2))]
    return [list(tokens[at : at + n]) for n in lengths for at in [drawn.randrange(len(tokens) - n)]]


@contextmanager
def serving(
    model: PreTrainedModel, plan: KVPlan, memory: int = MEMORY, tokens: int = 512, **given: Any
) -> Iterator[Any]:
    options = ContinuousBatchingConfig(max_batch_tokens=tokens, **given)
    with kvmix_fx.serve(model, plan, memory=memory, continuous_batching_config=options) as manager:
        yield manager


def divergence(logits: Tensor, other: Tensor) -> Tensor:
    """KL(other || logits) of each row, in nats."""
    a, b = logits.double().log_softmax(-1), other.double().log_softmax(-1)
    return (b.exp() * (b - a)).sum(-1)


Answer = tuple[list[int], Tensor]


def ask(manager: Any, heard: Logits, prompts: Sequence[list[int]], pause: float = 0.0) -> list[Answer]:
    """Tokens and logits of requests that arrive one by one."""
    drawn = random.Random(7)
    names = []
    for prompt in prompts:
        names.append(manager.add_request(prompt, max_new_tokens=NEW))
        if pause:
            time.sleep(drawn.expovariate(1 / pause))
    found = results(manager, names, 3600)
    return [(found[name].generated_tokens, torch.stack(heard.by_request.pop(name))) for name in names]


def compared(answers: Sequence[Answer], others: Sequence[Answer]) -> tuple[float, float, float, float]:
    """Largest difference of logits, largest and mean divergence, and share of equal choices.

    A row counts as long as the tokens before it are the same.
    """
    worst, kls, same = 0.0, [], []
    for (tokens, logits), (theirs, other) in zip(answers, others, strict=True):
        agree = next(
            (i for i, (a, b) in enumerate(zip(tokens, theirs, strict=True)) if a != b), len(tokens) - 1
        )
        mine, yours = logits[: agree + 1], other[: agree + 1]
        worst = max(worst, (mine - yours).abs().max().item())
        kls.append(divergence(mine, yours))
        same.append((mine.argmax(-1) == yours.argmax(-1)).double())
    joined = torch.cat(kls)
    return worst, joined.max().item(), joined.mean().item(), torch.cat(same).mean().item()


def equality(count: int, pause: float) -> list[Row]:
    """Requests side by side against each alone."""
    model, tokenizer = load_smollm2()
    model.generation_config.eos_token_id = -1
    prompts = make_prompts(text_tokens(tokenizer, 30000), count, 3)
    total = sum(map(len, prompts))
    print(f"{count} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {total} in all")
    fine, coarse = plan_of(model, 8), plan_of(model, 2)
    with serving(model, fine) as manager, Logits(manager) as heard:
        begun = time.perf_counter()
        together = ask(manager, heard, prompts, pause)
        print(f"side by side: {time.perf_counter() - begun:.0f} s")
        free = free_share(manager)
    alone: dict[str, list[Answer]] = {}
    # nothing is shared, so every request is computed by itself
    for name, plan in (("8 bits", fine), ("2 bits", coarse)):
        with serving(model, plan, allow_block_sharing=False) as manager, Logits(manager) as heard:
            alone[name] = [ask(manager, heard, [prompt])[0] for prompt in prompts]
    with torch.no_grad():
        exact = []
        for prompt, (tokens, _) in zip(prompts, together, strict=True):
            ids = torch.tensor([[*prompt, *tokens[:-1]]])
            exact.append((tokens, model(ids, logits_to_keep=NEW).logits[0]))
    case = f"smollm2 {count} requests of 20-1500 tokens, random arrival"
    rows = [make_row(SUITE, case, "kvmix k8v8 g32 w32 s4", "sectors free at the end", free, "share")]
    for provider, baseline, pair in (
        ("kvmix k8v8 g32 w32 s4", "the same alone", (together, alone["8 bits"])),
        ("kvmix k8v8 g32 w32 s4", "float32 cache", (together, exact)),
        ("control: 2 bits alone", "8 bits side by side", (alone["2 bits"], together)),
    ):
        worst, high, mean, same = compared(*pair)
        against = f"against {baseline}"
        print(
            f"{provider} {against}: logits {worst:.3g}, KL {high:.3g} most, {mean:.3g} mean, top-1 {same:.4f}"
        )
        for metric, value, unit in (
            ("largest difference of logits", worst, "logit"),
            ("largest KL", high, "nat"),
            ("mean KL", mean, "nat"),
            ("top-1 agreement", same, "share"),
        ):
            rows.append(make_row(SUITE, case, provider, f"{metric} {against}", value, unit))
    print(f"free at the end: {free}")
    return rows


def prefix(length: int = 1024, count: int = 16) -> list[Row]:
    """Blocks that a prefix of many requests takes."""
    model, tokenizer = load_smollm2()
    model.generation_config.eos_token_id = -1
    tokens = text_tokens(tokenizer, length + 40 * count)
    common, rest = tokens[:length], tokens[length:]
    plan = plan_of(model, 8)
    with serving(model, plan) as manager, Logits(manager) as heard:
        ask(manager, heard, [common])
        packed = manager.cache.packed
        most = 0
        update = manager.batch_processor.update_batch

        def noting() -> None:
            nonlocal most
            held = {block for table in packed.block_table.values() for block in table}
            most = max(most, len(held | packed.ledger.cached_blocks.keys()))
            update()

        manager.batch_processor.update_batch = noting
        prompts = [[*common, *rest[40 * i : 40 * (i + 1)]] for i in range(count)]
        ask(manager, heard, prompts)
        pages = math.ceil((length + 40 + NEW) / packed.tokens_per_page)
        free = free_share(manager)
    shared = length // packed.tokens_per_page
    own = count * (pages - shared)
    case = f"smollm2 {count} requests, {length} tokens in common"
    print(f"{case}: at most {most} blocks; once {shared} and {own} of their own, {count * pages} unshared")
    return [
        make_row(
            SUITE, case, "kvmix k8v8 g32 w32 s4", "blocks at most", most, "blocks",
            baseline="without sharing", ratio=count * pages / most,
        ),
        make_row(SUITE, case, "kvmix k8v8 g32 w32 s4", "sectors free at the end", free, "share"),
    ]  # fmt: skip


def stored(cache: PagedAttentionCache, length: int) -> int:
    """Requests of so many tokens that a cache takes."""
    for number in range(1 << 20):
        cache.pool.try_to_free_sectors()
        if not cache.can_store_request_tokens(RequestState(f"r{number}", []), length):
            return number
    return 1 << 20


def capacity(length: int = 8192, memory: int = 2 << 30) -> list[Row]:
    """Requests that a pool holds."""
    model, _ = load_smollm2(torch.bfloat16)
    config = ContinuousBatchingConfig(max_batch_tokens=512)
    plain_block = model.config.num_hidden_layers * 2 * 3 * 64 * 2 * config.page_size
    own = PagedAttentionCache(
        model.config,
        ContinuousBatchingConfig(
            max_batch_tokens=512, num_blocks=memory // plain_block - 2, max_memory_percent=0.9,
            max_blocks_per_request=0, max_requests_per_batch=64,
        ),
        model.device, DistributedHelper(None, None, {}), torch.bfloat16, True,
    )  # fmt: skip
    base = stored(own, length) * length
    print(f"{ENGINE}: {base} tokens in {own.cache_tensor.numel()} bytes")
    case = f"smollm2 requests of {length} tokens in {memory >> 20} MiB"
    rows = [make_row(SUITE, case, ENGINE, "tokens held", base, "token", bytes=own.cache_tensor.numel())]
    for provider, plan in (
        ("kvmix k2v2 g32 w32 s4", plan_of(model, 2)),
        ("kvmix tiers tile_keys w32 s4", tiers(model)),
        ("kvmix k4v4 g32 w32 s4", plan_of(model, 4)),
    ):
        manager = kvmix_fx.serve(model, plan, memory=memory, continuous_batching_config=config)
        cache = manager.cache
        held = stored(cache, length) * length
        bits = 8 * (cache.nbytes / held) / (plain_block / config.page_size / 2)
        print(f"{provider}: {held} tokens, {held / base:.2f}x, {bits:.3f} bits an element with all")
        rows.append(
            make_row(
                SUITE, case, provider, "tokens held", held, "token",
                baseline=ENGINE, ratio=held / base, effective_bits=bits, bytes=cache.nbytes,
            )
        )  # fmt: skip
        manager.close()
    return rows


def speed(count: int = 16, length: int = 1024, new: int = 24) -> list[Row]:
    """Seconds that requests take, ours and transformers' own in turns."""
    model, tokenizer = load_smollm2()
    model.generation_config.eos_token_id = -1
    tokens = text_tokens(tokenizer, count * length)
    prompts = [tokens[i * length : (i + 1) * length] for i in range(count)]
    case = f"smollm2 {count} requests of {length} tokens and {new} new"
    figures = {}
    for provider in (ENGINE, "kvmix k2v2 g32 w32 s4", "kvmix k8v8 g32 w32 s4"):
        if provider == ENGINE:
            config = ContinuousBatchingConfig(max_batch_tokens=512, num_blocks=count * length // 256 + 40)
            manager = model.init_continuous_batching(continuous_batching_config=config)
        else:
            config = ContinuousBatchingConfig(max_batch_tokens=512)
            plan = plan_of(model, int(provider[7]))
            manager = kvmix_fx.serve(model, plan, memory=MEMORY, continuous_batching_config=config)
        manager.start()
        names = manager.add_requests(prompts, max_new_tokens=new, record_timestamps=True)
        found = results(manager, names, 3600)
        stamps = sorted(stamp for result in found.values() for stamp in result.timestamps)
        last = max(result.timestamps[0] for result in found.values())
        decoding = [stamp for stamp in stamps if stamp > last]
        figures[provider] = (
            count * new / (stamps[-1] - min(result.created_time for result in found.values())),
            len(decoding) / (decoding[-1] - last),
        )
        print(f"{provider}: {figures[provider][0]:.2f} token/s in all, {figures[provider][1]:.2f} decoding")
        manager.stop()
    rows = []
    for i, metric in enumerate(("new tokens a second", "new tokens a second once all decode")):
        base = figures[ENGINE][i]
        for provider, both in figures.items():
            rest = {} if provider == ENGINE else {"baseline": ENGINE, "ratio": both[i] / base}
            rows.append(make_row(SUITE, case, provider, metric, both[i], "token/s", **rest))
    return rows


def resident() -> int:
    """Bytes of memory that this process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Load(NamedTuple):
    """What a server that runs for long is given.

    name: of the case; lengths: fewest and most tokens of a prompt's own; shared: tokens that a third of the
    prompts begin with; new: most new tokens; running: requests at a time; tokens: of a step; memory: bytes of
    the pool.
    """

    name: str = "tiny llama"
    lengths: tuple[int, int] = (5, 300)
    shared: int = 90
    new: int = 60
    running: int = 24
    tokens: int = 512
    # what a pool holds is taken from the system when it is first written to: a small one is full soon
    memory: int = 24 << 20


def long(
    minutes: float = 5,
    model: Any = None,
    plan: KVPlan | None = None,
    provider: str = "kvmix k4v4 g32 w32 s4",
    load: Load = Load(),  # noqa: B008  # not changed
) -> list[Row]:
    """Memory of a server that has run for a while, of the process and of its GPU."""
    if model is None:
        model = tiny_llama()
        model.generation_config.eos_token_id = -1
    drawn = random.Random(11)
    common = [drawn.randint(1, 127) for _ in range(load.shared)]
    samples: list[tuple[float, int, int]] = []
    with serving(model, plan or plan_of(model, 4), memory=load.memory, tokens=load.tokens) as manager:
        begun, asked, answered, cancelled = time.perf_counter(), 0, 0, 0
        running: set[str] = set()
        while (passed := time.perf_counter() - begun) < 60 * minutes:
            while len(running) < load.running:
                own = [drawn.randint(1, 127) for _ in range(drawn.randint(*load.lengths))]
                prompt = [*common, *own] if asked % 3 == 0 else own
                name = manager.add_request(prompt, max_new_tokens=drawn.randint(1, load.new))
                asked += 1
                if asked % 10 == 9:
                    manager.cancel_request(name)
                    cancelled += 1
                else:
                    running.add(name)
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished() and result.request_id in running:
                running.discard(result.request_id)
                answered += 1
            if not samples or passed > samples[-1][0] + 10:
                gc.collect()
                held = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
                samples.append((passed, resident(), held))
                sizes = f"{samples[-1][1] >> 20} MiB, {held >> 20} MiB of the GPU"
                print(f"{passed:.0f} s: {answered} answered, {sizes}", flush=True)
        results(manager, sorted(running), 600)
        # what was cancelled is forgotten by the next step
        results(manager, [manager.add_request([1], max_new_tokens=1)], 600)
        free, failed = free_share(manager), manager.counts.failed
    few, most = load.lengths
    case = (
        f"{load.name}, {minutes:g} minutes of requests of {few}-{most + load.shared} tokens, "
        f"{load.running} at a time, pool of {load.memory >> 20} MiB"
    )
    figures = [
        ("answered", answered, "requests"),
        ("cancelled", cancelled, "requests"),
        ("failed", failed, "requests"),
        ("steps", manager.counts.steps, "steps"),
        ("sectors free at the end", free, "share"),
    ]
    # what was there when a fifth of the time had passed, and at the end
    late = [sample for sample in samples if sample[0] >= 12 * minutes]
    for place, what in ((1, "memory"), (2, "memory of the GPU"))[: 2 if samples[-1][2] else 1]:
        figures += [
            (f"{what} after a fifth of the time", late[0][place], "byte"),
            (f"{what} at the end", late[-1][place], "byte"),
            (f"most {what} after a fifth", max(sample[place] for sample in late), "byte"),
        ]
    for name, value, unit in figures:
        print(f"{name}: {value:g} {unit}")
    return [make_row(SUITE, case, provider, name, value, unit) for name, value, unit in figures]


PARTS = {"equality": equality, "prefix": prefix, "capacity": capacity, "speed": speed, "long": long}


def main() -> None:
    """Measure, print, write rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [name for name in PARTS if name != "long"]
    parser.add_argument("parts", nargs="*", default=every, choices=PARTS)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--pause", type=float, default=1.0, help="mean seconds between arrivals")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for part in options.parts:
        rows = equality(options.requests, options.pause) if part == "equality" else PARTS[part]()
        save(rows)


if __name__ == "__main__":
    main()
