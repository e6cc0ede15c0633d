"""The ops over tensors with a high tier of tokens. Steps of few tokens have kernels, others take the plain ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvmix_kernels.cached import Cached
from kvmix_kernels.importance import policy_of
from kvmix_kernels.importance.policy import by_score
from kvmix_kernels.layout import SCORE_NAMES, SKIPPED_NAME
from kvmix_kernels.tokens import append as plain_append
from kvmix_kernels.tokens import attend as plain
from kvmix_kernels.tokens import places
from kvmix_kernels.triton import configs, storage
from kvmix_kernels.triton.attention import Beside, Prepared, launch, parts, prepare
from kvmix_kernels.triton.common import (
    buffers,
    check_grids,
    device_of,
    inner_dense,
    model_dtype,
    near,
    starts_early,
    strides,
)
from kvmix_kernels.triton.kernels import fields
from kvmix_kernels.triton.kernels.exchange import exchange_kernel
from kvmix_kernels.triton.kernels.high import balance_kernel, finish_kernel, high_kernel
from kvmix_kernels.triton.launch_plan import (
    MAX_BULK_COLUMNS,
    AttendPlan,
    Step,
    attend_plan,
    merge_chunk,
    next_power_of_2,
)
from kvmix_kernels.triton.storage import valid_row

FEW, MANY = (
    configs.AttendConfig(warps=4, programs=programs, rest_tokens=64, rest_stages=stages)
    for programs, stages in ((528, 3), (264, 5))
)
"""Of the kernel that reads the high tier, for at most `FEW_HEADS` KV heads of all sequences and for more.

