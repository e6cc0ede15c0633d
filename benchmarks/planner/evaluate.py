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

from kvmix_fx.cache import QuantizedKVTensor, tiers
from kvmix_fx.cache.orders import key_order
from kvmix_fx.plan import KVPlan, LayerPlan
from kvmix_kernels import ops
from kvmix_kernels.tokens.ops import attend_tiers
from kvmix_kernels.tokens.scores import of_prompt


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
            self.ids = ids
            self.prompt, self.queries = read_prompt(model, ids[:, :prompt])
            cache = DynamicCache(config=model.config)
            model(input_ids=ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
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
        oracle = any(one.token_tier is not None and one.token_tier.policy == "oracle" for one in plan.layers)
        scores = self.attention_to_come() if oracle else [None] * len(plan.layers)
        given = zip(plan.layers, self.prompt, self.queries, scores, strict=True)
        layers = [packed_layer(layer, *kv, queries, known) for layer, kv, queries, known in given]
        with reading_packed(self.model):
            for part in self.continuation:
                yield read_packed(self.model, layers, part)

    def attention_to_come(self) -> list[Tensor]:
        """What the tokens of the prompt get from those after it, of each layer [B, Hkv, prompt]."""
        with torch.inference_mode():
            _heard.clear()
            cache = DynamicCache(config=self.model.config)
            with _attention(self.model, _LISTENING):
                self.model(input_ids=self.ids, past_key_values=cache, logits_to_keep=1)
            heard = list(_heard)
            _heard.clear()
            prompt = self.prompt[0][0].shape[2]
            later = self.ids.shape[1] - prompt
            scale = self.prompt[0][0].shape[3] ** -0.5
            return [
                of_prompt(queries, layer.keys, None, scale, 0.0, later)[:, :, :prompt]
                for queries, layer in zip(heard, cache.layers, strict=True)
            ]


def reading_packed(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """For the time of a block, attention that takes `packed` layers."""
    return _attention(model, _ATTENTION)


def read_packed(model: PreTrainedModel, layers: list[_PackedLayer], ids: Tensor) -> Tensor:
    """Logits of more tokens [B, n], which are stored; within `reading_packed`."""
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, past_key_values=Cache(layers=layers), packed=layers).logits
    return logits


def read_prompt(model: PreTrainedModel, ids: Tensor) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Exact keys and values of each layer for a prompt [B, L], and its queries."""
    with torch.inference_mode():
        _heard.clear()
        cache = DynamicCache(config=model.config)
        with _attention(model, _LISTENING):
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        queries = list(_heard)
        _heard.clear()
        return [(layer.keys, layer.values) for layer in cache.layers], queries


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


def packed_layer(
    layer: LayerPlan, keys: Tensor, values: Tensor, queries: Tensor, scores: Tensor | None = None
) -> _PackedLayer:
    """A prompt's keys and values [B, Hkv, L, D], packed; `scores` [B, Hkv, L] for the policy "oracle"."""
    key_format, value_format = layer.formats(keys.shape[-1])
    order = key_order(layer, keys.shape[1], keys.shape[-1], keys.device)
    if key_format.high is not None:
        formats = key_format, value_format
        return _PackedLayer(*tiers.pack(keys, values, formats, queries, order=order, scores=scores))
    packed = QuantizedKVTensor.from_hp(keys, key_format, hint=queries if order is None else order)
    return _PackedLayer(packed, QuantizedKVTensor.from_hp(values, value_format))


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
    given = (
        *(query, keys, values, layer.keys.cached.tensors, layer.values.cached.tensors, causal, None, length),
        *(scaling, layer.keys.format.encode(), layer.values.format.encode()),
    )
    if layer.keys.format.high is not None:
        out, mass = attend_tiers(*given)
        layer.keys, layer.values = tiers.append(layer.keys, layer.values, keys, values, mass)
    else:
        out = ops.attend(*given)
        layer.keys, layer.values = layer.keys.append(keys), layer.values.append(values)
    return out.transpose(1, 2), None


_ATTENTION = "kvmix_benchmark"
_LISTENING = "kvmix_listening"
AttentionInterface.register(_ATTENTION, _attend)
AttentionInterface.register(_LISTENING, _listen)
AttentionMaskInterface.register(_LISTENING, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
