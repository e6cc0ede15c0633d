"""The attention of a model whose cache is packed pages, registered by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from kvmix_fx.errors import NarrowScalesError, ServingError
from kvmix_fx.integrations.transformers.batching.cache import HANDED_ON, PackedCache
from kvmix_kernels import layout, ops
from kvmix_kernels.paged import attend

NAME = "kvmix_paged"
"""As `attn_implementation`."""


def register() -> None:
    """Make the name known to transformers; again is no harm."""
    AttentionInterface.register(NAME, paged_attention)


def unregister() -> None:
    """Undo `register`."""
    AttentionInterface._global_mapping.pop(NAME, None)


@torch.compiler.disable
def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it: query [1, Hq, N, D] to output [1, N, Hq, Dv].

    Raises:
        ServingError: the model is called by something else than the engine it is served by.
        NarrowScalesError: the plan's scales do not have the range of the model's keys or values.
    """
    # from 5.24 on layers call `PackedCache.update`, and attention is not given the cache
    cache = kwargs.get(HANDED_ON, cache)
    if not isinstance(cache, PackedCache):
        raise ServingError(
            "this model is being served, and attends to the pages of its manager alone: close the manager "
            "before you call the model or generate()"
        )
    if kwargs.get("position_bias") is not None:
        raise ServingError("packed pages have no attention with a position bias: serve another model")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = ops.default_scale(query.shape[3]) if scaling is None else float(scaling)
    rest = (scale, softcap or 0.0, s_aux)
    if cache.layer_to_allocator[layer] is not cache.packed:
        return _sliding(cache, layer, query, key, value, sliding_window, *rest, kwargs), None
    step = cache.step
    stored = cache.packed.pages.tails(layer)
    if any(x.shape[1::2] != tail.shape[1::2] for x, tail in zip((key, value), stored, strict=True)):
        raise ServingError(
            f"layer {layer} attends to {key.shape[1]} heads of {key.shape[3]} channels and values of "
            f"{value.shape[3]}, its configuration says otherwise: it cannot be served from packed pages"
        )
    if layer not in cache.in_range:
        _check_range(cache, layer, key, value)
    # padding that the engine adds comes behind the tokens of all requests
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = attend.attend(cache.packed.pages, layer, step, q, k, v, *rest)
    attend.store(cache.packed.pages, layer, step, k, v)
    return out.unsqueeze(0), None


def _check_range(cache: PackedCache, layer: int, key: Tensor, value: Tensor) -> None:
    """Note that a layer's first keys and values have the range of their scales; others are not looked at.

    Raises:
        NarrowScalesError: they do not.
    """
    pages = cache.packed.layout.layers[layer]
    found: list[tuple[int | None, int, float]] = []
    for role, (x, side) in enumerate(((key, pages.keys), (value, pages.values))):
        peak = float(ops.peak(x))
        if not layout.holds(side.format, peak):
            found.append((layer, role, peak))
    if found:
        raise NarrowScalesError.of(found)
    cache.in_range.add(layer)


def _sliding(
    cache: PackedCache,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    scale: float,
    softcap: float,
    s_aux: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """A layer with a window, whose cache is the engine's own: one request after another."""
    if HANDED_ON not in kwargs:
        key, value = cache.update(key, value, layer, kwargs)
    begin_q, begin_k = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    if window is None:
        window = int(cache.layer_to_allocator[layer].sliding_window)
    group = query.shape[1] // key.shape[1]
    out = query.new_zeros(1, *query.shape[1:3], value.shape[3])
    for first_q, last_q, first_k, last_k in zip(begin_q, begin_q[1:], begin_k, begin_k[1:], strict=False):
        q = query[:, :, first_q:last_q]
        k, v = (x[:, :, first_k:last_k].repeat_interleave(group, 1) for x in (key, value))
        rows = torch.arange(first_q, last_q, device=q.device).unsqueeze(1) - last_q + last_k - first_k
        columns = torch.arange(last_k - first_k, device=q.device)
        seen = (columns <= rows) & (columns > rows - window)
        if softcap or s_aux is not None:
            scores = (q.float() * scale) @ k.float().mT
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            scores = scores.masked_fill(~seen, -torch.inf)
            if s_aux is not None:
                sink = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
                scores = torch.cat([scores, sink], 3)
            weights = torch.softmax(scores, 3)[..., : len(columns)]
            out[:, :, first_q:last_q] = (weights @ v.float()).to(out.dtype)
        else:
            out[:, :, first_q:last_q] = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=scale
            )
    return out.transpose(1, 2)
