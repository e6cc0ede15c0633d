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
    "llama-3.1-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
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
    "gemma-3-4b": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
        "sliding_window": 1024, "max_position_embeddings": 131072,
    },
    "mistral-7b-v0.1": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
        "sliding_window": 4096, "max_position_embeddings": 32768,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
}  # fmt: skip
"""Sizes by name, of Llama where no `model_type` is named."""

WITHOUT_END = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
"""Every run yields as many tokens as it was asked for."""


def build(
    shape: str,
    device: str = "cuda",
    layers: int | None = None,
    tp_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """A model of `shape`, made on the device; of `tp_size` ranks, each makes its own share.

    layers: None for as many as the shape has. The weights are the same whatever tp_size is.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SHAPES[shape] | WITHOUT_END | ({} if layers is None else {"num_hidden_layers": layers})
    torch.manual_seed(0)
    if "model_type" in sizes:
        return build_other(sizes, device, dtype)
    config = LlamaConfig(**sizes, dtype=dtype)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    if tp_size > 1:
        model = share_out(model, device, tp_size)
    else:
        model.to_empty(device=device)
    set_weights(model)
    # not a parameter, and lost on the meta device
    rotary: Any = model.model.rotary_emb
    with torch.device(device):
        model.model.rotary_emb = type(rotary)(config)
    return model.eval()


def build_other(sizes: dict[str, Any], device: str, dtype: torch.dtype) -> nn.Module:
    """A model of any type, whole on one device; its buffers are as its class makes them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**sizes, dtype=dtype)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    set_weights(model)
    return model.eval()


def share_out(model: Any, device: str, tp_size: int) -> Any:
    """Give every rank memory for its share of a model on the meta device, as from_pretrained would."""
    from torch.distributed.tensor import DTensor
    from transformers.distributed import DistributedConfig

    # what the mesh is made of differs between releases
    config, _, mesh = type(model).prepare_distribute_model(DistributedConfig(tp_size=tp_size))
    model = type(model).maybe_distribute_model(model, config, mesh)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                local = torch.empty_like(parameter.to_local(), device=device)
                parameter = DTensor.from_local(
                    local, parameter.device_mesh, parameter.placements, run_check=False,
                    shape=parameter.shape, stride=parameter.stride(),
                )  # fmt: skip
            else:
                parameter = torch.empty_like(parameter, device=device)
            setattr(module, name, nn.Parameter(parameter, requires_grad=False))
    return model


def set_weights(model: nn.Module) -> None:
    """Random matrices that keep the size of what they multiply, ones elsewhere."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        for parameter in model.parameters():
            std = parameter.shape[1] ** -0.5 if parameter.dim() > 1 else 0
            if not std:
                parameter.fill_(1.0)
            elif isinstance(parameter, DTensor):
                # drawn whole, as for a model on one device, and all but this rank's part dropped
                part = parameter.to_local()
                whole = torch.empty(parameter.shape, dtype=part.dtype, device=part.device).normal_(std=std)
                mine = distribute_tensor(
                    whole, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
                part.copy_(mine.to_local())
            else:
                parameter.normal_(std=std)
