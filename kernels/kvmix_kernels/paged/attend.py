"""Attention of one step over pages, and what the step leaves behind in them.

A token attends to the sequence's packed pages, to its raw tokens, and exactly to the step's own tokens up to
itself. Parts are merged by their log-sum-exp, so no sequence is padded to another's length and the history
never exists in 16 bits.

On GPUs a few launches do it for all sequences of a step (`triton.paged`), by numbers on the device
(`tables.Tables`): those with one token read pages where they lie; the others get what they have stored as
numbers, of one layer at a time, for one call of flash attention with all their lengths.

Elsewhere sequences with one token go together: their pages are rows of one batch for `ops.attend_lse` (the C
kernel on CPUs), whatever sequence they are of, and are merged afterwards. Sequences with several tokens go
one by one, in blocks of pages, as reading a prompt costs more than calling ops.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kvmix_kernels import ops
from kvmix_kernels.cached import Cached, allocate
from kvmix_kernels.paged.pages import PagePool
from kvmix_kernels.paged.step import Request, Singles, Step
from kvmix_kernels.paged.tables import Tables, tables_for
from kvmix_kernels.reference.quantize import compute_dtype
from kvmix_kernels.reference.storage import read

BLOCK_ELEMENTS = 1 << 22
"""Scores, or unpacked elements of K, that exist at a time."""
GATHERED_BYTES = 1 << 29
"""Most that prompts may take whose stored tokens exist as numbers together."""


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
    """Attention of a step's tokens, each to its own sequence up to itself.

    Args:
        pool: as it is before the step.
        layer: whose pages.
        step: sequences, whose tokens lie one after another.
        query: [N, Hq, D].
        keys: the step's own, [N, Hkv, D], not yet in the pool.
        values: likewise, [N, Hkv, Dv].
        scale: factor of the scores.
        softcap: as of `reference.attention.attend`.
        sink_logits: likewise, [Hq].

    Returns:
        [N, Hq, Dv] in the query's dtype.
    """
    kernel = _kernel(query, pool, layer)
    if kernel is not None:
        return _attend_on_device(kernel, pool, layer, step, query, keys, values, scale, softcap, sink_logits)
    out = query.new_empty(*query.shape[:2], values.shape[2])
    if step.singles is not None:
        tokens = step.singles.tokens
        found = _attend_singles(
            pool,
            layer,
            step.singles,
            query[tokens],
            keys[tokens],
            values[tokens],
            scale,
            softcap,
            sink_logits,
        )
        out[tokens] = found.to(out.dtype)
    for request in step.runs:
        own = slice(request.first, request.first + request.count)
        found = _attend_run(
            pool, layer, step, request, query[own], keys[own], values[own], scale, softcap, sink_logits
        )
        out[own] = found.to(out.dtype)
    return out


def store(pool: PagePool, layer: int, step: Step, keys: Tensor, values: Tensor) -> None:
    """Keep a step's tokens of a layer, after its attention: pack pages that are full, keep the rest raw.

    Args:
        pool: written in place.
        layer: whose tokens.
        step: as for `attend`.
        keys: [N, Hkv, D].
        values: [N, Hkv, Dv].
    """
    kernel = _kernel(keys, pool, layer)
    if kernel is not None:
        kernel.store(pool, layer, tables_of(step, keys), keys, values)
        return
    # tails still have the tokens that full pages begin with
    if len(step.packed):
        both = pool.pages(layer)
        tails = pool.tails(layer)
        full = [_full_pages(step, x, tail) for x, tail in zip((keys, values), tails, strict=True)]
        packed = [
            _empty(cached, len(step.packed), x.shape[1], x.shape[3], x)
            for cached, x in zip(both, full, strict=True)
        ]
        packed[0].take_order(pool.order(layer))
        ops.append_(
            packed[0].tensors,
            packed[1].tensors,
            *full,
            step.packed_mask,
            None,
            0,
            packed[0].format.encode(),
            packed[1].format.encode(),
        )
        for target, made, side in zip(
            both, packed, (pool.layout.layers[layer].keys, pool.layout.layers[layer].values), strict=True
        ):
            for place, new, part in zip(target.tensors, made.tensors, side.parts, strict=True):
                if part is not None and place.numel():
                    place.index_copy_(0, step.packed, new)
    for tail, x in zip(pool.tails(layer), (keys, values), strict=True):
        tail[step.kept.blocks, :, step.kept.slots] = x[step.kept.tokens]
    if step.kept_sinks is not None:
        for first, x in zip(pool.sinks(layer), (keys, values), strict=True):
            first[step.kept_sinks.blocks, :, step.kept_sinks.slots] = x[step.kept_sinks.tokens]


def _empty(like: Cached, count: int, heads: int, channels: int, x: Tensor) -> Cached:
    fmt = like.format
    tokens = x.shape[2]
    tiles, slots = (0, tokens) if fmt.is_raw else (tokens // fmt.tile, fmt.residual_slots)
    return allocate(count, heads, channels, tiles, slots, fmt, x.dtype, x.device)


def _full_pages(step: Step, new: Tensor, tail: Tensor) -> Tensor:
    """The tokens of the pages that the step fills, [n, Hkv, tokens, D]; `new` are the step's, [N, Hkv, D]."""
    size = step.layout.tokens
    found = []
    for request in step.requests:
        pages = step.filled(request)
        if not pages:
            continue
        first, last = pages[0] * size, (pages[-1] + 1) * size
        begin = request.first + max(0, first - request.past)
        tokens = new[begin : request.first + last - request.past].transpose(0, 1)
        if first < request.past:
            old = tail[request.tail].index_select(1, step.slots(first, request.past))
            tokens = torch.cat([old, tokens], 1)
        found.append(tokens.unflatten(1, (len(pages), size)).transpose(0, 1))
    return torch.cat(found).contiguous()


