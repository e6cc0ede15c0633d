"""Where releases of transformers differ: a cache is called `past_key_values`, from 5.24 on `cache`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

NAMES = ("cache", "past_key_values")
"""New and old; a call or a result has one of them."""


def cache_name(function: Callable[..., Any]) -> str:
    """What this function calls the cache that it takes."""
    parameters = inspect.signature(function).parameters
    return next((name for name in NAMES if name in parameters), NAMES[1])


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument of a model's forward or generate()."""
    return {cache_name(model.forward): cache}


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a call; None without one."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def returned_cache(result: Any, default: Any = None) -> Any:
    """The cache that a result holds; `default` if it has no place for one."""
    # in this order: the old name of a result that has the new one warns
    return next((getattr(result, name) for name in NAMES if hasattr(result, name)), default)


__all__ = ["NAMES", "cache_argument", "cache_name", "given_cache", "returned_cache"]
