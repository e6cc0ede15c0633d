"""What eager PyTorch operations do to packed tensors.

An explicit table. Reads that are not in it unpack everything and warn once per operation;
mutations that are not in it raise. The compiled path never comes here: the graph pass replaces
these operations by ops on the buffers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from kvmix_fx.cache.tensor import QuantizedKVTensor
from kvmix_fx.dynamo import is_fake
from kvmix_fx.errors import CacheMutationError, DequantizeWarning

aten = torch.ops.aten
_TABLE: dict[Any, Callable[..., Any]] = {}
_warned: set[str] = set()


def implements(*overloads: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a handler `(func, args, kwargs) -> result or NotImplemented`."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for overload in overloads:
            _TABLE[overload] = handler
        return handler

    return register


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `func` on arguments of which at least one is packed."""
    handler = _TABLE.get(func)
    if handler is not None:
        result = handler(func, args, kwargs)
        if result is not NotImplemented:
            return result
    written = _written_packed(func, args, kwargs)
    if written is not None:
        raise CacheMutationError(
            f"{func} cannot change a packed cache in place (argument {written!r}). Append with torch.cat "
            "or index_copy_, or take an explicit copy with .dequantize()."
        )
    _warn_once(func, args, kwargs)
    args, kwargs = tree_map(_plain, (args, kwargs))
    return func(*args, **kwargs)


def _plain(x: Any) -> Any:
    return x.dequantize() if isinstance(x, QuantizedKVTensor) else x


def _written_packed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if isinstance(value, QuantizedKVTensor):
            return str(argument.name)
    return None


def _warn_once(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name = str(func)
    if name in _warned:
        return
    packed = [a for a in args if isinstance(a, QuantizedKVTensor)]
    # while a compiler traces, nothing is computed
    if not packed or is_fake(packed[0].residual):
        return
    _warned.add(name)
    size = packed[0].numel() * packed[0].element_size()
    warnings.warn(
        f"{name} is not defined on packed keys and values, so all {size} bytes were unpacked. Compile the "
        "model with kvmix_fx.compile to attend to packed storage, or call .dequantize() to say you want it.",
        DequantizeWarning,
        stacklevel=2,
    )


def _dim(t: Tensor, dim: int) -> int:
    return dim % t.dim()


@implements(aten.cat.default)
def _cat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = tensors[0]
    if (
        not isinstance(first, QuantizedKVTensor)
        or first.is_fixed
        or _dim(first, dim) != 2
        or any(isinstance(t, QuantizedKVTensor) for t in tensors[1:])
    ):
        return NotImplemented
    # a cache that never got a token is an empty 1-D tensor in transformers
    new = [t for t in tensors[1:] if t.dim() == 4]
    return first.append(new[0] if len(new) == 1 else torch.cat(new, 2)) if new else first.alias()


@implements(aten.index_copy_.default)
def _index_copy_(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    self, dim, index, source = args
    if not isinstance(self, QuantizedKVTensor) or not self.is_fixed or _dim(self, dim) != 2:
        return NotImplemented
    return self.write_(index, source)


@implements(aten.index_copy.default)
def _index_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    self, dim, index, source = args
    if not isinstance(self, QuantizedKVTensor) or not self.is_fixed or _dim(self, dim) != 2:
        return NotImplemented
    return self.map_buffers(torch.clone).write_(index, source)


@implements(aten.index_put_.default, aten.index_put.default)
def _index_put(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    self, indices, values = args[:3]
    accumulate = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    by_position = len(indices) == 3 and indices[0] is None and indices[1] is None and indices[2] is not None
    if not isinstance(self, QuantizedKVTensor) or not self.is_fixed or not by_position or accumulate:
        return NotImplemented
    target = self if func is aten.index_put_.default else self.map_buffers(torch.clone)
    return target.write_(indices[2], values)


@implements(aten.slice.Tensor)
def _slice(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    self: QuantizedKVTensor = args[0]
    given: list[Any] = [*args[1:]]
    dim, start, end, step = given + [0, None, None, 1][len(given) :]
    size = self.shape[_dim(self, dim)]
    start = 0 if start is None else start
    end = size if end is None else end
    if is_fake(self.residual):
        # symbolic bounds: only the whole range and a crop to a known end keep the packed type
        if _dim(self, dim) != 2 and start == 0 and step == 1:
            return self.alias()
        return NotImplemented
    start, end, _ = slice(start, end).indices(size)
    if step != 1:
        return NotImplemented
    if start == 0 and end == size:
        return self.alias()
    if _dim(self, dim) == 2 and start == 0 and not self.is_fixed:
        return self.crop(max(0, end))
    if _dim(self, dim) == 0:
        return self.map_buffers(lambda b: b[start:end].clone())
    return NotImplemented


@implements(aten.index_select.default)
def _index_select(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    self, dim, index = args
    if not isinstance(self, QuantizedKVTensor) or _dim(self, dim) != 0:
        return NotImplemented
    return self.map_buffers(lambda b: b.index_select(0, index))


@implements(aten.index.Tensor)
def _index(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    self, indices = args
    if (
        not isinstance(self, QuantizedKVTensor)
        or indices[0] is None
        or any(i is not None for i in indices[1:])
    ):
        return NotImplemented
    return self.map_buffers(lambda b: b[indices[0]])


@implements(aten.clone.default)
def _clone(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].map_buffers(torch.clone)


@implements(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _alias(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0].alias()


@implements(aten._to_copy.default)
def _to_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    self: QuantizedKVTensor = args[0]
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    non_blocking = kwargs.get("non_blocking", False)
    moved = self.cached.map(lambda b: b.to(device=device, non_blocking=non_blocking, copy=True))
    if dtype is not None:
        names = self.format.buffer_names
        # codes and scales keep their dtypes: only the raw tokens are in the model dtype
        raw = {name: moved.named(name) for name in ("residual", "high_residual") if name in names}
        moved = moved.replace(**{name: tokens.to(dtype=dtype) for name, tokens in raw.items()})
    live = self.live.to(device=device, copy=True) if self.live is not None else None
    return QuantizedKVTensor(moved, self.shape[2], live)


@implements(aten.zero_.default)
def _zero_(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    self: QuantizedKVTensor = args[0]
    empty = self.cached.zeros()
    if self.cached.order is not None:
        # a plan's is given once, and zeros are no permutation
        empty = empty.replace(order=self.cached.order.clone())
    if self.live is None:
        # others may read the same buffers
        self.become(empty)
        return self
    for buffer, nothing in zip(self.cached.tensors, empty.tensors, strict=True):
        buffer.copy_(nothing)
    self.live.zero_()
    return self


@implements(aten.copy_.default)
def _copy_(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    self, source = args[:2]
    same = (
        isinstance(self, QuantizedKVTensor)
        and isinstance(source, QuantizedKVTensor)
        and self.format == source.format
        and self.shape == source.shape
        and self.is_fixed == source.is_fixed
    )
    if not same:
        return NotImplemented
    if self.live is None:
        # others may read the same buffers; and a growing tensor's may have any room
        self.become(_to_copy(func, (source,), {"device": self.device, "dtype": self.dtype}).cached)
        return self
    if any(a.shape != b.shape for a, b in zip(self.cached.tensors, source.cached.tensors, strict=True)):
        return NotImplemented
    for target, origin in zip(self.cached.tensors, source.cached.tensors, strict=True):
        target.copy_(origin)
    self.live.copy_(source.live)
    return self
