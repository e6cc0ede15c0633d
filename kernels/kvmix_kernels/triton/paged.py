"""Launching decode attention over pages: shares of pages, one kernel, and what merges the shares."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvmix_kernels.cached import Cached
from kvmix_kernels.layout import TensorFormat
from kvmix_kernels.reference.scales import rotate_sums
from kvmix_kernels.triton.common import (
    buffers,
    check_grids,
    device_of,
    model_dtype,
    multiprocessors,
    strides,
)
from kvmix_kernels.triton.kernels.paged import paged_kernel
from kvmix_kernels.triton.launch_plan import form_plan

WAVES = 4
"""Programs for each multiprocessor: enough that the last ones do not run alone."""
STEP_TOKENS = 64
"""Most tokens that are unpacked at a time."""


def attend_pages(
    query: Tensor,
    keys: Cached,
    values: Cached,
    pages: Tensor,
    starts: Tensor,
    sink: int,
    tokens: int,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of one token of each of N sequences over its packed pages.

    Args:
        query: [N, Hq, D], float16, bfloat16 or float32.
        keys: of one layer in all pages of a pool, whose batch is the blocks (`PagePool.pages`).
        values: likewise.
        pages: blocks of all sequences' pages, int64 [P], sequence by sequence.
        starts: where each sequence's begin, int64 [N + 1].
        sink: first tokens of a sequence that do not count.
        tokens: of a page.
        scale: factor of the scores.
        softcap: as of `reference.attention.attend`.

    Returns:
        [N, Hq, Dv] and the log-sum-exp [N, Hq], float32; zeros and minus infinity for a sequence without pages.
    """
    N, Hq, D = query.shape
    Hkv, Dv = keys.residual.shape[1], values.head_dim
    rows = Hq // Hkv
    check_grids(keys)
    check_grids(values)
    query = query if query.stride(2) == 1 else query.contiguous()
    splits = max(1, min(WAVES * multiprocessors(query) // max(1, N * Hkv), len(pages)))
    out = torch.empty(N, Hq, splits, Dv, dtype=torch.float32, device=query.device)
    lse = torch.empty(N, Hq, splits, dtype=torch.float32, device=query.device)
    unit = math.log2(math.e)
    with device_of(query):
        paged_kernel[(N * Hkv * splits,)](
            query, buffers(keys), buffers(values), pages, starts, out, lse,
            *query.stride()[:2], strides(keys), strides(values),
            Hkv, splits, sink, keys.format.tile, values.format.tile, scale * unit, softcap * unit,
            K_FORM=form_plan(keys.format, D), V_FORM=form_plan(values.format, Dv),
            ROWS=rows, N=max(16, 1 << (rows - 1).bit_length()),
            TOKENS=step_tokens(keys.format, tokens), PAGE=tokens, CAPPED=softcap > 0,
            DTYPE=model_dtype(query.dtype), PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=4, num_stages=2,
        )  # fmt: skip
    if splits > 1:
        both = lse.logsumexp(2, keepdim=True)
        weights = torch.exp(lse - both).nan_to_num_(0.0)
        out, lse = (weights.unsqueeze(3) * out).sum(2), both.squeeze(2)
    else:
        out, lse = out.squeeze(2), lse.squeeze(2)
    return (rotate_sums(out) if values.format.rotation else out), lse


def step_tokens(fmt: TensorFormat, tokens: int) -> int:
    """Tokens that are unpacked at a time: a power of two that divides a page, and tiles with their own order."""
    unit = math.gcd(tokens, fmt.tile) if fmt.by_tile else tokens
    return min(STEP_TOKENS, unit & -unit)


def takes(keys: TensorFormat, values: TensorFormat, tokens: int) -> bool:
    """Whether the kernel reads pages of these formats."""
    return step_tokens(keys, tokens) >= 16 and not (values.order or values.apart)
