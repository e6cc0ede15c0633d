"""What precision inside a layer gains: presets with tiers against plans without, really packed.

The protocol of `benchmarks.planner.run`, with prompts of 420 tokens, so that with and without four sinks the
same three tiles of 128 are packed. Orders of channels of presets come from the calibration text that the
package brings along; those of the planner, its prices and the layers that may drop channels from the
calibration parts of the two texts. All are judged on others. "held out" are texts that no choice was made on:
other chunks than the planner's. Worst chunks are kept beside the means. "planner untiered" chooses among
uniform formats alone, "kvmix default" among all that were priced.

    python -m benchmarks.planner.tiers                  # 5 minutes of two cores
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

import kvmix_fx
from benchmarks.planner.evaluate import Evaluator, Loss
from benchmarks.planner.plans import TILE
from benchmarks.planner.run import calibration_chunks
from benchmarks.rows import RESULTS, machine_name, make_row, percentiles, save
from kvmix_fx.plan import KVPlan, ModelGeometry
from kvmix_fx.plan.orders import decode_order, encode_order
from kvmix_fx.plan.prices import Menu
from kvmix_fx.profiling import Profile, channel_orders
from kvmix_fx.testing import texts
from kvmix_fx.testing.smollm2 import load_smollm2

PROMPT, JUDGED, STEP, CHUNKS = 420, 32, 16, 12
TEXTS = {"prose": texts.prose, "code": texts.code}
HELD_OUT = 5
"""By how many chunks the held-out ones lie behind the planner's."""
PROFILE = RESULTS / "planner" / "tiers.safetensors"
CALIBRATION = 264
"""Tokens of each piece that is profiled: the sink, two groups of 128, a few that no query finds packed."""
SMALLEST_FACTOR = 2.5
"""A shuffled order has to lose so many times what the chosen one loses, or the order decides nothing."""


def chunks(tokenizer: object, name: str, shift: int) -> torch.Tensor:
    """Chunks of one text, spread over its evaluation part."""
    text, length = TEXTS[name](), PROMPT + JUDGED
    return torch.cat([texts.chunks(tokenizer, text, length, 1, skip=11 * n + shift) for n in range(CHUNKS)])


def shuffled(orders: tuple[str, ...], head_dim: int) -> tuple[str, ...]:
    """Orders of chance, the same each time."""
    chance = random.Random(0)
    return tuple(
        encode_order([chance.sample(range(head_dim), head_dim) for _ in decode_order(order, head_dim)])
        for order in orders
    )


def profile_of(model: nn.Module, tokenizer: object) -> Profile:
    """What the planner goes by, measured on the calibration parts of the texts; kept in a file."""
    if not PROFILE.exists():
        print(f"profiling into {PROFILE}", flush=True)
        whole = Menu.default(ModelGeometry.of(model))
        menu = Menu(*(tuple(s for s in specs if s.bits < 8) for specs in (whole.keys, whole.values)))
        # a piece of each text: they are read 50 times
        ids = calibration_chunks(tokenizer)[::4, :CALIBRATION]
        kvmix_fx.profile(model, ids, menu=menu, signals="fisher_scaled").save(PROFILE)
    return Profile.load(PROFILE)


