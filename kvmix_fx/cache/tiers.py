"""Packing keys and values that share a high tier of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvmix_fx.cache.growth import prepare_append
from kvmix_fx.cache.tensor import QuantizedKVTensor, fitting
from kvmix_kernels import layout
from kvmix_kernels.cached import Cached
from kvmix_kernels.layout import TensorFormat
from kvmix_kernels.ops import default_scale
from kvmix_kernels.tokens.ops import append_tiers_, pack_tiers


def pack(
    keys: Tensor,
    values: Tensor,
    formats: tuple[TensorFormat, TensorFormat],
    query: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    order: Tensor | None = None,
    scores: Tensor | None = None,
) -> tuple[QuantizedKVTensor, QuantizedKVTensor]:
    """Pack a prompt into two growing tensors with a high tier.

    Scales become float32 where those of a format do not have the range of the tokens.

    Args:
        keys: [B, Hkv, L, D].
        values: likewise.
        formats: of keys and of values, both with a high tier.
        query: the prompt's queries, [B, Hq, L, D]. Without them keys are not balanced, and policies that look
            at attention find all tokens alike.
        mask: of the prompt's attention; None is causal.
        scale: of scores; None for 1 / sqrt(D).
        softcap: bound of scores, 0 for none.
        order: the plan's order of channels, [Hkv, D], if it has one.
        scores: importance of the tokens, [B, Hkv, L], for the policy "oracle".

    Raises:
        HeadSizeError: heads of D channels cannot be packed so.
    """
    for x, fmt in ((keys, formats[0]), (values, formats[1])):
        layout.check_head_size(fmt, x.shape[3])
    key_format, value_format = fitting(keys, formats[0]), fitting(values, formats[1])
    buffers = pack_tiers(
        *(keys, values, query, mask, default_scale(keys.shape[3]) if scale is None else scale, softcap),
        *(key_format.encode(), value_format.encode(), order, scores),
    )
    count = len(key_format.buffer_names)
    packed = Cached(key_format, tuple(buffers[:count])), Cached(value_format, tuple(buffers[count:]))
    length = keys.shape[2]
    return QuantizedKVTensor(packed[0], length), QuantizedKVTensor(packed[1], length)


def append(
    keys: QuantizedKVTensor,
    values: QuantizedKVTensor,
    new_keys: Tensor,
    new_values: Tensor,
    mass: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> tuple[QuantizedKVTensor, QuantizedKVTensor]:
    """Growing tensors with a high tier, and the tokens [B, Hkv, n, D] after theirs.

    `mass`: what the op `attend_tiers` of the step returned beside its output; without it nobody has counted
    how much attention tokens got. `mask`: of the step.
    """
    assert keys.lease is not None
    assert values.lease is not None
    length, extra = keys.lease.length, new_keys.shape[2]
    k, k_store = prepare_append(keys.cached, keys.lease, extra)
    v, v_store = prepare_append(values.cached, values.lease, extra)
    slots, more = keys.cached.positions.shape[2], k.positions.shape[2] - keys.cached.positions.shape[2]
    if mass is not None and mass.shape[2] and more:
        # buffers have grown since it was counted, and with them the tier
        mass = torch.cat([pad(mass[:, :, :slots], (0, more)), mass[:, :, slots:]], 2)
    append_tiers_(
        *(k.tensors, v.tensors, new_keys.to(keys.dtype), new_values.to(values.dtype), mask, None, length),
        *(k.format.encode(), v.format.encode(), None, mass, 1.0),
    )
    return (
        QuantizedKVTensor(k, length + extra, store=k_store),
        QuantizedKVTensor(v, length + extra, store=v_store),
    )
