"""Kernels that are compiled before they are launched, each in a thread of its own.

Triton compiles a kernel when it is launched first, one after another: attention takes ten seconds and more. Its
compiler lets go of Python's lock, so that Dynamo and Inductor can go on beside it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor
from triton.runtime.jit import MockTensor

_log = logging.getLogger(__name__)
_here = threading.local()
_pending: set[threading.Thread] = set()


def compiling() -> bool:
    """Whether this thread compiles for calls to come: its tensors have sizes and no memory."""
    return getattr(_here, "compiling", False)


class Kernel:
    """A Triton kernel. While its thread compiles for calls to come, a launch compiles and starts nothing."""

    def __init__(self, jitted: Any) -> None:
        """`jitted`: what `triton.jit` returns."""
        self.jitted = jitted

    def __getitem__(self, grid: Any) -> Any:
        """A function that launches it."""
        if compiling():
            return self._compile
        if _pending:
            wait()
        return self.jitted[grid]

    def __getattr__(self, name: str) -> Any:
        """All else of `jitted`."""
        return getattr(self.jitted, name)

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        self.jitted.warmup(*map(_described, args), grid=(1,), **kwargs)


def start(launcher: Callable[..., object], args: tuple[Any, ...]) -> None:
    """Compile what `launcher(*args)` would launch, whose tensors are fake; launches from now on wait for it."""
    thread = threading.Thread(target=_run, args=(launcher, args), name="kvmix compiles")
    thread.start()
    _pending.add(thread)


def wait() -> None:
    """Return when nothing is being compiled any more."""
    for thread in tuple(_pending):
        thread.join()
        _pending.discard(thread)


def _run(launcher: Callable[..., object], args: tuple[Any, ...]) -> None:
    _here.compiling = True
    try:
        launcher(*args)
    except Exception:
        # what is not compiled here is when it is launched, where errors belong
        _log.debug("not compiled ahead: %s", launcher, exc_info=True)
    finally:
        _here.compiling = False


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return MockTensor(value.dtype)
    return tuple(map(_described, value)) if isinstance(value, tuple) else value
