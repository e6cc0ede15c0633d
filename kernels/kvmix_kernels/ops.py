"""The ops `torch.ops.kvmix.*`: schemas, fakes and dispatch.

Imports torch only. Formats travel as `int[]` (a `layout.TensorFormat`), buffers one by one: keys
first (`k_qdata, k_scale, k_zero_point, k_residual`), then values. The number of live tokens is
either `length` (growing caches: the host knows it) or, when the 0-d int64 tensor `start` is
given, on the device (fixed caches), and `length` is then the cache's capacity.

`torch.library.Library` is used instead of `custom_op` because its dispatch costs a fraction
per call, and a decode step calls two ops per layer.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.cpu import attention as cpu_attention
from kvmix_kernels.errors import CapacityError
from kvmix_kernels.layout import TensorFormat
from kvmix_kernels.reference import attention, storage
from kvmix_kernels.reference.quantize import SCALE_DTYPES
from kvmix_kernels.reference.storage import Buffers

NAMESPACE = "kvmix"

_USE_TRITON = os.environ.get("KVMIX_KERNELS", "triton") != "reference"
"""CUDA tensors take the Triton kernels unless the environment says KVMIX_KERNELS=reference."""
_library = torch.library.Library(NAMESPACE, "DEF")

_K = "Tensor{0} k_qdata, Tensor{1} k_scale, Tensor{2} k_zero_point, Tensor{3} k_residual"
_V = "Tensor{4} v_qdata, Tensor{5} v_scale, Tensor{6} v_zero_point, Tensor{7} v_residual"
_READ = ", ".join((_K, _V)).format(*[""] * 8)
_WRITE = ", ".join((_K, _V)).format(*(f"({name}!)" for name in "abcdefgh"))

_library.define(
    "quantize_pack(Tensor x, Tensor? mask, int[] format) -> (Tensor, Tensor, Tensor, Tensor)",
)
_library.define(
    f"append_({_WRITE}, Tensor keys, Tensor values, Tensor? mask, Tensor? start, SymInt length, "
    "int[] key_format, int[] value_format) -> ()",
)
_library.define(
    f"attend(Tensor query, Tensor? new_keys, Tensor? new_values, {_READ}, Tensor? mask, Tensor? start, "
    "SymInt length, float scale, int[] key_format, int[] value_format, float softcap=0.0) -> Tensor",
)
_library.define(
    "dequantize(Tensor qdata, Tensor scale, Tensor zero_point, Tensor residual, Tensor? start, "
    "SymInt length, int[] format) -> Tensor",
)


def _live(start: Tensor | None, length: int) -> int:
    return length if start is None else int(start)


def _quantize_pack(
    x: Tensor, mask: Tensor | None, format: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Buffers of a growing cache holding the tokens x [B, H, L, D]; reads x once.

    `mask` is the attention mask of the step that made the tokens: what its last row hides is
    padding and does not widen any group.
    """
    fmt = TensorFormat(*format)
    B, H, L, D = x.shape
    tiles, slots = layout.growing_tiles(fmt, L), layout.growing_slots(fmt, L)
    buffers = storage.allocate(B, H, D, tiles, slots, fmt, x.dtype, x.device)
    storage.append(buffers, x, storage.valid_tokens(mask, B), 0, fmt)
    return tuple(buffers)


def _append_(
    k_qdata: Tensor,
    k_scale: Tensor,
    k_zero_point: Tensor,
    k_residual: Tensor,
    v_qdata: Tensor,
    v_scale: Tensor,
    v_zero_point: Tensor,
    v_residual: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    start: Tensor | None,
    length: int,
    key_format: list[int],
    value_format: list[int],
) -> None:
    """Append the tokens `keys`, `values` [B, H, Lq, D] in place and flush what left the window.

    Raises:
        CapacityError: the buffers are too small, or with `start` given the capacity `length` is; nothing has
            been written.
    """
    live = _live(start, length)
    if start is not None and live + keys.shape[2] > length:
        raise CapacityError.exceeded(keys.shape[2], live, length)
    formats = TensorFormat(*key_format), TensorFormat(*value_format)
    for fmt, qdata, residual in zip(formats, (k_qdata, v_qdata), (k_residual, v_residual), strict=True):
        layout.check_room(fmt, qdata.shape[2], residual.shape[2], live, keys.shape[2])
    # only a flush asks which tokens are padding
    flushes = any(f.packed_tiles(live + keys.shape[2]) > f.packed_tiles(live) for f in formats)
    valid = storage.valid_tokens(mask, keys.shape[0]) if flushes else None
    storage.append(Buffers(k_qdata, k_scale, k_zero_point, k_residual), keys, valid, live, formats[0])
    storage.append(Buffers(v_qdata, v_scale, v_zero_point, v_residual), values, valid, live, formats[1])


