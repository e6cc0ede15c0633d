"""Launching what a step does over pages: decode attention, the read of prompts' histories, packing, keeping.

No launch depends on a value of the step, only on how many sequences, tokens and pages there is room for, so
steps of sequences with one token can be recorded.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import torch
from torch import Tensor

from kvmix_kernels.layout import TensorFormat
from kvmix_kernels.paged.pages import PageLayout, PagePool
from kvmix_kernels.paged.tables import ROW, Tables
from kvmix_kernels.triton import configs
from kvmix_kernels.triton.attention import shift_table
from kvmix_kernels.triton.common import (
    buffers,
    check_grids,
    device_of,
    in_pairs,
    model_dtype,
    multiprocessors,
    portable,
    strides,
)
from kvmix_kernels.triton.kernels import fields
from kvmix_kernels.triton.kernels.forms import ORDERED
from kvmix_kernels.triton.kernels.merge import combine_kernel
from kvmix_kernels.triton.kernels.paged import decode_kernel, gather_kernel
from kvmix_kernels.triton.kernels.paged_storage import keep_kernel, pack_pages_kernel
from kvmix_kernels.triton.launch_plan import (
    AttendPlan,
    Step,
    attend_plan,
    form_plan,
    merge_chunk,
    next_power_of_2,
    shares_of_rest,
    tuned_group,
)
from kvmix_kernels.triton.storage import APPEND_ELEMENTS, APPEND_WARPS, _cut, _packing

STEP_TOKENS = 64
"""Most tokens that are unpacked at a time where they become numbers."""
GATHER_TOKENS = 32
"""Most that a program of `gather` has: with more its registers spill."""
KEEP_ROWS = 16
"""New tokens of a prompt that a program keeps at a time."""


def takes(layout: PageLayout, layer: int) -> bool:
    """Whether the kernels read and write pages of a layer."""
    one = layout.layers[layer]
    keys, values = one.keys.format, one.values.format
    fits = step_tokens(keys, layout.tokens) >= 16 and step_tokens(values, layout.tokens) >= 16
    return fits and not (values.order or values.apart_channels)


def step_tokens(fmt: TensorFormat, tokens: int) -> int:
    """Tokens that are unpacked at a time: a power of two that divides a page, and tiles with their own order."""
    unit = math.gcd(tokens, fmt.tile) if fmt.by_tile else tokens
    return min(STEP_TOKENS, unit & -unit)


@lru_cache(256)
def decode_plan(
    keys: TensorFormat, values: TensorFormat, page: int, sink: int, ring: int, step: Step, gpu: configs.Gpu
) -> tuple[AttendPlan, int]:
    """The plan of a launch over pages, and the groups that a share of them has room for. Kept: every layer asks.

    page, sink, ring: as of `PageLayout`; step: its length is that of the packed pages of the longest sequence.
    """
    # sinks and tails are to a plan what they are to a cache of one sequence
    k, v = (f._replace(sink=sink, window=ring - f.tile) for f in (keys, values))
    k_form, v_form = form_plan(k, step.D), form_plan(v, step.Dv)
    most = step.length // page
    step = step._replace(length=step.length + sink + ring)
    plan = attend_plan(k, v, step, gpu)
    unit = plan.unit
    if plan.bulk:
        group = tuned_group(k)
        config = configs.attend_config(gpu, k, v, step.D, group, plan.columns, True, configs.FEW_HEADS + 1)
        # a step lies in one page
        spread = math.gcd(config.spread, page // unit)
        config = config._replace(spread=spread, tokens=min(config.tokens, group * spread, page & -page))
        plan = attend_plan(k, v, step, gpu, config)
    bulk_splits = plan.bulk_splits
    if not plan.bulk:
        programs = plan.column_blocks * step.heads
        bulk_splits = max(1, min(most, 4 * max(gpu.multiprocessors, 132) // programs))
    bulk_splits = max(1, min(bulk_splits, most))
    room = -(-(-(-most // bulk_splits) * (page // unit)) // plan.part) * plan.part
    programs = 8 * max(gpu.multiprocessors, 132)
    splits = bulk_splits + shares_of_rest(sink + ring + 1, plan.column_blocks * step.heads, programs)
    return plan._replace(
        keys=k_form, values=v_form, bulk_splits=bulk_splits, splits=splits, room=room,
        scratch=room + (step.D if plan.bulk and k_form.TURNED == ORDERED else 0),
        merge_splits=next_power_of_2(splits), merge_chunk=merge_chunk(splits, v_form.DP),
        merge_rotated=bool(values.rotation), merge_parts=1,
    ), room  # fmt: skip


def attend_singles(
    pool: PagePool,
    layer: int,
    tables: Tables,
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of sequences that have one token in the step: two launches for all of them.

    Args:
        pool: as it is before the step.
        layer: whose pages.
        tables: of the step.
        query: of all tokens of the step, [tokens, Hq, D], float16, bfloat16 or float32.
        new_keys: likewise, [tokens, Hkv, D].
        new_values: likewise, [tokens, Hkv, Dv].
        scale: factor of the scores.
        softcap: as of `reference.attention.attend`.
        sink_logits: likewise, [Hq].

    Returns:
        [N, Hq, Dv] in the query's dtype, of the first N sequences of the tables, those with one token; zeros for
        a row without a sequence.
    """
    layout = pool.layout
    keys, values = pool.pages(layer)
    check_grids(keys)
    check_grids(values)
    N, (_, Hq, D) = tables.singles, query.shape
    Hkv, Dv = new_keys.shape[1], new_values.shape[2]
    rows = Hq // Hkv
    tails, sinks = pool.tails(layer), pool.sinks(layer)
    query = in_pairs(query if query.stride(2) == 1 else query.contiguous())
    new_keys, new_values = (_alike(x, tail) for x, tail in zip((new_keys, new_values), tails, strict=True))
    half = query.dtype in (torch.float16, torch.bfloat16)
    raw_half = half and query.dtype == new_keys.dtype == new_values.dtype and not fields.INTERPRET
    length = tables.longest * layout.tokens
    step = Step(N * Hkv, rows, D, Dv, length, 1, scale > 0, half, raw_half)
    plan, room = decode_plan(
        keys.format, values.format, layout.tokens, layout.sink, layout.ring, step, configs.gpu_of(query)
    )
    columns, heads = plan.columns, N * Hkv * plan.column_blocks
    device = query.device
    out = query.new_empty(N, Hq, Dv)
    partial = torch.empty(heads * plan.splits * columns * Dv, dtype=torch.float32, device=device)
    stats = torch.empty(heads * plan.splits * 2 * columns, dtype=torch.float32, device=device)
    offsets = torch.empty(
        heads * plan.bulk_splits * plan.scratch * columns if plan.bulk else 1,
        dtype=torch.float32,
        device=device,
    )
    unit = math.log2(math.e)
    unpacked = min(step_tokens(f, layout.tokens) for f in (keys.format, values.format))
    with device_of(query):
        decode_kernel[(heads * plan.splits,)](
            query, new_keys, new_values, buffers(keys), buffers(values), *tails, *sinks,
            tables.requests, tables.pages,
            shift_table(plan.keys, plan.values, device) if plan.bulk else query, offsets, partial, stats,
            *query.stride()[:2], *new_keys.stride()[:2], *new_values.stride()[:2], strides(keys), strides(values),
            tails[0].stride(0), sinks[0].stride(0),
            Hkv, rows, keys.format.tile, values.format.tile, layout.sink, layout.ring,
            plan.bulk_splits, plan.splits, plan.column_blocks, room, plan.scratch, scale * unit, softcap * unit,
            BULK=plan.bulk, CAPPED=softcap > 0, K_FORM=plan.keys, V_FORM=plan.values, N=columns, PAGE=layout.tokens,
            UNIT=plan.unit, TOKENS=plan.tokens if plan.bulk else unpacked, SPREAD=plan.spread, STAGES=plan.stages, PART=plan.part,
            SINGLE=room <= plan.part, BULK_PRECISION="tf32" if plan.exact_half else "tf32x3",
            RAW_TOKENS=plan.rest_tokens if raw_half else min(plan.rest_tokens, 32),
            RAW_STAGES=plan.rest_stages if raw_half else 1,
            DTYPE=model_dtype(query.dtype if raw_half else torch.float32), PRECISION="tf32" if half else "ieee",
            PORTABLE=portable(query), WARPS=plan.warps, num_warps=plan.warps if plan.bulk else 4, maxnreg=plan.registers or None,
        )  # fmt: skip
        combine_kernel[(N * Hkv * rows,)](
            partial, stats, out, stats, out if sink_logits is None else sink_logits.contiguous(),
            plan.bulk_splits, plan.splits, plan.column_blocks, rows, Hkv, 1, SINKS=sink_logits is not None,
            MASK=0, N=columns, DV=Dv, CHANNELS=plan.values.DP,
            MAX_SPLITS=plan.merge_splits, CHUNK=plan.merge_chunk, ROTATED=plan.merge_rotated, EARLY=False,
            SUMS=False, PARTS=1, num_warps=1,
        )  # fmt: skip
    return out


