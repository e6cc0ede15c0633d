"""What packed tensors must read as, from plain lists of tokens: the oracle of `test_machine.py`.

Knows when a token is packed, from `TensorFormat.packed_tiles`, and rounds every tile by itself with the
specification. Nothing of `kvmix_fx.cache` is used: no buffers that several tensors share, no ring of raw
slots, no growth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.cached import Cached, allocate
from kvmix_kernels.layout import TensorFormat
from kvmix_kernels.reference import quantize, storage


@dataclass(frozen=True)
class Tokens:
    """Tokens of one tensor.

    raw: [B, H, L, D] in the model dtype, as each would be read where it is not packed. packed: those behind
    the sink that are, as numbers, float32 [B, H, n * tile, D]. order: of the channels, as the tensor has it.
    """

    fmt: TensorFormat
    raw: Tensor
    packed: Tensor
    order: Tensor | None = None

    @classmethod
    def none(cls, fmt: TensorFormat, like: Tensor) -> Tokens:
        """No tokens of the batch, heads and channels of `like`."""
        return cls(fmt, like[:, :, :0], like[:, :, :0].float())

    def __len__(self) -> int:
        return self.raw.shape[2]

    @property
    def end(self) -> int:
        """Position behind the last packed token."""
        return self.fmt.sink + self.packed.shape[2]

    def numbers(self) -> Tensor:
        """As attention reads them: packed ones are not rounded to the model dtype."""
        wide = torch.float64 if self.raw.dtype == torch.float64 else torch.float32
        middle = self.packed.to(wide)
        if not self.packed.shape[2]:
            return self.raw.to(wide)
        return torch.cat([self.raw[:, :, : self.fmt.sink].to(wide), middle, self.raw[:, :, self.end :]], 2)

    def reads(self) -> Tensor:
        """In the model dtype."""
        return self.numbers().to(self.raw.dtype)

    def append(self, x: Tensor, valid: Tensor | None, order: Tensor | None) -> Tokens:
        """With the tokens x [B, H, n, D] behind them.

        Args:
            x: in any dtype.
            valid: which tokens may widen a group, bool [B, len + n]; None for all.
            order: what the tensor under test has chosen, which no permutation is too bad for.
        """
        fmt = self.fmt
        raw = torch.cat([self.raw, x.to(self.raw.dtype)], 2)
        packed = [self.packed]
        old, new = self.packed.shape[2] // fmt.tile, fmt.packed_tiles(raw.shape[2])
        for tile in range(old, new):
            first = fmt.sink + tile * fmt.tile
            span = slice(first, first + fmt.tile)
            chosen = order if order is None or not fmt.by_tile else order[:, :, tile : tile + 1]
            packed.append(rounded(raw[:, :, span], None if valid is None else valid[:, span], fmt, chosen))
        return replace(self, raw=raw, packed=torch.cat(packed, 2), order=order if new > old else self.order)

    def crop(self, length: int) -> Tokens:
        """The first tokens. Those that were packed and are raw again are what their codes said."""
        tiles = self.fmt.packed_tiles(length)
        raw, packed = self.raw[:, :, :length].clone(), self.packed[:, :, : tiles * self.fmt.tile]
        first, last = self.fmt.sink + packed.shape[2], min(length, self.end)
        if first < last:
            raw[:, :, first:last] = self.packed[:, :, first - self.fmt.sink : last - self.fmt.sink]
        return replace(self, raw=raw, packed=packed)

    def without_front(self, tiles: int) -> Tokens:
        """Without the first tiles."""
        n = tiles * self.fmt.tile
        return replace(self, raw=self.raw[:, :, n:], packed=self.packed[:, :, n:])

    def map(self, function) -> Tokens:
        """With other rows."""
        order = None if self.order is None else function(self.order)
        return replace(self, raw=function(self.raw), packed=function(self.packed), order=order)

    def to(self, dtype: torch.dtype) -> Tokens:
        """With raw tokens in another dtype."""
        return replace(self, raw=self.raw.to(dtype))

    def zeros(self) -> Tokens:
        """As many zeros."""
        return replace(self, raw=torch.zeros_like(self.raw), packed=torch.zeros_like(self.packed))


def rounded(x: Tensor, valid: Tensor | None, fmt: TensorFormat, order: Tensor | None) -> Tensor:
    """Whole tiles [B, H, n * tile, D], of one order, as their codes say they are, float32."""
    B, H, L, D = x.shape
    alone = fmt._replace(sink=0, window=0, high=None)
    codes, scale, zero_point = quantize.quantize(x, valid, alone, order)
    one: Cached = allocate(B, H, D, L // fmt.tile, alone.residual_slots, alone, x.dtype, x.device)
    one.qdata.copy_(quantize.pack(codes, fmt.code, layout.plane_block(fmt), fmt.channels(D)[1]))
    one.scale.copy_(scale)
    one.zero_point.copy_(zero_point)
    if order is not None and one.order is not None:
        one.order.copy_(order)
        quantize.keep_apart(one, quantize.in_order(x, order), 0, x.shape[2])
    return storage.read(one, 0, L, L).float()


def attention(query, keys, values, mask, scale, softcap=0.0) -> Tensor:
    """softmax(scale * Q K^T + mask) V in the dtype of the keys; rows that see nothing are 0."""
    group = query.shape[1] // keys.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (keys, values))
    scores = query.to(k.dtype) @ k.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        mask = mask[..., : k.shape[2]]
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(k.dtype)
        )
    return torch.softmax(scores, -1).nan_to_num(0) @ v
