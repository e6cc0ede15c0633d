"""Attention over pages in the plainest way: the specification. One sequence after another, all at once."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmix_kernels.paged.pages import PagePool
from kvmix_kernels.paged.step import Request, Step
from kvmix_kernels.reference.quantize import compute_dtype
from kvmix_kernels.reference.storage import read


def stored(pool: PagePool, layer: int, request: Request, role: int) -> Tensor:
    """The stored keys (role 0) or values (1) of a sequence as numbers, [Hkv, past, D]."""
    layout = pool.layout
    size, begin = layout.tokens, request.raw_from
    dtype = compute_dtype(pool.tails(layer)[role])
    parts: list[Tensor] = []
    pages = torch.tensor(request.pages[: begin // size], dtype=torch.int64)
    if len(pages):
        packed = read(pool.gathered(layer, pages)[role], 0, size, size)
        tokens = packed.to(dtype).transpose(0, 1).flatten(1, 2)
        sinks = pool.sinks(layer)[role][request.sinks] if layout.sink else tokens[:, :0]
        parts = [sinks.to(dtype), tokens[:, layout.sink :]]
    for position in range(begin, request.past):
        slot = position % layout.ring
        parts.append(pool.tails(layer)[role][request.tail, :, slot : slot + 1].to(dtype))
    heads, channels = pool.tails(layer)[role].shape[1::2]
    return torch.cat(parts, 1) if parts else torch.zeros(heads, 0, channels, dtype=dtype)


def attend(
    pool: PagePool,
    layer: int,
    step: Step,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """`kvmix_kernels.paged.attend.attend`: same arguments, the same up to rounding."""
    dtype = compute_dtype(query)
    out = query.new_empty(*query.shape[:2], values.shape[2])
    group = query.shape[1] // keys.shape[1]
    for request in step.requests:
        own = slice(request.first, request.first + request.count)
        k, v = (
            torch.cat([stored(pool, layer, request, role), x[own].to(dtype).transpose(0, 1)], 1)
            for role, x in enumerate((keys, values))
        )
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
        scores = query[own].to(dtype).transpose(0, 1) * scale @ k.mT  # [Hq, count, past + count]
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        later = torch.arange(k.shape[1]) > request.past + torch.arange(request.count).unsqueeze(1)
        scores = scores.masked_fill(later, -torch.inf)
        if sink_logits is not None:
            sink = sink_logits.to(dtype).view(-1, 1, 1).expand(-1, request.count, 1)
            weights = torch.softmax(torch.cat([scores, sink], 2), 2)[..., :-1]
        else:
            weights = torch.softmax(scores, 2)
        out[own] = (weights @ v).transpose(0, 1).to(out.dtype)
    return out
