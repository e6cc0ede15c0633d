"""Where the tokens of a tensor with a high tier are. Token counts are numbers, or tensors of one."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmix_kernels.cached import Cached
from kvmix_kernels.layout import SKIPPED_NAME, TensorFormat

Count = Tensor | int


def count_of(start: Tensor | None, length: int) -> Count:
    """Tokens stored, as ops are told: on a GPU they stay there, for the host would have to wait for them."""
    if start is None:
        return length
    return start if start.is_cuda else int(start)


def packed_end(fmt: TensorFormat, length: Count) -> Count:
    """`TensorFormat.packed_end`."""
    if not isinstance(length, Tensor):
        return fmt.packed_end(length)
    return fmt.sink + (length - fmt.sink - fmt.window).clamp(min=0) // fmt.tile * fmt.tile


def in_tier(cached: Cached, length: Count) -> Tensor:
    """Which slots hold a token of a tensor of so many, bool [B, H, Q]."""
    positions = cached.positions
    return (positions >= cached.format.sink) & (positions < packed_end(cached.format, length))


def nothing_skipped(qdata: Tensor) -> Tensor:
    """A buffer `skipped` for packed tokens in these rows."""
    return qdata.new_zeros(qdata.shape[:3], dtype=torch.uint8)


def skip(keys: Cached, length: Count) -> None:
    """Write down which packed tokens are read from the high tier alone, from the positions in it.

    Nothing but a tile that is packed changes it, so a cache whose end moves back keeps it.
    """
    fmt, skipped = keys.format, keys.named(SKIPPED_NAME)
    assert fmt.high is not None
    if fmt.high.evicting:
        skipped.fill_(1)
        return
    # one place more, for slots that hold nothing
    room = skipped.new_zeros(*skipped.shape[:2], skipped.shape[2] + 1)
    rows = (keys.positions.long() - fmt.sink).masked_fill(~in_tier(keys, length), skipped.shape[2])
    room.scatter_(2, rows.clamp(max=skipped.shape[2]), 1)
    skipped.copy_(room[:, :, :-1])


def ring_positions(cached: Cached, length: Count) -> tuple[Tensor, Tensor]:
    """The position of the token in each slot of the recent window, int64 [ring], and whether there is one."""
    fmt = cached.format
    end = packed_end(fmt, length)
    slot = torch.arange(fmt.ring, device=cached.residual.device)
    positions = end + (slot - (end - fmt.sink)) % fmt.ring
    return positions, positions < length


def columns(mask: Tensor, positions: Tensor) -> Tensor:
    """The columns of a mask [B, Hq, Lq, S] for positions [B, Hkv, n] or [n]; past its end the last one."""
    B, Hq, Lq, S = mask.shape
    index = positions.long().clamp(0, S - 1)
    if index.dim() == 1:
        return mask.index_select(3, index)
    index = index.repeat_interleave(Hq // index.shape[1], 1)
    return mask.gather(3, index.unsqueeze(2).expand(B, Hq, Lq, -1))


def factors(cached: Cached) -> Tensor | None:
    """What keys are multiplied by, [B, H, 1, D]; None where they are stored as they are."""
    high = cached.format.high
    return cached.named("balance").unsqueeze(2) if high is not None and high.balanced else None


def balanced_query(query: Tensor, keys: Cached) -> Tensor:
    """Queries as the stored keys want them."""
    factor = factors(keys)
    if factor is None:
        return query
    # powers of two: as exact in the model's dtype
    factor = factor.to(query.dtype).repeat_interleave(query.shape[1] // factor.shape[1], 1)
    return query / factor


def balanced_keys(new: Tensor, keys: Cached) -> Tensor:
    """Keys as they are stored."""
    factor = factors(keys)
    return new if factor is None else new * factor.to(new.dtype)
