"""Launching quantize-and-pack and append."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.cached import Cached, shapes
from kvmix_kernels.errors import CacheShapeError
from kvmix_kernels.layout import AXIS_CHANNEL, TensorFormat
from kvmix_kernels.reference import storage as reference
from kvmix_kernels.triton.common import (
    buffers,
    check_grids,
    check_places,
    check_rows,
    device_of,
    inner_dense,
    multiprocessors,
    starts_early,
    strides,
)
from kvmix_kernels.triton.kernels.fields import next_power_of_2
from kvmix_kernels.triton.kernels.storage import (
    ALL_TILES,
    FRESH_TILES,
    RING_TILES,
    append_kernel,
    order_kernel,
    pack_kernel,
    ranges_kernel,
    see_kernel,
)
from kvmix_kernels.triton.launch_plan import form_plan

PACK_ELEMENTS = 2048
"""Channels times tokens that a warp of `quantize_pack` holds at a time."""

APPEND_ELEMENTS = 512
"""The same of `append_`, whose programs hold both tensors' code."""

PACK_WARPS = 4
"""Of `quantize_pack`; fewer for small groups of tokens, see `WARP_ELEMENTS`."""

WARP_ELEMENTS = 4096
"""Channels times tokens that share a warp's work per channel: with fewer that work outweighs the rest."""

APPEND_WARPS = 8

ROWS = 16
"""New tokens that a program of `append_` writes at a time."""

PROMPT_PROGRAMS = 8
"""Programs per multiprocessor for more than one new token. For one, most of more would have nothing to do."""


class _Cut(NamedTuple):
    """As in `kernels.forms.Packing`. parts: of a tile, one program each."""

    fields: int
    words: int
    words_p: int
    tokens: int
    parts: int


