"""Launching attention over segments. Chooses the path and the shares; touches no device values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.cached import Cached
from kvmix_kernels.layout import AXIS_CHANNEL, AXIS_TOKEN, TensorFormat
from kvmix_kernels.triton import configs
from kvmix_kernels.triton.common import (
    check_grids,
    device_of,
    inner_dense,
    model_dtype,
    portable,
    starts_early,
    strides,
)
from kvmix_kernels.triton.kernels import fields
from kvmix_kernels.triton.kernels.attend import attend_kernel
from kvmix_kernels.triton.kernels.merge import combine_kernel

MAX_BULK_COLUMNS = 16
"""Query rows of one program over bulk tokens; more take several, which share what L2 holds."""
MAX_COLUMNS = 64
"""Query rows of one program of the general path, and most that the bulk is read for: beyond, nothing is gained."""
MIN_PART, MAX_PART = 16, 32
"""Groups whose offsets are multiplied with queries at a time: rows of a dot, and what a warp's registers hold for 128 channels."""
FEW_SPLITS = 8
"""Up to here one warp merges a row."""
REST_SHARE = 128
"""Tokens outside the bulk that one program should not fall below."""


def has_bulk_path(key_format: TensorFormat, value_format: TensorFormat, Dv: int, rows: int) -> bool:
    """Whether packed tokens of these formats can take the fast path for `rows` query rows."""
    k, v = key_format, value_format
    if k.is_raw or v.is_raw or k.axis != AXIS_CHANNEL or v.axis != AXIS_TOKEN or rows > MAX_COLUMNS:
        return False
    group = layout.channel_group(v, Dv)
    return k.group_size >= fields.MIN_DOT and k.group_size & (k.group_size - 1) == 0 and Dv // group <= 8


@cache
def shift_table(k_bits: int, v_bits: int, D: int, Dv: int, device: torch.device) -> Tensor:
    """`fields.fold_shifts` of keys and values on the device."""
    table = fields.fold_shifts(k_bits, D) + fields.fold_shifts(v_bits, Dv)
    return torch.tensor(table, dtype=torch.int16, device=device)


