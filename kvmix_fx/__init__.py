"""Keep a model's KV cache in 2 to 4 bits: a torch.compile pass driven by a per-layer plan."""

from kvmix_fx.api import compile, compiled, explain, restore
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.plan import KVPlan, LayerPlan, QuantSpec, WindowRule

__all__ = [
    "KVPlan",
    "LayerPlan",
    "QuantSpec",
    "QuantizedKVTensor",
    "WindowRule",
    "compile",
    "compiled",
    "explain",
    "restore",
]
