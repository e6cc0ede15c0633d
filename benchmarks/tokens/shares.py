"""Shares of tokens at 4 bits for each layer of SmolLM2, over the preset `tiers`, kept as plan files.

Measured on two pieces of the calibration text that the package brings along, and chosen under the budgets of
5 and 10 % of the tokens in every layer. `benchmarks.tokens.kl` judges them on other texts.

    python -m benchmarks.tokens.shares                  # 7 minutes of one core
"""

from __future__ import annotations

import time

import torch

from benchmarks.planner.tiers import JUDGED, PROMPT
from benchmarks.tokens.plans import BUDGETS, chosen_file, tiered
from kvmix_fx.plan import KVPlan, ModelGeometry
from kvmix_fx.plan.budget import Budget
from kvmix_fx.profiling.shares import measure_shares
from kvmix_fx.testing.smollm2 import load_smollm2

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)


def main() -> None:
    """Measure, choose and save."""
    torch.set_num_threads(1)
    model, tokenizer = load_smollm2()
    plan = KVPlan.preset("tiers", ModelGeometry.of(model))
    tiers = [tiered(plan, share).layers[0].token_tier for share in SHARES]
    started = time.perf_counter()
    found = measure_shares(
        model, plan, [t for t in tiers if t], tokenizer=tokenizer, prompts=2, length=PROMPT + JUDGED
    )
    print(f"measured in {time.perf_counter() - started:.0f} s", flush=True)
    for layer, losses in enumerate(found.losses):
        print(f"{layer:3}", *(f"{loss:.6f}" for loss in losses))
    print("sum", *(f"{sum(column):.6f}" for column in zip(*found.losses, strict=True)))
    for share in BUDGETS:
        budget = Budget(bits=tiered(plan, share).bits_per_element())
        chosen = found.choose(budget)
        said = chosen.provenance["token_tiers"]
        print(f"{budget}: {chosen.bits_per_element():.3f} bits, loss {said['predicted_loss']:.6f}")
        print(chosen)
        chosen_file(share).parent.mkdir(exist_ok=True)
        chosen.save(chosen_file(share))


if __name__ == "__main__":
    main()
