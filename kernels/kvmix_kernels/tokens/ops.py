"""The ops over tensors with a high tier: `torch.ops.kvmix.*_tiers`, in PyTorch over the plain ops.

Of CUDA tensors steps of few tokens have kernels, in `kvmix_kernels.triton.tiers`; all else is done here.
`keys` and `values` are the buffers of `TensorFormat.buffer_names`, those of the high tier included. The plain
ops take no such format; `dequantize_tiers` is there because `dequantize` is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvmix_kernels import layout, ops
from kvmix_kernels.cached import RESIDUAL, Cached, allocate, shapes
from kvmix_kernels.importance import policy_of
from kvmix_kernels.layout import TensorFormat
from kvmix_kernels.tokens import append, attend, prompt, read

_library = torch.library.Library(ops.NAMESPACE, "FRAGMENT")

_library.define(
    "pack_tiers(Tensor keys, Tensor values, Tensor? query, Tensor? mask, float scale, float softcap, "
    "int[] key_format, int[] value_format, Tensor? hint=None, Tensor? mass=None, "
    "Tensor? sink_logits=None, Tensor? lse=None) -> Tensor[]"
)
_library.define(
    "append_tiers_(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor new_keys, Tensor new_values, Tensor? mask, "
    "Tensor? start, SymInt length, int[] key_format, int[] value_format, Tensor? query, Tensor? mass, "
    "float scale, float softcap=0.0, Tensor? sink_logits=None, Tensor? lse=None) -> ()"
)
_library.define(
    "attend_tiers(Tensor query, Tensor? new_keys, Tensor? new_values, Tensor[] keys, Tensor[] values, "
    "Tensor? mask, Tensor? start, SymInt length, float scale, int[] key_format, int[] value_format, "
    "float softcap=0.0, Tensor? sink_logits=None) -> (Tensor, Tensor)"
)
_library.define(
    "attend_prompt(Tensor query, Tensor keys, Tensor values, float scale, bool grouped) -> (Tensor, Tensor)"
)
_library.define("dequantize_tiers(Tensor[] cached, Tensor? start, SymInt length, int[] format) -> Tensor")


def _pack_tiers(
    keys: Tensor,
    values: Tensor,
    query: Tensor | None,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    key_format: list[int],
    value_format: list[int],
    hint: Tensor | None = None,
    mass: Tensor | None = None,
    sink_logits: Tensor | None = None,
    lse: Tensor | None = None,
) -> list[Tensor]:
    """Buffers of growing caches, of keys and then of values, that hold a prompt [B, H, L, D].

    `hint`: the plan's order of channels, if it has one. `mass`: scores of the tokens, [B, H, L], for policies
    that look at neither attention nor keys. `sink_logits`: of a learned sink, [Hq]. `lse`: what
    `attend_prompt` tells. Without `query` nothing is balanced, and all tokens matter alike.
    """
    found = []
    for x, numbers in ((keys, key_format), (values, value_format)):
        fmt = TensorFormat.decode(numbers)
        B, H, L, D = x.shape
        tiles, slots = layout.growing_tiles(fmt, L), layout.growing_slots(fmt, L)
        found.append(allocate(B, H, D, tiles, slots, fmt, x.dtype, x.device))
    found[0].take_order(hint)
    rest = (mask, None, 0, query, mass, scale, softcap, sink_logits, lse)
    append.append(found[0], found[1], keys, values, *rest)
    return [*found[0].tensors, *found[1].tensors]


def _append_tiers_(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    new_keys: Tensor,
    new_values: Tensor,
    mask: Tensor | None,
    start: Tensor | None,
    length: int,
    key_format: list[int],
    value_format: list[int],
    query: Tensor | None,
    mass: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    both = Cached.of(keys, key_format), Cached.of(values, value_format)
    rest = (mask, start, length, query, mass, scale, softcap, sink_logits, lse)
    append.append(*both, new_keys, new_values, *rest)


def _attend_tiers(
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
) -> tuple[Tensor, Tensor]:
    both = Cached.of(keys, key_format), Cached.of(values, value_format)
    return attend.attend(query, new_keys, new_values, *both, mask, start, length, scale, softcap, sink_logits)


def _dequantize_tiers(
    cached: Sequence[Tensor], start: Tensor | None, length: int, format: list[int]
) -> Tensor:
    return read.dequantize(Cached.of(cached, format), start, length)


def _fake_pack_tiers(
    keys: Tensor,
    values: Tensor,
    _query: Tensor | None,
    _mask: Tensor | None,
    _scale: float,
    _softcap: float,
    key_format: list[int],
    value_format: list[int],
    *_: Tensor | None,
) -> list[Tensor]:
    found: list[Tensor] = []
    for x, numbers in ((keys, key_format), (values, value_format)):
        fmt = TensorFormat.decode(numbers)
        B, H, L, D = x.shape
        tiles = layout.growing_tiles(fmt, L, torch.sym_max)
        slots = layout.growing_slots(fmt, L, torch.sym_max)
        found += [
            x.new_empty((B, H, *size), dtype=dtype) for size, dtype in shapes(fmt, D, tiles, slots, x.dtype)
        ]
    return found


def _fake_attend_tiers(
    query: Tensor,
    new_keys: Tensor | None,
    _new_values: Tensor | None,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    _mask: Tensor | None,
    _start: Tensor | None,
    _length: int,
    _scale: float,
    key_format: list[int],
    *_: object,
) -> tuple[Tensor, Tensor]:
    k = Cached.of(keys, key_format)
    counted = 0
    if policy_of(k.format).decay:
        counted = k.positions.shape[2] + k.format.ring + (0 if new_keys is None else new_keys.shape[2])
    B, Hkv = k.residual.shape[:2]
    out = query.new_empty((*query.shape[:3], values[RESIDUAL].shape[3]))
    return out, query.new_empty((B, Hkv, counted), dtype=torch.float32)


def _fake_append_tiers_(*_: object) -> None:
    return None


for _name, _implementation, _fake in (
    ("pack_tiers", _pack_tiers, _fake_pack_tiers),
    ("append_tiers_", _append_tiers_, _fake_append_tiers_),
    ("attend_tiers", _attend_tiers, _fake_attend_tiers),
    ("attend_prompt", prompt.attend, prompt.fake_attend),
    ("dequantize_tiers", _dequantize_tiers, ops._fake_dequantize),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{ops.NAMESPACE}::{_name}", _fake, lib=_library)

# one device has kernels for a step
for _name, _implementation in (("append_tiers_", _append_tiers_), ("attend_tiers", _attend_tiers)):
    _library.impl(_name, ops._on_cuda(_name, "tiers", _implementation), "CUDA")

pack_tiers = torch.ops.kvmix.pack_tiers.default
append_tiers_ = torch.ops.kvmix.append_tiers_.default
attend_tiers = torch.ops.kvmix.attend_tiers.default
attend_prompt = torch.ops.kvmix.attend_prompt.default
dequantize_tiers = torch.ops.kvmix.dequantize_tiers.default


def dequantize(cached: Sequence[Tensor], start: Tensor | None, length: int, format: list[int]) -> Tensor:
    """The op that reads tensors of this format as numbers, with or without a high tier."""
    read_by = ops.dequantize if TensorFormat.decode(format).high is None else dequantize_tiers
    found: Tensor = read_by(cached, start, length, format)
    return found
