"""Tiny models for tests: one per way of writing a cache, no downloads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sharpen(model: nn.Module, factor: float = 4.0) -> nn.Module:
    """Scale query and key projections, so that attention is not uniform and a damaged cache shows."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("q_proj", "k_proj", "c_attn", "query_key_value", "qkv", "wqk")):
            parameter.data.mul_(factor)
    return model.eval()


def tiny_llama(seed: int = 0, **overrides: Any) -> Any:
    """LlamaForCausalLM with 2 layers, 4 query heads, 2 KV heads of size 32, vocabulary 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 128,
        "max_position_embeddings": 2048,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return sharpen(LlamaForCausalLM(LlamaConfig(**(settings | overrides))))


class TupleCacheAttention(nn.Module):
    """Attention whose cache is a tuple that the caller keeps: (keys, values) or None."""

    def __init__(self, heads: int = 2, head_dim: int = 32) -> None:
        """Fused projection, no grouped heads."""
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        width = heads * head_dim
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """X [B, L, width] to the same, and the new cache."""
        B, L, width = x.shape
        q, k, v = (
            t.view(B, L, self.heads, self.head_dim).transpose(1, 2) for t in self.qkv(x).split(width, -1)
        )
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None and L > 1)
        return self.out(y.transpose(1, 2).reshape(B, L, width)), (k, v)


class TupleCacheModel(nn.Module):
    """Two layers of TupleCacheAttention: forward(x, past list) -> (y, past list)."""

    def __init__(self, layers: int = 2, heads: int = 2, head_dim: int = 32) -> None:
        """Random weights."""
        super().__init__()
        self.layers = nn.ModuleList(TupleCacheAttention(heads, head_dim) for _ in range(layers))

    def forward(self, x: Tensor, past: list[tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, Any]:
        """X [B, L, width]; past as returned by an earlier call."""
        present = []
        for i, layer in enumerate(self.layers):
            y, kv = layer(x, None if past is None else past[i])
            x = x + y
            present.append(kv)
        return x, present


class PositionCacheModel(nn.Module):
    """A fixed cache in module buffers, written by position, read whole under a mask."""

    def __init__(
        self, layers: int = 2, heads: int = 4, kv_heads: int = 2, head_dim: int = 32, size: int = 256
    ) -> None:
        """`size`: capacity in tokens."""
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.size = heads, kv_heads, head_dim, size
        width = heads * head_dim
        self.qkv = nn.ModuleList(nn.Linear(width, (heads + 2 * kv_heads) * head_dim) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.register_buffer("causal", torch.tril(torch.ones(size, size, dtype=torch.bool)))
        for i in range(layers):
            self.register_buffer(f"k_cache_{i}", torch.zeros(1, kv_heads, size, head_dim))
            self.register_buffer(f"v_cache_{i}", torch.zeros(1, kv_heads, size, head_dim))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """X [1, L, width] at `positions` [L]."""
        B, L, width = x.shape
        mask = self.causal[None, None, positions]
        for i, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
            q, k, v = (t.view(B, L, -1, self.head_dim).transpose(1, 2) for t in qkv(x).split(sizes, -1))
            k_cache, v_cache = getattr(self, f"k_cache_{i}"), getattr(self, f"v_cache_{i}")
            k_cache[:, :, positions] = k
            v_cache[:, :, positions] = v
            group = self.heads // self.kv_heads
            y = F.scaled_dot_product_attention(
                q,
                k_cache.repeat_interleave(group, dim=1),
                v_cache.repeat_interleave(group, dim=1),
                attn_mask=mask,
            )
            x = x + out(y.transpose(1, 2).reshape(B, L, width))
        return x
