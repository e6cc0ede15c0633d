"""What a cache occupies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kvmix_fx.cache.tensor import QuantizedKVTensor

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


def cache_size(cache: Cache) -> tuple[int, int]:
    """Bytes allocated by a cache, packed or not, and the elements it holds or has room for."""
    nbytes = elements = 0
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, Tensor):
                packed = isinstance(tensor, QuantizedKVTensor)
                nbytes += tensor.packed_nbytes if packed else tensor.numel() * tensor.element_size()
                elements += tensor.numel()
    return nbytes, elements


__all__ = ["cache_size"]
