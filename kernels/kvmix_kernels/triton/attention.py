"""Launching attention over segments: checks, a plan, two kernels. Touches no device values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from kvmix_kernels.cached import Cached
from kvmix_kernels.reference import attention as reference
from kvmix_kernels.triton import configs
from kvmix_kernels.triton.common import (
    PLACES,
    buffers,
    check_grids,
    check_places,
    device_of,
    in_pairs,
    inner_dense,
    model_dtype,
    near,
    portable,
    starts_early,
    strides,
)
from kvmix_kernels.triton.kernels import fields
from kvmix_kernels.triton.kernels.attend import attend_kernel
from kvmix_kernels.triton.kernels.forms import Form
from kvmix_kernels.triton.kernels.merge import combine_kernel
from kvmix_kernels.triton.launch_plan import AttendPlan, Step, attend_plan


@cache
def shift_table(keys: Form, values: Form, device: torch.device) -> Tensor:
    """`fields.fold_shifts` of keys and values on the device."""
    table = [n for form in (keys, values) for n in fields.fold_shifts(form.BITS, form.KEPT, form.HIGH)]
    return torch.tensor(table, dtype=torch.int16, device=device)


class Mask(NamedTuple):
    """A mask as the kernel takes it; kinds and `shared` as in `kernels.forms.Scores`."""

    tensor: Tensor | None
    strides: tuple[int, int, int, int]
    kind: int
    shared: bool


def as_mask(mask: Tensor | None, queries: int) -> Mask:
    """A mask that broadcasts to [B, Hq, queries, S]."""
    if mask is None:
        return Mask(None, (0, 0, 0, 0), 0, True)
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    if mask.shape[3] * mask.stride(3) >= PLACES:
        mask = mask.contiguous()  # places in a row are 32-bit numbers
    b, h, q, s = (0 if n == 1 else step for n, step in zip(mask.shape, mask.stride(), strict=True))
    shared = h == 0 and (q == 0 or queries == 1)
    if mask.dtype == torch.bool:
        return Mask(mask.view(torch.uint8), (b, h, q, s), 1, shared)
    return Mask(mask, (b, h, q, s), 2, shared)


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
    sink_logits: Tensor | None = None,
    config: configs.AttendConfig | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """The op `attend`; `config` overrides the tuned one (for the tuner and tests).

    `sums`, float32 [B, Hq, Lq, 2], gets the largest score of each query, in the kernel's own unit, and the sum of
    weights against it; the output is then float32.
    """
    k, v = Cached.of(keys, key_format), Cached.of(values, value_format)
    B, Hq, Lq = query.shape[:3]
    Hkv, Dv = k.residual.shape[1], v.head_dim
    rows = Hq // Hkv * Lq
    new_count = new_keys.shape[2] if new_keys is not None and new_values is not None else 0
    out = query.new_empty(B, Hq, Lq, Dv, dtype=query.dtype if sums is None else torch.float32)
    if out.numel() == 0:
        return out
    if length + new_count == 0:
        if sums is not None:
            sums.zero_()
            if sink_logits is not None:
                sums[..., 0] = sink_logits.float()[:, None] / _log_unit(mask)
                sums[..., 1] = 1
        return out.zero_()
    if not v.format.sums_packed:
        warnings.warn("values with orders of tiles or channels apart take the slow reference", stacklevel=2)
        live = length if start is None else int(start)
        given = (query, new_keys, new_values, k, v, mask, live, scale, softcap, sink_logits)
        if sums is None:
            return reference.attend(*given)
        out, lse = reference.attend_lse(*given)
        torch.stack([lse / _log_unit(mask), torch.ones_like(lse)], 3, out=sums)
        return out
    step = prepare(query, new_keys, new_values, k, v, mask, start, length, scale, softcap, config)
    plan, early = step.plan, starts_early(query)
    heads = B * Hkv * plan.column_blocks
    partial, stats = parts(heads * plan.splits, plan, Dv, query.device)
    with device_of(query):
        launch(step, partial, stats, plan.splits)
        combine_kernel[(B * Hkv * rows * plan.merge_parts,)](
            partial, stats, out, stats if sums is None else sums,
            out if sink_logits is None else sink_logits.contiguous(),
            plan.bulk_splits, plan.splits, plan.column_blocks, rows, Hkv, Lq, SINKS=sink_logits is not None,
            MASK=step.seen.kind, N=plan.columns, DV=Dv, CHANNELS=plan.values.DP // plan.merge_parts,
            MAX_SPLITS=plan.merge_splits, CHUNK=plan.merge_chunk, ROTATED=plan.merge_rotated, EARLY=early,
            SUMS=sums is not None, PARTS=plan.merge_parts, num_warps=1, launch_pdl=early,
        )  # fmt: skip
    return out


class Prepared(NamedTuple):
    """One launch of `attend_kernel`: its plan, and its arguments as it takes them.

    seen: the mask; unit: of scores, against natural ones; cap: in it.
    """

    plan: AttendPlan
    query: Tensor
    new_keys: Tensor | None
    new_values: Tensor | None
    keys: Cached
    values: Cached
    seen: Mask
    start: Tensor | None
    length: int
    new_count: int
    scale: float
    cap: float


def prepare(
    query: Tensor,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    k: Cached,
    v: Cached,
    mask: Tensor | None,
    start: Tensor | None,
    length: int,
    scale: float,
    softcap: float,
    config: configs.AttendConfig | None = None,
) -> Prepared:
    """Check and plan; arguments as of `attend`.

    Raises:
        CacheShapeError: scales and offsets do not lie alike. CapacityError: a head has too many numbers.
    """
    check_grids(k)
    check_grids(v)
    B, Hq, Lq, D = query.shape
    Hkv, Dv = k.residual.shape[1], v.head_dim
    check_places(length + Lq, D, Dv)
    # places of heads are 64-bit numbers here
    query = in_pairs(inner_dense(query) if Lq == 1 else near(query))
    if new_keys is None or new_values is None:
        new_keys = new_values = None
    else:
        new_keys, new_values = inner_dense(new_keys), inner_dense(new_values)
    new_count = 0 if new_keys is None else new_keys.shape[2]
    own = [x.dtype for x in (new_keys, new_values) if x is not None]
    alike = {k.residual.dtype, v.residual.dtype, *own} == {query.dtype}
    half = query.dtype in (torch.float16, torch.bfloat16)
    step = Step(
        *(B * Hkv, Hq // Hkv * Lq, D, Dv, length, new_count, scale > 0, half),
        alike and not fields.INTERPRET,
    )
    plan = attend_plan(k.format, v.format, step, configs.gpu_of(query), config)
    seen = as_mask(mask, Lq)
    # scores are in units of log 2 where no additive mask forbids it
    unit = 1.0 if seen.kind == 2 else math.log2(math.e)
    return Prepared(
        *(plan, query, new_keys, new_values, k, v, seen, start, length, new_count),
        *(scale * unit, softcap * unit),
    )


def parts(count: int, plan: AttendPlan, Dv: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for `count` partial outputs, and for what `merge` needs to know of each."""
    partial = torch.empty(count * plan.columns * Dv, dtype=torch.float32, device=device)
    return partial, torch.empty(count * 2 * plan.columns, dtype=torch.float32, device=device)


