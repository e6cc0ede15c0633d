"""Attention over segments: the specification, and the path for devices without a kernel.

A step attends to the cache as it stood before the step and, exactly, to its own tokens. Tokens
are visited in blocks of bounded size and merged by online softmax (Milakov and Gimelshein,
arXiv 1805.02867), so no copy of the history in 16 bits or more ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvmix_kernels.cached import Cached
from kvmix_kernels.reference.quantize import compute_dtype
from kvmix_kernels.reference.storage import read

BLOCK_ELEMENTS = 1 << 21
"""Elements of K (or V) that are unpacked at a time, over batch and heads."""


def attend(
    query: Tensor,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    keys: Cached,
    values: Cached,
    mask: Tensor | None,
    length: int,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """softmax(scale * Q K^T + mask) V over `length` cached tokens and the step's own.

    Args:
        query: [B, Hq, Lq, D].
        new_keys: the step's own tokens, [B, Hkv, Ln, D], not yet in the cache; None for none.
        new_values: likewise, [B, Hkv, Ln, Dv].
        keys: the cached keys before the step.
        values: the cached values before the step.
        mask: boolean (True attends) or additive, broadcastable to [B, Hq, Lq, S] with
            S >= length + Ln; column j is the token at position j. None attends to all.
        length: live tokens in the cache.
        scale: factor of the scores.
        softcap: if above 0, scores x become softcap * tanh(x / softcap) ahead of the mask (Gemma 2,
            arXiv 2408.00118).
        sink_logits: [Hq], of a learned sink: one more score in each row's softmax, neither scaled nor capped
            nor masked, with a value of zeros (gpt-oss, arXiv 2508.10925).

    Returns:
        [B, Hq, Lq, Dv] in the query's dtype. A query that may attend to nothing gets zeros.
    """
    given = (query, new_keys, new_values, keys, values, mask, length, scale, softcap, sink_logits)
    out, _ = attend_lse(*given)
    return out.to(query.dtype)


def attend_lse(
    query: Tensor,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    keys: Cached,
    values: Cached,
    mask: Tensor | None,
    length: int,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend`, and what merges it with attention over other tokens.

    Returns:
        The output in the compute dtype, [B, Hq, Lq, Dv], and the logarithm of the sum of all weights, that of
        a learned sink included, [B, Hq, Lq]; without a sink -inf for a query that may attend to nothing.
    """
    B, Hq, Lq, D = query.shape
    Hkv, Dv = keys.residual.shape[1], values.residual.shape[3]
    group = Hq // Hkv
    dtype = compute_dtype(query)
    # grouped heads share their keys: fold the group into the rows of one product
    rows = (query.to(dtype) * scale).reshape(B, Hkv, group * Lq, D)
    if mask is not None:
        while mask.dim() < 4:
            mask = mask.unsqueeze(0)
        mask = mask.expand(B, Hq, Lq, mask.shape[3])

    best = rows.new_full((B, Hkv, group * Lq, 1), torch.finfo(dtype).min)
    total = torch.zeros_like(best)
    out = rows.new_zeros(B, Hkv, group * Lq, Dv)
    blocks = _blocks(new_keys, new_values, keys, values, length, dtype)
    for number, (first, k, v) in enumerate(blocks):
        scores = rows @ k.transpose(2, 3)  # [B, Hkv, group * Lq, n]
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            part = mask[..., first : first + k.shape[2]].reshape(B, Hkv, group * Lq, k.shape[2])
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        merged = torch.maximum(best, scores.amax(3, keepdim=True))
        weights = torch.exp(scores - merged)
        if number == 0:  # nothing to merge with yet
            total, out = weights.sum(3, keepdim=True), weights @ v
        else:
            shrink = torch.exp(best - merged)
            total = total * shrink + weights.sum(3, keepdim=True)
            out = out * shrink + weights @ v
        best = merged
    if sink_logits is not None:
        sink = sink_rows(sink_logits, Hkv, Lq).to(dtype).unsqueeze(2)
        merged = torch.maximum(best, sink)
        shrink = torch.exp(best - merged)
        total, out, best = total * shrink + torch.exp(sink - merged), out * shrink, merged
    out = out / total.masked_fill(total == 0, 1)
    lse = best + total.log()
    return out.view(B, Hq, Lq, Dv), lse.view(B, Hq, Lq)


def sink_rows(sink_logits: Tensor, kv_heads: int, queries: int) -> Tensor:
    """A sink's logits [Hq] for the rows of one product, [Hkv, group * Lq]."""
    return sink_logits.view(kv_heads, -1, 1).expand(-1, -1, queries).reshape(kv_heads, -1)


def _blocks(
    new_keys: Tensor | None,
    new_values: Tensor | None,
    keys: Cached,
    values: Cached,
    length: int,
    dtype: torch.dtype,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Blocks of tokens as (first position, keys [B, Hkv, n, D], values [B, Hkv, n, Dv])."""
    per_token = keys.residual[:, :, :1].numel() + values.residual[:, :, :1].numel()
    tile = max(keys.format.tile, values.format.tile)
    block = max(1, BLOCK_ELEMENTS // max(1, per_token) // tile) * tile
    first = 0
    sink = 0 if keys.format.is_raw else keys.format.sink
    while first < length:
        # the first block also takes the sink, so that later ones start at a tile
        last = min(length, first + block + (sink if first == 0 else 0))
        k = read(keys, first, last, length)
        v = read(values, first, last, length)
        if last == length and new_keys is not None and new_values is not None:
            k = torch.cat([k, new_keys.to(k.dtype)], 2)
            v = torch.cat([v, new_values.to(v.dtype)], 2)
        yield first, k.to(dtype), v.to(dtype)
        first = last
    if length == 0 and new_keys is not None and new_values is not None:
        yield 0, new_keys.to(dtype), new_values.to(dtype)
