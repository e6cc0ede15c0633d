"""Storing tokens in both tiers: scores, what enters the high tier, and what leaves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvmix_kernels import layout, ops
from kvmix_kernels.cached import Cached
from kvmix_kernels.errors import CapacityError, FormatError
from kvmix_kernels.importance import policy_of
from kvmix_kernels.importance.policy import Policy
from kvmix_kernels.reference import quantize as q
from kvmix_kernels.reference.storage import valid_tokens
from kvmix_kernels.tokens import places
from kvmix_kernels.tokens.places import Count, balanced_keys, balanced_query, packed_end
from kvmix_kernels.tokens.scores import of_prompt

_of_prompt: Callable[..., Any] = ops._on_cuda("of_prompt", "importance", of_prompt)
"""The same by kernels, for CUDA tensors."""


def append(
    keys: Cached,
    values: Cached,
    new_keys: Tensor,
    new_values: Tensor,
    mask: Tensor | None,
    start: Tensor | None,
    length: int,
    query: Tensor | None,
    mass: Tensor | None,
    scale: float,
    softcap: float,
    sink_logits: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    """Append tokens [B, H, n, D] in place; choose anew who is in the high tier when a tile is packed.

    Args:
        keys: with a high tier, before the step.
        values: likewise.
        new_keys: as the model has them.
        new_values: likewise.
        mask: of the step.
        start: tokens stored, on the device; None: `length` of them.
        length: tokens stored, or with `start` the capacity.
        query: the step's queries, [B, Hq, n, D]. A prompt's balance and importance come from them.
        mass: what attention gave to the tokens, [B, H, Q + ring + n]; of a prompt its own tokens alone, [B,
            H, n]. None or no columns: the policy counts none, or nobody has.
        scale: factor of the scores, for a prompt's importance.
        softcap: likewise.
        sink_logits: likewise, [Hq].
        lse: logarithms of the sums of a causal prompt's weights, [B, Hq, n], if they are known.

    Raises:
        FormatError: a prompt's queries are not those of its tokens.
        CapacityError: the tokens do not fit, and the host can see it; nothing has been written.
    """
    fmt, n = keys.format, new_keys.shape[2]
    policy = policy_of(fmt)
    count = places.count_of(start, length)
    if query is not None and query.shape[2] != n and isinstance(count, int) and count == 0:
        raise FormatError(
            f"a high tier is chosen by a prompt that attends to itself, got {query.shape[2]} queries for {n} "
            "tokens: leave the high tier out where attention is across, or hand over no queries"
        )
    check_room(keys, values, start, length, count, n)
    scores, waiting = keys.named("scores"), keys.named("waiting")
    own = count + torch.arange(n, device=new_keys.device)
    if isinstance(count, int) and count == 0:
        scores.zero_()
        waiting.zero_()
        _balance(keys, new_keys, query, mask)
        if policy.queries and query is not None:
            count_attention = _of_prompt if query.is_cuda else of_prompt
            found = count_attention(query, new_keys, mask, scale, softcap, policy.queries, sink_logits, lse)
        else:
            found = mass
    elif mass is not None and mass.shape[2]:
        of_tier, of_ring, found = mass.split([scores.shape[2], waiting.shape[2], n], 2)
        for kept, more in ((scores, of_tier), (waiting, of_ring)):
            kept.mul_(policy.decay**n).add_(more)
    else:
        found = None
    if policy.of_keys is not None:
        found = policy.of_keys(new_keys, own)
    if found is None:
        found = new_keys.new_zeros(*new_keys.shape[:3], dtype=torch.float32)
    stored = balanced_keys(new_keys, keys)

    begin, end = packed_end(fmt, count), packed_end(fmt, count + n)
    if isinstance(count, Tensor):
        # a step that does not fit writes nothing
        end = torch.where(count + n <= length, end, begin)
    if isinstance(end, Tensor) or end > begin:
        if isinstance(count, Tensor) or isinstance(end, Tensor) or count:
            _choose(keys, values, stored, new_values, found, mask, count, begin, end)
        else:
            _choose_first(keys, values, stored, new_values, found, mask, end)
    _wait(waiting, found, fmt, count)
    order = None if query is None or not fmt.asks_queries else balanced_query(query, keys)
    ops.append_(
        *(keys.low.tensors, values.low.tensors, stored, new_values, mask, start, length),
        *(keys.low.format.encode(), values.low.format.encode()),
        *(() if order is None else (order,)),
    )


def check_room(
    keys: Cached, values: Cached, start: Tensor | None, length: int, count: Count, more: int
) -> None:
    """Raise CapacityError if the host can see that `more` tokens do not fit; arguments as of `append`."""
    if not isinstance(count, int):
        return
    if start is not None and count + more > length:
        raise CapacityError.exceeded(more, count, length)
    for cached in (keys, values):
        layout.check_room(cached.format, cached.qdata.shape[2], cached.residual.shape[2], count, more)


def _balance(keys: Cached, new_keys: Tensor, query: Tensor | None, mask: Tensor | None) -> None:
    """Factors of a prompt: sqrt(max |q| / max |k|) of each channel, as powers of two; frozen from then on.

    MiKV's balancer (arXiv 2402.18096, equations 2 to 4). A power of two at most 2^(1/2) away from it makes
    multiplying exact, so raw tokens stay what they are.
    """
    assert keys.format.high is not None
    if not keys.format.high.balanced:
        return
    balance = keys.named("balance")
    if query is None:
        balance.fill_(1)
        return
    B, H, n, D = new_keys.shape
    real = valid_tokens(mask, B)
    hidden = None if real is None else ~real[:, None, :n, None]

    def largest(x: Tensor) -> Tensor:
        # in its own dtype: a prompt's queries are large
        x = x.nan_to_num(0, 0, 0)
        x = x if hidden is None else x.masked_fill_(hidden, 0)
        return torch.maximum(x.amax(2), -x.amin(2)).float()

    of_query = largest(query).view(B, H, -1, D).amax(2).clamp(min=1e-6)
    factor = (of_query / largest(new_keys).clamp(min=1e-6)).log2() / 2
    balance.copy_(torch.exp2(factor.round().clamp(-12, 12)))


def _choose_first(
    keys: Cached,
    values: Cached,
    new_keys: Tensor,
    new_values: Tensor,
    found: Tensor,
    mask: Tensor | None,
    end: int,
) -> None:
    """As `_choose` for a prompt, whose tokens compete with nobody: one long sort, and no copies."""
    fmt, n = keys.format, new_keys.shape[2]
    high, policy, begin = fmt.high, policy_of(fmt), fmt.sink
    assert high is not None
    limit = int(high.limit(end - begin))
    positions = torch.arange(begin, end, device=new_keys.device)
    entering = found[:, :, begin:end]
    ranks = _ranked(policy, entering, positions.expand(entering.shape), end - limit * high.recent // 100, n)
    real = valid_tokens(mask, len(new_keys))
    if real is not None:
        ranks = ranks.masked_fill(~real[:, None, begin:end], -torch.inf)
    best = ranks.argsort(dim=2, descending=True, stable=True)[..., : min(limit, keys.positions.shape[2])]
    missing = ranks.gather(2, best) == -torch.inf
    # by position; behind them slots that nobody takes
    which = best.masked_fill(missing, end - begin).sort(dim=2).values
    moves, which = which < end - begin, which.clamp(max=end - begin - 1)
    slots = torch.arange(which.shape[2], device=which.device).expand_as(which)
    keys.positions.fill_(-1)
    keys.positions[:, :, : which.shape[2]] = (which + begin).to(torch.int32).masked_fill_(~moves, -1)
    values.positions.copy_(keys.positions)
    keys.named("scores")[:, :, : which.shape[2]] = entering.gather(2, which).masked_fill_(~moves, 0)
    for cached, new in ((keys, new_keys), (values, new_values)):
        _exchange(cached.high, _rows(new, which + begin).to(cached.residual.dtype), slots, moves)
    places.skip(keys, n)


def _choose(
    keys: Cached,
    values: Cached,
    new_keys: Tensor,
    new_values: Tensor,
    found: Tensor,
    mask: Tensor | None,
    count: Count,
    begin: Count,
    end: Count,
) -> None:
    """Let the tokens that are packed now, at `begin` to `end`, compete with those of the tier.

    Whoever leaves has its codes in the low tier since it was packed. Slots of those that stay are not moved.
    """
    fmt, n, device = keys.format, new_keys.shape[2], new_keys.device
    high, policy = fmt.high, policy_of(fmt)
    assert high is not None
    B, H, Q = keys.positions.shape
    many = fmt.ring + n if isinstance(end, Tensor) else int(end - begin)
    positions = begin + torch.arange(many, device=device)
    leaving = (positions < end).expand(B, H, -1)
    real = valid_tokens(mask, B)
    if real is not None:
        leaving = leaving & real[:, positions.clamp(max=real.shape[1] - 1)].unsqueeze(1)
    in_ring, is_old = (positions - fmt.sink) % fmt.ring, positions < count
    fresh = (positions - count).clamp(0, n - 1)
    pool = torch.cat([keys.named("waiting"), found], 2)
    entering = pool.index_select(2, torch.where(is_old, in_ring, fmt.ring + fresh))
    raw = torch.where(is_old, fmt.sink + in_ring, keys.residual.shape[2] + fresh)

    old = keys.positions
    held = (old >= fmt.sink) & (old < begin)
    limit = high.limit(end - fmt.sink)
    newest = end - limit * high.recent // 100
    both = torch.cat([old.long(), positions.expand(B, H, -1)], 2)
    ranks = _ranked(policy, torch.cat([keys.named("scores"), entering], 2), both, newest, count + n)
    ranks = ranks.masked_fill(~torch.cat([held, leaving], 2), -torch.inf)
    by_rank = ranks.argsort(dim=2, descending=True, stable=True)
    first = torch.arange(by_rank.shape[2], device=device).expand_as(by_rank)
    chosen = torch.empty_like(by_rank).scatter_(2, by_rank, first) < limit
    chosen &= ranks > -torch.inf
    stays, enters = chosen[..., :Q], chosen[..., Q:]

    # the j-th token that enters takes the j-th free slot; there are never fewer slots
    most = min(Q, many)
    slots = stays.long().argsort(dim=2, stable=True)[..., :most]
    which = (~enters).long().argsort(dim=2, stable=True)[..., :most]
    moves = enters.gather(2, which)
    kept = old.masked_fill(~stays, -1)
    there = positions.expand(B, H, -1).gather(2, which).to(torch.int32)
    kept.scatter_(2, slots, torch.where(moves, there, kept.gather(2, slots)))
    scores = keys.named("scores")
    scores.scatter_(2, slots, torch.where(moves, entering.gather(2, which), scores.gather(2, slots)))
    for cached, new in ((keys, new_keys), (values, new_values)):
        rows = raw.expand(B, H, -1).gather(2, which)
        tokens = _rows(torch.cat([cached.residual, new.to(cached.residual.dtype)], 2), rows)
        _exchange(cached.high, tokens, slots, moves)
        cached.positions.copy_(kept)
    places.skip(keys, count + n)


def _ranked(policy: Policy, scores: Tensor, positions: Tensor, newest: Count, length: Count) -> Tensor:
    """What tokens compete by, finite; those from `newest` on come first."""
    ranks = policy.rank(scores, positions, length).masked_fill(positions >= newest, torch.inf)
    return ranks.nan_to_num(nan=-1e38, posinf=3e38, neginf=-1e38)


def _exchange(high: Cached, tokens: Tensor, slots: Tensor, moves: Tensor) -> None:
    """Put tokens [B, H, m, D] into these slots of a tier where `moves` says so, rounded to its bits."""
    fmt = high.format
    if fmt.is_raw:
        parts: tuple[tuple[Tensor, Tensor], ...] = ((high.residual, tokens),)
    else:
        codes, scale, zero_point = q.quantize(tokens, None, fmt)
        packed = (q.pack(codes, fmt.code), scale, zero_point)
        parts = tuple(zip(high.tensors[:3], packed, strict=True))
    for buffer, new in parts:
        index = slots.unsqueeze(3).expand(-1, -1, -1, buffer.shape[3])
        buffer.scatter_(2, index, torch.where(moves.unsqueeze(3), new, buffer.gather(2, index)))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index.unsqueeze(3).expand(-1, -1, -1, x.shape[3]))


def _wait(waiting: Tensor, found: Tensor, fmt: layout.TensorFormat, count: Count) -> None:
    """Keep the scores of new tokens by their ring slots. Those of sinks are written over or never read."""
    n = found.shape[2]
    kept = min(n, fmt.ring)
    positions = count + torch.arange(n - kept, n, device=found.device)
    waiting.index_copy_(2, (positions - fmt.sink) % fmt.ring, found[:, :, n - kept :])