def _attend_singles(
    pool: PagePool,
    layer: int,
    singles: Singles,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,
) -> Tensor:
    dtype = compute_dtype(query)
    N, Hq, D = query.shape
    Hkv, Dv = keys.shape[1], values.shape[2]
    (tail_k, tail_v), (sink_k, sink_v) = pool.tails(layer), pool.sinks(layer)
    raw_k = torch.cat([sink_k[singles.sinks], tail_k[singles.tails]], 2)
    raw_v = torch.cat([sink_v[singles.sinks], tail_v[singles.tails]], 2)
    # what a slot holds that does not count may be no number
    idle = ~singles.raw.view(N, 1, -1, 1)
    raw_k = torch.cat([raw_k.to(dtype).masked_fill_(idle, 0), keys.to(dtype).unsqueeze(2)], 2)
    raw_v = torch.cat([raw_v.to(dtype).masked_fill_(idle, 0), values.to(dtype).unsqueeze(2)], 2)
    rows = (query.to(dtype) * scale).view(N, Hkv, Hq // Hkv, D)
    scores = _capped(rows @ raw_k.mT, softcap)
    scores[..., :-1].masked_fill_(idle.mT, -torch.inf)
    best = scores.amax(3, keepdim=True)
    weights = torch.exp(scores - best)
    total = weights.sum(3, keepdim=True)
    raw_out = (weights @ raw_v / total).view(N, Hq, Dv)
    raw_lse = (best + total.log()).view(N, Hq)
    everyone = torch.arange(N, device=query.device)
    outs, lses, owners = [raw_out], [raw_lse], [everyone]
    if len(singles.pages):
        out, lse = _attend_pages(pool, layer, singles, query, scale, softcap)
        outs.append(out.to(dtype))
        lses.append(lse.to(dtype))
        owners.append(singles.owners)
    if sink_logits is not None:
        outs.append(raw_out.new_zeros(N, Hq, Dv))
        lses.append(sink_logits.to(dtype).expand(N, Hq))
        owners.append(everyone)
    if len(outs) == 1:
        return raw_out
    return _merged(torch.cat(outs), torch.cat(lses), torch.cat(owners), N)


def _attend_pages(
    pool: PagePool, layer: int, singles: Singles, query: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Attention of sequences with one token over their pages: outputs and log-sum-exps of every page.

    Pages are copied side by side as they are packed.
    """
    k, v = pool.gathered(layer, singles.pages)
    out, lse = ops.attend_lse(
        query[singles.owners].unsqueeze(2),
        None,
        None,
        k.tensors,
        v.tensors,
        singles.counted,
        None,
        pool.layout.tokens,
        scale,
        k.format.encode(),
        v.format.encode(),
        softcap,
    )
    return out.squeeze(2), lse.squeeze(2)


def _kernel(x: Tensor, pool: PagePool, layer: int) -> Any:
    """The module of the kernels, if they take a layer's pages and tokens of this kind."""
    if not x.is_cuda or x.dtype == torch.float64 or not ops._USE_TRITON:
        return None
    kernel = _module()
    if kernel is None:
        return None
    return kernel if kernel.takes(pool.layout, layer) else None


@cache
def _module() -> Any:
    """The module of the kernels; None without Triton, of which the ops say so. Asked in every layer, so kept.

    Nothing else that keeps it from being imported is passed over: steps would be slow without a word.
    """
    if find_spec("triton") is None:
        return None
    return import_module("kvmix_kernels.triton.paged")


def kernels_take(pool: PagePool, layer: int, dtype: torch.dtype) -> bool:
    """Whether kernels do all that a step does in a layer, for a model of this dtype."""
    return _kernel(pool.storage.new_empty(0).to(dtype), pool, layer) is not None


def tables_of(step: Step, like: Tensor) -> Tables:
    """The numbers of a step on the device of a tensor, made for its first layer unless it has them."""
    if step.tables is None:
        step.tables = tables_for(step, like.device)
    assert isinstance(step.tables, Tables)
    return step.tables


def _attend_on_device(
    kernel: Any,
    pool: PagePool,
    layer: int,
    step: Step,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,
) -> Tensor:
    """`attend` by kernels; rows of padding, behind the tokens of all sequences, are zeros."""
    tables = tables_of(step, query)
    given = (scale, softcap, sink_logits)
    if not tables.runs and tables.rows == len(query):
        out: Tensor = kernel.attend_singles(pool, layer, tables, query, keys, values, *given)
        return out
    out = query.new_zeros(*query.shape[:2], values.shape[2])
    if tables.singles:
        found = kernel.attend_singles(pool, layer, tables, query, keys, values, *given)
        out.index_copy_(0, tables.single_tokens, found)
    if not tables.runs:
        return out
    size = tables.keys * keys.shape[1] * (keys.shape[2] + values.shape[2]) * query.element_size()
    if not _flash_takes(query, values.shape[2], softcap) or size > GATHERED_BYTES:
        for request in tables.runs:
            own = slice(request.first, request.first + request.count)
            out[own] = _attend_run(pool, layer, step, request, query[own], keys[own], values[own], *given).to(
                out.dtype
            )
        return out
    k, v = kernel.gather(pool, layer, tables, keys, values)
    q = query[tables.run_tokens]
    lengths = tables.run_lengths
    found, lse = _flash_on_cuda_varlen(
        q, k.to(q.dtype), v.to(q.dtype), lengths[0], lengths[1], tables.most,
        max(request.past + request.count for request in tables.runs), 0.0, True, False, scale=scale,
    )[:2]  # fmt: skip
    if sink_logits is not None:
        both = torch.logaddexp(lse, sink_logits.to(lse.dtype).unsqueeze(1))
        found = (found * torch.exp(lse - both).T.unsqueeze(2)).to(out.dtype)
    out[tables.run_tokens] = found
    return out


def _flash_takes(query: Tensor, channels: int, softcap: float) -> bool:
    """Whether flash attention takes sequences of any lengths side by side, with such queries and values."""
    if softcap > 0 or channels != query.shape[2] or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    alike = query[:1].transpose(0, 1).unsqueeze(0)
    return bool(
        torch.backends.cuda.can_use_flash_attention(
            torch.backends.cuda.SDPAParams(alike, alike, alike, None, 0.0, False, False)
        )
    )


def _merged(out: Tensor, lse: Tensor, owners: Tensor, count: int) -> Tensor:
    """Partial outputs [P, Hq, Dv] with their log-sum-exps [P, Hq], merged by owner: [count, Hq, Dv]."""
    best = lse.new_full((count, lse.shape[1]), -torch.inf)
    best = best.scatter_reduce(0, owners.unsqueeze(1).expand_as(lse), lse, "amax")
    weights = torch.exp(lse - best[owners])
    total = torch.zeros_like(best).index_add_(0, owners, weights)
    # a part that nobody attends to has -inf and an output of zeros
    summed = out.new_zeros(count, *out.shape[1:]).index_add_(0, owners, out * weights.unsqueeze(2))
    return summed / total.unsqueeze(2)


def _attend_run(
    pool: PagePool,
    layer: int,
    step: Step,
    request: Request,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention of the tokens [n, Hq, D] of one sequence: [n, Hq, Dv]."""
    if request.past == 0 and softcap == 0 and sink_logits is None:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, keys, values))
        grouped = k.shape[1] != q.shape[1]
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
        return out[0].transpose(0, 1)
    n, Hq, D = query.shape
    merge = _Online(query.transpose(0, 1).unsqueeze(0), scale, softcap)
    size, sink = pool.layout.tokens, pool.layout.sink
    packed = request.raw_from // size
    # scores exist where attention is written out
    scores = 0 if merge.fused(values.shape[2]) else Hq * n
    at_once = max(1, BLOCK_ELEMENTS // (size * max(scores, keys.shape[1] * D)))
    for first in range(0, packed, at_once):
        some = step.page_tensor(request.pages[first : min(packed, first + at_once)])
        k, v = (_unpacked(cached, size) for cached in pool.gathered(layer, some))
        skip = min(sink, size * packed) if first == 0 else 0
        merge.add(k[:, skip:], v[:, skip:])
    slots = step.slots(request.raw_from, request.past)
    raw = []
    for firsts, recent in zip(pool.sinks(layer), pool.tails(layer), strict=True):
        parts = [firsts[request.sinks]] if packed and sink else []
        raw.append(torch.cat([*parts, recent[request.tail].index_select(1, slots)], 1))
    merge.add(raw[0], raw[1])
    merge.add(keys.transpose(0, 1), values.transpose(0, 1), causal=True)
    return merge.result(sink_logits).transpose(0, 1)


def _unpacked(cached: Cached, size: int) -> Tensor:
    """All tokens of some pages as one sequence, [Hkv, P * size, D]."""
    if cached.qdata.is_cuda:
        tokens = ops.dequantize(cached.tensors, None, size, cached.format.encode())
    else:
        # the op would round to the model's dtype
        tokens = read(cached, 0, size, size)
    return tokens.transpose(0, 1).flatten(1, 2)


class _Online:
    """Attention of one sequence's queries that get their keys and values part by part."""

    def __init__(self, query: Tensor, scale: float, softcap: float) -> None:
        """`query`: [1, Hq, n, D]."""
        self.query, self.scale, self.softcap = query, scale, softcap
        self.dtype = compute_dtype(query)
        self.out: Tensor | None = None
        self.lse = query.new_empty(0)

    def add(self, k: Tensor, v: Tensor, causal: bool = False) -> None:
        """Every query attends to all of keys [Hkv, m, D] and values [Hkv, m, Dv].

        causal: there are as many as queries, and each attends to those up to its own.
        """
        if not k.shape[1]:
            return
        out, lse = self._partial(k.unsqueeze(0), v.unsqueeze(0), causal)
        if self.out is None:
            self.out, self.lse = out, lse
            return
        both = torch.logaddexp(self.lse, lse)
        self.out = self.out * torch.exp(self.lse - both).unsqueeze(3) + out * torch.exp(lse - both).unsqueeze(
            3
        )
        self.lse = both

    def fused(self, channels: int) -> bool:
        """Whether attention over values of so many channels is one op that does not keep the scores."""
        query = self.query
        if self.softcap > 0 or channels != query.shape[3] or self.dtype != torch.float32:
            return False
        if query.device.type == "cpu":
            return True
        if not query.is_cuda:
            return False
        alike = torch.backends.cuda.SDPAParams(query, query, query, None, 0.0, False, False)
        return torch.backends.cuda.can_use_flash_attention(alike)

    def result(self, sink_logits: Tensor | None) -> Tensor:
        """[Hq, n, Dv]; `sink_logits` [Hq] as of `attend`."""
        assert self.out is not None
        out = self.out
        if sink_logits is not None:
            both = torch.logaddexp(self.lse, sink_logits.to(self.dtype).view(1, -1, 1))
            out = out * torch.exp(self.lse - both).unsqueeze(3)
        return out[0]

    def _partial(self, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Output [1, Hq, n, Dv] over one part, and its log-sum-exp [1, Hq, n], in the compute dtype."""
        group = self.query.shape[1] // k.shape[1]
        if self.fused(v.shape[3]) and k.device.type == "cpu":
            q, k, v = (x.float() for x in (self.query, k, v))
            out, lse = _flash_on_cpu(q, k, v, 0.0, causal, scale=self.scale)
            return out, lse
        if self.fused(v.shape[3]):
            k, v = (x.to(self.query.dtype).repeat_interleave(group, 1) for x in (k, v))
            out, lse = _flash_on_cuda(self.query, k, v, 0.0, causal, scale=self.scale)[:2]
            return out.to(self.dtype), lse
        rows = self.query.to(self.dtype).unflatten(1, (-1, group)) * self.scale
        k, v = k.to(self.dtype).unsqueeze(2), v.to(self.dtype).unsqueeze(2)
        n, m = rows.shape[3], k.shape[3]
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        block = max(1, BLOCK_ELEMENTS // (self.query.shape[1] * m))
        for first in range(0, n, block):
            last = min(n, first + block)
            seen = last if causal else m
            scores = _capped(rows[:, :, :, first:last] @ k[:, :, :, :seen].mT, self.softcap)
            if causal:
                columns = torch.arange(seen, device=k.device)
                scores.masked_fill_(columns > columns[first:last].unsqueeze(1), -torch.inf)
            lse = scores.logsumexp(4)
            outs.append(torch.exp(scores - lse.unsqueeze(4)) @ v[:, :, :, :seen])
            lses.append(lse)
        return torch.cat(outs, 3).flatten(1, 2), torch.cat(lses, 3).flatten(1, 2)


# those of scaled_dot_product_attention, which does not return the sums
_flash_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_on_cuda = torch.ops.aten._scaled_dot_product_flash_attention
# that of torch.nn.attention.varlen, whose interface differs between releases
_flash_on_cuda_varlen = torch.ops.aten._flash_attention_forward


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap > 0 else scores
