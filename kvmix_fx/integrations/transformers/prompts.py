"""A prompt that is not traced: the model as it is, and each layer packed as soon as it has been attended to.

Until a step has a history, nothing in it is rewritten: keys and values of a prompt are exact. So all that a
traced prompt adds is to pack them, by the queries and under the mask of their attention. Both are seen here
when attention is called. Tracing the same takes a large model 20 seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticSlidingWindowLayer

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.cache.orders import key_order
from kvmix_fx.cache.tensor import ranges_wider
from kvmix_fx.errors import NarrowScalesError, NarrowScalesWarning
from kvmix_fx.integrations.transformers.layers import (
    KVMixDynamicLayer,
    KVMixStaticLayer,
    PromptFirstStaticLayer,
    of_kind,
)
from kvmix_fx.parallel import process_group_size
from kvmix_fx.plan import KVPlan
from kvmix_kernels import layout, ops
from kvmix_kernels.cached import Cached
from kvmix_kernels.layout import TensorFormat

Packs = KVMixStaticLayer | KVMixDynamicLayer
_TAKES = (
    KVMixStaticLayer,
    PromptFirstStaticLayer,
    KVMixDynamicLayer,
    DynamicLayer,
    StaticSlidingWindowLayer,
    DynamicSlidingWindowLayer,
)
"""Kinds of layers that a prompt may be read into. Windows stay plain, as others may."""


def takes(model: Any, cache: Any, plan: KVPlan) -> bool:
    """Whether a plain prompt fills an empty cache as a traced one would: all attention is torch's own.

    Tiers of tokens need what each token was attended to, packed windows keep accounts of their own.
    """
    layers = getattr(cache, "layers", ())
    return (
        len(layers) == len(plan.layers)
        and all(type(layer) in _TAKES for layer in layers)
        and all(one.token_tier is None for one in plan.layers)
        and getattr(model.config, "_attn_implementation", None) == "sdpa"
    )


class PlainPrompt(TorchFunctionMode):
    """While it lasts, layers hand over their first tokens, and are packed after their attention."""

    def __init__(self, cache: Cache, plan: KVPlan, wide: Collection[tuple[int | None, int]] = ()) -> None:
        """`cache`: empty, and `takes` takes it. `wide`: layers and roles with scales of single precision."""
        super().__init__()
        self._pending: tuple[int, Tensor, Tensor] | None = None
        self._peaks: list[Tensor] = []
        self._about: list[tuple[int, int, TensorFormat]] = []
        self._cache, self._before = cache, list(cache.layers)
        for index, (layer, layer_plan) in enumerate(zip(self._before, plan.layers, strict=True)):
            if type(layer) is DynamicLayer and not layer_plan.is_raw:
                cache.layers[index] = KVMixDynamicLayer(layer_plan)
        self._layers = {index: layer for index, layer in enumerate(cache.layers) if isinstance(layer, Packs)}
        self._wide = wide

    def run(
        self,
        forward: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        meanwhile: Callable[[], None],
    ) -> Any:
        """What `forward` returns, the cache packed.

        `meanwhile`: called when a device has been given all it has to do, before it is waited for.

        Raises:
            NarrowScalesError: keys or values do not fit the planned scales; packed layers are empty again.
                With several processes that is a warning.
        """
        for layer in self._layers.values():
            layer.prompt = self
        try:
            with self:
                result = forward(*args, **kwargs)
            self._pack(None, None)
            meanwhile()
            self._check_ranges()
            self._own_windows()
        except BaseException:
            # whoever does the call again takes back what plain layers have got
            self._cache.layers[:] = self._before
            for layer in self._layers.values():
                layer.forget_prompt()
            raise
        finally:
            for layer in self._layers.values():
                # not None, which a graph would take for another kind of layer
                del layer.prompt
        return result

    def _own_windows(self) -> None:
        """Let go of the prompt, of which plain windows are a slice.

        As steps leave them, behind one token that has left: other strides take a graph of their own.
        """
        for layer in of_kind(self._cache.layers, DynamicSlidingWindowLayer):
            for name in ("keys", "values"):
                x = getattr(layer, name)
                if x.stride(1) > (x.shape[2] + 1) * x.shape[3]:
                    setattr(layer, name, torch.cat([x[:, :, :1], x], 2)[:, :, 1:])

    def take(self, layer: Packs, keys: Tensor, values: Tensor) -> None:
        """A layer's first tokens, [B, Hkv, n, D]: to be packed after their attention."""
        # of a layer before it whose attention is not torch's, and was seen by nobody
        self._pack(None, None)
        index = next(index for index, own in self._layers.items() if own is layer)
        self._pending = index, keys, values

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention and self._pending is not None:
            given = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
            # latents are stored as they are, whatever reads them
            known = given["key"].shape[2:] == self._pending[1].shape[2:]
            self._pack(*((given["query"], given.get("attn_mask")) if known else (None, None)))
        return result

    def _pack(self, query: Tensor | None, mask: Tensor | None) -> None:
        """Pack what is pending, if anything is."""
        if self._pending is None:
            return
        (index, keys, values), self._pending = self._pending, None
        layer = self._layers[index]
        if isinstance(layer, KVMixStaticLayer):
            both = layer.keys.format, layer.values.format
            more = (query,) if both[0].asks_queries and query is not None else ()
            ops.append_(
                *(layer.keys.cached.tensors, layer.values.cached.tensors, keys, values, mask, None, 0),
                *(both[0].encode(), both[1].encode(), *more),
            )
            for tensor in (layer.keys, layer.values):
                tensor.live.fill_(keys.shape[2])
        else:
            roles = [role for number, role in self._wide if number == index]
            own = layer.layer_plan.widened(roles)
            both = own.formats(keys.shape[3], values.shape[3])
            hint = query if both[0].asks_queries else None
            if both[0].order == layout.ORDER_PLAN:
                hint = key_order(own, keys.shape[1], keys.shape[3], keys.device)
            hints = ((hint,) if hint is not None else (), ())
            layer.keys, layer.values = (
                QuantizedKVTensor(
                    Cached(fmt, tuple(ops.quantize_pack(x, mask, fmt.encode(), *given))), x.shape[2]
                )
                for x, fmt, given in zip((keys, values), both, hints, strict=True)
            )
        for role, (x, fmt) in enumerate(zip((keys, values), both, strict=True)):
            if ranges_wider(x.dtype, fmt):
                self._peaks.append(ops.peak(x))
                self._about.append((index, role, fmt))

    def _check_ranges(self) -> None:
        peaks = torch.stack(self._peaks).tolist() if self._peaks else []
        found = [
            (*about[:2], peak)
            for about, peak in zip(self._about, peaks, strict=True)
            if not layout.holds(about[2], peak)
        ]
        if not found:
            return
        error = NarrowScalesError.of(found)
        # a prompt done again communicates again, and ranks, whose heads have their ranges, would not agree
        if process_group_size() == 1:
            raise error
        warnings.warn(str(error), NarrowScalesWarning, stacklevel=2)
