"""What a file says is a packed tensor, checked before anything reads it.

Kernels trust a format and its buffers: they compute addresses from both. A file that is cut short, or made
to harm, must not get that far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kvmix_fx.errors import CacheStateError, KVMixError
from kvmix_kernels import layout
from kvmix_kernels.cached import Cached, shapes
from kvmix_kernels.layout import HighTier, TensorFormat

LARGEST = 2**40
"""Of any number in a format, and of a length."""


def check_numbers(numbers: Sequence[int]) -> TensorFormat:
    """The format that `TensorFormat.encode` wrote, if its parts fit each other.

    Raises:
        CacheStateError: they do not.
    """
    # a format with a high tier begins with a mark
    if not all(0 <= number < LARGEST for number in numbers[1:]) or not -1 <= numbers[0] < LARGEST:
        raise CacheStateError(f"no packed format has the numbers {list(numbers)}: the file is damaged")
    try:
        whole = TensorFormat.decode(numbers)
        if whole.high is not None:
            _check_high(whole, whole.high, numbers)
        fmt = whole.low
        tiers = [(tier.bits, tier.channels) for tier in fmt.tiers] if len(fmt.tiers) > 1 else []
        tiers.sort(reverse=True)  # raw channels are packed last, and named first
        again = layout.make_format(
            fmt.bits, fmt.axis, fmt.group_size, fmt.tile, fmt.sink, fmt.window, fmt.scale_dtype,
            tiers=tiers, order=fmt.order, symmetric=bool(fmt.symmetric), rotation=bool(fmt.rotation),
        )  # fmt: skip
        spans = [1 <= tier.span <= 100 for tier in fmt.tiers]
        known = fmt.axis in (0, 1) and fmt.order < len(layout.ORDERS)
        known &= fmt.scale_dtype < len(layout.SCALE_DTYPES)
        if not known or not all(spans) or _without_spans(again) != _without_spans(fmt):
            raise CacheStateError(f"no packed format has the numbers {list(numbers)}: the file is damaged")
    except (KVMixError, IndexError) as problem:
        raise CacheStateError(f"a saved cache has a format that cannot be: {problem}") from None
    return whole


def _check_high(fmt: TensorFormat, high: HighTier, numbers: Sequence[int]) -> None:
    again = layout.make_high(
        *(high.share, high.count, high.bits, high.group_size, high.policy, high.recent),
        *(bool(high.balanced), bool(high.evicting)),
    )
    layout.with_high(fmt.low, high)
    # values keep no scores and are not balanced
    unscored = again._replace(scored=0, balanced=0)
    if high.policy >= len(layout.POLICIES) or high not in (again, unscored):
        raise CacheStateError(f"no packed format has the numbers {list(numbers)}: the file is damaged")


def _without_spans(fmt: TensorFormat) -> TensorFormat:
    return fmt._replace(tiers=tuple(tier._replace(span=100) for tier in fmt.tiers))


def check_buffers(cached: Cached, length: int, live: Tensor | None) -> None:
    """Check that buffers are as a format has them, and hold `length` tokens (or have room for so many).

    Raises:
        CacheStateError: they are not; the message names the first that is wrong.
    """
    fmt, residual = cached.format, cached.residual
    if length < 0:
        raise CacheStateError(f"a saved cache says it holds {length} tokens: the file is damaged")
    if residual.dim() != 4 or not residual.is_floating_point() or min(residual.shape) < 1:
        raise _damaged("residual", residual, "raw tokens [batch, heads, slots, head size]")
    rows = cached.qdata.shape[2] if cached.qdata.dim() == 4 else -1
    if rows < 0 or rows % fmt.tile:
        raise _damaged("qdata", cached.qdata, f"whole tiles of {fmt.tile} tokens")
    slots, head_dim = residual.shape[2:]
    try:
        layout.check_head_size(fmt, head_dim)
        if fmt.high is not None:
            layout.check_head_size(fmt.high_format, head_dim)
        expected = shapes(fmt, head_dim, rows // fmt.tile, slots, residual.dtype)
        for name, buffer, (size, dtype) in zip(fmt.buffer_names, cached.tensors, expected, strict=True):
            whole = (*residual.shape[:2], *size)
            if buffer.shape != whole or buffer.dtype != dtype or buffer.device != residual.device:
                raise _damaged(name, buffer, f"{list(whole)} of {dtype} on {residual.device}")
        layout.check_room(fmt, rows, slots, length, 0)
    except CacheStateError:
        raise
    except KVMixError as problem:
        raise CacheStateError(f"a saved cache does not fit its own format: {problem}") from None
    if fmt.is_raw and slots < layout.fixed_slots(fmt, max(1, length)):
        # else the next token would ask for as much as the format says a tile is
        raise _damaged("residual", residual, f"at least {layout.fixed_slots(fmt, max(1, length))} slots")
    if not fmt.is_raw and slots != fmt.residual_slots:
        raise _damaged("residual", residual, f"{fmt.residual_slots} slots")
    for name, buffer in zip(fmt.buffer_names, cached.tensors, strict=True):
        if not buffer.is_contiguous():
            # steps write to it, and places may share their memory
            raise CacheStateError(f'"{name}" of a saved cache is not contiguous: call contiguous() on it')
    if live is not None:
        if live.dim() or live.dtype != torch.int64:
            raise _damaged("live", live, "one int64")
        if not 0 <= int(live) <= length:
            raise CacheStateError(f"a saved cache with room for {length} tokens says it holds {int(live)}")
        length = int(live)
    order = cached.order
    if order is not None:
        if fmt.by_tile:
            order = order[:, :, : fmt.packed_tiles(length)]
        channels = torch.arange(head_dim, dtype=order.dtype, device=order.device)
        if not torch.equal(order.sort(-1).values, channels.expand_as(order)):
            raise CacheStateError("the order of channels in a saved cache is no permutation: it is damaged")


def read_meta(state: Mapping[str, Any], prefix: str) -> list[int]:
    """The numbers beside the buffers of a saved tensor.

    Raises:
        CacheStateError: they are missing, or no list of integers.
    """
    meta = entry(state, prefix, "meta")
    if meta.dim() != 1 or meta.dtype != torch.int64 or not 1 < meta.numel() < 100:
        raise _damaged("meta", meta, "a list of int64")
    return [int(number) for number in meta.tolist()]


def entry(state: Mapping[str, Any], prefix: str, name: str) -> Tensor:
    """A tensor of a saved one.

    Raises:
        CacheStateError: it is missing, or something else.
    """
    value = state.get(prefix + name)
    if not isinstance(value, Tensor):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise CacheStateError(
            f'"{prefix}{name}" of a saved cache is {found}: it was cut short, or saved under another prefix'
        )
    plain = type(value) in (Tensor, Parameter) and value.layout == torch.strided and not value.is_meta
    if not plain or value.requires_grad:
        raise CacheStateError(
            f'"{prefix}{name}" of a saved cache is no plain tensor: only what to_state() returned can be read'
        )
    return value


def _damaged(name: str, found: Tensor, wanted: str) -> CacheStateError:
    return CacheStateError(
        f'"{name}" of a saved cache should be {wanted}, and is {list(found.shape)} of {found.dtype}: '
        "the file is damaged, fill the cache anew"
    )
