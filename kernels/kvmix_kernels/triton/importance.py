"""How much attention each token of a prompt gets: the launches behind `tokens.scores.of_prompt`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvmix_kernels.importance.policy import EVERY_QUERY
from kvmix_kernels.reference.storage import valid_tokens
from kvmix_kernels.tokens import scores
from kvmix_kernels.triton.attention import as_mask
from kvmix_kernels.triton.common import device_of, inner_dense, model_dtype
from kvmix_kernels.triton.kernels import fields
from kvmix_kernels.triton.kernels.importance import columns_kernel, rows_kernel
from kvmix_kernels.triton.launch_plan import next_power_of_2


class Blocks(NamedTuple):
    """Parameters of one launch.

    kept: tokens that a program has in shared memory while it goes through others, `step` at a time; warps; stages:
    steps on their way; registers: most that a thread may have, so that two programs fit (0: as many as it likes).
    """

    kept: int
    step: int
    warps: int
    stages: int
    registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        """As a launch takes them."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"M": self.kept, "N": self.step, "STAGES": self.stages, "num_warps": self.warps, **limit}


ROWS = COLUMNS = Blocks(128, 64, 4, 2)
"""Of heads up to 128 channels without a mask. Three programs share a multiprocessor, so that products of one hide
exponentials of the others."""

SMALL = Blocks(64, 64, 4, 2)
"""Of wider heads, and under masks, whose tiles need registers. 96 KB of shared memory, which every GPU has."""


def of_prompt(
    query: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    queries: int,
    sink_logits: Tensor | None = None,
    rows: Blocks | None = None,
    columns: Blocks | None = None,
) -> Tensor:
    """`tokens.scores.of_prompt` in two launches, and sums of few numbers over the heads of a group.

    The order of every sum is fixed. Float32 models stay in PyTorch: their products would have no tensor cores.
    `rows` and `columns` override the parameters of the two launches.
    """
    (B, Hq, L, D), Hkv = query.shape, keys.shape[1]
    begin = 0 if queries == EVERY_QUERY else max(0, L - queries)
    half = query.dtype in (torch.float16, torch.bfloat16) and keys.dtype == query.dtype
    if not (half and scale > 0 and B * Hq * (L - begin)):
        return scores.of_prompt(query, keys, mask, scale, softcap, queries, sink_logits)
    query, keys = inner_dense(query), inner_dense(keys)
    seen, real = as_mask(mask, L), valid_tokens(mask, B)
    DP = max(16, next_power_of_2(D))
    large = DP <= 128 and seen.kind == 0
    rows, columns = rows or (ROWS if large else SMALL), columns or (COLUMNS if large else SMALL)
    # scores are in units of log 2 where no additive mask forbids it
    unit = 1.0 if seen.kind == 2 else math.log2(math.e)
    lse = torch.empty(2 if seen.kind == 2 else 1, B * Hq, L - begin, dtype=torch.float32, device=query.device)
    out = torch.empty(B, Hq, L, dtype=torch.float32, device=query.device)
    given = query if seen.tensor is None else seen.tensor
    ahead = query if mask is None else _sees_ahead(mask, begin, L)
    counted = query if real is None else real.contiguous().view(torch.uint8)
    strides = *query.stride()[:3], *keys.stride()[:3], *seen.strides
    sizes = B * Hq, Hq, Hq // Hkv, L, begin, scale * unit, softcap * unit
    # the interpreter has no products of bfloat16
    dtype = model_dtype(torch.float32 if fields.INTERPRET else query.dtype)
    kind = {"MASK": seen.kind, "CAPPED": softcap > 0, "DTYPE": dtype, "D": D, "DP": DP}
    with device_of(query):
        rows_kernel[(B * Hq * -(-(L - begin) // rows.kept),)](
            query, keys, given, ahead, counted, query if sink_logits is None else sink_logits.contiguous(), lse,
            *strides, 0 if real is None else counted.stride(0), *sizes,
            **kind, SINKS=sink_logits is not None, **rows.options,
        )  # fmt: skip
        columns_kernel[(B * Hq * -(-L // columns.kept),)](
            query, keys, given, ahead, lse, out, *strides, *sizes,
            **kind, **columns.options,
        )  # fmt: skip
    return out if Hq == Hkv else out.unflatten(1, (Hkv, -1)).sum(2)


def _sees_ahead(mask: Tensor, begin: int, length: int) -> Tensor:
    """Whether any query from `begin` on may attend to what comes after it, uint8 [] on the device.

    Of an additive mask only -inf hides: under the lowest finite number a row may attend to all tokens alike.
    """
    # a row that all queries share is that of the first
    first = begin if mask.shape[-2] > 1 else 0
    part = mask[..., first:, :length]
    visible = part if part.dtype == torch.bool else part > -torch.inf
    return visible.triu(first + 1).any().view(torch.uint8)
