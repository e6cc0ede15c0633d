"""What GPUs do not forgive and the interpreter does: shifts by all bits, unaligned words, untrue hints."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest


class StrictnessError(AssertionError):
    """A kernel does what is undefined, or faults, on a GPU."""


def shifting(real: Callable[..., Any]) -> Callable[..., Any]:
    """A shift of the interpreter that refuses what a compiler may make anything of."""

    def strict(self: Any, lhs: Any, rhs: Any) -> Any:
        bits, by = lhs.dtype.scalar.primitive_bitwidth, rhs.data
        if ((by < 0) | (by >= bits)).any():
            raise StrictnessError(f"a number of {bits} bits is shifted by {by.min()} to {by.max()}")
        return real(self, lhs, rhs)

    return strict


def reaching(real: Callable[..., Any], place: int) -> Callable[..., Any]:
    """A load or store of the interpreter that refuses addresses that are no multiple of the size."""

    def strict(self: Any, ptrs: Any, *args: Any, **kwargs: Any) -> Any:
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        at = ptrs.data[args[place].data]
        if (at % size).any():
            raise StrictnessError(f"numbers of {size} bytes are read or written at no multiple of {size}")
        return real(self, ptrs, *args, **kwargs)

    return strict


def hinting(real: Callable[..., Any]) -> Callable[..., Any]:
    """A hint of the interpreter that refuses addresses that are no multiple of what it says."""

    def strict(self: Any, key: str, values: Any) -> None:
        if key == "tt.divisibility" and hasattr(self.dtype.scalar, "element_ty") and self.data.ndim == 1:
            size = int(getattr(values[0], "value", values[0]))
            if (self.data % size).any():
                raise StrictnessError(f"addresses are said to be multiples of {size} bytes and are not")
        real(self, key, values)

    return strict


@pytest.fixture(autouse=True)
def _strict_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        monkeypatch.setattr(TensorHandle, "set_attr", hinting(TensorHandle.set_attr))
        for name in ("create_shl", "create_ashr", "create_lshr"):
            monkeypatch.setattr(InterpreterBuilder, name, shifting(getattr(InterpreterBuilder, name)))
        for name, place in (("create_masked_load", 0), ("create_masked_store", 1)):
            monkeypatch.setattr(InterpreterBuilder, name, reaching(getattr(InterpreterBuilder, name), place))
