"""What SmolLM2 finds again with tiers of tokens: lines (MiKV's own test) and pass keys, against eviction.

The text is packed before the question is read, as `kvmix_fx.retrieve` does it, but eagerly: a text is read
once and packed under every plan. Few samples: a share of 12 moves in steps of 8 %.

    python -m benchmarks.tokens.retrieval               # 20 minutes of one core
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from benchmarks.planner.evaluate import packed_layer, read_packed, read_prompt, reading_packed
from benchmarks.rows import machine_name, make_row, save
from benchmarks.tokens.plans import compared, true_bits
from kvmix_fx.evaluation.tasks import Sample, make_sample
from kvmix_fx.plan import KVPlan, ModelGeometry
from kvmix_fx.testing.smollm2 import load_smollm2

SPARE_TOKENS = 4
"""What an answer may be longer than the number asked for."""


def main() -> None:
    """Measure all and write rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default="lines,passkey", help="separated by commas")
    parser.add_argument("--lengths", default="512", help="tokens, separated by commas")
    parser.add_argument("--depths", default="0.1,0.35,0.6", help="from 0 to 1, separated by commas")
    parser.add_argument("--samples", type=int, default=4, help="texts per length and depth")
    parser.add_argument("--provider", action="append", help="only those of this name; repeatable")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = load_smollm2()
    geometry = ModelGeometry.of(model)
    plain = KVPlan.uniform(geometry, 16)
    plans = [("unquantized", plain)]
    for name, plan in compared(geometry):
        unknown = "oracle" in name  # of questions that are still to come
        if not unknown and (not given.provider or name in given.provider):
            plans.append((name, plan))

    def ids(text: str) -> Tensor:
        return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])

    def answer(sample: Sample, read: tuple[list[tuple[Tensor, Tensor]], list[Tensor]], plan: KVPlan) -> str:
        given = zip(plan.layers, *read, strict=True)
        layers = [packed_layer(layer, *kv, queries) for layer, kv, queries in given]
        said: list[int] = []
        tokens = ids(sample.question)
        for _ in range(ids(" " + sample.answers[0]).shape[1] + SPARE_TOKENS):
            tokens = read_packed(model, layers, tokens)[:, -1:].argmax(-1)
            said.append(int(tokens))
        return str(tokenizer.decode(said, skip_special_tokens=True))

    depths = [float(depth) for depth in given.depths.split(",")]
    for task in given.tasks.split(","):
        for length in map(int, given.lengths.split(",")):
            found: dict[str, list[float]] = {name: [] for name, _ in plans}
            started = time.perf_counter()
            for depth in depths:
                for n in range(given.samples):
                    seed = f"0 {length} {depth} {n}"
                    sample = make_sample(task, lambda text: ids(text).shape[1], length, depth, seed)
                    read = read_prompt(model, ids(sample.context))
                    with reading_packed(model):
                        for name, plan in plans:
                            found[name].append(sample.score(answer(sample, read, plan)))
            for name, plan in plans:
                share = sum(found[name]) / len(found[name])
                case = f"smollm2 {task} n{length} tokens"
                save(
                    [make_row("quality", case, name, "found", share, "share", effective_bits=true_bits(plan))]
                )
                print(f"{case:30} {name:40} {true_bits(plan):.2f} bits  {share:.2f}", flush=True)
            print(f"{time.perf_counter() - started:.0f} s  {machine_name()}", flush=True)


if __name__ == "__main__":
    main()
