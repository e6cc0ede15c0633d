"""How far a model's predictions move when its cache is packed, token by token."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvmix_fx.testing.simulate import teacher_forced


@dataclass(frozen=True)
class Quality:
    """Figures per chunk, each a list with one entry per chunk.

    Attributes:
        perplexity: of the tokens after the prefill.
        perplexity_change: against the reference, in percent.
        kl: mean over positions of KL(reference || this), nats.
        agreement: positions at which both predict the same token, percent.
    """

    perplexity: list[float]
    perplexity_change: list[float]
    kl: list[float]
    agreement: list[float]

    def mean(self, name: str) -> float:
        """Over all chunks; perplexities by way of their logarithms."""
        values: list[float] = getattr(self, name)
        if name == "perplexity":
            return math.exp(sum(map(math.log, values)) / len(values))
        if name == "perplexity_change":
            ratios = (math.log1p(value / 100) for value in values)
            return 100 * math.expm1(sum(ratios) / len(values))
        return sum(values) / len(values)


@torch.no_grad()
def reference_predictions(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probabilities of one full forward without a cache, [B, L, vocabulary] in float32."""
    outputs = (model(input_ids=row, use_cache=False) for row in ids.split(1))
    return torch.cat([output.logits.float().log_softmax(-1) for output in outputs])


def reference_quality(ids: Tensor, reference: Tensor, prefill: int) -> Quality:
    """Figures of the reference itself, over the tokens that `decode_quality` counts."""
    B = ids.shape[0]
    found = reference[:, prefill:-1].gather(2, ids[:, prefill + 1 :, None])
    perplexity = (-found[..., 0].double().mean(1)).exp().tolist()
    return Quality(perplexity, [0.0] * B, [0.0] * B, [100.0] * B)


def decode_quality(
    model: nn.Module,
    ids: Tensor,
    reference: Tensor,
    prefill: int,
    cache: object | None = None,
    label: str = "",
) -> tuple[Quality, object]:
    """Read `ids` [B, L] with a prefill and then token by token, and compare the steps after the prefill.

    Returns:
        The figures, and the cache as the last step left it.
    """
    B, L = ids.shape
    kl, same, loss, reference_loss = torch.zeros(4, B, dtype=torch.float64)
    started = time.perf_counter()
    caches = _Keeper(model)
    for first, logits in teacher_forced(caches, ids, prefill, cache):
        if first < prefill:
            continue
        mine, full = logits[:, 0].float().log_softmax(-1), reference[:, first]
        kl += (full.exp() * (full - mine)).sum(-1)
        same += mine.argmax(-1) == full.argmax(-1)
        if first + 1 < L:
            following = ids[:, first + 1, None]
            loss -= mine.gather(1, following)[:, 0]
            reference_loss -= full.gather(1, following)[:, 0]
        if label and (first + 1) % 256 == 0:
            print(f"  {label}: {first + 1} tokens, {time.perf_counter() - started:.0f} s", flush=True)
    steps = L - prefill
    quality = Quality(
        (loss / (steps - 1)).exp().tolist(),
        (100 * torch.expm1((loss - reference_loss) / (steps - 1))).tolist(),
        (kl / steps).tolist(),
        (100 * same / steps).tolist(),
    )
    return quality, caches.last


class _Keeper:
    """Calls a model and keeps the cache of the newest step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.last: object | None = None

    def __call__(self, **inputs: object) -> object:
        result = self.model(**inputs)
        self.last = result.past_key_values
        return result
