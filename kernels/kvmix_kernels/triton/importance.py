"""How much attention each token of a prompt gets: the launches behind `tokens.scores.of_prompt`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
    lse: Tensor | None = None,
    rows: Blocks | None = None,
    columns: Blocks | None = None,
) -> Tensor:
    """`tokens.scores.of_prompt` in two launches, and sums of few numbers over the heads of a group.

    With `lse` there is one. The order of every sum is fixed. Float32 models stay in PyTorch: their products would have
    no tensor cores. `rows` and `columns` override the parameters of the two launches.
    """
    Hq, L, Hkv = *query.shape[1:3], keys.shape[1]
    begin = 0 if queries == EVERY_QUERY else max(0, L - queries)
    if not _has_kernels(query, keys, scale, begin):
        return scores.of_prompt(query, keys, mask, scale, softcap, queries, sink_logits)
    launch = _Launch.of(query, keys, mask, scale, softcap, begin)
    known = launch.rows(sink_logits, rows) if lse is None else lse[:, :, begin:].contiguous() * launch.unit
    out = launch.columns(known, columns)
    return out if Hq == Hkv else out.unflatten(1, (Hkv, -1)).sum(2)


def log_sums(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """`tokens.scores.log_sums` in one launch."""
    if not _has_kernels(query, keys, scale, 0):
        return scores.log_sums(query, keys, scale)
    launch = _Launch.of(query, keys, None, scale, 0.0, 0)
    return launch.rows(None, None).view(query.shape[:3]) / launch.unit


def _has_kernels(query: Tensor, keys: Tensor, scale: float, begin: int) -> bool:
    half = query.dtype in (torch.float16, torch.bfloat16) and keys.dtype == query.dtype
    return half and scale > 0 and query.shape[0] * query.shape[1] * (query.shape[2] - begin) > 0


class _Launch(NamedTuple):
    """What both launches take.

    unit: of the scores, log2(e) where no additive mask forbids it; ahead: whether a query sees what comes after it.
    """

    query: Tensor
    keys: Tensor
    given: Tensor
    ahead: Tensor
    real: Tensor | None
    unit: float
    strides: tuple[int, ...]
    sizes: tuple[int | float, ...]
    kind: dict[str, Any]
    begin: int

    @classmethod
    def of(
        cls, query: Tensor, keys: Tensor, mask: Tensor | None, scale: float, softcap: float, begin: int
    ) -> _Launch:
        (B, Hq, L, D), Hkv = query.shape, keys.shape[1]
        query, keys = inner_dense(query), inner_dense(keys)
        seen, real = as_mask(mask, L), valid_tokens(mask, B)
        unit = 1.0 if seen.kind == 2 else math.log2(math.e)
        # the interpreter has no products of bfloat16
        dtype = model_dtype(torch.float32 if fields.INTERPRET else query.dtype)
        return cls(
            query, keys,
            query if seen.tensor is None else seen.tensor,
            query if mask is None else _sees_ahead(mask, begin, L),
            None if real is None else real.contiguous().view(torch.uint8),
            unit,
            (*query.stride()[:3], *keys.stride()[:3], *seen.strides),
            (B * Hq, Hq, Hq // Hkv, L, begin, scale * unit, softcap * unit),
            {"MASK": seen.kind, "CAPPED": softcap > 0, "DTYPE": dtype, "D": D, "DP": max(16, next_power_of_2(D))},
            begin,
        )  # fmt: skip

    def _blocks(self, chosen: Blocks | None, large: Blocks) -> Blocks:
        return chosen or (large if self.kind["DP"] <= 128 and self.kind["MASK"] == 0 else SMALL)

    def rows(self, sink_logits: Tensor | None, blocks: Blocks | None) -> Tensor:
        """Logarithms of the sums of weights as the second launch wants them, [1 or 2, batch x heads, rows]."""
        B, Hq, L, _ = self.query.shape
        blocks = self._blocks(blocks, ROWS)
        parts = 2 if self.kind["MASK"] == 2 else 1
        lse = torch.empty(parts, B * Hq, L - self.begin, dtype=torch.float32, device=self.query.device)
        real = self.query if self.real is None else self.real
        with device_of(self.query):
            rows_kernel[(B * Hq * -(-(L - self.begin) // blocks.kept),)](
                self.query, self.keys, self.given, self.ahead, real,
                self.query if sink_logits is None else sink_logits.contiguous(), lse,
                *self.strides, 0 if self.real is None else self.real.stride(0), *self.sizes,
                **self.kind, SINKS=sink_logits is not None, **blocks.options,
            )  # fmt: skip
        return lse

    def columns(self, lse: Tensor, blocks: Blocks | None) -> Tensor:
        """Weights that keys get from each query head, [B, Hq, L]."""
        B, Hq, L, _ = self.query.shape
        blocks = self._blocks(blocks, COLUMNS)
        out = torch.empty(B, Hq, L, dtype=torch.float32, device=self.query.device)
        with device_of(self.query):
            columns_kernel[(B * Hq * -(-L // blocks.kept),)](
                self.query, self.keys, self.given, self.ahead, lse, out, *self.strides, *self.sizes,
                **self.kind, **blocks.options,
            )  # fmt: skip
        return out


def _sees_ahead(mask: Tensor, begin: int, length: int) -> Tensor:
    """Whether any query from `begin` on may attend to what comes after it, uint8 [] on the device.

    Of an additive mask only -inf hides: under the lowest finite number a row may attend to all tokens alike.
    """
    # a row that all queries share is that of the first
    first = begin if mask.shape[-2] > 1 else 0
    part = mask[..., first:, :length]
    visible = part if part.dtype == torch.bool else part > -torch.inf
    return visible.triu(first + 1).any().view(torch.uint8)
