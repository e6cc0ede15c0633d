"""Bytes and bits of one cached tensor, from the packed layout."""

from __future__ import annotations

from typing import Literal, TypeAlias

from kvmix_kernels import layout
from kvmix_kernels.layout import TensorFormat

CacheKind: TypeAlias = Literal["growing", "fixed"]
CACHE_KINDS: tuple[CacheKind, ...] = ("growing", "fixed")


def allocated_bytes(fmt: TensorFormat, head_dim: int, length: int, itemsize: int, cache: CacheKind) -> int:
    """Bytes of all buffers of one batch row and one KV head.

    Args:
        fmt: how the tensor is stored.
        head_dim: channels of the head.
        length: tokens stored ("growing") or tokens there is room for ("fixed").
        itemsize: bytes of one raw element.
        cache: whether buffers grow with the tokens or are allocated once.
    """
    if cache == "growing":
        tiles, slots = layout.growing_tiles(fmt, length), layout.growing_slots(fmt, length)
    else:
        tiles, slots = layout.fixed_tiles(fmt, length), layout.fixed_slots(fmt, length)
    return layout.buffer_nbytes(fmt, head_dim, tiles, slots, itemsize)


def mean_bits(fmt: TensorFormat, head_dim: int, length: int | None) -> float:
    """Bits per element of `length` stored tokens, or of endlessly many for None.

    Sink and window tokens count as raw, and the order of channels, one number a channel, counts too; slots
    that are allocated and empty are not counted.
    """
    packed_bits = layout.bits_per_packed_element(fmt, head_dim)
    if length is None:
        return packed_bits
    packed = fmt.packed_tiles(length) * fmt.tile
    order = 8 * layout.ORDER_ITEMSIZE if fmt.order else 0
    total = packed * packed_bits + (length - packed) * layout.RAW_BITS + order
    if fmt.high is not None and fmt.high.count:
        total += min(fmt.high.count, packed) * layout.bits_per_high_element(fmt, head_dim)
    return total / length
