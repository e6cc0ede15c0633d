"""Attention over both tiers."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmix_kernels import ops
from kvmix_kernels.cached import Cached
from kvmix_kernels.importance import policy_of
from kvmix_kernels.tokens import places
from kvmix_kernels.tokens.places import balanced_keys, balanced_query, columns, in_tier, packed_end
from kvmix_kernels.tokens.scores import mass, whole


def attend(
    query: Tensor,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    keys: Cached,
    values: Cached,
    mask: Tensor | None,
    start: Tensor | None,
    length: int,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention as `reference.attention.attend` has it, over a cache with a high tier.

    Args:
        query: [B, Hq, Lq, D].
        new_keys: the step's own tokens, [B, Hkv, Ln, D]; None for none.
        new_values: likewise.
        keys: the cached keys before the step, with a high tier.
        values: the cached values before the step, with one.
        mask: boolean or additive, broadcastable to [B, Hq, Lq, S]; None attends to all.
        start: tokens stored, on the device; None: `length` of them.
        length: tokens stored, or with `start` the capacity.
        scale: factor of the scores.
        softcap: bound of the scores, 0 for none.
        sink_logits: [Hq], of a learned sink. It goes with the low tier, so it counts once.

    Returns:
        [B, Hq, Lq, Dv] in the query's dtype; and the attention that each token got which is or may come into
        the high tier, see `scores.mass`, or no columns if the policy does not count it.
    """
    B, Hq = query.shape[:2]
    Hkv = keys.residual.shape[1]
    fmt, dtype = keys.format, query.dtype
    assert fmt.high is not None
    count = places.count_of(start, length)
    query = balanced_query(query, keys)
    new_keys = None if new_keys is None else balanced_keys(new_keys, keys)
    full = None if mask is None else whole(mask, B, Hq)
    width = full.shape[3] if full is not None else length + (0 if new_keys is None else new_keys.shape[2])
    inside = in_tier(keys, count)

    elsewhere = torch.ones(B, Hkv, width + 1, dtype=torch.bool, device=query.device)
    elsewhere.scatter_(2, keys.positions.long().masked_fill(~inside, width).clamp(max=width), False)
    elsewhere = elsewhere[:, :, :width]
    if fmt.high.evicting:
        place = torch.arange(width, device=query.device)
        elsewhere = elsewhere & ((place < fmt.sink) | (place >= packed_end(fmt, count)))
    visible = elsewhere.repeat_interleave(Hq // Hkv, 1).unsqueeze(2)
    low_mask = visible if full is None else _both(full, visible)
    new_values = None if new_keys is None else new_values
    low = ops.attend_lse(
        *(query, new_keys, new_values, keys.low.tensors, values.low.tensors, low_mask, start, length, scale),
        *(keys.low.format.encode(), values.low.format.encode(), softcap, sink_logits),
    )
    slots = keys.positions.shape[2]
    if slots:
        visible = inside.repeat_interleave(Hq // Hkv, 1).unsqueeze(2)
        high_mask = visible if full is None else _both(columns(full, keys.positions), visible)
        high = ops.attend_lse(
            *(query, None, None, keys.high.tensors, values.high.tensors, high_mask, None, slots, scale),
            *(keys.high.format.encode(), values.high.format.encode(), softcap),
        )
        out, lse = merge(low, high)
    else:
        out, lse = low
    if policy_of(fmt).decay == 0:
        return out.to(dtype), out.new_empty(B, Hkv, 0, dtype=torch.float32)
    return out.to(dtype), mass(query, lse, new_keys, keys, full, count, scale, softcap)


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs [B, Hq, Lq, Dv] and log-sum-exps [B, Hq, Lq] of two sets of tokens as those of their union."""
    (a, of_a), (b, of_b) = first, second
    lse = torch.logaddexp(of_a, of_b)
    # a query that may attend to nothing gets zeros
    top = lse.masked_fill(lse == -torch.inf, 0)
    return a * (of_a - top).exp().unsqueeze(3) + b * (of_b - top).exp().unsqueeze(3), lse


def _both(mask: Tensor, visible: Tensor) -> Tensor:
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -torch.inf)
