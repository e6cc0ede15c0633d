"""Decode attention for CPUs: the C kernel of `native`, and what it leaves in few and long vectorised ops.

The kernel needs a C compiler. What follows is about the ops.

The reference unpacks tokens into rows of D channels. Its fields are then slices of D * bits / 16
channels, 8 for 64 channels at 2 bits, and an op over such short rows spends its time between rows.
Here the packed words are transposed first, while they are small: as [words, B * Hkv, n] every field
is one long run, one `bitwise_and` with a mask per field takes all of them apart, in the order of the
channels, and the products over tokens read contiguous memory.

Fields are not shifted down: field f of a plane of w bits comes out 2^(f w) too large, and these powers
of two go into the query, or out of the result, exactly. Keys are multiplied by their scales, values
pass theirs on to the weights, and zero points are small products of their own: q . zero_point for
keys, the sum of the weights over a group for values.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.cached import Cached
from kvmix_kernels.cpu import native
from kvmix_kernels.layout import AXIS_CHANNEL, TensorFormat
from kvmix_kernels.reference import attention as reference
from kvmix_kernels.reference.quantize import split_planes
from kvmix_kernels.reference.scales import load_scale, load_zero, rotate_sums
from kvmix_kernels.reference.storage import runs

CHUNK_ELEMENTS = 1 << 20
"""Elements of K (or V) that are unpacked at a time, over batch and heads.

