"""Errors raised where packed storage is read or written.

`kvmix_fx.errors` re-exports these beside its own, so a user imports from there.
"""

from __future__ import annotations


class KVMixError(Exception):
    """Base of every error this project raises on purpose."""


class FormatError(KVMixError, ValueError):
    """A packed format that cannot exist: bits, axis, group size, tile or window do not fit."""


class HeadSizeError(KVMixError, ValueError):
    """The head size cannot be packed: it is no multiple of 16, or no multiple of the group."""


class CapacityError(KVMixError, RuntimeError):
    """Tokens would not fit into a fixed-capacity cache. Raised before anything is written."""

    @classmethod
    def exceeded(cls, new: int, stored: int, capacity: int) -> CapacityError:
        """Say how many tokens were to follow how many, and what to do."""
        return cls(
            f"{new} tokens after the {stored} stored ones exceed the capacity of {capacity}: make the cache "
            "larger (max_cache_len)"
        )


class KernelMemoryError(KVMixError, MemoryError):
    """The CPU kernel found no memory for its partial results. Nothing was written."""


class TuningFileError(KVMixError, ValueError):
    """A file of launch parameters in the user's cache folder that cannot be read."""


class CacheShapeError(KVMixError, ValueError):
    """Tensors handed to a cache disagree with it in batch, heads, head size, dtype or device."""
