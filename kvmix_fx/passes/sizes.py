"""Symbolic sizes as functions of a step's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvmix_fx import dynamo
from kvmix_fx.runtime.boundary import Size


def size_evaluator(size: Any, values: Sequence[Any]) -> Size:
    """A function from the actual arguments to the number that `size` stood for.

    values: example values of the inputs; every symbol of `size` is a dimension of one of them.
    """
    if not dynamo.is_symbolic(size):
        number = int(size)
        return lambda _: number
    expression = dynamo.expression(size)
    readers = {symbol: _reader(symbol, values) for symbol in expression.free_symbols}
    if expression.is_Symbol:
        return readers[expression]
    if len(readers) == 1:
        [(symbol, read)] = readers.items()
        more = expression - symbol
        if more.is_number:
            # a step counts so: without sympy at each one
            number = int(more)
            return lambda args: read(args) + number
    return lambda args: int(expression.xreplace({s: read(args) for s, read in readers.items()}))


def _reader(symbol: Any, values: Sequence[Any]) -> Size:
    for i, value in enumerate(values):
        if dynamo.is_symbolic(value) and dynamo.expression(value) == symbol:
            return lambda args: int(args[i])
    for i, value in enumerate(values):
        if not isinstance(value, torch.Tensor):
            continue
        for dim, size in enumerate(value.shape):
            if dynamo.is_symbolic(size) and dynamo.expression(size) == symbol:
                return lambda args: int(args[i].shape[dim])
    raise LookupError(f"no input has the size {symbol}")