Six bytes of scratch each. Smaller chunks would stay in a core's own cache, but the fixed cost of the
ops, about 2 us each, outweighs that.
"""

MAX_ROWS = native.MAX_ROWS
"""Query rows per KV head (grouped heads x query length). The reference takes more: it keeps no scores."""


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
    """`kvmix_kernels.reference.attention.attend` for CPU tensors: same arguments, equal up to rounding.

    Scratch without the kernel: CHUNK_ELEMENTS elements, and the scores of all tokens, float32 [B, Hq, Lq,
    length + Ln]. The history never exists in 16 bits.
    """
    B, Hq, Lq, D = query.shape
    Hkv, Dv = keys.residual.shape[1], values.residual.shape[3]
    rows = Hq // Hkv * Lq
    rest = (mask, length, scale, softcap, sink_logits)
    if rows > MAX_ROWS or query.dtype == torch.float64:
        return reference.attend(query, new_keys, new_values, keys, values, *rest)
    out = native.attend(query, new_keys, new_values, keys, values, *rest)
    if out is not None:
        return out
    if not (keys.format.sums_packed and values.format.sums_packed):
        _say_reference(D > native.MAX_HEAD_DIM)
        return reference.attend(query, new_keys, new_values, keys, values, *rest)
    # grouped heads share their keys: fold the group into the rows of one product
    q = (query.float() * scale).reshape(B * Hkv, rows, D)
    scores = _scores(q, keys, new_keys, length)
    if softcap > 0:
        scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None and mask.dtype == torch.bool and mask.all():
        mask = None
    if mask is not None:
        by_head = scores.view(B, Hq, Lq, -1)
        part = mask[..., : by_head.shape[3]]
        if part.dtype == torch.bool:
            by_head.masked_fill_(~part, -torch.inf)
        else:
            by_head.add_(part)
    if sink_logits is None:
        weights = torch.softmax(scores, -1)
    else:
        sink = reference.sink_rows(sink_logits, Hkv, Lq).to(scores.dtype).repeat(B, 1).unsqueeze(2)
        weights = torch.softmax(torch.cat([scores, sink], 2), -1)[..., :-1]
    if mask is not None:
        # a query that may attend to nothing gets zeros
        weights.masked_fill_(scores.amax(-1, keepdim=True) == -torch.inf, 0)
    out = _weighted_sum(weights, values, new_values, length)
    return out.view(B, Hq, Lq, Dv).to(query.dtype)


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
    """`kvmix_kernels.reference.attention.attend_lse` for CPU tensors, by the kernel where it takes them."""
    given = (query, new_keys, new_values, keys, values, mask, length, scale, softcap, sink_logits)
    B, Hq, Lq, _ = query.shape
    if query.dtype != torch.float64 and Hq // keys.residual.shape[1] * Lq <= MAX_ROWS:
        sums = torch.empty(B, Hq, Lq, 2)
        out = native.attend(*given, sums)
        if out is not None:
            return out, sums[..., 0] + sums[..., 1].log()
    return reference.attend_lse(*given)


@cache
def _say_reference(too_wide: bool) -> None:
    why = f"heads of more than {native.MAX_HEAD_DIM} channels" if too_wide else "no C kernel that takes them"
    warnings.warn(
        f"keys with orders of tiles or channels apart take the slow reference here: {why}. An order from the "
        "plan or the prompt is faster",
        stacklevel=3,
    )


def _scores(q: Tensor, cached: Cached, new: Tensor | None, length: int) -> Tensor:
    """Products of q [B * H, R, D] with all keys, [B * H, R, length + Ln], in the order of positions."""
    fmt = cached.format
    parts = [torch.bmm(q, tokens.mT) for _, _, tokens in _raw(cached, 0, min(length, fmt.sink))]
    packed = _as_packed(q, cached)
    for first, last in _chunks(cached, length):
        total: Tensor | None = None
        step, zero_point = _numbers(cached, first, last)
        for fields, power in _fields(cached, first, last):
            scaled = _scaled(fields, step, fmt, last - first)
            product = torch.bmm(packed[:, :, : len(power)] * power, scaled.transpose(0, 1))
            total = product if total is None else total.add_(product)
        assert total is not None
        zero_point = zero_point.flatten(0, 1)
        if fmt.axis == AXIS_CHANNEL:
            offset = torch.bmm(packed, zero_point.mT)
            total.view(*offset.shape, fmt.group_size).add_(offset.unsqueeze(3))
        else:
            total.baddbmm_(packed.unflatten(2, (zero_point.shape[2], -1)).sum(3), zero_point.mT)
        parts.append(total)
    parts += [torch.bmm(q, tokens.mT) for _, _, tokens in _raw(cached, fmt.packed_end(length), length)]
    if new is not None:
        parts.append(torch.bmm(q, new.float().flatten(0, 1).mT))
    return torch.cat(parts, 2) if parts else q.new_zeros(*q.shape[:2], 0)


def _weighted_sum(weights: Tensor, cached: Cached, new: Tensor | None, length: int) -> Tensor:
    """Sum of all values by weights [B * H, R, length + Ln]; [B * H, R, D]."""
    fmt = cached.format
    out = weights.new_zeros(*weights.shape[:2], cached.residual.shape[3])
    for begin, end in ((0, min(length, fmt.sink)), (fmt.packed_end(length), length)):
        for first, last, tokens in _raw(cached, begin, end):
            out.baddbmm_(weights[:, :, first:last], tokens)
    if new is not None:
        out.baddbmm_(weights[:, :, length:], new.float().flatten(0, 1))
    # what is packed in other channels, or in a rotated basis, is summed by itself and turned back once
    apart = bool(fmt.rotation or fmt.order)
    packed = torch.zeros_like(out) if apart else out
    for first, last in _chunks(cached, length):
        p = weights[:, :, fmt.sink + first : fmt.sink + last]
        step, zero_point = _numbers(cached, first, last)
        zero_point = zero_point.flatten(0, 1)
        if fmt.axis == AXIS_CHANNEL:
            packed.baddbmm_(p.unflatten(2, (-1, fmt.group_size)).sum(3), zero_point)
            for fields, power in _fields(cached, first, last):
                scaled = _scaled(fields, step, fmt, last - first)
                packed[:, :, : len(power)].addcmul_(torch.bmm(p, scaled.permute(1, 2, 0)), power)
        else:
            groups = zero_point.shape[2]
            scale = step.permute(3, 0, 1, 2).contiguous().flatten(1, 2).unsqueeze(2)
            by_group = (p * scale).unbind()
            for fields, power in _fields(cached, first, last):
                channels = fields.permute(1, 2, 0).chunk(groups, 2)
                sums = [torch.bmm(w, c) for w, c in zip(by_group, channels, strict=True)]
                packed.addcmul_(torch.cat(sums, 2) if groups > 1 else sums[0], power)
            packed.view(*packed.shape[:2], groups, -1).add_(torch.bmm(p, zero_point).unsqueeze(3))
    if cached.order is not None:
        packed = torch.empty_like(packed).scatter_(2, _places(cached, packed), packed)
    if fmt.rotation:
        packed = rotate_sums(packed)
    return out.add_(packed) if apart else out


def _as_packed(q: Tensor, cached: Cached) -> Tensor:
    """Queries [B * H, R, D] as the packed tokens' channels lie: in their order, or rotated as they are."""
    if cached.order is not None:
        q = q.gather(2, _places(cached, q))
    return rotate_sums(q) if cached.format.rotation else q


def _places(cached: Cached, like: Tensor) -> Tensor:
    """The order of channels as an index of `like`, [B * H, R, D]."""
    assert cached.order is not None
    return cached.order.long().flatten(0, 1).unsqueeze(1).expand(like.shape)


