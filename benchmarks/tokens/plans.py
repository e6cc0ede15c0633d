"""The plans that are compared: token tiers, what they are made of, and what else their bits could buy."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.rows import RESULTS
from kvmix_fx.plan import KVPlan, LayerPlan, ModelGeometry, QuantSpec, TokenTier
from kvmix_fx.plan.token_tier import Policy

TILE = 128
"""Of every plan, so that all have the same tokens packed."""
SHARE = 0.2
BUDGETS = (0.05, 0.1)
"""Shares of all layers that cost what `benchmarks.tokens.shares` has to spend on shares of its own."""


def compared(geometry: ModelGeometry) -> Iterator[tuple[str, KVPlan]]:
    """Providers and their plans. Tiles of 128, windows of 32, no sinks but where the name says so."""
    half = geometry.head_dim // 2

    def mikv(low: int, high: int = 16, **options: object) -> KVPlan:
        plan = KVPlan.preset("mikv", geometry, low_bits=low, high_bits=high, share=SHARE, **options)
        return plan.with_layers("all", tile=TILE)

    for bits in (2, 3, 4):
        spec = QuantSpec(bits, "token", half)
        layer = LayerPlan(spec, spec, tile=TILE)
        yield f"per token K{bits}V{bits} g{half}", KVPlan((layer,) * geometry.num_layers, geometry)
        yield f"uniform K{bits}V{bits} g32", KVPlan.uniform(geometry, bits, bits, 32, tile=TILE)
    yield "evict 80 %", mikv(0)
    for bits in (2, 3, 4):
        yield f"mikv {bits}/16 no balancer", mikv(bits, balancer=False)
        yield f"mikv {bits}/16", mikv(bits)
    for high in (8, 4):
        yield f"mikv 2/{high}", mikv(2, high)
    for policy in ("mean", "last", "norm", "random", "oracle"):
        yield f"mikv 2/16 {policy}", mikv(2, policy=policy)
        yield f"evict 80 % {policy}", mikv(0, policy=policy)
    yield "zipcache", KVPlan.preset("zipcache", geometry).with_layers("all", tile=TILE)
    for bits in (2.4, 2.6, 3.1):
        yield f"tiers {bits} s4", KVPlan.preset("tiers", geometry, bits=bits)
    over = KVPlan.preset("tiers", geometry)
    policies: tuple[Policy, ...] = ("accumulated", "last", "random", "oracle")
    for policy in policies:
        yield f"tiers 2.4 s4, 10 % at 4 {policy}", tiered(over, 0.1, policy)
    yield "tiers 2.4 s4, 5 % at 4 last", tiered(over, 0.05)
    for share in BUDGETS:
        if chosen_file(share).exists():
            chosen = KVPlan.load(chosen_file(share))
            yield f"tiers 2.4 s4, shares for {share:.0%} at 4 last", chosen
            # the control: as many bits, in layers of chance
            order = random.Random(0).sample(chosen.layers, len(chosen.layers))
            yield f"tiers 2.4 s4, shares for {share:.0%} at 4 last, shuffled", replace(chosen, layers=order)
    for policy in ("accumulated", "last", "oracle"):
        tier = TokenTier(SHARE, None, 16, policy=policy)
        yield f"tiers 2.4 s4, 20 % at 16 {policy}", over.with_layers("all", token_tier=tier)
    tier = TokenTier(SHARE, None, 16, policy="last", balancer=True)
    yield "tiers 2.4 s4, 20 % at 16 last balanced", over.with_layers("all", token_tier=tier)


def tiered(plan: KVPlan, share: float, policy: Policy = "last") -> KVPlan:
    """A share of the tokens at 4 bits in all layers, none for being new."""
    return plan.with_layers("all", token_tier=TokenTier(share, None, 4, policy=policy, recent=0.0))


def chosen_file(share: float) -> Path:
    """The plan whose layers have shares of their own, for what `share` costs in all of them."""
    return RESULTS / "tokens" / f"shares-{share}.json"


def true_bits(plan: KVPlan) -> float:
    """Bits per element in a long context; of eviction those of the tokens that are kept, codes left out."""
    tier = plan.layers[0].token_tier
    if tier is None or not tier.evict:
        return plan.bits_per_element()
    kept = replace(tier, evict=False)
    codes = plan.with_layers("all", token_tier=kept).bits_per_element()
    low = KVPlan(tuple(replace(layer, token_tier=None) for layer in plan.layers), plan.geometry)
    return codes - low.bits_per_element()
