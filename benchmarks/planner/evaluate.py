"""What a plan costs in quality, within seconds per plan.

Tracing a graph for every plan takes longer than reading the text, so the model runs eagerly here. Its
attention reads the packed storage (`QuantizedKVTensor`) through the op (`kvmix::attend`) that a model
compiled with `kvmix_fx.compile` calls; `python -m benchmarks.planner.check` shows that both give the same
logits.

Each chunk of text is a prompt and a continuation. Keys and values of the prompt are exact when they are made,
as in any prefill, so they are computed once, and each plan packs them. The continuation is read a few tokens
at a time: a step attends to the cache it found and, exactly, to its own tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.cache.orders import key_order
from kvmix_fx.plan import KVPlan
from kvmix_kernels import ops


@dataclass(frozen=True)
class Loss:
    """What quantization costs, one entry per chunk.

    Attributes:
        kl: mean over positions of KL(unquantized || quantized), nats.
        log_loss: growth of the mean negative log-likelihood of the next token, nats.
    """

    kl: list[float]
    log_loss: list[float]

    @property
    def mean_kl(self) -> float:
        """Over the chunks, nats per token."""
        return sum(self.kl) / len(self.kl)

    @property
    def perplexity_increase(self) -> float:
        """Percent."""
        return 100 * math.expm1(sum(self.log_loss) / len(self.log_loss))

    def part(self, chunks: slice) -> Loss:
        """Of some chunks."""
        return Loss(self.kl[chunks], self.log_loss[chunks])


class Evaluator:
    """Measures plans on fixed chunks of text.

    Args:
        model: a transformers model that is not compiled; its attention is exchanged while a plan is measured.
        ids: chunks, [B, prompt + continuation].
        prompt: tokens of each chunk that are read at once and not judged.
        step: tokens read at a time after the prompt.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, prompt: int, step: int) -> None:
        self.model = model
        self.continuation = ids[:, prompt:].split(step, 1)
        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            with _attention(model, _LISTENING):
                model(input_ids=ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
            self.prompt = [(layer.keys, layer.values) for layer in cache.layers]
            self.queries = list(_heard)
            _heard.clear()
            logits = [model(input_ids=part, past_key_values=cache).logits for part in self.continuation]
            self.exact = [part.log_softmax(-1) for part in logits]
        # one token less in the last step, which has none after its last one
        starts = range(prompt + 1, ids.shape[1] + 1, step)
        self.following = [ids[:, start : start + step, None] for start in starts]

    def __call__(self, plan: KVPlan) -> Loss:
        """Read all continuations with the cache packed as `plan` says."""
        kl, growth = [], []
        for logits, exact, following in zip(self.steps(plan), self.exact, self.following, strict=True):
            lost = exact - logits.log_softmax(-1)
            kl.append((exact.exp() * lost).sum(-1))
            growth.append(lost[:, : following.shape[1]].gather(2, following)[..., 0])
        return Loss(*(torch.cat(parts, 1).mean(1).tolist() for parts in (kl, growth)))

    def steps(self, plan: KVPlan) -> Iterator[Tensor]:
        """Logits of each step, [B, step, vocabulary]."""
        layers = []
        for layer, (keys, values), queries in zip(plan.layers, self.prompt, self.queries, strict=True):
            key_format, value_format = layer.formats(keys.shape[-1])
            order = key_order(layer, keys.shape[1], keys.shape[-1], keys.device)
            packed_keys = QuantizedKVTensor.from_hp(
                keys, key_format, hint=queries if order is None else order
            )
            layers.append(_PackedLayer(packed_keys, QuantizedKVTensor.from_hp(values, value_format)))
        cache = Cache(layers=layers)
        with _attention(self.model, _ATTENTION):
            for part in self.continuation:
                with torch.inference_mode():
                    yield self.model(input_ids=part, past_key_values=cache, packed=layers).logits


@contextlib.contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Another attention for the time of a block."""
    usual = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


_heard: list[Tensor] = []
"""Queries of the layers of a call, first to last, [B, Hq, L, D]."""


def _listen(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    _heard.append(query)
    return sdpa_attention_forward(module, query, *args, **kwargs)


class _PackedLayer(DynamicLayer):
    """Packed keys and values of one layer."""

    keys: QuantizedKVTensor
    values: QuantizedKVTensor

    def __init__(self, keys: QuantizedKVTensor, values: QuantizedKVTensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        # stored by `_attend`, which first attends to what is there
        return keys, values


def _attend(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    attention_mask: None,  # noqa: ARG001 - no padding here
    scaling: float,
    packed: list[_PackedLayer],
    **_: Any,
) -> tuple[Tensor, None]:
    layer = packed[module.layer_idx]
    length, n = layer.keys.shape[2], query.shape[2]
    causal = torch.ones(n, length + n, dtype=torch.bool).tril(length)
    out = ops.attend(
        query,
        keys,
        values,
        layer.keys.cached.tensors,
        layer.values.cached.tensors,
        causal,
        None,
        length,
        scaling,
        layer.keys.format.encode(),
        layer.values.format.encode(),
    )
    layer.keys, layer.values = layer.keys.append(keys), layer.values.append(values)
    return out.transpose(1, 2), None


_ATTENTION = "kvmix_benchmark"
_LISTENING = "kvmix_listening"
AttentionInterface.register(_ATTENTION, _attend)
AttentionInterface.register(_LISTENING, _listen)
AttentionMaskInterface.register(_LISTENING, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