def _chunks(cached: Cached, length: int) -> Iterator[tuple[int, int]]:
    """Packed tokens in bounded parts: first row of qdata, last row + 1."""
    fmt = cached.format
    B, H, _, D = cached.residual.shape
    step = max(1, CHUNK_ELEMENTS // (B * H * D * fmt.tile)) * fmt.tile
    packed = fmt.packed_tiles(length) * fmt.tile
    for first in range(0, packed, step):
        yield first, min(packed, first + step)


def _raw(cached: Cached, begin: int, end: int) -> Iterator[tuple[int, int, Tensor]]:
    """Raw tokens in bounded parts: first position, last position + 1, float32 [B * H, n, D]."""
    B, H, _, D = cached.residual.shape
    step = max(1, CHUNK_ELEMENTS // (B * H * D))
    for start, stop, slot in runs(begin, end, cached.format):
        for first in range(start, stop, step):
            last = min(stop, first + step)
            tokens = cached.residual.narrow(2, slot + first - start, last - first)
            yield first, last, tokens.float().flatten(0, 1)


def _groups(grid: Tensor, first: int, last: int, fmt: TensorFormat) -> Tensor:
    """Scales or zero points of the rows first..last-1 of qdata, [B, H, groups, D] or [B, H, n, groups]."""
    if fmt.axis == AXIS_CHANNEL:
        first, last = first // fmt.group_size, last // fmt.group_size
    return grid.narrow(2, first, last - first)


def _numbers(cached: Cached, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Scales and offsets of the rows first..last-1, float32, shaped as `_groups` has them."""
    fmt = cached.format
    step = load_scale(_groups(cached.scale, first, last, fmt), fmt, torch.float32)
    return step, load_zero(step, _groups(cached.zero_point, first, last, fmt), fmt)


def _scaled(fields: Tensor, step: Tensor, fmt: TensorFormat, count: int) -> Tensor:
    """Fields [n, B * H, count], multiplied in place by the scales of their groups."""
    scale = step.permute(3, 0, 1, 2)
    columns, B, H, _ = scale.shape
    if fmt.axis == AXIS_CHANNEL:
        channels = len(fields)
        fields.view(channels, B, H, -1, fmt.group_size).mul_(scale[:channels].unsqueeze(4))
    else:
        fields.view(columns, -1, B, H, count).mul_(scale.contiguous().unsqueeze(1))
    return fields


def _fields(cached: Cached, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows first..last-1 of qdata, plane by plane, masked but not shifted down.

    Yields:
        (fields, float32 [D, B * H, n], free to be overwritten until the next are asked for; factor of
        each channel, float32 [D]). Fields times factors, summed over the planes, are the codes. With tiers
        there are fewer channels than D, the first of their order.
    """
    fmt, D = cached.format, cached.head_dim
    rows = cached.qdata.narrow(2, first, last - first)
    kept, above = fmt.channels(D)
    planes = split_planes(rows, layout.plane_words(fmt.code, kept, above), layout.plane_block(fmt))
    for plane, (masks, power) in zip(planes, _field_constants(fmt.code, kept, above), strict=True):
        words = plane.permute(3, 0, 1, 2).contiguous()
        masked, unsigned, floats, fields = _scratch.take((len(masks), *words.shape))
        torch.bitwise_and(words, masks, out=masked)
        floats.copy_(unsigned)
        yield fields, power


class _Scratch(threading.local):
    """Memory that is kept for the next call: to get it anew from the system costs more than to fill it."""

    def __init__(self) -> None:
        self._masked = torch.empty(0, dtype=torch.int16)
        self._floats = torch.empty(0)
        self._views: dict[tuple[int, ...], tuple[Tensor, ...]] = {}

    def take(self, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Views with the contents of their last use, kept too, as a step asks for few shapes many times.

        Args:
            shape: (fields, words, B, H, n).

        Returns:
            int16, the same memory as uint16 (a set top bit is no sign), float32; and the float32 as
            [fields * words, B * H, n]: fields and words in this order are the channels.
        """
        if shape not in self._views:
            count = math.prod(shape)
            if count > len(self._masked) or len(self._views) > 8:
                self._views.clear()
            with torch.inference_mode(False):  # or they could not be written outside of it
                if count > len(self._masked):
                    self._masked = torch.empty(count, dtype=torch.int16)
                    self._floats = torch.empty(count)
                masked, floats = self._masked[:count].view(shape), self._floats[:count].view(shape)
                fields, words, B, H, n = shape
                self._views[shape] = (
                    masked,
                    masked.view(torch.uint16),
                    floats,
                    floats.view(fields * words, B * H, n),
                )
        return self._views[shape]


_scratch = _Scratch()


@cache
def _field_constants(bits: int, channels: int, above: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Per plane: masks of its fields, int16 [fields, 1, 1, 1, 1]; 2^(shift - position) of each channel.

    `channels` are those of the lowest digit, `above` those of the others. Channels of which a plane holds
    nothing have a mask of 0.
    """
    found = []
    digits = layout.digits(bits)
    for plane, words in enumerate(layout.plane_words(bits, channels, above)):
        count = above if len(digits) > 1 and plane >= digits[1].first else channels
        masks = torch.zeros(count // words, dtype=torch.int32)
        power = torch.ones(count // words)
        for field in layout.bit_fields(bits, channels, above):
            if field.plane == plane:
                masks[field.channel // words] = (2**field.count - 1) << field.position
                power[field.channel // words] = 2.0 ** (field.above - field.position)
        signed = masks.to(torch.uint16).view(torch.int16)
        found.append((signed.view(-1, 1, 1, 1, 1), power.repeat_interleave(words)))
    return tuple(found)
