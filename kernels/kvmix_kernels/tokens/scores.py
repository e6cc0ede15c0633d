"""The attention that tokens get, summed over queries and the heads that share them: the raw importance."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmix_kernels.cached import Cached
from kvmix_kernels.importance.policy import EVERY_QUERY
from kvmix_kernels.reference.storage import valid_tokens
from kvmix_kernels.tokens.places import Count, columns, in_tier, ring_positions

BLOCK_ELEMENTS = 1 << 24
"""Scores that exist at a time, over batch and heads."""


def mass(
    query: Tensor,
    lse: Tensor,
    new_keys: Tensor | None,
    keys: Cached,
    mask: Tensor | None,
    length: Count,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attention to the tokens that can be in the high tier, now or later: float32 [B, Hkv, Q + ring + Ln].

    First those of the tier by their slots, then the raw ones by theirs, then the step's own. What is in no
    slot gets 0. The tokens of the low tier never come back, so nothing is counted for them.

    Args:
        query: balanced, [B, Hq, Lq, D].
        lse: of all attention of each query, [B, Hq, Lq].
        new_keys: the step's own, balanced, [B, Hkv, Ln, D].
        keys: the cache before the step.
        mask: [B, Hq, Lq, S] or None, as for attention.
        length: tokens before the step.
        scale: factor of the scores.
        softcap: as for attention.
    """
    B, Hkv = keys.residual.shape[:2]
    fmt = keys.format
    inside = in_tier(keys, length)
    recent, live = ring_positions(keys, length)
    parts = [
        (_tokens(keys.high), keys.positions, inside),
        (keys.residual[:, :, fmt.sink :], recent, live.expand(B, Hkv, -1)),
    ]
    if new_keys is not None:
        own = length + torch.arange(new_keys.shape[2], device=query.device)
        parts.append((new_keys, own, torch.ones_like(own, dtype=torch.bool).expand(B, Hkv, -1)))
    found = []
    for tokens, positions, counts in parts:
        # summed a few queries at a time, for a chunk of a prompt has many
        step = max(1, BLOCK_ELEMENTS // max(1, B * query.shape[1] * tokens.shape[2]))
        total = torch.zeros(B, Hkv, tokens.shape[2], device=query.device)
        for first in range(0, query.shape[2], step):
            rows = slice(first, first + step)
            scores = _products(query[:, :, rows], tokens, scale, softcap)
            seen = None if mask is None else columns(mask[:, :, rows], positions)
            scores = scores if seen is None else masked(scores, seen)
            top = lse[:, :, rows].masked_fill(lse[:, :, rows] == -torch.inf, torch.inf)
            total += _by_kv_head(torch.exp(scores - top.unsqueeze(3)), Hkv)
        found.append(total.masked_fill(~counts, 0))
    return torch.cat(found, 2)


def of_prompt(
    query: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    queries: int,
    sink_logits: Tensor | None = None,
    lse: Tensor | None = None,  # noqa: ARG001 - softmax has it
) -> Tensor:
    """The same for a prompt that attends to itself: float32 [B, Hkv, L].

    A pass of its own beside the prompt's attention, some rows at a time.

    Args:
        query: [B, Hq, L, D].
        keys: [B, Hkv, L, D].
        mask: as the prompt's attention has it; None is causal.
        scale: factor of the scores.
        softcap: as for attention.
        queries: how many of the last ones count, or EVERY_QUERY.
        sink_logits: as for attention, [Hq].
        lse: `log_sums` of a causal prompt, if they are known. Kernels need not find them then.
    """
    B, Hq, L, _ = query.shape
    Hkv = keys.shape[1]
    real = valid_tokens(mask, B)
    total = torch.zeros(B, Hkv, L, device=query.device)
    place = torch.arange(L, device=query.device)
    begin = 0 if queries == EVERY_QUERY else max(0, L - queries)
    step = max(1, BLOCK_ELEMENTS // max(1, B * Hq * L))
    for first in range(begin, L, step):
        last = min(L, first + step)
        # a causal row ends where its last query is
        width = L if mask is not None else last
        scores = _products(query[:, :, first:last], keys[:, :, :width], scale, softcap)
        if mask is None:
            scores = scores.masked_fill(place[:width] > place[first:last, None], -torch.inf)
        else:
            scores = masked(scores, whole(mask, B, Hq)[:, :, first:last, :L])
        if sink_logits is not None:
            sink = sink_logits.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], 3)
        weights = torch.softmax(scores, 3)[..., :width].nan_to_num(0)
        if real is not None:
            # rows of padding may attend to anything
            weights = weights * real[:, None, first:last, None]
        total[:, :, :width] += _by_kv_head(weights, Hkv)
    return total


def log_sums(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Logarithms of the sums of weights of a causal prompt's queries, float32 [B, Hq, L]."""
    B, Hq, L, _ = query.shape
    place = torch.arange(L, device=query.device)
    step = max(1, BLOCK_ELEMENTS // max(1, B * Hq * L))
    found = [query.new_zeros(B, Hq, 0, dtype=torch.float32)]
    for first in range(0, L, step):
        last = min(L, first + step)
        products = _products(query[:, :, first:last], keys[:, :, :last], scale, 0.0)
        hidden = place[:last] > place[first:last, None]
        found.append(products.masked_fill(hidden, -torch.inf).logsumexp(3))
    return torch.cat(found, 2)


def whole(mask: Tensor, batch: int, heads: int) -> Tensor:
    """A mask that broadcasts, as [B, Hq, Lq, S]."""
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    return mask.expand(batch, heads, -1, -1)


def masked(scores: Tensor, part: Tensor) -> Tensor:
    """Scores under a boolean or an additive mask."""
    return scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part


def _products(query: Tensor, keys: Tensor, scale: float, softcap: float) -> Tensor:
    B, Hq, n, D = query.shape
    Hkv = keys.shape[1]
    # in the model's dtype where a device multiplies that fast, else in float32
    dtype = query.dtype if query.is_cuda else torch.float32
    rows = query.to(dtype).reshape(B, Hkv, Hq // Hkv * n, D)
    scores = (rows @ keys.to(dtype).transpose(2, 3)).float() * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.view(B, Hq, n, -1)


def _by_kv_head(weights: Tensor, heads: int) -> Tensor:
    return weights.sum(2).unflatten(1, (heads, -1)).sum(2)


def _tokens(high: Cached) -> Tensor:
    """All slots of a high tier as numbers, [B, H, Q, D]."""
    from kvmix_kernels import ops

    if high.format.is_raw:
        return high.residual
    return ops.dequantize(high.tensors, None, high.qdata.shape[2], high.format.encode())
