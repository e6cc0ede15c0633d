"""What SmolLM2 finds again in a packed text: 16 bits, two bits everywhere, and the preset "tiers".

The text is packed before the question is read. Few samples: a share of 8 moves in steps of 12 %.

    python -m benchmarks.quality.retrieval              # 10 minutes of one core
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.rows import machine_name, make_row, save
from kvmix_fx.evaluation import retrieve
from kvmix_fx.plan import KVPlan
from kvmix_fx.testing.smollm2 import load_smollm2


def main() -> None:
    """Measure all and write rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default="passkey", help="separated by commas")
    parser.add_argument("--lengths", default="512,1024", help="tokens, separated by commas")
    parser.add_argument("--depths", default="0,0.33,0.67,1", help="from 0 to 1, separated by commas")
    parser.add_argument("--samples", type=int, default=2, help="texts per length and depth")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = load_smollm2()
    plans = {
        "unquantized": None,
        "uniform K2V2 g32": KVPlan.uniform(model, 2, 2, 32, sink_length=0),
        "kvmix tiers 2.4 prompt": KVPlan.preset("tiers", model),
    }
    depths = [float(depth) for depth in given.depths.split(",")]
    for task in given.tasks.split(","):
        for length in map(int, given.lengths.split(",")):
            for provider, plan in plans.items():
                started = time.perf_counter()
                found = retrieve(
                    model, plan, tokenizer,
                    tasks=[task], lengths=[length], depths=depths, samples=given.samples,
                )  # fmt: skip
                bits = None if plan is None else plan.bits_per_element()
                case = f"smollm2 {task} n{length}"
                rows = [
                    make_row(
                        "quality", case, provider, "found", found.mean(task), "share", effective_bits=bits
                    )
                ]
                rows += [
                    make_row(
                        "quality", case, provider, f"found depth {score.depth:g}", score.value, "share",
                        effective_bits=bits,
                    )
                    for score in found.scores
                    if score.depth is not None
                ]  # fmt: skip
                save(rows)
                print(
                    f"{case:24} {provider:24} {found.mean(task):.2f}  "
                    + " ".join(f"{score.value:.2f}" for score in found.scores)
                    + f"  {time.perf_counter() - started:.0f} s  {machine_name()}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
