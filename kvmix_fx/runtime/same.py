"""Two meanings of "the same argument as a step ago". They differ in what is no tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def same_object(a: Any, b: Any) -> bool:
    """Whether `b` can take the place of `a` without anybody asking what is inside it.

    Tensors: of one shape, dtype and device. Dicts, as of masks: of the same keys and such values. All else:
    the very same object, because equal caches or configs may behave differently.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    if type(a) is dict and type(b) is dict:
        return a.keys() == b.keys() and all(same_object(x, b[key]) for key, x in a.items())
    return a is b


def same_form(a: Any, b: Any) -> bool:
    """Whether work that was recorded for `a` is right for `b`, once the numbers of `b` are copied in.

    Tensors: of one shape, dtype and device. All else: equal values, because a graph's other inputs are
    numbers.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)