@cache
def _cut(fmt: TensorFormat, D: int, elements: int) -> _Cut:
    """How a program's tile of one tensor is cut. Kept: prefill asks in every layer."""
    if fmt.is_raw:
        return _Cut(1, 1, 1, 1, 0)
    layout.check_head_size(fmt, D)
    kept, high = fmt.channels(D)
    wide, *_, words = layout.plane_words(fmt.code, kept, high) * 2
    if wide == next_power_of_2(wide) or len(fmt.tiers) > 1:
        # the wide plane's words: longer pieces of a row, and half as many channels in a thread; of tiers those of
        # the lowest digit, which is packed by itself
        words = wide
    count = kept // words
    padded = next_power_of_2(words)
    group = form_plan(fmt, D).GROUP
    together = group if fmt.axis == AXIS_CHANNEL else fmt.tile
    held = max(count * padded, next_power_of_2(D))
    tokens = max(1, min(next_power_of_2(together), elements // held))
    parts = fmt.tile // group if fmt.axis == AXIS_CHANNEL else -(-fmt.tile // tokens)
    return _Cut(count, words, padded, tokens, parts)


def _packing(fmt: TensorFormat, D: int, cut: _Cut, prefix: str = "") -> dict[str, Any]:
    """What a kernel puts together as its `forms.Packing`, by the names of its parameters."""
    wide = fmt.tiers[0]
    narrow = next((tier for tier in fmt.tiers if tier.bits == 2), wide)
    named = {
        "FORM": form_plan(fmt, D), "SCALE": fmt.scale_dtype,
        "FIELDS": cut.fields, "WORDS": cut.words, "WORDS_P": cut.words_p, "TOKENS": cut.tokens,
        "MARGIN": (100 - narrow.span) / 200, "MARGIN_HIGH": (100 - wide.span) / 200,
    }  # fmt: skip
    return {prefix + name: value for name, value in named.items()}


@cache
def _pack_warps(fmt: TensorFormat, D: int) -> int:
    if fmt.is_raw or fmt.axis != AXIS_CHANNEL:
        return PACK_WARPS
    # the product that packs tiers spills in one warp
    least = 2 if len(fmt.tiers) > 1 else 1
    return max(least, min(PACK_WARPS, next_power_of_2(fmt.group_size * D // WARP_ELEMENTS)))


def flushes_ring(fmt: TensorFormat, length: int | None, count: int) -> bool:
    """Whether a tile of which some tokens are in the ring may be due; length: None if the host does not know."""
    if fmt.is_raw or length is None:
        return not fmt.is_raw
    fresh = -(-max(0, length - fmt.sink) // fmt.tile)
    return min(fmt.packed_tiles(length + count), fresh) > fmt.packed_tiles(length)


def valid_row(mask: Tensor | None, x: Tensor) -> tuple[Tensor, int, int, float, int]:
    """The mask row that tells padding from tokens: (tensor, batch stride, token stride, limit, kind).

    Kind 0 is no mask, 1 a boolean one, 2 an additive one, which hides what is not above the limit.
    """
    if mask is None:
        return x, 0, 0, 0.0, 0
    row = mask[..., -1, :]
    while row.dim() < 3:
        row = row.unsqueeze(0)
    if row.shape[1] > 1:
        if row.dtype != torch.bool:
            row = row > torch.finfo(row.dtype).min / 2
        row = row.any(1, keepdim=True)
    limit, kind = 0.0, 1
    if row.dtype == torch.bool:
        row = row.view(torch.uint8)
    else:
        limit, kind = torch.finfo(row.dtype).min / 2, 2
    return row, 0 if row.shape[0] == 1 else row.stride(0), row.stride(2), limit, kind


def _ranges(x: Tensor, valid: Tensor | None, fmt: TensorFormat) -> Tensor:
    """`reference.quantize.ranges` in one pass, without copies of x."""
    B, H, L, D = x.shape
    warps, groups = _pack_warps(fmt, D), L // fmt.group_size
    out = torch.empty(B, H, groups, D, dtype=torch.float32, device=x.device)
    x = inner_dense(x)
    seen = x if valid is None else valid.view(torch.uint8)
    if out.numel():
        with device_of(x):
            ranges_kernel[(B * H * groups,)](
                x, seen, out, *x.stride()[:3], *((0, 0) if valid is None else seen.stride()), H, groups,
                VALID=int(valid is not None), GROUP=fmt.group_size, D=D, DP=next_power_of_2(D),
                TOKENS=_cut(fmt, D, PACK_ELEMENTS * warps).tokens,
                num_warps=warps,
            )  # fmt: skip
    return out


def _order_tiles(
    cached: Cached, x: Tensor, mask: Tensor | None, start: Tensor | None, length: int, query: Tensor | None
) -> None:
    """Orders of the tiles that are due once the tokens x are stored, and what was seen of queries."""
    fmt, order, seen = cached.format, cached.order, cached.seen
    (B, H, L, D), rest = x.shape, cached.residual
    most = -(-L // fmt.tile)
    if start is None:
        most = fmt.packed_tiles(length + L) - fmt.packed_tiles(length)
    if not fmt.by_tile or order is None or B * H * L == 0 or (seen is None and most == 0):
        return
    valid, *valid_arguments, kind = valid_row(mask, x)
    begin = x if start is None else start
    # without queries, what was seen counts as it is
    group = 0 if query is None else query.shape[1] // H
    query = x if query is None else inner_dense(query)
    alone, totals = seen is not None and L == 1, seen
    tokens = max(1, 4096 // next_power_of_2(D))
    with device_of(x):
        if seen is not None and not alone:
            found = torch.empty(B, H, most + 1, D, dtype=seen.dtype, device=x.device)
            see_kernel[(B * H * (most + 1),)](
                query, seen, found, valid, begin, *query.stride()[:3], *seen.stride()[:2], *valid_arguments,
                H, group, L, length, fmt.tile, fmt.sink, fmt.window, most,
                ON_DEVICE=start is not None, VALID=kind, D=D, TOKENS=tokens,
            )  # fmt: skip
            totals = found.cumsum_(2)
            seen.copy_(totals[:, :, -1])
        most = max(most, 1) if alone else most
        if most:
            order_kernel[(B * H * most,)](
                x, query, rest, order, x if seen is None else seen, x if totals is None else totals, valid, begin,
                *x.stride()[:3], *query.stride()[:3], *rest.stride()[:2], *order.stride()[:2],
                *((0, 0) if seen is None else seen.stride()[:2]), 0 if totals is None else totals.stride(1),
                *valid_arguments, H, group, L, length, fmt.sink, fmt.window, fmt.ring, most,
                ON_DEVICE=start is not None, VALID=kind, BY_QUERIES=seen is not None, ALONE=alone,
                TILE=fmt.tile, D=D, APART=fmt.apart_channels, TOKENS=min(tokens, next_power_of_2(fmt.tile)),
                num_warps=8,
            )  # fmt: skip


def quantize_pack(
    x: Tensor, mask: Tensor | None, format: list[int], hint: Tensor | None = None
) -> list[Tensor]:
    """The op `quantize_pack`: one launch, x is read once. Orders of channels are chosen ahead of it."""
    fmt = TensorFormat.decode(format)
    B, H, L, D = x.shape
    check_places(L, D)
    warps = _pack_warps(fmt, D)
    cut = _cut(fmt, D, PACK_ELEMENTS * warps)
    tiles, slots = layout.growing_tiles(fmt, L), layout.growing_slots(fmt, L)
    # without tokens there is none to read in place of those that are missing
    make = torch.empty if L else torch.zeros
    made = [
        make(B, H, *size, dtype=dtype, device=x.device)
        for size, dtype in shapes(fmt, D, tiles, slots, x.dtype)
    ]
    x = inner_dense(x)
    cached = Cached(fmt, tuple(made))
    if cached.order is not None:
        cached.order.copy_(torch.arange(D, device=x.device))
        cached.take_order(hint)
        _order_tiles(cached, x, mask, None, 0, reference.of_tokens(hint if fmt.asks_queries else None, x))
        if fmt.order == layout.ORDER_PROMPT and hint is not None:
            reference.order_from_prompt(cached, x, reference.valid_tokens(mask, B), 0, hint, _ranges)
    valid, *valid_arguments, kind = valid_row(mask, x)
    rows = max(1, 4096 // next_power_of_2(D))
    jobs = tiles * cut.parts + -(-slots // rows)
    if B * H * L * jobs:
        with device_of(x):
            pack_kernel[(B * H * jobs,)](
                x, buffers(cached), valid, *x.stride()[:3], *valid_arguments,
                H, L, tiles, slots, fmt.tile, fmt.sink, fmt.window, fmt.ring, cut.parts, jobs,
                VALID=kind, ROWS=rows, **_packing(fmt, D, cut),
                num_warps=warps,
            )  # fmt: skip
    return made


def append_(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    new_keys: Tensor,
    new_values: Tensor,
    mask: Tensor | None,
    start: Tensor | None,
    length: int,
    key_format: list[int],
    value_format: list[int],
    query: Tensor | None = None,
) -> None:
    """The op `append_`: one launch for a decode step.

    More tokens could reach ring slots that a flush still has to read, so they take two launches: tiles that
    begin in the ring, then tiles of new tokens alone, as fast as `quantize_pack`, and the new raw tokens. The
    first of them is left out where the host knows that it would find nothing.
    """
    caches = Cached.of(keys, key_format), Cached.of(values, value_format)
    k, v = (cached.format for cached in caches)
    for x, cached in zip((new_keys, new_values), caches, strict=True):
        residual = cached.residual
        if x.shape[:2] != residual.shape[:2] or x.shape[3] != residual.shape[3]:
            raise CacheShapeError(
                f"cannot append tokens of shape {list(x.shape)} to a cache with batch, heads and head size "
                f"{[*residual.shape[:2], residual.shape[3]]}"
            )
        check_grids(cached)
        check_rows(cached)
    B, H, Lq, D = new_keys.shape
    Dv = new_values.shape[3]
    if B * H * Lq == 0:
        return
    check_places(length if start is not None else length + Lq, D, Dv)
    if start is None:
        for cached in caches:
            layout.check_room(cached.format, cached.qdata.shape[2], cached.residual.shape[2], length, Lq)
    new_keys, new_values = inner_dense(new_keys), inner_dense(new_values)
    if start is None and k.order == layout.ORDER_PROMPT and k.packed_tiles(length) == 0:
        seen = reference.valid_tokens(mask, B)
        reference.order_from_prompt(caches[0], new_keys, seen, length, query, _ranges)
    if k.by_tile:
        asked = reference.of_tokens(query if k.asks_queries else None, new_keys)
        _order_tiles(caches[0], new_keys, mask, start, length, asked)
    if v.by_tile:
        _order_tiles(caches[1], new_values, mask, start, length, None)
    valid, *valid_arguments, kind = valid_row(mask, new_keys)
    early = starts_early(new_keys)
    if Lq == 1:
        phases = [(ALL_TILES, True, APPEND_WARPS, APPEND_ELEMENTS, 1)]
    else:
        warps = min(_pack_warps(k, D), _pack_warps(v, Dv))
        phases = [(FRESH_TILES, True, warps, PACK_ELEMENTS, PROMPT_PROGRAMS)]
        if any(flushes_ring(fmt, None if start is not None else length, Lq) for fmt in (k, v)):
            phases.insert(0, (RING_TILES, False, APPEND_WARPS, APPEND_ELEMENTS, 1))
    for flush, write, warps, elements, per_multiprocessor in phases:
        held = elements * warps
        if flush is not FRESH_TILES and (k.order or v.rotation):
            # programs of so many registers would be alone
            held //= 4 if k.order else 2
        cut_k, cut_v = (_cut(f, size, held) for f, size in ((k, D), (v, Dv)))
        tiles = max(cut.parts * -(-Lq // f.tile) for cut, f in ((cut_k, k), (cut_v, v)))
        needed = B * H * max(tiles, -(-Lq // ROWS) if write else 0)
        programs = min(needed, per_multiprocessor * multiprocessors(new_keys))
        with device_of(new_keys):
            append_kernel[(programs,)](
                new_keys, new_values, buffers(caches[0]), buffers(caches[1]), valid, new_keys if start is None else start,
                *new_keys.stride()[:3], *new_values.stride()[:3], strides(caches[0]), strides(caches[1]),
                *valid_arguments, B, H, Lq, length,
                k.tile, k.sink, k.window, k.ring, cut_k.parts,
                v.tile, v.sink, v.window, v.ring, cut_v.parts,
                ON_DEVICE=start is not None, VALID=kind, FLUSH=flush.value, WRITE=write,
                K_ROWS=ROWS, **_packing(k, D, cut_k, "K_"), V_ROWS=ROWS, **_packing(v, Dv, cut_v, "V_"),
                EARLY=early,
                num_warps=warps, launch_pdl=early,
            )  # fmt: skip
