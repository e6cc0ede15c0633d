"""Greedy runs of one prompt, timed and compared; what `kvmix demo` measures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmix_fx.contracts import cache_argument

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Run:
    """One greedy generation.

    tokens: int64 [n], the first one from the prefill. logits: of the decode steps [n - 1, vocabulary]; row i
    is what tokens[i + 1] is chosen from. cache: as the model left it. decode_seconds: of the decode steps
    alone. seconds: of everything.
    """

    tokens: Tensor
    logits: Tensor
    cache: Any
    decode_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decode steps per second."""
        return len(self.logits) / self.decode_seconds


def generate_greedily(
    model: PreTrainedModel,
    ids: Tensor,
    count: int,
    forced: Tensor | None = None,
    step: Callable[[], None] | None = None,
) -> Run:
    """Generate `count` tokens with a growing cache; an end of text does not stop it.

    Args:
        model: as it is, compiled or not.
        ids: the prompt [1, L].
        count: tokens to generate, at least 2.
        forced: tokens [count] to feed instead of the model's own choices.
        step: called after every token.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    held = {**cache_argument(model, cache), "use_cache": True}
    tokens: list[Tensor] = []
    logits: list[Tensor] = []
    with torch.no_grad():
        started = _now(ids.device)
        last = model(input_ids=ids, **held).logits[:, -1]
        prefilled = _now(ids.device)
        for index in range(count):
            token = last.argmax(-1) if forced is None else forced[index : index + 1]
            tokens.append(token)
            if index + 1 < count:
                last = model(input_ids=token[:, None], **held).logits[:, -1]
                logits.append(last)
            if step is not None:
                step()
        ended = _now(ids.device)
    return Run(torch.cat(tokens), torch.cat(logits), cache, ended - prefilled, ended - started)


def agreement(reference: Tensor, other: Tensor) -> tuple[float, float]:
    """How alike two sets of logits [n, vocabulary] are.

    Returns:
        The share of rows with the same likeliest token, and the mean of KL(reference || other) in nats.
    """
    from torch.nn.functional import kl_div

    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    return float(same), float(kl_div(q, p, reduction="batchmean", log_target=True))


def text_length(tokens: Tensor, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of `tokens` [n] come before the end of the text."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    known = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    return next((index for index, token in enumerate(tokens.tolist()) if token in known), len(tokens))


def _now(device: torch.device) -> float:
    """The time once the device has done all it was given."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
