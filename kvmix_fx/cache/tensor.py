"""A cached tensor that looks like [B, Hkv, L, D] in the model dtype and stores packed codes.

Follows torchao's conventions for tensor subclasses (named data and attribute fields, `qdata`,
`scale`, `zero_point`) on a base of its own, because building and flattening one costs time in
every decode step. Two kinds:

* growing (`live` is None): L is the number of tokens; concatenation appends.
* fixed: L is the capacity; writing by index appends; `live`, a 0-d int64 tensor on the device,
  counts the tokens stored.

Compilers must learn L from the outer size and everything static from the flatten context: a
length in the context would recompile at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvmix_fx.cache.growth import Lease, Store, enlarge, prepare_append, rewind, without_front
from kvmix_fx.cache.saved import check_buffers, check_numbers, entry, read_meta
from kvmix_fx.dynamo import is_fake, mark_tokens
from kvmix_fx.errors import CacheMutationError, CacheVersionError, CapacityError, TokenTierError
from kvmix_kernels import layout, ops
from kvmix_kernels.cached import Cached, allocate, shapes
from kvmix_kernels.layout import BUFFER_NAMES, HIGH_NAMES, PLAIN_NUMBERS, SKIPPED_NAME, TensorFormat
from kvmix_kernels.reference import storage
from kvmix_kernels.tokens.ops import dequantize
from kvmix_kernels.tokens.places import nothing_skipped, skip


class QuantizedKVTensor(torch.Tensor):
    """Keys or values of one layer, packed.

    Fields (see `kvmix_kernels.layout` for the exact layout):
        qdata: codes, int16 [B, Hkv, tiles * tile, words_per_token].
        scale, zero_point: [B, Hkv, *layout.scale_grid], offset added after scaling.
        residual: raw tokens in the model dtype, [B, Hkv, slots, D].
        live: None (growing) or the number of stored tokens, int64 [] on the device (fixed).
        format: `kvmix_kernels.layout.TensorFormat`.

    Eager operations that caches need (concatenate, write by index, slice, reorder, repeat, select,
    clone, move, zero) act on the packed data. Any other read unpacks the whole history and warns
    once (`DequantizeWarning`); any other in-place operation raises `CacheMutationError`.
    `dequantize()` is the explicit way to 16 bits.
    """

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor
    residual: Tensor
    live: Tensor | None
    format: TensorFormat
    lease: Lease | None

    tensor_data_names: ClassVar = list(BUFFER_NAMES)
    optional_tensor_data_names: ClassVar = ["live"]
    tensor_attribute_names: ClassVar = ["format"]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        cached: Cached,
        length: int,
        live: Tensor | None = None,
        store: Store | None = None,
    ) -> QuantizedKVTensor:
        """Wrap buffers that hold `length` tokens (growing) or have that capacity (fixed)."""
        residual = cached.residual
        B, H, _, D = residual.shape
        self = torch.Tensor._make_wrapper_subclass(
            cls, (B, H, length, D), dtype=residual.dtype, device=residual.device
        )
        self.live = live
        self.lease = None
        self.become(cached, store)
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Everything happens in `__new__`."""

    def become(self, cached: Cached, store: Store | None = None) -> None:
        """Hold these buffers from now on; without a store nobody else does."""
        self.cached, self.format = cached, cached.format
        # compilers take a subclass apart by the names of its attributes
        for name, buffer in zip(cached.format.buffer_names, cached.tensors, strict=True):
            setattr(self, name, buffer)
        if is_fake(self.residual):
            return
        counted = [self, *((self.residual,) if self.format.is_raw else cached.per_token)]
        if self.format.high is not None:
            first = len(self.format.low.buffer_names)
            counted += cached.tensors[first : first + len(HIGH_NAMES)]
            if self.format.high.scored:
                counted += cached.named("scores"), cached.named(SKIPPED_NAME)
        mark_tokens(*counted, fixed=self.is_fixed)
        if self.live is None:
            self.lease = Lease(store or Store(), int(self.shape[2]))

    @property
    def is_fixed(self) -> bool:
        """Whether this has a fixed capacity."""
        return self.live is not None

    def stored_tokens(self) -> int:
        """Tokens stored. Waits for the device when the capacity is fixed."""
        return int(self.shape[2]) if self.live is None else int(self.live)

    @property
    def packed_nbytes(self) -> int:
        """Bytes allocated for codes, scales, offsets and raw tokens."""
        return sum(b.numel() * b.element_size() for b in self.cached.tensors)

    def bits_per_element(self) -> float:
        """Allocated bits per logical element, everything counted."""
        return 8 * self.packed_nbytes / max(1, self.numel())

    @classmethod
    def from_hp(
        cls, x: Tensor, format: TensorFormat, mask: Tensor | None = None, hint: Tensor | None = None
    ) -> QuantizedKVTensor:
        """Quantize and pack the tokens x [B, Hkv, L, D] into a growing tensor.

        Scales become float32 where those of the format do not have the range of the tokens.

        `mask`: the attention mask of the step that made them; hidden tokens widen no group. `hint`: what an
        order of channels comes from, see `kvmix_kernels.ops`.
        """
        layout.check_head_size(format, x.shape[3])
        if format.high is not None:
            raise TokenTierError(
                "keys and values with a high tier are packed together, by a prompt of a compiled model, "
                "which tells what matters: use kvmix_fx.compile, or kvmix_fx.cache.tiers.pack"
            )
        format = fitting(x, format)
        return cls(Cached(format, tuple(ops.quantize_pack(x, mask, format.encode(), hint))), x.shape[2])

    @classmethod
    def empty_fixed(
        cls,
        batch: int,
        heads: int,
        capacity: int,
        head_dim: int,
        format: TensorFormat,
        dtype: torch.dtype,
        device: torch.device | str,
        live: Tensor | None = None,
        order: Tensor | None = None,
    ) -> QuantizedKVTensor:
        """A fixed tensor without tokens.

        `live` may be shared by all tensors that the same graphs write, as those of a cache. `order`: of
        channels, [Hkv, D], if the plan has one.
        """
        tiles, slots = layout.fixed_tiles(format, capacity), layout.fixed_slots(format, capacity)
        cached = allocate(batch, heads, head_dim, tiles, slots, format, dtype, device)
        if live is None:
            live = torch.zeros((), dtype=torch.int64, device=device)
        if order is not None:
            cached.take_order(order)
        return cls(cached, capacity, live)

    def dequantize(self) -> Tensor:
        """All tokens as a plain tensor [B, Hkv, L, D] in the model dtype; zeros where none is stored."""
        if is_fake(self.residual):
            return self.residual.new_empty(self.shape)
        return dequantize(self.cached.tensors, self.live, self.shape[2], self.format.encode())

    def append(self, keys: Tensor) -> QuantizedKVTensor:
        """A growing tensor with the tokens `keys` [B, Hkv, n, D] after this one's."""
        if is_fake(self.residual) or is_fake(keys):
            return QuantizedKVTensor(self.cached, self.shape[2] + keys.shape[2])
        assert self.lease is not None
        length, extra = self.lease.length, keys.shape[2]
        self._check_alone()
        cached, store = prepare_append(self.cached, self.lease, extra)
        storage.append(cached, keys.to(self.dtype), None, length)
        return QuantizedKVTensor(cached, length + extra, store=store)

    def write_(self, positions: Tensor, keys: Tensor) -> QuantizedKVTensor:
        """Store `keys` at consecutive `positions` of a fixed tensor, the first one at its live end.

        An earlier first position rewinds the cache to it. Raises CapacityError or
        CacheMutationError before anything is written.
        """
        if is_fake(self.residual) or is_fake(keys):
            return self
        assert self.live is not None
        n = keys.shape[2]
        if n == 0:
            return self
        self._check_alone()
        start, stored = int(positions.reshape(-1)[0]), int(self.live)
        if positions.numel() != n or int(positions.reshape(-1)[-1]) != start + n - 1:
            raise CacheMutationError("a packed cache is written at consecutive positions only")
        if start + n > self.shape[2]:
            raise CapacityError.exceeded(n, start, self.shape[2])
        if start > stored:
            raise CacheMutationError(
                f"a write at position {start} would leave a gap after the {stored} tokens stored"
            )
        if start < stored:
            self.rewind_(start, stored)
        storage.append(self.cached, keys.to(self.dtype), None, start)
        self.live.fill_(start + n)
        return self

    def _check_alone(self) -> None:
        if self.format.high is not None:
            raise TokenTierError(
                "a cache with a high tier is written by steps of a compiled model, where attention tells "
                "which tokens matter: use kvmix_fx.compile, or a plan without token_tier"
            )

    def __setitem__(self, index: Any, value: Any) -> None:
        """Write the tokens `value` as `x[:, :, positions] = value` or `x[:, :, start:stop] = value`.

        PyTorch would write to a slice of an unpacked copy, and drop the first dimension of one row.

        Raises:
            CacheMutationError, CapacityError: as `write_`; also for an index of any other form.
        """
        place = index if isinstance(index, tuple) else (index,)
        whole = [i is Ellipsis or (isinstance(i, slice) and i == slice(None)) for i in place]
        if all(whole):
            super().__setitem__(index, value)
            return
        where = place[-1]
        span = _span(where) if whole == [True, True, False] and self.is_fixed else None
        if span is None:
            raise CacheMutationError(
                "a packed cache is written at [:, :, positions] or at [:, :, start:stop], if its capacity is "
                "fixed, or extended with torch.cat"
            )
        start, stop = span
        if start < 0 or value.dim() != 4 or stop - start != value.shape[2]:
            raise CacheMutationError(f"tokens of shape {tuple(value.shape)} do not fit into [{start}:{stop}]")
        if not is_fake(self.residual):
            positions = torch.arange(start, stop) if isinstance(where, slice) else where
            self.write_(positions, value)

    def rewind_(self, length: int, stored: int) -> None:
        """Forget the tokens of a fixed tensor from position `length` on; `live` is not changed."""
        shorter = rewind(self.cached, stored, length)
        for mine, other in zip(self.cached.tensors, shorter.tensors, strict=True):
            if other is not mine:
                mine.copy_(other)

    def enlarged(self, capacity: int) -> QuantizedKVTensor:
        """A fixed tensor of the same tokens with room for `capacity`, which is no smaller."""
        tiles, slots = layout.fixed_tiles(self.format, capacity), layout.fixed_slots(self.format, capacity)
        return QuantizedKVTensor(enlarge(self.cached, tiles, slots), capacity, self.live)

    def narrowed(self, capacity: int) -> QuantizedKVTensor:
        """A fixed tensor over the same memory with room for `capacity`, which is no larger."""
        tiles, slots = layout.fixed_tiles(self.format, capacity), layout.fixed_slots(self.format, capacity)
        sizes = shapes(self.format, self.shape[3], tiles, slots, self.dtype)
        buffers = zip(self.cached.tensors, sizes, strict=True)
        cached = Cached(self.format, tuple(buffer[:, :, : size[0]] for buffer, (size, _) in buffers))
        return QuantizedKVTensor(cached, capacity, self.live)

    def crop(self, length: int) -> QuantizedKVTensor:
        """The first `length` tokens, sharing the packed data."""
        if is_fake(self.residual):
            return QuantizedKVTensor(self.cached, length)
        assert self.lease is not None
        cached = rewind(self.cached, self.lease.length, length)
        return QuantizedKVTensor(cached, length, store=self.lease.store)

    def without_front(self, tiles: int, room: int) -> QuantizedKVTensor:
        """A growing tensor of its own without its first `tiles` tiles, with room for `room` tokens."""
        left = self.shape[2] - tiles * self.format.tile
        return QuantizedKVTensor(without_front(self.cached, tiles, room), left)

    def map_buffers(
        self, function: Callable[[Tensor], Tensor], live: Tensor | None = None
    ) -> QuantizedKVTensor:
        """A tensor of its own whose buffers are `function` of this one's."""
        live = live if live is not None or self.live is None else self.live.clone()
        return QuantizedKVTensor(self.cached.map(function), self.shape[2], live)

    def alias(self) -> QuantizedKVTensor:
        """A new tensor object over the same data."""
        store = self.lease.store if self.lease is not None else None
        return QuantizedKVTensor(self.cached, self.shape[2], self.live, store)

    def repeat_interleave(self, repeats: Any, dim: int | None = None, **kwargs: Any) -> Tensor:
        """Repeat batch rows, packed. PyTorch takes this operation apart before it can be dispatched."""
        if dim != 0:
            return super().repeat_interleave(repeats, dim, **kwargs)
        return self.map_buffers(lambda b: b.repeat_interleave(repeats, 0, **kwargs))

    def __tensor_flatten__(self) -> tuple[list[str], tuple[TensorFormat]]:
        names = list(self.format.buffer_names)
        if self.live is not None:
            names.append("live")
        return names, (self.format,)

    @classmethod
    def __tensor_unflatten__(
        cls,
        inner_tensors: dict[str, Tensor],
        context: tuple[TensorFormat],
        outer_size: Sequence[int],
        outer_stride: Sequence[int],
    ) -> QuantizedKVTensor:
        cached = Cached(context[0], tuple(inner_tensors[name] for name in context[0].buffer_names))
        return cls(cached, outer_size[2], inner_tensors.get("live"))

    def _stable_hash_for_caching(self) -> str:
        return repr((type(self).__name__, self.format.encode(), self.is_fixed))

    def __repr__(self, **kwargs: Any) -> str:
        f = self.format
        kind = "fixed capacity" if self.is_fixed else "growing"
        axis = "channel" if f.axis == layout.AXIS_CHANNEL else "token"
        if f.high is not None:
            many = f"{f.high.share} %" if f.high.share else f"{f.high.count} tokens"
            kind += f", {many} at {f.high.bits} bits"
        recipe = (
            "raw" if f.is_raw else f"{f.label} bits per {axis} in groups of {f.group_size or self.shape[3]}"
        )
        named = layout.SCALE_DTYPES[f.scale_dtype]
        scales = "" if f.is_raw or named == "float16" else f", {named} scales"
        size = (
            ""
            if is_fake(self.residual)
            else f", {self.packed_nbytes} bytes = {self.bits_per_element():.2f} bits/element"
        )
        return (
            f"QuantizedKVTensor({list(self.shape)}, {self.dtype}, {self.device}, {kind}, {recipe}, "
            f"sink {f.sink}, window {f.window}{scales}{size})"
        )

    def __reduce_ex__(self, proto: Any) -> tuple[Any, ...]:
        return _rebuild, (self.to_state(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedKVTensor:
        copy = self.map_buffers(torch.clone)
        memo[id(self)] = copy
        return copy

    def to_state(self, prefix: str = "") -> dict[str, Any]:
        """Plain tensors by name, for pickling or safetensors; `from_state` restores."""
        named = zip(self.format.buffer_names, self.cached.tensors, strict=True)
        # who is skipped follows from the positions
        state: dict[str, Any] = {
            prefix + name: buffer.contiguous() for name, buffer in named if name != SKIPPED_NAME
        }
        if self.live is not None:
            state[prefix + "live"] = self.live
        meta = [self.shape[2], *self.format.encode(), layout.VERSION]
        state[prefix + "meta"] = torch.tensor(meta, dtype=torch.int64)
        return state

    @classmethod
    def from_state(cls, state: dict[str, Any], prefix: str = "") -> QuantizedKVTensor:
        """Inverse of `to_state`.

        Raises:
            CacheStateError: something is missing or does not fit the rest.
            CacheVersionError: it was saved under another packed layout.
        """
        length, *numbers = read_meta(state, prefix)
        # version 1 was not written down
        *numbers, version = numbers if len(numbers) > PLAIN_NUMBERS else [*numbers, 1]
        # a later version may have formats that are not known here
        fmt = check_numbers(numbers) if version <= layout.VERSION else None
        if fmt is None or not layout.reads(version, fmt.bits):
            raise CacheVersionError(
                f"this cache was saved in version {version} of the packed layout, and version "
                f"{layout.VERSION} is read here: use the package that wrote it, or fill it anew"
            )
        buffers = {name: entry(state, prefix, name) for name in fmt.buffer_names if name != SKIPPED_NAME}
        if SKIPPED_NAME in fmt.buffer_names:
            buffers[SKIPPED_NAME] = nothing_skipped(buffers["qdata"])
        cached = Cached(fmt, tuple(buffers[name] for name in fmt.buffer_names))
        live = entry(state, prefix, "live") if prefix + "live" in state else None
        check_buffers(cached, length, live)
        if SKIPPED_NAME in buffers:
            skip(cached, length if live is None else int(live))
        return cls(cached, length, live)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from kvmix_fx.cache.dispatch import dispatch

        return dispatch(func, args, kwargs or {})


def ranges_wider(dtype: torch.dtype, format: TensorFormat) -> bool:
    """Whether tokens of this dtype may have a range that scales of the format do not have."""
    return dtype != torch.float16 and not layout.holds(format, torch.inf)


def fitting(x: Tensor, format: TensorFormat) -> TensorFormat:
    """The format, with scales of single precision where its own do not have the range of the tokens x."""
    if is_fake(x) or not ranges_wider(x.dtype, format) or layout.holds(format, float(ops.peak(x))):
        return format
    return layout.widened(format)


def _span(where: Any) -> tuple[Any, Any] | None:
    """Bounds of a slice, or of the places of a tensor of positions; None for any other part of an index."""
    if isinstance(where, slice) and where.step in (None, 1) and where.stop is not None:
        return where.start or 0, where.stop
    if isinstance(where, Tensor) and where.dim() == 1 and where.dtype == torch.int64:
        return 0, where.shape[0]
    return None


def _rebuild(state: dict[str, Any]) -> QuantizedKVTensor:
    return QuantizedKVTensor.from_state(state)


torch.serialization.add_safe_globals([QuantizedKVTensor, _rebuild])
