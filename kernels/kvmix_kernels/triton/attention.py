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
    buffers,
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
from kvmix_kernels.triton.kernels.forms import Form
from kvmix_kernels.triton.kernels.merge import combine_kernel
from kvmix_kernels.triton.launch_plan import Step, attend_plan


@cache
def shift_table(keys: Form, values: Form, device: torch.device) -> Tensor:
    """`fields.fold_shifts` of keys and values on the device."""
    table = [n for form in (keys, values) for n in fields.fold_shifts(form.BITS, form.KEPT, form.HIGH)]
    return torch.tensor(table, dtype=torch.int16, device=device)


class _Mask(NamedTuple):
    """A mask as the kernel takes it; kinds and `shared` as in `kernels.forms.Scores`."""

    tensor: Tensor | None
    strides: tuple[int, int, int, int]
    kind: int
    shared: bool


def _as_mask(mask: Tensor | None, queries: int) -> _Mask:
    if mask is None:
        return _Mask(None, (0, 0, 0, 0), 0, True)
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    if mask.shape[3] * mask.stride(3) >= 1 << 31:
        mask = mask.contiguous()  # places in a row are 32-bit numbers
    b, h, q, s = (0 if n == 1 else step for n, step in zip(mask.shape, mask.stride(), strict=True))
    shared = h == 0 and (q == 0 or queries == 1)
    if mask.dtype == torch.bool:
        return _Mask(mask.view(torch.uint8), (b, h, q, s), 1, shared)
    return _Mask(mask, (b, h, q, s), 2, shared)


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
    B, Hq, Lq, D = query.shape
    Hkv, Dv = k.residual.shape[1], v.head_dim
    rows = Hq // Hkv * Lq
    has_new = new_keys is not None and new_values is not None
    new_count = new_keys.shape[2] if new_keys is not None and has_new else 0
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
    check_grids(k)
    check_grids(v)

    query = inner_dense(query)
    new_k = inner_dense(new_keys) if new_keys is not None and has_new else query
    new_v = inner_dense(new_values) if new_values is not None and has_new else query
    alike = {query.dtype, k.residual.dtype, v.residual.dtype, new_k.dtype, new_v.dtype} == {query.dtype}
    half = query.dtype in (torch.float16, torch.bfloat16)
    step = Step(B * Hkv, rows, D, Dv, length, new_count, scale > 0, half, alike and not fields.INTERPRET)
    plan = attend_plan(k.format, v.format, step, configs.gpu_of(query), config)
    seen = _as_mask(mask, Lq)
    # scores are in units of log 2 where no additive mask forbids it
    unit = 1.0 if seen.kind == 2 else math.log2(math.e)
    rest_dtype = query.dtype if plan.rest_half else torch.float32
    N, heads = plan.columns, B * Hkv * plan.column_blocks
    early = starts_early(query)
    partial = torch.empty(heads * plan.splits * N * Dv, dtype=torch.float32, device=query.device)
    stats = torch.empty(heads * plan.splits * 2 * N, dtype=torch.float32, device=query.device)
    offsets = torch.empty(
        heads * plan.bulk_splits * plan.scratch * N, dtype=torch.float32, device=query.device
    )
    with device_of(query):
        attend_kernel[(heads * plan.splits,)](
            query, new_k, new_v, buffers(k), buffers(v),
            query if seen.tensor is None else seen.tensor, query if start is None else start,
            shift_table(plan.keys, plan.values, query.device) if plan.bulk else query,
            offsets, partial, stats,
            *query.stride()[:3], *new_k.stride()[:3], *new_v.stride()[:3], strides(k), strides(v), *seen.strides,
            Hkv, rows, Lq, length, new_count,
            *_places(k), *_places(v), plan.bulk_splits, plan.splits, plan.column_blocks, plan.scratch,
            scale * unit, softcap * unit,
            BULK=plan.bulk, ON_DEVICE=start is not None, NEW=has_new,
            MASK=seen.kind, MASK_SHARED=seen.shared, CAPPED=softcap > 0,
            K_FORM=plan.keys, V_FORM=plan.values,
            REST_PACKED=plan.rest_packed, N=N,
            BULK_TOKENS=plan.tokens, BULK_SPREAD=plan.spread, BULK_STAGES=plan.stages,
            PART=plan.part, SINGLE=plan.room <= plan.part, V_ALIGN=plan.v_align,
            BULK_PRECISION="tf32" if plan.exact_half else "tf32x3",
            REST_TOKENS=plan.rest_tokens, REST_STAGES=plan.rest_stages,
            REST_DTYPE=model_dtype(rest_dtype), REST_PRECISION="tf32" if half else "ieee",
            PORTABLE=portable(query), EARLY=early,
            num_warps=plan.warps, maxnreg=plan.registers or None,
        )  # fmt: skip
        combine_kernel[(B * Hkv * rows,)](
            partial, stats, out, stats if sums is None else sums,
            out if sink_logits is None else sink_logits.contiguous(),
            plan.bulk_splits, plan.splits, plan.column_blocks, rows, Hkv, Lq, SINKS=sink_logits is not None,
            MASK=seen.kind, N=N, DV=Dv, CHANNELS=plan.values.DP,
            MAX_SPLITS=plan.merge_splits, CHUNK=plan.merge_chunk, ROTATED=plan.merge_rotated, EARLY=early,
            SUMS=sums is not None, num_warps=1, launch_pdl=early,
        )  # fmt: skip
    return out


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
