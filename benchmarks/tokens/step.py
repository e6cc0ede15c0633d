"""What a tier of tokens costs one layer on a CPU: a decode step (attend and append) and packing a prompt.

Time of the processor, not of the clock, so that other work on the machine shows less. Heads of SmolLM2-135M.

    python -m benchmarks.tokens.step                    # seconds
"""

from __future__ import annotations

import time

import torch

from benchmarks.rows import make_row, save
from kvmix_fx.cache import QuantizedKVTensor, tiers
from kvmix_fx.plan import KVPlan, ModelGeometry
from kvmix_kernels import ops
from kvmix_kernels.tokens.ops import attend_tiers

KV_HEADS, GROUP, HEAD, STEPS = 3, 3, 64, 64


def main() -> None:
    """Measure all and write rows."""
    torch.set_num_threads(1)
    geometry = ModelGeometry(num_layers=1, num_kv_heads=KV_HEADS, head_dim=HEAD)
    plans = {"uniform K2V2 g32": KVPlan.uniform(geometry, 2)}
    for policy in ("accumulated", "last", "norm"):
        plans[f"mikv 2/16 {policy}"] = KVPlan.preset("mikv", geometry, policy=policy)
    for length in (1000, 4000):
        case, rows = f"b1 h{KV_HEADS}x{GROUP} n{length} d{HEAD}", []
        for name, plan in plans.items():
            prompt, step = measured(plan, length)
            bits = plan.bits_per_element()
            for metric, value in (("prompt packed", prompt * 1e6), ("step", step * 1e6)):
                rows.append(make_row("token_tiers", case, name, metric, value, "us", effective_bits=bits))
            print(f"{case} {name:24} prompt {prompt * 1e3:.1f} ms, step {step * 1e6:.0f} us", flush=True)
        save(rows)


def measured(plan: KVPlan, length: int) -> tuple[float, float]:
    """Seconds for a prompt and for a step."""
    formats = plan.layers[0].formats(HEAD)
    numbers = [fmt.encode() for fmt in formats]
    keys, values = torch.randn(2, 1, KV_HEADS, length, HEAD)
    queries = torch.randn(1, KV_HEADS * GROUP, length, HEAD)
    tiered = formats[0].high is not None
    started = time.process_time()
    if tiered:
        k, v = tiers.pack(keys, values, formats, queries)
    else:
        k, v = (QuantizedKVTensor.from_hp(x, f) for x, f in zip((keys, values), formats, strict=True))
    prompt = time.process_time() - started
    query, (new_k, new_v) = queries[:, :, :1], torch.randn(2, 1, KV_HEADS, 1, HEAD)
    started = time.process_time()
    for n in range(length, length + STEPS):
        given = (query, new_k, new_v, k.cached.tensors, v.cached.tensors, None, None, n, 0.125, *numbers)
        if tiered:
            k, v = tiers.append(k, v, new_k, new_v, attend_tiers(*given)[1])
        else:
            ops.attend(*given)
            k, v = k.append(new_k), v.append(new_v)
    return prompt, (time.process_time() - started) / STEPS


if __name__ == "__main__":
    main()