def gather(
    pool: PagePool, layer: int, tables: Tables, new_keys: Tensor, new_values: Tensor
) -> tuple[Tensor, Tensor]:
    """All tokens of the sequences that have several in the step, stored and own, as numbers: one launch.

    Args:
        pool: as it is before the step.
        layer: whose pages.
        tables: of the step.
        new_keys: of all tokens of the step, [tokens, Hkv, D].
        new_values: likewise, [tokens, Hkv, Dv].

    Returns:
        [T, Hkv, D] and [T, Hkv, Dv] in the dtype of the new keys, sequence by sequence.
    """
    layout = pool.layout
    keys, values = pool.pages(layer)
    tails, sinks = pool.tails(layer), pool.sinks(layer)
    Hkv, D = new_keys.shape[1:]
    Dv = new_values.shape[2]
    out_k = new_keys.new_empty(tables.keys, Hkv, D)
    out_v = new_keys.new_empty(tables.keys, Hkv, Dv)
    tokens = min(GATHER_TOKENS, *(step_tokens(f, layout.tokens) for f in (keys.format, values.format)))
    longest = max(request.past + request.count for request in tables.runs)
    blocks = -(-longest // tokens)
    new_keys, new_values = (_alike(x, tail) for x, tail in zip((new_keys, new_values), tails, strict=True))
    with device_of(new_keys):
        gather_kernel[(len(tables.runs) * Hkv * blocks,)](
            new_keys, new_values, buffers(keys), buffers(values), *tails, *sinks,
            tables.requests[tables.singles * ROW :], tables.pages, out_k, out_v,
            *new_keys.stride()[:2], *new_values.stride()[:2], strides(keys), strides(values),
            tails[0].stride(0), sinks[0].stride(0), Hkv, blocks, keys.format.tile, values.format.tile,
            layout.sink, layout.ring, K_FORM=form_plan(keys.format, D), V_FORM=form_plan(values.format, Dv),
            PAGE=layout.tokens, TOKENS=tokens, num_warps=4,
        )  # fmt: skip
    return out_k, out_v


@cache
def _valid(sink: int, tokens: int, device: torch.device) -> Tensor:
    """Which tokens of a first page, then of any other, may widen a group."""
    valid = torch.ones(2 * tokens, dtype=torch.uint8)
    valid[:sink] = 0
    return valid.to(device)


def store(pool: PagePool, layer: int, tables: Tables, new_keys: Tensor, new_values: Tensor) -> None:
    """Keep a step's tokens: pack the pages that are due, then write tails and sinks. Two launches, or three.

    Args:
        pool: written in place.
        layer: whose tokens.
        tables: of the step.
        new_keys: of all tokens of the step, [tokens, Hkv, D].
        new_values: likewise, [tokens, Hkv, Dv].
    """
    layout = pool.layout
    both = keys, values = pool.pages(layer)
    tails, sinks = pool.tails(layer), pool.sinks(layer)
    new_keys, new_values = (_alike(x, tail) for x, tail in zip((new_keys, new_values), tails, strict=True))
    Hkv, D = new_keys.shape[1:]
    Dv = new_values.shape[2]
    k, v = (cached.format for cached in both)
    held = APPEND_ELEMENTS * APPEND_WARPS
    if k.order or v.order or v.rotation:
        # with channels from everywhere, or exchanged, programs of so many registers would be alone
        held //= 4 if k.order or v.order else 2
    cuts = [_cut(f, size, held) for f, size in ((k, D), (v, Dv))]
    tiles = [1 if f.is_raw else layout.tokens // f.tile for f in (k, v)]
    raw_parts = -(-layout.tokens // KEEP_ROWS)
    parts = [raw_parts if f.is_raw else cut.parts * n for f, cut, n in zip((k, v), cuts, tiles, strict=True)]
    most = tables.due_room * Hkv
    given = (
        new_keys, new_values, buffers(keys), buffers(values), *tails, _valid(layout.sink, layout.tokens, tails[0].device),
        tables.numbers, tables.requests, tables.due, tables.pages,
        *new_keys.stride()[:2], *new_values.stride()[:2], strides(keys), strides(values), tails[0].stride(0), Hkv,
    )  # fmt: skip
    fixed = {
        "PAGE": layout.tokens, "VALID": int(layout.sink > 0), **_packing(k, D, cuts[0], "K_"), **_packing(v, Dv, cuts[1], "V_"),
    }  # fmt: skip
    filled = min(2 * multiprocessors(tails[0]), most * max(parts))
    with device_of(tails[0]):
        for role, fmt, size in ((0, k, D), (1, v, Dv)):
            if fmt.by_tile and most:
                # of the tile that is ordered, in place of those that share a scale
                rows = min(max(1, 4096 // next_power_of_2(size)), next_power_of_2(fmt.tile))
                ordered = fixed | {("K_", "V_")[role] + "TOKENS": fmt.tile}
                pack_pages_kernel[(min(2 * multiprocessors(tails[0]), most * tiles[role]),)](
                    *given, k.tile, tiles[0], v.tile, tiles[1], layout.ring,
                    K_ORDERS=role == 0, V_ORDERS=role == 1, TOKENS=rows, **ordered, num_warps=8,
                )  # fmt: skip
        if most:
            pack_pages_kernel[(filled,)](
                *given, k.tile, parts[0], v.tile, parts[1], layout.ring,
                K_ORDERS=False, V_ORDERS=False, TOKENS=KEEP_ROWS, **fixed, num_warps=APPEND_WARPS,
            )  # fmt: skip
        rows = 1 if tables.most == 1 else KEEP_ROWS
        blocks = -(-tables.most // rows)
        keep_kernel[(tables.rows * Hkv * blocks,)](
            new_keys, new_values, *tails, *sinks, tables.requests,
            *new_keys.stride()[:2], *new_values.stride()[:2], tails[0].stride(0), sinks[0].stride(0),
            Hkv, blocks, layout.sink, layout.ring,
            K_D=D, K_DP=next_power_of_2(D), V_D=Dv, V_DP=next_power_of_2(Dv), TOKENS=rows,
            num_warps=1 if rows == 1 else 4,
        )  # fmt: skip


def _alike(new: Tensor, stored: Tensor) -> Tensor:
    """New tokens [tokens, H, D] in the dtype of stored ones; each begins at a multiple of 16 bytes, if D is one."""
    new = new.to(stored.dtype)
    loose = any(n % 8 for n in (new.storage_offset(), *new.stride()[:2])) and new.shape[2] % 8 == 0
    return new.contiguous() if loose or new.stride(2) != 1 else new
