"""The ops `torch.ops.kvmix.*`: schemas, fakes and dispatch.

Imports torch only. A cached tensor travels as the list of its buffers, in the order of
`TensorFormat.buffer_names`, and its format as the `int[]` of `TensorFormat.encode`; `Cached.of` puts both
together again. `keys` and `values` are always the cache, `new_keys` and `new_values` the step's own
tokens. The number of live tokens is either `length` (growing caches: the host knows it) or, when the
0-d int64 tensor `start` is given, on the device (fixed caches), and `length` is then the cache's capacity.

`torch.library.Library` is used instead of `custom_op` because its dispatch costs a fraction
per call, and a decode step calls two ops per layer.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.cached import RESIDUAL, Cached, allocate, shapes
from kvmix_kernels.cpu import attention as cpu_attention
from kvmix_kernels.errors import CapacityError
from kvmix_kernels.layout import TensorFormat
from kvmix_kernels.reference import attention, storage

NAMESPACE = "kvmix"

_USE_TRITON = os.environ.get("KVMIX_KERNELS", "triton") != "reference"
"""CUDA tensors take the Triton kernels unless the environment says KVMIX_KERNELS=reference."""
_library = torch.library.Library(NAMESPACE, "DEF")

_library.define("quantize_pack(Tensor x, Tensor? mask, int[] format, Tensor? hint=None) -> Tensor[]")
# only what is written may stand in an (a!) list: functionalization copies the others as well
_library.define(
    "append_(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor new_keys, Tensor new_values, Tensor? mask, "
    "Tensor? start, SymInt length, int[] key_format, int[] value_format, Tensor? query=None) -> ()",
)
_library.define(
    "attend(Tensor query, Tensor? new_keys, Tensor? new_values, Tensor[] keys, Tensor[] values, "
    "Tensor? mask, Tensor? start, SymInt length, float scale, int[] key_format, int[] value_format, "
    "float softcap=0.0, Tensor? sink_logits=None) -> Tensor",
)
_library.define(
    "attend_lse(Tensor query, Tensor? new_keys, Tensor? new_values, Tensor[] keys, Tensor[] values, "
    "Tensor? mask, Tensor? start, SymInt length, float scale, int[] key_format, int[] value_format, "
    "float softcap=0.0, Tensor? sink_logits=None) -> (Tensor, Tensor)",
)
_library.define("dequantize(Tensor[] cached, Tensor? start, SymInt length, int[] format) -> Tensor")


def _live(start: Tensor | None, length: int) -> int:
    return length if start is None else int(start)


def _quantize_pack(
    x: Tensor, mask: Tensor | None, format: list[int], hint: Tensor | None = None
) -> list[Tensor]:
    """Buffers of a growing cache holding the tokens x [B, H, L, D]; reads x once.

    `mask` is the attention mask of the step that made the tokens: what its last row hides is
    padding and does not widen any group. `hint` is what an order of channels comes from where the format
    has one: the order itself, [H, D] or [B, H, D], if it is the plan's, and the queries of the step,
    [B, Hq, L, D], if it is the prompt's or a tile's.

    Raises:
        FormatError: the plan's order is missing, or is none of this head.
    """
    fmt = TensorFormat.decode(format)
    B, H, L, D = x.shape
    tiles, slots = layout.growing_tiles(fmt, L), layout.growing_slots(fmt, L)
    cached = allocate(B, H, D, tiles, slots, fmt, x.dtype, x.device)
    cached.take_order(hint)
    query = hint if fmt.asks_queries else None
    storage.append(cached, x, storage.valid_tokens(mask, B), 0, query)
    return list(cached.tensors)


def _append_(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    new_keys: Tensor,
    new_values: Tensor,
    mask: Tensor | None,
    start: Tensor | None,
    length: int,
    key_format: list[int],
    value_format: list[int],
    query: Tensor | None = None,
) -> None:
    """Append the tokens `new_keys`, `new_values` [B, H, Lq, D] in place and flush what left the window.

    `query`: the step's queries, [B, Hq, Lq, D], for formats that choose an order of channels from them.

    Raises:
        CapacityError: the buffers are too small, or with `start` given the capacity `length` is; nothing has
            been written.
    """
    live, count = _live(start, length), new_keys.shape[2]
    if start is not None and live + count > length:
        raise CapacityError.exceeded(count, live, length)
    both = Cached.of(keys, key_format), Cached.of(values, value_format)
    for cached in both:
        layout.check_room(cached.format, cached.qdata.shape[2], cached.residual.shape[2], live, count)
    # only a flush asks which tokens are padding, and a sum of queries
    asks = any(c.format.packed_tiles(live + count) > c.format.packed_tiles(live) for c in both)
    asks = asks or both[0].seen is not None
    valid = storage.valid_tokens(mask, new_keys.shape[0]) if asks else None
    storage.append(both[0], new_keys, valid, live, query)
    storage.append(both[1], new_values, valid, live)


def _attention(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The op `attend` by a function with the signature of `reference.attention.attend`; so `attend_lse`."""

    def attend(
        query: Tensor,
        new_keys: Tensor | None,
        new_values: Tensor | None,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        mask: Tensor | None,
        start: Tensor | None,
        length: int,
        scale: float,
        key_format: list[int],
        value_format: list[int],
        softcap: float = 0.0,
        sink_logits: Tensor | None = None,
    ) -> Any:
        k, v = Cached.of(keys, key_format), Cached.of(values, value_format)
        live = _live(start, length)
        return implementation(query, new_keys, new_values, k, v, mask, live, scale, softcap, sink_logits)

    return attend