def _attend(
    query: Tensor,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    k_qdata: Tensor,
    k_scale: Tensor,
    k_zero_point: Tensor,
    k_residual: Tensor,
    v_qdata: Tensor,
    v_scale: Tensor,
    v_zero_point: Tensor,
    v_residual: Tensor,
    mask: Tensor | None,
    start: Tensor | None,
    length: int,
    scale: float,
    key_format: list[int],
    value_format: list[int],
    softcap: float = 0.0,
) -> Tensor:
    """Attention of `query` over the cache and the step's own tokens; see `reference.attention`."""
    return attention.attend(
        query,
        new_keys,
        new_values,
        Buffers(k_qdata, k_scale, k_zero_point, k_residual),
        Buffers(v_qdata, v_scale, v_zero_point, v_residual),
        mask,
        _live(start, length),
        scale,
        TensorFormat(*key_format),
        TensorFormat(*value_format),
        softcap,
    )


def _attend_cpu(
    query: Tensor,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    k_qdata: Tensor,
    k_scale: Tensor,
    k_zero_point: Tensor,
    k_residual: Tensor,
    v_qdata: Tensor,
    v_scale: Tensor,
    v_zero_point: Tensor,
    v_residual: Tensor,
    mask: Tensor | None,
    start: Tensor | None,
    length: int,
    scale: float,
    key_format: list[int],
    value_format: list[int],
    softcap: float = 0.0,
) -> Tensor:
    """`_attend` for CPU tensors; see `cpu.attention`."""
    return cpu_attention.attend(
        query,
        new_keys,
        new_values,
        Buffers(k_qdata, k_scale, k_zero_point, k_residual),
        Buffers(v_qdata, v_scale, v_zero_point, v_residual),
        mask,
        _live(start, length),
        scale,
        TensorFormat(*key_format),
        TensorFormat(*value_format),
        softcap,
    )


def _dequantize(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    residual: Tensor,
    start: Tensor | None,
    length: int,
    format: list[int],
) -> Tensor:
    """All tokens as numbers, [B, H, length, D] in the model dtype; zeros beyond the live ones."""
    live = _live(start, length)
    buffers = Buffers(qdata, scale, zero_point, residual)
    tokens = storage.read(buffers, 0, live, live, TensorFormat(*format)).to(residual.dtype)
    if live == length:
        # a read of raw tokens alone is a view, and an op may not return a view of its input
        return (
            tokens.clone(memory_format=torch.contiguous_format) if tokens._is_view() else tokens.contiguous()
        )
    full = residual.new_zeros(*residual.shape[:2], length, residual.shape[3])
    full[:, :, :live] = tokens
    return full


def _fake_quantize_pack(
    x: Tensor, mask: Tensor | None, format: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fmt = TensorFormat(*format)
    B, H, L, D = x.shape
    tiles = layout.growing_tiles(fmt, L, torch.sym_max)
    slots = layout.growing_slots(fmt, L, torch.sym_max)
    words = 0 if fmt.is_raw else layout.words_per_token(fmt.bits, D)
    grid = layout.scale_grid(fmt, D, tiles)
    stored = SCALE_DTYPES[fmt.scale_dtype]
    return (
        x.new_empty((B, H, tiles * fmt.tile, words), dtype=torch.int16),
        x.new_empty((B, H, *grid), dtype=stored),
        x.new_empty((B, H, *grid), dtype=stored),
        x.new_empty((B, H, slots, D)),
    )


def _fake_append_(*args: object) -> None:
    return None


def _fake_attend(query: Tensor, *args: object) -> Tensor:
    v_residual = args[9]
    assert isinstance(v_residual, Tensor)
    return query.new_empty((*query.shape[:3], v_residual.shape[3]))


def _fake_dequantize(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    residual: Tensor,
    start: Tensor | None,
    length: int,
    format: list[int],
) -> Tensor:
    return residual.new_empty((*residual.shape[:2], length, residual.shape[3]))


for _name, _reference, _fake in (
    ("quantize_pack", _quantize_pack, _fake_quantize_pack),
    ("append_", _append_, _fake_append_),
    ("attend", _attend, _fake_attend),
    ("dequantize", _dequantize, _fake_dequantize),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)

_library.impl("attend", _attend_cpu, "CPU")


def _on_cuda(name: str, reference: Callable[..., object]) -> Callable[..., object]:
    """The Triton implementation of an op, imported when it is first called. No kernel takes float64."""

    def call(*args: object) -> object:
        if not _USE_TRITON or any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args):
            return reference(*args)
        implementation = _cuda.get(name)
        if implementation is None:
            try:
                from kvmix_kernels import triton

                implementation = getattr(triton, name)
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
for _name, _reference in (
    ("quantize_pack", _quantize_pack),
    ("append_", _append_),
    ("attend", _attend),
    ("dequantize", _dequantize),
):
    _library.impl(_name, _on_cuda(_name, _reference), "CUDA")

quantize_pack = torch.ops.kvmix.quantize_pack.default
append_ = torch.ops.kvmix.append_.default
attend = torch.ops.kvmix.attend.default
dequantize = torch.ops.kvmix.dequantize.default


def default_scale(head_dim: int) -> float:
    """SDPA's scale when none is given."""
    return 1.0 / math.sqrt(head_dim)