def compared(
    geometry: ModelGeometry, orders: tuple[str, ...], profile: Profile
) -> Iterator[tuple[str, KVPlan]]:
    """Providers and their plans."""
    for name, key_bits, value_bits, group in (("K2V2 g32", 2, 2, 32), ("K3V3 g64", 3, 3, 64)):
        plan = KVPlan.uniform(geometry, key_bits, value_bits, group_size=group, sink_length=0)
        yield f"uniform {name}", plan
        yield f"uniform {name} s4", plan.with_layers("all", sink_length=4)
    for bits in (2.4, 2.6, 3.1):
        yield f"kvmix tiers {bits}", KVPlan.preset("tiers", geometry, bits=bits, channel_orders=orders)
        yield f"kvmix tiers {bits} prompt", KVPlan.preset("tiers", geometry, bits=bits)
    chance = shuffled(orders, geometry.head_dim)
    yield "kvmix tiers 2.4 shuffled", KVPlan.preset("tiers", geometry, bits=2.4, channel_orders=chance)
    dropping = {"channel_orders": profile.orders, "drop_layers": profile.droppable()}
    yield "kvmix tiers 2.15 drops", KVPlan.preset("tiers", geometry, bits=2.15, **dropping)
    plain = Menu.uniform(geometry, bits=(2, 3, 4))
    for bits in (2.5, 3.0):
        yield f"planner untiered {bits}", profile.plan(bits=bits, menu=plain, tile=TILE)
    for bits in (2.5, 2.75, 3.0):
        yield f"kvmix default {bits}", profile.plan(bits=bits, tile=TILE)
    whole = KVPlan.preset("tiers", geometry, bits=2.4, channel_orders=orders)
    key = replace(whole.layers[0].key, bits=2, tiers=(), order="none", channel_order="", range_factor=0.8)
    yield "kvmix tiers 2.4 without tiers g32", whole.with_layers("all", key=replace(key, group_size=32))
    for name in ("mixkvq", "kitty"):
        plan = KVPlan.preset(name, geometry)
        yield name, plan
        # as published they leave more or fewer tokens raw than the others
        yield f"{name} s4 w32", plan.with_layers("all", window=32, sink_length=4)


def main() -> None:
    """Measure all and write rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--provider",
        action="append",
        help="only the one of this name, or those whose names contain it; repeatable",
    )
    chosen = parser.parse_args().provider
    model, tokenizer = load_smollm2()
    geometry = ModelGeometry.of(model)
    orders = channel_orders(model, tokenizer=tokenizer)
    profile = profile_of(model, tokenizer)
    print(profile.describe(), f"dropping: {profile.droppable()}", sep="\n", flush=True)
    for case, shift in (("smollm2 {} tiers", 0), ("smollm2 {} tiers held out", HELD_OUT)):
        ids = torch.cat([chunks(tokenizer, name, shift) for name in TEXTS])
        evaluate = Evaluator(model, ids, PROMPT, STEP)
        found: dict[str, Loss] = {}
        plans = dict(compared(geometry, orders, profile))
        for provider, plan in plans.items():
            if chosen and not any(part == provider if part in plans else part in provider for part in chosen):
                continue
            started = time.perf_counter()
            found[provider] = loss = evaluate(plan)
            parts = {name: loss.part(slice(n * CHUNKS, (n + 1) * CHUNKS)) for n, name in enumerate(TEXTS)}
            for name, part in parts.items():
                low, _, high = percentiles(part.kl)
                bits = plan.bits_per_element()
                rest = {"p20": low, "p80": high, "effective_bits": bits}
                figures = (("kl_nats", part.mean_kl, rest), ("kl_nats worst chunk", max(part.kl), rest))
                save(
                    [
                        make_row("quality", case.format(name), provider, metric, value, "nats/token", **more)
                        for metric, value, more in figures
                    ]
                )
            print(
                f"{case.format('*'):26} {provider:34} {plan.bits_per_element():.3f} bits  "
                + "  ".join(
                    f"{name} {part.mean_kl:.4f} (worst {max(part.kl):.4f})" for name, part in parts.items()
                )
                + f"  {time.perf_counter() - started:.0f} s  {machine_name()}",
                flush=True,
            )
        best, control = (found.get(f"kvmix tiers 2.4{kind}") for kind in ("", " shuffled"))
        if best and control and control.mean_kl < SMALLEST_FACTOR * best.mean_kl:
            raise SystemExit(
                "the control does not fail: a shuffled order loses about as little as the chosen one"
            )


if __name__ == "__main__":
    main()