Which tokens it reads comes from positions, which are a step ahead of them: of five stages two are of tokens.
"""

FEW_HEADS = 32

BLOCK = 256
"""Tokens whose attention a warp sums up."""

EXCHANGED = 2048
"""Slots whose scores a program adds up, or goes through at a time when a tile is packed."""


def attend_tiers(
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
    sink_logits: Tensor | None = None,
    config: configs.AttendConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """The op `attend_tiers`: both tiers in a launch each, of which one more merges what they found.

    It reads who is in the high tier from `skipped` and the positions; nothing is made of the whole history.
    `config` overrides the parameters of the kernel for the high tier.
    """
    k, v = Cached.of(keys, key_format), Cached.of(values, value_format)
    B, Hq, Lq = query.shape[:3]
    Hkv, slots = k.positions.shape[1:]
    rows, new_count = Hq // Hkv * Lq, 0 if new_keys is None else new_keys.shape[2]
    alike = (k.format.tile, k.format.sink, k.format.window) == (v.format.tile, v.format.sink, v.format.window)
    if not (alike and v.format.sums_packed and slots and 0 < rows <= MAX_BULK_COLUMNS and B and length):
        return plain.attend(
            *(query, new_keys, new_values, k, v, mask, start, length, scale, softcap, sink_logits)
        )
    fmt, low, high = k.format, (k.low, v.low), (k.high, v.high)
    query, new_keys = balanced(query, new_keys, k)
    step = prepare(query, new_keys, new_values, *low, mask, start, length, scale, softcap)
    high_plan = _high_plan(step, *high, config)
    plan, early, device = step.plan, starts_early(query), query.device
    splits = plan.splits + high_plan.splits

    counted = slots + fmt.ring + new_count if policy_of(fmt).decay else 0
    high_tops = -(-slots // high_plan.rest_tokens)
    outside = fmt.residual_slots if plan.bulk else length
    tops_of = high_tops + -(-(outside + new_count) // plan.rest_tokens)
    weights = tops = None
    if counted:
        weights = torch.empty(B * Hkv * counted * rows, dtype=torch.float16, device=device)
        tops = torch.empty(B * Hkv * tops_of * plan.columns, dtype=torch.float32, device=device)
    mass = torch.empty(B, Hkv, counted, dtype=torch.float32, device=device)
    out = query.new_empty(B, Hq, Lq, v.head_dim)
    partial, stats = parts(B * Hkv * splits, plan, v.head_dim, device)
    beside = Beside(k.named(SKIPPED_NAME), weights, tops, slots, counted, high_tops, tops_of)
    merging, on_device = B * Hkv * rows, start is not None
    given = query if start is None else start
    kept = (query if weights is None else weights, query if tops is None else tops)
    half = query.dtype in (torch.float16, torch.bfloat16)
    with device_of(query):
        launch(step, partial, stats, splits, beside)
        high_kernel[(B * Hkv * high_plan.splits,)](
            step.query, buffers(high[0]), buffers(high[1]), k.positions,
            query if step.seen.tensor is None else step.seen.tensor, given, *kept, partial, stats,
            *step.query.stride()[:3], strides(high[0]), strides(high[1]), *k.positions.stride()[:2], *step.seen.strides,
            Hkv, rows, Lq, length, slots, fmt.tile, fmt.sink, fmt.window, plan.splits, splits, counted, tops_of,
            step.scale, step.cap,
            ON_DEVICE=on_device, MASK=step.seen.kind, MASK_SHARED=step.seen.shared, CAPPED=softcap > 0,
            KEPT=counted > 0, K_FORM=high_plan.keys, V_FORM=high_plan.values, PACKED=high_plan.rest_packed,
            N=plan.columns, TOKENS=high_plan.rest_tokens, STAGES=high_plan.rest_stages,
            DTYPE=model_dtype(query.dtype if high_plan.rest_half else torch.float32),
            PRECISION="tf32" if half else "ieee", EARLY=early, num_warps=high_plan.warps, launch_pdl=early,
        )  # fmt: skip
        finish_kernel[(merging + B * Hkv * -(-counted // BLOCK),)](
            partial, stats, out, out if sink_logits is None else sink_logits.contiguous(), given, *kept, mass,
            plan.bulk_splits, splits, rows, Hkv, Lq, length, new_count, slots, fmt.tile, fmt.sink, fmt.window, fmt.ring,
            merging, high_tops, tops_of,
            SINKS=sink_logits is not None, MASK=step.seen.kind, N=plan.columns, R=next_power_of_2(rows), DV=v.head_dim,
            CHANNELS=plan.values.DP, MAX_SPLITS=next_power_of_2(splits), CHUNK=merge_chunk(splits, plan.values.DP),
            ROTATED=plan.merge_rotated, EARLY=early, ON_DEVICE=on_device, BULK=plan.bulk,
            HIGH_TOKENS=high_plan.rest_tokens, REST_TOKENS=plan.rest_tokens, BLOCK=BLOCK,
            num_warps=1, launch_pdl=early,
        )  # fmt: skip
    return out, mass


def append_tiers_(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    new_keys: Tensor,
    new_values: Tensor,
    mask: Tensor | None,
    start: Tensor | None,
    length: int,
    key_format: list[int],
    value_format: list[int],
    query: Tensor | None,
    mass: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    """The op `append_tiers_`: of one token, a launch for the high tier and what `append_` takes for the low one.

    Tiers that are packed, and more tokens, take the plain ops.
    """
    k, v = Cached.of(keys, key_format), Cached.of(values, value_format)
    fmt, policy, count = k.format, policy_of(k.format), places.count_of(start, length)
    (B, H, n, D), slots, Dv = new_keys.shape, k.positions.shape[2], new_values.shape[3]
    counted = mass is not None and mass.shape[2] > 0
    written = [k.residual, v.residual, k.high.residual, v.high.residual, k.positions, v.positions]
    written += [k.named(name) for name in (*SCORE_NAMES, SKIPPED_NAME)]
    alike = (fmt.tile, fmt.sink, fmt.window) == (v.format.tile, v.format.sink, v.format.window)
    raw = k.high.format.is_raw and v.high.format.is_raw
    takes = n == 1 and B * H and slots and alike and raw and not (counted and policy.of_keys)
    if not takes or (isinstance(count, int) and count == 0) or not all(x.is_contiguous() for x in written):
        plain_append.append(
            *(k, v, new_keys, new_values, mask, start, length, query, mass, scale, softcap, sink_logits, lse)
        )
        return
    plain_append.check_room(k, v, start, length, count, n)
    found = mass.contiguous() if counted and mass is not None else k.positions
    if policy.of_keys is not None:
        found = policy.of_keys(new_keys, count + torch.arange(n, device=new_keys.device)).contiguous()
    query, new_keys = balanced(query if fmt.asks_queries else None, new_keys, k)
    new_keys, new_values = inner_dense(new_keys), inner_dense(new_values)
    high, early = fmt.high, starts_early(new_keys)
    assert high is not None
    ranks = torch.empty(B * H * (slots + fmt.tile), dtype=torch.int32, device=new_keys.device)
    lists = torch.empty(B * H * 3 * fmt.tile, dtype=torch.int32, device=new_keys.device)
    chunks = -(-slots // EXCHANGED) if counted else 1
    valid, *valid_arguments, kind = valid_row(mask, new_keys)
    with device_of(new_keys):
        exchange_kernel[(B * H * chunks,)](
            new_keys, new_values, *written, found, valid, new_keys if start is None else start, ranks, lists,
            *new_keys.stride()[:2], *new_values.stride()[:2], *valid_arguments,
            H, chunks, length, slots, k.qdata.shape[2], fmt.tile, fmt.sink, fmt.window, fmt.ring,
            high.share, high.count, high.recent, float(policy.decay),
            ON_DEVICE=start is not None, MASS=counted, FOUND=policy.of_keys is not None,
            PER_QUERY=policy.rank is not by_score, EVICTING=bool(high.evicting), VALID=kind,
            TILE=next_power_of_2(fmt.tile), RING=next_power_of_2(fmt.ring), D=D, DP=next_power_of_2(D),
            DV=Dv, DVP=next_power_of_2(Dv), BLOCK=EXCHANGED, EARLY=early,
            num_warps=8, launch_pdl=early,
        )  # fmt: skip
    storage.append_(
        *(k.low.tensors, v.low.tensors, new_keys, new_values, mask, start, length),
        *(k.low.format.encode(), v.low.format.encode(), query),
    )


def balanced(query: Tensor | None, new_keys: Tensor | None, keys: Cached) -> tuple[Any, Any]:
    """Queries and keys of a step as the stored keys want them, in one launch; None stays None."""
    high = keys.format.high
    if high is None or not high.balanced or (query is None and new_keys is None):
        return query, new_keys
    factor = keys.named("balance")
    given = [x if x is None else near(x) for x in (query, new_keys)]
    some = next(x for x in given if x is not None)
    out = [x if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given]
    q, k, q_out, k_out = (some if x is None else x for x in (*given, *out))
    rows = [0 if x is None else x.shape[0] * x.shape[1] * x.shape[2] for x in given]
    D = some.shape[3]
    with device_of(some):
        balance_kernel[(sum(rows),)](
            q, k, factor, q_out, k_out, *q.stride()[:3], *k.stride()[:3], *factor.stride()[:2],
            rows[0], q.shape[1], q.shape[2], factor.shape[1], k.shape[2], D=D, DP=next_power_of_2(D), num_warps=1,
        )  # fmt: skip
    return out[0], out[1]


def _high_plan(
    step: Prepared, keys: Cached, values: Cached, config: configs.AttendConfig | None
) -> AttendPlan:
    """How the slots of a high tier are shared."""
    check_grids(keys)
    check_grids(values)
    (B, Hq, Lq, D), Hkv = step.query.shape, keys.residual.shape[1]
    heads, slots = B * Hkv, keys.residual.shape[2] if keys.format.is_raw else keys.qdata.shape[2]
    half = step.query.dtype in (torch.float16, torch.bfloat16)
    alike = {keys.residual.dtype, values.residual.dtype} == {step.query.dtype} and not fields.INTERPRET
    config = config or (FEW if heads <= FEW_HEADS else MANY)
    one = Step(heads, Hq // Hkv * Lq, D, values.head_dim, slots, 0, True, half, alike)
    return attend_plan(keys.format, values.format, one, configs.gpu_of(step.query), config)
