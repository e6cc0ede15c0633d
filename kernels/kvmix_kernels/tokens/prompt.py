"""A prompt's own attention, which also tells what its weights sum up to: importance then need not find it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from kvmix_kernels import ops
from kvmix_kernels.tokens import scores

_log_sums: Callable[..., Any] = ops._on_cuda("log_sums", "importance", scores.log_sums)
"""The same by kernels, for CUDA tensors."""


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, grouped: bool) -> tuple[Tensor, Tensor]:
    """Causal attention as `scaled_dot_product_attention` does it, and logarithms of the sums of its weights.

    Args:
        query: [B, Hq, L, D].
        keys: [B, Hkv, L, D].
        values: [B, Hkv, L, Dv].
        scale: factor of the scores.
        grouped: whether query heads share those of keys; else there are as many.

    Returns:
        [B, Hq, L, Dv], and float32 [B, Hq, L].
    """
    found = _fused(query, keys, values, scale, grouped)
    if found is None:
        count = _log_sums if query.is_cuda else scores.log_sums
        found = _plain(query, keys, values, scale, grouped), count(query, keys, scale)
    return found


def worth_asking(query: Tensor, grouped: bool) -> bool:
    """Whether attention is likely to tell sums, and importance to use them.

    On a GPU importance has kernels for half precision alone, and attention tells none of heads that flash
    does not take: a policy of the last queries would have all found. On a CPU it tells none where heads
    share keys: they would be found apart, for nothing.
    """
    if query.is_cuda:
        D = query.shape[3]
        return query.dtype in (torch.float16, torch.bfloat16) and D <= 256 and D % 8 == 0
    return not grouped


def _plain(query: Tensor, keys: Tensor, values: Tensor, scale: float, grouped: bool) -> Tensor:
    return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)


def _fused(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, grouped: bool
) -> tuple[Tensor, Tensor] | None:
    """By the kernel that PyTorch chooses, if it is one that tells the sums."""
    aten = torch.ops.aten
    three = (query, keys, values)
    choice = torch._fused_sdp_choice(*three, None, 0.0, True, scale=scale, enable_gqa=grouped)
    if query.is_cuda and choice == SDPBackend.CUDNN_ATTENTION.value:
        out, lse = aten._scaled_dot_product_cudnn_attention(
            *three, None, True, 0.0, True, False, scale=scale
        )[:2]
    elif query.is_cuda and choice == SDPBackend.FLASH_ATTENTION.value and query.shape[3] % 8 == 0:
        out, lse = aten._scaled_dot_product_flash_attention(*three, 0.0, True, False, scale=scale)[:2]
    elif query.device.type == "cpu" and choice == SDPBackend.FLASH_ATTENTION.value and not grouped:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*three, 0.0, True, scale=scale)
    else:
        return None
    return out, lse.reshape(query.shape[:3]).float().contiguous()


def fake_attend(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, grouped: bool
) -> tuple[Tensor, Tensor]:
    """Shapes and strides of `attend`."""
    out = _plain(query, keys, values, scale, grouped)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)
