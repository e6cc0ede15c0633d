"""Tiny models for tests: true architectures, and one per way of writing a cache; no downloads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
# what a configuration would store without the model ever reading it
NOT_TAKEN = {
    "BloomConfig": ("num_key_value_heads",),
    "FalconConfig": ("head_dim", "num_key_value_heads"),
    "GPT2Config": ("num_key_value_heads",),
    "GPTNeoXConfig": ("num_key_value_heads",),
    "MptConfig": ("num_key_value_heads",),
    "OPTConfig": ("num_key_value_heads",),
}
MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}

Architecture = tuple[str, dict[str, Any]]
"""A configuration class of transformers, and what it is given besides TINY."""

PACKED: dict[str, Architecture] = {
    "llama": ("LlamaConfig", {}),
    "llama, all heads": ("LlamaConfig", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 128}),
    "falcon, one kv head": ("FalconConfig", {"multi_query": True, "new_decoder_architecture": False}),
    "falcon, new": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),
    "cohere": ("CohereConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "mixtral": ("MixtralConfig", {"sliding_window": None} | MOE),
    "qwen3-moe": ("Qwen3MoeConfig", MOE),
}

# attention written out, as it has to be where scores are capped
WRITTEN_OUT: dict[str, Architecture] = {
    "llama": ("LlamaConfig", {}),
    "gpt2": PACKED["gpt2"],
    "gpt-neox": PACKED["gpt-neox"],
    "gemma2": (
        "Gemma2Config",
        {
            "layer_types": ["full_attention"] * 2,
            "attn_logit_softcapping": 1.5,
            "query_pre_attn_scalar": 32,
        },
    ),
    "granite, swa": (
        "GraniteSWAConfig",
        {"layer_types": ["full_attention"] * 2, "attention_multiplier": 32**-0.5},
    ),
}

# sliding and chunked windows longer than what a plan keeps raw; with the attention
WINDOWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mistral": ("MistralConfig", {"sliding_window": 64}, "sdpa"),
    "gpt-oss": ("GptOssConfig", {"sliding_window": 64} | MOE, "eager"),
    "llama 4, chunks": (
        "Llama4TextConfig",
        {"attention_chunk_size": 64, "intermediate_size_mlp": 128} | MOE,
        "sdpa",
    ),
}

# with the reason
LEFT_ALONE: dict[str, tuple[str, dict[str, Any], str]] = {
    "mistral with a window": ("MistralConfig", {"sliding_window": 24}, "no longer than what the plan keeps"),
}

# caches that no known attention reads, packed as storage; with the attention
STORED: dict[str, tuple[str, dict[str, Any], str]] = {
    "diffllama": ("DiffLlamaConfig", {}, "sdpa"),
    "deepseek-v3, latents": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "q_lora_rank": 32,
            "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
            "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 64,
            "num_experts_per_tok": 2, "head_dim": 16,
        },
        "sdpa",
    ),
}  # fmt: skip


def sharpen(model: nn.Module, factor: float = 4.0) -> nn.Module:
    """Scale query and key projections, so that attention is not uniform and a damaged cache shows.

    Learned sinks get logits that take a share which shows.
    """
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("q_proj", "k_proj", "c_attn", "query_key_value", "qkv", "wqk")):
            parameter.data.mul_(factor)
        elif name.endswith("sinks"):
            parameter.data.copy_(torch.linspace(1, 5, parameter.numel()))
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


def tiny_architecture(config_name: str, overrides: dict[str, Any], attention: str = "sdpa") -> Any:
    """A causal language model of a transformers configuration class: two layers, random weights.

    Args:
        config_name: of the class, such as "LlamaConfig".
        overrides: of TINY.
        attention: attn_implementation.
    """
    import transformers

    torch.manual_seed(0)
    settings = {k: v for k, v in TINY.items() if k not in NOT_TAKEN.get(config_name, ())}
    config = getattr(transformers, config_name)(**(settings | overrides))
    config._attn_implementation = attention
    return sharpen(transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention))


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
