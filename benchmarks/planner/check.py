"""Does the quick evaluator measure what a compiled model would lose?

For three plans, 4 chunks of prose: the logits of the evaluator against those of the same model compiled with
`kvmix_fx.compile`, read in the same steps; and the KL of reading token by token instead. Writes rows. Ends
with exit status 1 unless the logits agree to 1e-3, KL differs by less than 15 %, and ranks the plans alike.

    python -m benchmarks.planner.check      # 6 minutes of one core
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvmix_fx
from benchmarks.planner import plans
from benchmarks.planner.evaluate import Evaluator
from benchmarks.planner.run import PROMPT, STEP, evaluation_chunks
from benchmarks.rows import make_row, save
from kvmix_fx.plan import KVPlan, ModelGeometry, QuantSpec
from kvmix_fx.testing.smollm2 import load_smollm2

CASE = "smollm2 prose planner evaluator"
CHUNKS = 4


def compared_plans(geometry: ModelGeometry) -> list[KVPlan]:
    """Two uniform ones and one that mixes bits and groups."""
    low = plans.uniform(QuantSpec(2), QuantSpec(2, "token"), geometry)
    even = plans.uniform(QuantSpec(3, group_size=64), QuantSpec(3, "token", "head"), geometry)
    mixed = even.with_layers("0-9", key=QuantSpec(2, group_size=128), value=QuantSpec(2, "token"))
    return [low, even, mixed.with_layers("20-24", key=QuantSpec(4))]


def compiled_logits(model: PreTrainedModel, ids: Tensor, plan: KVPlan) -> Tensor:
    """Of the judged tokens, [B, L, vocabulary], read in steps by a compiled model."""
    torch._dynamo.reset()
    kvmix_fx.compile(model, plan, inner="eager")
    try:
        with torch.no_grad():
            cache = model(input_ids=ids[:, :PROMPT], use_cache=True).past_key_values
            found = [
                model(input_ids=part, past_key_values=cache, use_cache=True).logits
                for part in ids[:, PROMPT:].split(STEP, 1)
            ]
    finally:
        kvmix_fx.restore(model)
    return torch.cat(found, 1)


def main() -> int:
    """Compare, write rows; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    model, tokenizer = load_smollm2()
    ids = evaluation_chunks(tokenizer, "prose")[:CHUNKS]
    in_steps, one_by_one = Evaluator(model, ids, PROMPT, STEP), Evaluator(model, ids, PROMPT, 1)
    holds = True
    ranking: list[tuple[float, float]] = []
    for number, plan in enumerate(compared_plans(ModelGeometry.of(model))):
        name = plan.name if number < 2 else "mixed"
        mine = torch.cat(list(in_steps.steps(plan)), 1)
        apart = float((mine - compiled_logits(model, ids, plan)).abs().max())
        several, single = in_steps(plan).mean_kl, one_by_one(plan).mean_kl
        print(
            f"{name}: logits {apart:.1e} apart; KL {several:.5f} in steps, {single:.5f} one by one",
            flush=True,
        )
        ranking.append((several, single))
        holds &= apart < 1e-3 and abs(several - single) < 0.15 * single
        bits = plan.bits_per_element()
        save(
            [
                make_row(
                    "quality",
                    CASE,
                    f"{name}, steps of {STEP}",
                    "kl_nats",
                    several,
                    "nats/token",
                    effective_bits=bits,
                ),
                make_row(
                    "quality",
                    CASE,
                    f"{name}, steps of 1",
                    "kl_nats",
                    single,
                    "nats/token",
                    effective_bits=bits,
                ),
                make_row("quality", CASE, f"{name}, against compiled", "logits apart", apart, "absolute"),
            ]
        )
    holds &= sorted(ranking) == sorted(ranking, key=lambda pair: pair[1])
    print("holds" if holds else "FAILS")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
