"""Keep a model's KV cache in 2 to 4 bits: a torch.compile pass driven by a per-layer plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmix_fx.plan import KVPlan, LayerPlan, ModelGeometry, QuantSpec, WindowRule

if TYPE_CHECKING:
    from kvmix_fx import errors
    from kvmix_fx.api import compile, compiled, explain, restore
    from kvmix_fx.cache import QuantizedKVTensor
    from kvmix_fx.contracts import cache_argument, returned_cache
    from kvmix_fx.evaluation import evaluate
    from kvmix_fx.integrations.transformers import KVMixCache, KVMixStaticCache
    from kvmix_fx.integrations.transformers.batching import serve
    from kvmix_fx.profiling import profile

__all__ = [
    "KVMixCache",
    "KVMixStaticCache",
    "KVPlan",
    "LayerPlan",
    "ModelGeometry",
    "QuantSpec",
    "QuantizedKVTensor",
    "WindowRule",
    "cache_argument",
    "compile",
    "compiled",
    "errors",
    "evaluate",
    "explain",
    "profile",
    "restore",
    "returned_cache",
    "serve",
]

_HOMES = {
    "KVMixCache": "kvmix_fx.integrations.transformers",
    "KVMixStaticCache": "kvmix_fx.integrations.transformers",
    "QuantizedKVTensor": "kvmix_fx.cache",
    "cache_argument": "kvmix_fx.contracts",
    "compile": "kvmix_fx.api",
    "compiled": "kvmix_fx.api",
    "evaluate": "kvmix_fx.evaluation",
    "explain": "kvmix_fx.api",
    "profile": "kvmix_fx.profiling",
    "restore": "kvmix_fx.api",
    "returned_cache": "kvmix_fx.contracts",
    "serve": "kvmix_fx.integrations.transformers.batching",
}


def __getattr__(name: str) -> Any:
    # plans and the command line's help must not wait for torch
    import importlib

    if name == "errors":
        return importlib.import_module("kvmix_fx.errors")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        from kvmix_fx.errors import MissingPackageError

        raise MissingPackageError.for_extra("transformers", "hf", name) from error
    globals()[name] = value
    return value
