"""Which layers' keys and values cost most at 2 bits: one tensor of one layer at a time, calibration text.

Reads each chunk in steps of 32 tokens with a simulated cache. Writes one row per tensor and prints the
ranking from which `plans.HIGH_KEY_LAYERS` and `plans.HIGH_VALUE_LAYERS` were taken.

    python -m benchmarks.quality.sensitivity
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from benchmarks.quality.measure import reference_predictions
from benchmarks.rows import make_row, save
from kvmix_fx.plan import KVPlan
from kvmix_fx.testing import texts
from kvmix_fx.testing.simulate import SimulatedCache
from kvmix_fx.testing.smollm2 import load_smollm2

STEP = 32


@torch.no_grad()
def kl_in_steps(model: nn.Module, ids: Tensor, reference: Tensor, plan: KVPlan) -> float:
    """Mean KL(reference || simulated), nats per token, over all tokens after the first step."""
    cache = SimulatedCache(plan)
    total = 0.0
    for first in range(0, ids.shape[1], STEP):
        piece = slice(first, first + STEP)
        mine = model(input_ids=ids[:, piece], past_key_values=cache).logits.log_softmax(-1)
        full = reference[:, piece]
        if first:
            total += float((full.exp() * (full - mine)).sum())
    return total / (ids.shape[0] * (ids.shape[1] - STEP))


def main() -> None:
    """Measure, write rows, print the ranking."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model, tokenizer = load_smollm2()
    ids = torch.cat(
        [
            texts.chunks(tokenizer, texts.prose(), options.length, 1, skip=19 * n, part="calibration")
            for n in range(options.chunks)
        ]
    )
    reference = reference_predictions(model, ids)
    raw = KVPlan.uniform(model, 16, sink_length=0)
    two = KVPlan.uniform(model, 2, window=0, sink_length=0)
    case = f"smollm2-135m prose calibration {options.chunks}x{options.length} one layer at 2 bits w0"
    for tensor in ("key", "value"):
        found = {}
        for layer in range(len(raw.layers)):
            plan = raw.with_layers(layer, **{tensor: getattr(two.layers[layer], tensor)}, window=0)
            found[layer] = kl_in_steps(model, ids, reference, plan)
            provider = f"simulated layer {layer} {tensor}"
            save([make_row("quality", case, provider, "kl", found[layer], "nats/token")])
        ranking = sorted(found, key=lambda layer: found[layer], reverse=True)
        costs = ", ".join(f"{layer} {1000 * found[layer]:.2f}" for layer in ranking)
        print(f"{tensor}, thousandths of a nat by layer: {costs}", flush=True)


if __name__ == "__main__":
    main()