class Beside(NamedTuple):
    """What `attend_kernel` does for a high tier, in the order of its `beside` and `beside_sizes`.

    skipped: bytes of packed tokens; weights, tops: of raw ones, or None. first_weight, weights_of: where the
    tokens of a head begin in theirs, and how many it has; first_top, tops_of: likewise.
    """

    skipped: Tensor
    weights: Tensor | None
    tops: Tensor | None
    first_weight: int
    weights_of: int
    first_top: int
    tops_of: int


def launch(step: Prepared, partial: Tensor, stats: Tensor, count: int, beside: Beside | None = None) -> None:
    """Start `attend_kernel`, whose partial outputs are the first of `count` that every head has."""
    plan, query, k, v, seen = step.plan, step.query, step.keys, step.values, step.seen
    B, Hq, Lq = query.shape[:3]
    Hkv = k.residual.shape[1]
    heads = B * Hkv * plan.column_blocks
    new_k = query if step.new_keys is None else step.new_keys
    new_v = query if step.new_values is None else step.new_values
    offsets = torch.empty(
        heads * plan.bulk_splits * plan.scratch * plan.columns, dtype=torch.float32, device=query.device
    )
    others: tuple[Tensor, ...] = (query, query, query)
    sizes: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    if beside is not None:
        others = tuple(query if x is None else x for x in beside[:3])
        sizes = (*beside.skipped.stride()[:2], *beside[3:])
    half = query.dtype in (torch.float16, torch.bfloat16)
    rest_dtype = query.dtype if plan.rest_half else torch.float32
    attend_kernel[(heads * plan.splits,)](
        query, new_k, new_v, buffers(k), buffers(v),
        query if seen.tensor is None else seen.tensor, query if step.start is None else step.start,
        shift_table(plan.keys, plan.values, query.device) if plan.bulk else query,
        offsets, partial, stats, others,
        *query.stride()[:3], *new_k.stride()[:3], *new_v.stride()[:3], strides(k), strides(v), *seen.strides, sizes,
        Hkv, Hq // Hkv * Lq, Lq, step.length, step.new_count,
        *_places(k), *_places(v), plan.bulk_splits, plan.splits, count, plan.column_blocks, plan.scratch,
        step.scale, step.cap,
        BULK=plan.bulk, ON_DEVICE=step.start is not None, NEW=step.new_keys is not None,
        MASK=seen.kind, MASK_SHARED=seen.shared, CAPPED=step.cap > 0,
        K_FORM=plan.keys, V_FORM=plan.values,
        REST_PACKED=plan.rest_packed, N=plan.columns,
        UNIT=plan.unit, BULK_TOKENS=plan.tokens, BULK_SPREAD=plan.spread, BULK_STAGES=plan.stages,
        PART=plan.part, SINGLE=plan.room <= plan.part, V_ALIGN=plan.v_align,
        BULK_PRECISION="tf32" if plan.exact_half else "tf32x3",
        REST_TOKENS=plan.rest_tokens, REST_STAGES=plan.rest_stages,
        REST_DTYPE=model_dtype(rest_dtype), REST_PRECISION="tf32" if half else "ieee",
        PORTABLE=portable(query), WARPS=plan.warps, EARLY=starts_early(query),
        SKIP=beside is not None, KEPT=beside is not None and beside.weights is not None,
        num_warps=plan.warps, maxnreg=plan.registers or None,
    )  # fmt: skip


def attend_lse(
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
) -> tuple[Tensor, Tensor]:
    """The op `attend_lse`."""
    sums = torch.empty(*query.shape[:3], 2, dtype=torch.float32, device=query.device)
    given = (query, new_keys, new_values, keys, values, mask, start, length, scale, key_format, value_format)
    out = attend(*given, softcap, sink_logits, sums=sums)
    return out, sums[..., 0] * _log_unit(mask) + sums[..., 1].log()


def _log_unit(mask: Tensor | None) -> float:
    # scores are in units of log 2 where no additive mask forbids it
    return math.log(2) if mask is None or mask.dtype == torch.bool else 1.0


def _places(cached: Cached) -> tuple[int, int, int, int]:
    fmt = cached.format
    return fmt.tile, fmt.sink, fmt.window, fmt.ring
