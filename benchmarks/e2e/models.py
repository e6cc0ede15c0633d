"""Models of true shape with random weights: speed and memory do not depend on the values."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 135168,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama-2-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 8192,
    },
}  # fmt: skip
"""Sizes by name; no end-of-sequence token, so that every run yields as many tokens as it was asked for."""


def build(shape: str, device: str = "cuda") -> nn.Module:
    """A bfloat16 model of `shape`, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPES[shape], bos_token_id=None, eos_token_id=None, pad_token_id=0, dtype=torch.bfloat16
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device=device)
    set_weights(model)
    # not a parameter, and lost on the meta device
    rotary: Any = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config, device=torch.device(device))
    return model.eval()


def set_weights(model: nn.Module) -> None:
    """Random matrices that keep the size of what they multiply, ones elsewhere."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.fill_(1.0)
