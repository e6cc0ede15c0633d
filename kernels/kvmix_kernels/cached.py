"""One cached tensor as an object: its format and its buffers. Knows torch, and nothing of the ops over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.errors import FormatError
from kvmix_kernels.layout import BUFFER_NAMES, TensorFormat

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.uint8)
"""As `layout.SCALE_DTYPES`."""
ZERO_DTYPES = (*SCALE_DTYPES[:3], torch.int8)
"""Of the offsets beside them."""
RESIDUAL = BUFFER_NAMES.index("residual")
"""Where every format has its raw tokens."""
APART_DTYPES = {16: torch.bfloat16}
"""Of the buffers of `layout.APART`."""
_NONE_APART = (None,) * len(layout.APART)


class Cached(NamedTuple):
    """The keys or the values of one layer, as drawn in `kvmix_kernels.layout`.

    tensors: the buffers that `format.buffer_names` lists, in that order, as ops take them.
    """

    format: TensorFormat
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], format: Sequence[int]) -> Cached:
        """From what an op is given: a list of buffers, and a format as `TensorFormat.encode` writes it.

        Raises:
            FormatError: the format does not have as many buffers.
        """
        fmt = TensorFormat.decode(format)
        names = fmt.buffer_names
        if len(tensors) != len(names):
            raise FormatError(f"this format has the buffers {names}, got {len(tensors)} tensors")
        return cls(fmt, tuple(tensors))

    @property
    def qdata(self) -> Tensor:
        """Packed codes, int16 [B, H, tiles * tile, words]."""
        return self.tensors[0]

    @property
    def scale(self) -> Tensor:
        """One per group, [B, H, *layout.scale_grid]."""
        return self.tensors[1]

    @property
    def zero_point(self) -> Tensor:
        """Likewise."""
        return self.tensors[2]

    @property
    def residual(self) -> Tensor:
        """Raw tokens, [B, H, slots, D]."""
        return self.tensors[RESIDUAL]

    @property
    def order(self) -> Tensor | None:
        """Which channel each packed one is, [B, H, D] or [B, H, tiles, D]; None without tiers."""
        return self.tensors[4] if self.format.order else None

    def named(self, name: str) -> Tensor:
        """A buffer by its name."""
        return self.tensors[self.format.buffer_names.index(name)]

    @property
    def low(self) -> Cached:
        """The tensor without its high tier."""
        low = self.format.low
        return Cached(low, self.tensors[: len(low.buffer_names)])

    @property
    def high(self) -> Cached:
        """The tokens of the high tier, as a tensor of as many tokens as there are slots."""
        first = len(self.format.low.buffer_names)
        return Cached(self.format.high_format, self.tensors[first : first + len(BUFFER_NAMES)])

    @property
    def positions(self) -> Tensor:
        """Of the tokens in the high tier, int32 [B, H, Q]; which of them count, `layout` says."""
        return self.named("positions")

    @property
    def apart(self) -> tuple[Tensor | None, ...]:
        """Per tier of `layout.APART` what is packed of it, [B, H, tiles * tile, channels], or None."""
        if len(self.tensors) == len(BUFFER_NAMES):
            return _NONE_APART
        counts = self.format.apart_counts
        after = len(BUFFER_NAMES) + 1
        buffers = iter(self.tensors[after:])
        return tuple(next(buffers) if count else None for count in counts) if any(counts) else _NONE_APART

    @property
    def seen(self) -> Tensor | None:
        """Sums of the sizes of all queries so far, float64 [B, H, D]; None where no order needs them."""
        if self.format.order != layout.ORDER_TILE:
            return None
        return self.named("seen")

    @property
    def per_token(self) -> tuple[Tensor, ...]:
        """Buffers of packed tokens, whose dimension 2 grows with them; without those of a high tier."""
        low = self.low
        named = zip(low.format.buffer_names, low.tensors, strict=True)
        kept_once = ("residual", "seen") if self.format.by_tile else ("residual", "order")
        return tuple(buffer for name, buffer in named if name not in kept_once)

    def take_order(self, hint: Tensor | None) -> None:
        """Copy the plan's order of channels, [H, D] or [B, H, D], if the format has one.

        Raises:
            FormatError: it is missing, or is none of this head.
        """
        if self.format.order != layout.ORDER_PLAN or self.order is None:
            return
        heads, head_dim = self.order.shape[1:]
        if hint is None or hint.shape[-2:] != (heads, head_dim):
            found = None if hint is None else list(hint.shape)
            raise FormatError(
                f"this format packs channels in the plan's order, which has to be given as [{heads}, "
                f'{head_dim}], got {found}: take the order from a profile of this model, or order="prompt"'
            )
        self.order.copy_(as_packed(hint, self.format))

    @property
    def head_dim(self) -> int:
        """D."""
        return int(self.residual.shape[3])

    def zeros(self) -> Cached:
        """Buffers of the same sizes that hold zeros; a high tier of them is empty."""
        fmt, (B, H, slots, D) = self.format, self.residual.shape
        tiles = self.qdata.shape[2] // fmt.tile
        return allocate(B, H, D, tiles, slots, fmt, self.residual.dtype, self.residual.device)

    def map(self, function: Callable[[Tensor], Tensor]) -> Cached:
        """The same tensor with `function` of each buffer."""
        return self._replace(tensors=tuple(map(function, self.tensors)))

    def replace(self, **buffers: Tensor) -> Cached:
        """The same tensor with other buffers of these names."""
        named = zip(self.format.buffer_names, self.tensors, strict=True)
        return self._replace(tensors=tuple(buffers.get(name, buffer) for name, buffer in named))


def shapes(
    fmt: TensorFormat, head_dim: int, tiles: int, slots: int, dtype: torch.dtype
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Of each buffer the dimensions behind batch and heads, and the dtype; raw tokens are of `dtype`."""
    found: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((tiles * fmt.tile, layout.row_words(fmt, head_dim)), torch.int16),
        (layout.scale_grid(fmt, head_dim, tiles), SCALE_DTYPES[fmt.scale_dtype]),
        (layout.zero_grid(fmt, head_dim, tiles), ZERO_DTYPES[fmt.scale_dtype]),
        ((slots, head_dim), dtype),
    ]
    if fmt.order:
        small = torch.uint8 if layout.tile_order_itemsize(head_dim) == 1 else torch.int16
        found.append(((tiles, head_dim), small) if fmt.by_tile else ((head_dim,), torch.int32))
        found += [((tiles * fmt.tile, tier.channels), APART_DTYPES[tier.bits]) for tier in fmt.apart]
        if fmt.order == layout.ORDER_TILE:
            found.append(((head_dim,), torch.float64))
    if fmt.high is not None:
        found += shapes(fmt.high_format, head_dim, *layout.high_shape(fmt, tiles), dtype)
        slots = fmt.high.slots(tiles * fmt.tile)
        found.append(((slots,), torch.int32))
        if fmt.high.scored:
            found += [((slots,), torch.float32), ((fmt.ring,), torch.float32)]
            found.append(((tiles * fmt.tile,), torch.uint8))
        if fmt.high.balanced:
            found.append(((head_dim,), torch.float32))
    return found


def as_packed(important: Tensor, fmt: TensorFormat) -> Tensor:
    """Channels [..., D], the most important first, in the order in which tiers are packed."""
    return important.roll(-fmt.apart_channels, -1) if fmt.apart else important


def allocate(
    batch: int,
    heads: int,
    head_dim: int,
    tiles: int,
    slots: int,
    fmt: TensorFormat,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Cached:
    """Zeroed buffers for `tiles` tiles and `slots` raw tokens; channels in their own order.

    Raises:
        HeadSizeError: heads of `head_dim` channels cannot be stored in this format.
    """
    layout.check_head_size(fmt, head_dim)
    cached = Cached(
        fmt,
        tuple(
            torch.zeros(batch, heads, *size, dtype=kind, device=device)
            for size, kind in shapes(fmt, head_dim, tiles, slots, dtype)
        ),
    )
    if cached.order is not None:
        cached.order.copy_(torch.arange(head_dim, device=device))
    if fmt.high is not None:
        cached.positions.fill_(-1)
        if fmt.high.balanced:
            cached.named("balance").fill_(1)
    return cached