_attend = _attention(attention.attend)
_attend_lse = _attention(attention.attend_lse)


def _dequantize(cached: Sequence[Tensor], start: Tensor | None, length: int, format: list[int]) -> Tensor:
    """All tokens as numbers, [B, H, length, D] in the model dtype; zeros beyond the live ones."""
    live, one = _live(start, length), Cached.of(cached, format)
    tokens = storage.read(one, 0, live, live).to(one.residual.dtype)
    if live == length:
        # a read of raw tokens alone is a view, and an op may not return a view of its input
        return (
            tokens.clone(memory_format=torch.contiguous_format) if tokens._is_view() else tokens.contiguous()
        )
    full = one.residual.new_zeros(*one.residual.shape[:2], length, one.head_dim)
    full[:, :, :live] = tokens
    return full


def _fake_quantize_pack(
    x: Tensor, mask: Tensor | None, format: list[int], hint: Tensor | None = None
) -> list[Tensor]:
    fmt = TensorFormat.decode(format)
    B, H, L, D = x.shape
    tiles = layout.growing_tiles(fmt, L, torch.sym_max)
    slots = layout.growing_slots(fmt, L, torch.sym_max)
    return [x.new_empty((B, H, *size), dtype=dtype) for size, dtype in shapes(fmt, D, tiles, slots, x.dtype)]


def _fake_append_(*args: object) -> None:
    return None


def _fake_attend(
    query: Tensor,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    mask: Tensor | None,
    start: Tensor | None,
    length: int,
    scale: float,
    key_format: list[int],
    value_format: list[int],
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    # not `Cached.of`: a trace asks this often, and the buffers were checked when they were made
    return query.new_empty((*query.shape[:3], values[RESIDUAL].shape[3]))


def _fake_attend_lse(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _fake_attend(query, *args).to(dtype), query.new_empty(query.shape[:3], dtype=dtype)


def _fake_dequantize(
    cached: Sequence[Tensor], start: Tensor | None, length: int, format: list[int]
) -> Tensor:
    residual = Cached.of(cached, format).residual
    return residual.new_empty((*residual.shape[:2], length, residual.shape[3]))


def _takes_float64(args: Sequence[object]) -> bool:
    # of buffers the raw tokens tell
    flat = (a[RESIDUAL] if isinstance(a, (list, tuple)) and len(a) > RESIDUAL else a for a in args)
    return any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in flat)


def compile_ahead(op: Any, args: tuple[Any, ...]) -> None:
    """Begin to compile the kernels of a call to come, beside what goes on; nothing where it has none.

    `op` is `attend`, `attend_lse` or `append_`, `args` its arguments, whose tensors are fake.
    """
    name = op._schema.name.removeprefix(f"{NAMESPACE}::")
    on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in args)
    if not on_gpu or not _USE_TRITON or _takes_float64(args):
        return
    try:
        launchers, ahead = (
            import_module(f"kvmix_kernels.triton.{part}") for part in (_modules[name], "ahead")
        )
    except ImportError:
        return  # the call itself says so
    ahead.start(getattr(launchers, name), args)


def _on_cuda(name: str, module: str, reference: Callable[..., object]) -> Callable[..., object]:
    """The Triton implementation of an op, imported when it is first called. No kernel takes float64."""

    def call(*args: object) -> object:
        if not _USE_TRITON or _takes_float64(args):
            return reference(*args)
        implementation = _cuda.get(name)
        if implementation is None:
            try:
                implementation = getattr(import_module(f"kvmix_kernels.triton.{module}"), name)
            except ImportError as missing:
                # not every machine has it
                warnings.warn(
                    f"{missing}: packed caches on CUDA take the slow reference; install triton", stacklevel=2
                )
                implementation = reference
            _cuda[name] = implementation
        return implementation(*args)

    return call


_cuda: dict[str, Callable[..., object]] = {}
_modules: dict[str, str] = {}
# name, meaning, fake, and the module of `kvmix_kernels.triton` that has its launcher
for _name, _reference, _fake, _module in (
    ("quantize_pack", _quantize_pack, _fake_quantize_pack, "storage"),
    ("append_", _append_, _fake_append_, "storage"),
    ("attend", _attend, _fake_attend, "attention"),
    ("attend_lse", _attend_lse, _fake_attend_lse, "attention"),
    ("dequantize", _dequantize, _fake_dequantize, "reading"),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)
    _library.impl(_name, _on_cuda(_name, _module, _reference), "CUDA")
    _modules[_name] = _module

_library.impl("attend", _attention(cpu_attention.attend), "CPU")
_library.impl("attend_lse", _attention(cpu_attention.attend_lse), "CPU")

quantize_pack = torch.ops.kvmix.quantize_pack.default
append_ = torch.ops.kvmix.append_.default
attend = torch.ops.kvmix.attend.default
attend_lse = torch.ops.kvmix.attend_lse.default
dequantize = torch.ops.kvmix.dequantize.default


def peak(x: Tensor) -> Tensor:
    """The size of the largest finite element, float32 []; 0 without any."""
    if not x.numel():
        return x.new_zeros((), dtype=torch.float32)
    return torch.where(x.isfinite(), x, 0).abs().amax().float()


def default_scale(head_dim: int) -> float:
    """SDPA's scale when none is given."""
    return 1.0 / math.sqrt(head_dim)
