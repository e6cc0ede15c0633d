"""Which thread uses a cache: one at a time.

A step reads how many tokens a cache holds, and writes behind them. Two threads would write to the same
places, and each would attend to tokens of the other's.
"""

from __future__ import annotations

import threading
import weakref

from transformers.cache_utils import Cache

from kvmix_fx.errors import CacheSharedError

_lock = threading.Lock()
_owners: weakref.WeakKeyDictionary[Cache, int] = weakref.WeakKeyDictionary()


def take(cache: Cache) -> None:
    """Have `cache` for this thread until `release`.

    Raises:
        CacheSharedError: another thread has it.
    """
    me = threading.get_ident()
    with _lock:
        owner = _owners.setdefault(cache, me)
    if owner != me:
        raise CacheSharedError(
            "another thread is in the middle of a step, or of generate(), with this cache: give each thread "
            "a cache of its own, such as copy.deepcopy(cache) made beforehand, or wait for the other one"
        )


def release(cache: Cache) -> None:
    """Let other threads have `cache`. No effect if this one does not have it."""
    with _lock:
        if _owners.get(cache) == threading.get_ident():
            del _owners[cache]