def attend(
    query: Tensor,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    mask: Tensor | None,
    start: Tensor | None,
    length: int,
    scale: float,
    key_format: list[int],
    value_format: list[int],
    softcap: float = 0.0,
    config: configs.AttendConfig | None = None,
) -> Tensor:
    """The op `attend`; `config` overrides the tuned one (for the tuner and tests)."""
    cached_k, cached_v = Cached.of(keys, key_format), Cached.of(values, value_format)
    k, v = cached_k.format, cached_v.format
    B, Hq, Lq, D = query.shape
    Hkv, Dv = cached_k.residual.shape[1], cached_v.head_dim
    rows = Hq // Hkv * Lq
    has_new = new_keys is not None and new_values is not None
    new_count = new_keys.shape[2] if has_new else 0
    out = query.new_empty(B, Hq, Lq, Dv)
    if out.numel() == 0:
        return out
    if length + new_count == 0:
        return out.zero_()
    check_grids(cached_k)
    check_grids(cached_v)

    query = inner_dense(query)
    new_k = inner_dense(new_keys) if has_new else query
    new_v = inner_dense(new_values) if has_new else query
    # the running maximum of the bulk assumes that larger products are larger scores
    bulk = scale > 0 and has_bulk_path(k, v, Dv, rows)
    k_group = 1 if k.is_raw else layout.channel_group(k, D) if k.axis == AXIS_TOKEN else k.group_size
    v_group = 1 if v.is_raw else layout.channel_group(v, Dv) if v.axis == AXIS_TOKEN else v.group_size
    N = max(8, min(MAX_BULK_COLUMNS if bulk else MAX_COLUMNS, fields.next_power_of_2(rows)))
    column_blocks = -(-rows // N)
    if config is None:
        config = configs.attend_config(
            configs.device_name(query), k.bits, v.bits, D, k_group, N, bulk, B * Hkv
        )

    # columns that rows do not need take other groups of keys
    spread = 1
    if bulk and column_blocks == 1:
        spread = max(1, min(N // fields.next_power_of_2(rows), config.tokens // k_group, config.spread))

    # shares: fixed by the capacity, filled evenly by however many tokens are alive
    heads = B * Hkv * column_blocks
    bulk_splits, part, room = 0, MIN_PART, 0
    outside = length + new_count
    if bulk:
        groups = max(0, min(k.packed_end(length), v.packed_end(length)) - max(k.sink, v.sink)) // k_group
        bulk = groups > 0
    if bulk:
        bulk_splits = max(
            1, min(groups, config.programs // heads, config.max_splits), -(-groups // config.max_groups)
        )
        # of a share, which has room for the offsets of as many groups
        most = fields.next_power_of_2(-(-groups // bulk_splits))
        part = max(MIN_PART, min(most, MAX_PART * config.warps * 128 // fields.next_power_of_2(max(128, D))))
        room = -(-groups // bulk_splits // part) * part
        # at no length are more tokens outside: sink, window, a tile not yet full, and where keys and
        # values differ the edges of groups
        apart = 0 if (k.tile, k.sink, k.window) == (v.tile, v.sink, v.window) else 2 * k_group
        outside = min(
            outside, max(k.sink, v.sink) + max(k.window + k.tile, v.window + v.tile) + apart + new_count
        )
    same = (k.tile, k.sink, k.window) == (v.tile, v.sink, v.window)
    rest_packed = not (k.is_raw and v.is_raw) and not (bulk and same)
    rest_splits = -(-outside // REST_SHARE)
    if not bulk:
        rest_splits = max(1, min(rest_splits, config.programs // heads))
    splits = bulk_splits + rest_splits

    half = query.dtype in (torch.float16, torch.bfloat16)
    exact_half = half and k.scale_dtype != 2
    raw_dtypes = {query.dtype, cached_k.residual.dtype, cached_v.residual.dtype, new_k.dtype, new_v.dtype}
    if half and not rest_packed and len(raw_dtypes) == 1 and not fields.INTERPRET:
        rest_dtype, rest_precision = model_dtype(query.dtype), "tf32"
    else:
        rest_dtype, rest_precision = model_dtype(torch.float32), "tf32" if half else "ieee"

    # the tuned parameters are those of half-precision tiles of raw tokens with heads of up to 128 channels
    DP, DVP = (max(16, fields.next_power_of_2(n)) for n in (D, Dv))
    rest_tokens, rest_stages = config.rest_tokens, config.rest_stages
    if rest_dtype is model_dtype(torch.float32):
        rest_tokens, rest_stages = min(rest_tokens, 32), 1
    rest_tokens = max(16, min(rest_tokens, 64 * 128 // max(DP, DVP)))

    mask_kind, mask_strides, shared = 0, (0, 0, 0, 0), True
    additive = False
    if mask is not None:
        while mask.dim() < 4:
            mask = mask.unsqueeze(0)
        if mask.shape[3] * mask.stride(3) >= 1 << 31:
            mask = mask.contiguous()  # places in a row are 32-bit numbers
        mask_strides = tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True))
        additive = mask.dtype != torch.bool
        mask_kind = 2 if additive else 1
        shared = mask_strides[1] == 0 and (mask_strides[2] == 0 or Lq == 1)
        if not additive:
            mask = mask.view(torch.uint8)
    unit = 1.0 if additive else math.log2(math.e)

    early = starts_early(query)
    partial = torch.empty(heads * splits * N * Dv, dtype=torch.float32, device=query.device)
    stats = torch.empty(heads * splits * 2 * N, dtype=torch.float32, device=query.device)
    offsets = torch.empty(heads * bulk_splits * room * N, dtype=torch.float32, device=query.device)
    with device_of(query):
        attend_kernel[(heads * splits,)](
            query, new_k, new_v, *keys, *values,
            query if mask is None else mask, query if start is None else start,
            shift_table(k.bits, v.bits, D, Dv, query.device) if bulk else query, offsets, partial, stats,
            *query.stride()[:3], *new_k.stride()[:3], *new_v.stride()[:3],
            *strides(cached_k), *strides(cached_v),
            *mask_strides,
            Hkv, rows, Lq, length, new_count,
            k.tile, k.sink, k.window, k.ring, v.tile, v.sink, v.window, v.ring,
            bulk_splits, splits, column_blocks, room, scale * unit, softcap * unit,
            BULK=bulk, ON_DEVICE=start is not None, NEW=has_new, MASK=mask_kind, MASK_SHARED=shared, CAPPED=softcap > 0,
            K_BITS=k.bits, K_AXIS=k.axis, K_GROUP=k_group, D=D, K_BLOCK=layout.plane_block(k), DP=DP,
            V_BITS=v.bits, V_AXIS=v.axis, V_GROUP=v_group, DV=Dv, V_BLOCK=layout.plane_block(v), DVP=DVP,
            REST_PACKED=rest_packed, N=N,
            BULK_TOKENS=min(k_group * spread, config.tokens) if bulk else 16,
            BULK_SPREAD=spread, BULK_STAGES=config.stages,
            PART=part, SINGLE=room <= part, V_ALIGN=math.gcd(k_group, k.sink - v.sink),
            BULK_PRECISION="tf32" if exact_half else "tf32x3",
            REST_TOKENS=rest_tokens, REST_STAGES=rest_stages,
            REST_DTYPE=rest_dtype, REST_PRECISION=rest_precision, PORTABLE=portable(query), EARLY=early,
            num_warps=config.warps, maxnreg=config.registers or None,
        )  # fmt: skip
        # few shares: a program merges whole rows; many: there are few rows, so programs share each
        few = splits <= FEW_SPLITS
        channels = DVP if few else 32
        channel_blocks = -(-Dv // channels)
        combine_kernel[(B * Hkv * rows * channel_blocks,)](
            partial, stats, out, splits, column_blocks, rows,
            MASK=mask_kind, N=N, DV=Dv, CHANNELS=channels, CHANNEL_BLOCKS=channel_blocks,
            MAX_SPLITS=fields.next_power_of_2(splits), CHUNK=min(32, fields.next_power_of_2(splits)), EARLY=early,
            num_warps=1 if few else 4, launch_pdl=early,
        )  # fmt: skip
    return out
