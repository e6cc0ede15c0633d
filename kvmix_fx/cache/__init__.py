"""The cache state: packed tensors of logical shape [B, Hkv, L, D], growing or of fixed capacity."""

from kvmix_fx.cache.tensor import QuantizedKVTensor

__all__ = ["QuantizedKVTensor"]
