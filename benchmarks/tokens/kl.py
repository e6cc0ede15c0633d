"""What token tiers cost in KL and perplexity, really packed: against eviction, uniform bits, channel tiers.

The protocol of `benchmarks.planner.tiers`: prompts of 420 tokens, three tiles of 128 packed, 32 tokens judged
in steps of 16, prose and code; "held out" are chunks that no choice of this project was made on. The policy
"oracle" counts the attention of the very tokens that are judged.

    python -m benchmarks.tokens.kl                      # 20 minutes of one core
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.planner.evaluate import Evaluator
from benchmarks.planner.tiers import HELD_OUT, PROMPT, STEP, TEXTS, chunks
from benchmarks.rows import machine_name, make_row, percentiles, save
from benchmarks.tokens.plans import compared, true_bits
from kvmix_fx.plan import ModelGeometry
from kvmix_fx.testing.smollm2 import load_smollm2


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
    parser.add_argument("--chunks", type=int, default=6, help="of each text, at most 12")
    parser.add_argument(
        "--apart", default="", help="added to the names of cases, for other numbers of chunks"
    )
    parser.add_argument("--held-out-only", action="store_true", help="leave the other chunks out")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = load_smollm2()
    plans = dict(compared(ModelGeometry.of(model)))
    cases = (
        (f"smollm2 {{}} tokens held out{given.apart}", HELD_OUT),
        (f"smollm2 {{}} tokens{given.apart}", 0),
    )
    for case, shift in cases[:1] if given.held_out_only else cases:
        ids = torch.cat([chunks(tokenizer, name, shift)[: given.chunks] for name in TEXTS])
        evaluate = Evaluator(model, ids, PROMPT, STEP)
        for provider, plan in plans.items():
            if given.provider and not any(
                part == provider if part in plans else part in provider for part in given.provider
            ):
                continue
            started = time.perf_counter()
            loss = evaluate(plan)
            bits = true_bits(plan)
            said = []
            for n, name in enumerate(TEXTS):
                part = loss.part(slice(n * given.chunks, (n + 1) * given.chunks))
                low, _, high = percentiles(part.kl)
                rest = {"p20": low, "p80": high, "effective_bits": bits}
                figures = (
                    ("kl_nats", part.mean_kl, "nats/token"),
                    ("kl_nats worst chunk", max(part.kl), "nats/token"),
                    ("perplexity increase", part.perplexity_increase, "%"),
                )
                save(
                    [
                        make_row("quality", case.format(name), provider, metric, value, unit, **rest)
                        for metric, value, unit in figures
                    ]
                )
                said.append(
                    f"{name} {part.mean_kl:.4f} (worst {max(part.kl):.4f}), "
                    f"perplexity {part.perplexity_increase:+.1f} %"
                )
            print(
                f"{case.format('*'):26} {provider:40} {bits:.3f} bits  {'  '.join(said)}  "
                f"{time.perf_counter() - started:.0f} s  {machine_name()}",
                flush=True,
            )


if __name__ == "__main__":
    main()
