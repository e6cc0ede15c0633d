"""transformers: cache classes for generate(), and what a compiled model does before each call.

A DynamicCache needs nothing: its plain layers are packed by the graph on their first step, and
every cache method then works on packed tensors. A StaticCache would allocate 16-bit buffers, so
its full-attention layers are exchanged for packed ones before they do.

On CUDA, generate() gets a packed cache of fixed capacity unless it is told otherwise: only such a cache
lets decode steps be replayed as CUDA graphs.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache, StaticLayer
from transformers.generation.configuration_utils import GenerationMode

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.errors import CacheShapeError, CapacityError, ModelInputError, PlanMismatchError
from kvmix_fx.integrations import Hooks
from kvmix_fx.parallel import kv_heads_here
from kvmix_fx.passes import replay
from kvmix_fx.passes.shortcut import Shortcut
from kvmix_fx.plan import KVPlan, LayerPlan


class KVMixDynamicLayer(DynamicLayer):
    """A growing layer that packs its first tokens itself when no compiled graph does."""

    def __init__(self, layer_plan: LayerPlan) -> None:
        """Start empty."""
        super().__init__()
        self.layer_plan = layer_plan

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, Hkv, n, D]; the first tokens are returned exact."""
        if torch.compiler.is_compiling() or self.get_seq_length() > 0:
            return super().update(key_states, value_states, *args, **kwargs)
        self.lazy_initialization(key_states, value_states)
        key_format, value_format = self.layer_plan.formats(key_states.shape[-1])
        self.keys = QuantizedKVTensor.from_hp(key_states, key_format)
        self.values = QuantizedKVTensor.from_hp(value_states, value_format)
        return key_states, value_states

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = None
        self.is_initialized = False


class KVMixCache(DynamicCache):
    """A growing packed cache, for `generate(past_key_values=...)` on a compiled or plain model."""

    def __init__(self, plan: KVPlan, config: Any) -> None:
        """`config`: the model's; layers that are no full attention keep their own kind."""
        plan = plan.for_model(config)
        super().__init__(config=config)
        self.plan = plan
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer and not plan.layers[i].is_raw:
                self.layers[i] = KVMixDynamicLayer(plan.layers[i])


class PromptFirstStaticLayer(StaticLayer):
    """A plain layer of fixed capacity whose first step attends to its own tokens only.

    transformers' StaticLayer attends to all of its slots, empty ones included. Packed layers do
    not, and layers that share a mask must agree.
    """

    keys: Any
    values: Any
    cumulative_length: Any

    def __init__(self, max_cache_len: int) -> None:
        """`max_cache_len`: capacity in tokens."""
        super().__init__(max_cache_len)
        # a plain bool: the first step runs another graph anyway
        self.has_tokens = False
        # tokens stored, known without asking the device
        self.host_length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store [B, Hkv, n, D]. The first tokens are returned themselves, so prefill is exact."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n = key_states.shape[-2]
        positions = torch.arange(n, device=self.device)
        if self.has_tokens:
            # the pass sees that a first step starts at 0, and appends without asking the device
            positions = positions + self.cumulative_length
        self.keys.index_copy_(2, positions, key_states)
        self.values.index_copy_(2, positions, value_states)
        self.cumulative_length.add_(n)
        if not self.has_tokens:
            self.has_tokens = True
            return key_states, value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of the attention mask."""
        # not max_cache_len: compilers take an attribute for a constant, and a size for a size
        return (self.keys.shape[2] if self.has_tokens else query_length), 0

    def get_seq_length(self) -> Any:
        """Tokens stored: 0 for an empty cache, else a tensor on the device."""
        # a number, so that the first step's mask and positions depend on no data
        return self.cumulative_length if self.has_tokens else 0

    def enlarge(self, capacity: int) -> None:
        """Make room for `capacity` tokens, keeping those stored."""
        if self.is_initialized:
            self.keys, self.values = (self._enlarged(x, capacity) for x in (self.keys, self.values))
        self.max_cache_len = capacity

    def _enlarged(self, x: Any, capacity: int) -> Any:
        larger = x.new_zeros(*x.shape[:2], capacity, x.shape[3])
        larger[:, :, : x.shape[2]] = x
        return larger

    def reset(self) -> None:
        """Forget all tokens, keep the buffers."""
        super().reset()
        self.has_tokens = False
        self.host_length = 0


class KVMixStaticLayer(PromptFirstStaticLayer):
    """A layer of fixed capacity whose keys and values are packed from the first token on."""

    is_croppable = True

    def __init__(self, max_cache_len: int, layer_plan: LayerPlan) -> None:
        """`max_cache_len`: capacity in tokens."""
        super().__init__(max_cache_len)
        self.layer_plan = layer_plan

    def lazy_initialization(
        self, key_states: Tensor, value_states: Tensor, live: Tensor | None = None
    ) -> None:
        """Allocate the buffers; shapes come from the first keys and values [B, Hkv, n, D].

        `live`: the counter of the other layers of the cache, to be shared.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        key_format, value_format = self.layer_plan.formats(self.k_head_dim)
        if live is None:
            live = torch.zeros((), dtype=torch.int64, device=self.device)
        shape = (self.batch_size, self.num_heads, self.max_cache_len)
        self.keys = QuantizedKVTensor.empty_fixed(
            *shape, self.k_head_dim, key_format, self.dtype, self.device, live
        )
        self.values = QuantizedKVTensor.empty_fixed(
            *shape, self.v_head_dim, value_format, self.dtype, self.device, live
        )
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.is_initialized = True

    def reset(self) -> None:
        """Forget all tokens, keep the buffers."""
        forget([self])

    def _enlarged(self, x: QuantizedKVTensor, capacity: int) -> QuantizedKVTensor:
        return x.enlarged(capacity)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `tokens_to_remove` (negative, as transformers passes it) tokens."""
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        stored = int(self.cumulative_length)
        length = tokens_to_remove if tokens_to_remove > 0 else max(0, stored + tokens_to_remove)
        if length >= stored:
            return
        for tensor in (self.keys, self.values):
            tensor.rewind_(length, stored)
            tensor.live.fill_(length)
        self.cumulative_length.fill_(length)
        self.host_length = length
        self.has_tokens = length > 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        self.keys, self.values = (t.repeat_interleave(repeats, dim=0) for t in (self.keys, self.values))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows."""
        self.keys, self.values = self.keys[indices, ...], self.values[indices, ...]


class KVMixStaticCache(StaticCache):
    """A packed cache of fixed capacity, for `generate(past_key_values=...)`."""

    def __init__(self, plan: KVPlan, config: Any, max_cache_len: int) -> None:
        """`max_cache_len`: capacity in tokens. Buffers are allocated at the first call."""
        plan = plan.for_model(config)
        super().__init__(config=config, max_cache_len=max_cache_len)
        self.plan = plan
        self.one_full_row = False
        self.grows = False
        pack_static_layers(self, plan)

    @property
    def is_compileable(self) -> bool:
        """Whether generate() should build the whole mask of a step, as it does for caches of fixed capacity.

        One sequence without padding needs none: attention ends with the last token stored.
        """
        # not by super(), in which older Dynamo does not find a property
        return not self.one_full_row and all(layer.is_compileable for layer in self.layers)

    @classmethod
    def over(cls, plan: KVPlan, layers: list[Any]) -> KVMixStaticCache:
        """An empty cache of layers that were another's."""
        cache = cls.__new__(cls)
        Cache.__init__(cache, layers=layers)
        cache.plan = plan
        cache.grows = False
        cache.reset()
        return cache

    def enlarge(self, capacity: int) -> None:
        """Make room for `capacity` tokens, keeping those stored. No effect on a cache that has it.

        Nor on one with a sliding layer that is smaller than its window because the cache is.
        """
        own = _capacity(self.layers)
        others: list[Any] = [x for x in self.layers if not isinstance(x, PromptFirstStaticLayer)]
        if capacity > own and all(layer.max_cache_len < own for layer in others):
            for layer in _fixed_layers(self):
                layer.enlarge(capacity)

    def reset(self) -> None:
        """Forget all tokens, keep the buffers."""
        self.one_full_row = False
        packed = [layer for layer in self.layers if isinstance(layer, KVMixStaticLayer)]
        forget(packed)
        for layer in self.layers:
            if not isinstance(layer, KVMixStaticLayer):
                layer.reset()


def forget(layers: list[KVMixStaticLayer]) -> None:
    """Empty packed layers, in few launches.

    Codes and scales beyond the live length are never used and always finite; raw tokens may be NaN, which
    a mask does not stop.
    """
    counters: dict[int, Tensor] = {}
    raw: list[Tensor] = []
    for layer in layers:
        layer.has_tokens = False
        layer.host_length = 0
        counters[id(layer.cumulative_length)] = layer.cumulative_length
        if layer.is_initialized:
            for tensor in (layer.keys, layer.values):
                counters[id(tensor.live)] = tensor.live
                raw.append(tensor.residual)
    for tensors in (list(counters.values()), raw):
        if tensors:
            torch._foreach_zero_(tensors)


def pack_static_layers(cache: Cache, plan: KVPlan) -> None:
    """Exchange the plain full-attention layers of a StaticCache for packed ones.

    Tokens they already hold are kept. Layers the plan keeps at 16 bits stay plain.
    """
    for i, layer in enumerate(cache.layers):
        if type(layer) is not StaticLayer:
            continue
        new = (
            PromptFirstStaticLayer(layer.max_cache_len)
            if plan.layers[i].is_raw
            else KVMixStaticLayer(layer.max_cache_len, plan.layers[i])
        )
        stored = int(layer.cumulative_length)
        if layer.is_initialized and stored:
            keys, values = layer.keys, layer.values
            assert keys is not None
            assert values is not None
            new.update(keys[:, :, :stored], values[:, :, :stored])
            new.host_length = stored
        cache.layers[i] = new


class InsideGenerate(threading.local):
    """Whether this thread is inside generate(), and between two single tokens of it."""

    calls = 0
    steady = False


class TransformersCalls:
    """What a compiled transformers model does before each forward."""

    def __init__(self, model: PreTrainedModel, plan: KVPlan, shortcut: Shortcut) -> None:
        """Keep what the checks need."""
        self.model, self.plan, self.shortcut = model, plan, shortcut
        self.inside = InsideGenerate()
        self._checked: weakref.ref[Cache] | None = None

    def prepare(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Callable[[], None]]:
        """Check the inputs and bring the cache into the form the graph expects.

        Raises:
            ModelInputError: no tokens. CapacityError: a fixed cache is too small; nothing was written.
            CacheShapeError, PlanMismatchError: the cache belongs to another batch, dtype, device or plan.
        """
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds", args[0] if args else None)
        if not isinstance(tokens, Tensor):
            return args, kwargs, _nothing
        batch, n = tokens.shape[:2]
        if batch == 0 or n == 0:
            raise ModelInputError(f"input of shape {list(tokens.shape)} holds no tokens; pass at least one")
        if n == 1:
            # a slice of a longer row brings its place in it into the graph, another one in every step
            args = tuple(_own(x) for x in args)
            kwargs.update(
                (name, _own(kwargs[name])) for name in ("input_ids", "position_ids") if name in kwargs
            )
        # else the first prompt's length would be compiled in, and the second would recompile; likewise a
        # cache's capacity, by way of masks [B, 1, n, capacity]
        _mark_length(tokens)
        _mark_length(kwargs.get("position_ids"))
        masks = kwargs.get("attention_mask")
        for mask in masks.values() if isinstance(masks, dict) else (masks,):
            _mark_length(mask)
            _mark_length(mask, -1)
        cache = kwargs.get("past_key_values")
        if n > 1 and _is_empty(cache) and _hides_nothing(kwargs.get("attention_mask"), n):
            # the graph can not look; without a mask, prefill takes the fastest attention
            kwargs["attention_mask"] = None
        if isinstance(cache, KVMixStaticCache):
            self._drop_mask_of_one_row(cache, kwargs, batch)
        steady = self.inside.steady
        self.inside.steady = self.inside.calls > 0 and n == 1
        if not isinstance(cache, Cache):
            return args, kwargs, _nothing
        checked = self._checked is not None and self._checked() is cache
        if steady and checked and not args and self.shortcut.serves(kwargs):
            # the same layers with the same tensors as a step ago
            fixed = _fixed_layers(cache)
            _check_room(fixed, n)
            return args, kwargs, _advance(fixed, n)
        fixed = self._prepare_cache(cache, batch, n)
        self._checked = weakref.ref(cache)
        if any(not layer.has_tokens for layer in fixed):
            # generate() built the mask for a plain StaticCache, which attends to all of its slots;
            # the first step of a packed one attends to its own tokens
            kwargs["attention_mask"] = _first_columns(kwargs.get("attention_mask"), n)
        elif fixed and kwargs.get("position_ids") is not None:
            # without positions some models count the mask
            kwargs["attention_mask"] = _to_capacity(kwargs.get("attention_mask"), fixed[0].max_cache_len)
        return args, kwargs, _advance(fixed, n)

    def _drop_mask_of_one_row(self, cache: KVMixStaticCache, kwargs: dict[str, Any], batch: int) -> None:
        """Keep account of whether the cache is one sequence without padding; such a step has no mask."""
        mask = kwargs.get("attention_mask")
        empty = _is_empty(cache)
        if batch != 1 or not (empty or cache.one_full_row):
            cache.one_full_row = False
        elif mask is None:
            cache.one_full_row = True
        elif not empty and self.inside.calls and isinstance(mask, Tensor) and mask.dim() == 2:
            # between its single tokens generate() itself adds ones to the mask; else look, and wait for it
            cache.one_full_row = self.inside.steady or _hides_nothing(mask, mask.shape[1])
            if cache.one_full_row:
                kwargs["attention_mask"] = None
        else:
            cache.one_full_row = False

    def _prepare_cache(self, cache: Cache, batch: int, n: int) -> list[PromptFirstStaticLayer]:
        """The layers of fixed capacity, checked, allocated and with room for n tokens."""
        plan = getattr(cache, "plan", None)
        for layer, layer_plan in zip(cache.layers, self.plan.layers, strict=False):
            if layer_plan.is_raw and isinstance(layer, DynamicLayer):
                # packed layers grow without recompiling; plain ones beside them must not spoil that
                _mark_length(layer.keys, 2)
                _mark_length(layer.values, 2)
        if plan is not None and plan.digest != self.plan.digest:
            raise PlanMismatchError(
                f"this cache was made for {plan!r}, the model was compiled with {self.plan!r}: make the "
                "cache from the plan given to kvmix_fx.compile"
            )
        if isinstance(cache, StaticCache) and self.plan.geometry is not None:
            pack_static_layers(cache, self.plan)
        fixed = _fixed_layers(cache)
        live: Tensor | None = None
        _check_room(fixed, n)
        for layer in fixed:
            if not layer.is_initialized:
                geometry = self.plan.geometry
                assert geometry is not None
                empty = torch.empty(
                    (batch, kv_heads_here(self.model, geometry), 0, geometry.head_dim),
                    dtype=self.model.dtype,
                    device=self.model.device,
                )
                if isinstance(layer, KVMixStaticLayer):
                    # one counter for all layers: a step then updates one number
                    layer.lazy_initialization(empty, empty, live)
                    live = layer.keys.live
                else:
                    layer.lazy_initialization(empty, empty)
        self._check_packed(cache, batch)
        return fixed

    def _check_packed(self, cache: Cache, batch: int) -> None:
        checked = False
        for layer in cache.layers:
            for name in ("keys", "values"):
                tensor = getattr(layer, name, None)
                if not isinstance(tensor, QuantizedKVTensor):
                    continue
                if tensor._is_view():
                    # slicing makes autograd views, which Dynamo would trace together with their base
                    setattr(layer, name, tensor.alias())
                if checked:
                    continue
                checked = True
                mine = (batch, self.model.dtype, self.model.device)
                theirs = (tensor.shape[0], tensor.dtype, tensor.device)
                if mine != theirs:
                    raise CacheShapeError(
                        f"the model gets (batch, dtype, device) {mine}, the cache holds {theirs}: continue "
                        "with the batch the cache was filled with, or start a new cache"
                    )


class GenerationCaches:
    """Packed caches of fixed capacity for generate(), used again when their user has dropped them."""

    def __init__(self, model: PreTrainedModel, plan: KVPlan) -> None:
        """Start without caches."""
        self._model, self._plan = model, plan
        self._free: dict[int, list[Any]] = {}

    def new(self, batch: int, capacity: int) -> KVMixStaticCache:
        """An empty cache of `capacity` tokens at least.

        The layers of a dropped cache of the same batch size are emptied and used again if they are large
        enough; their addresses are the same, so a recorded step is still good. Else they make room.
        """
        capacity = _in_steps(capacity)
        dropped = self._free.pop(batch, None)
        if dropped is not None and _capacity(dropped) >= capacity:
            cache = KVMixStaticCache.over(self._plan, dropped)
        else:
            cache = KVMixStaticCache(self._plan, self._model.config, capacity)
        # nobody chose its capacity, so nobody expects it to end there when a conversation goes on
        cache.grows = True
        # runs when nobody holds the cache any more; until then its tokens are its user's
        weakref.finalize(cache, self._keep, batch, cache.layers)
        return cache

    def _keep(self, batch: int, layers: list[Any]) -> None:
        self._free.pop(batch, None)
        self._free[batch] = layers
        while len(self._free) > replay.MAX_ENTRIES:
            # the one that has not been used for longest
            del self._free[next(iter(self._free))]


CAPACITY_STEP = 256
"""Capacities that nobody chose are multiples of this many tokens: prompts of similar length share a cache."""


def transformers_hooks(model: PreTrainedModel, plan: KVPlan, shortcut: Shortcut) -> Hooks:
    """The hooks of a transformers model."""
    attributes: dict[str, Any] = {}
    if hasattr(model, "get_compiled_call"):
        # on accelerators generate() would compile a second time, around this and with another backend
        def already_compiled(_config: Any = None) -> Callable[..., Any]:
            return model.__call__

        attributes["get_compiled_call"] = already_compiled
    calls = TransformersCalls(model, plan, shortcut)
    inside = calls.inside
    if isinstance(model, GenerationMixin):
        attributes["_prepare_cache_for_generation"] = _fixed_caches(model, plan)
        generate: Any = model.generate

        @functools.wraps(generate)
        def counted(*args: Any, **kwargs: Any) -> Any:
            inside.calls += 1
            inside.steady = False
            try:
                return generate(*args, **kwargs)
            finally:
                inside.calls -= 1
                inside.steady = False
                shortcut.forget()

        attributes["generate"] = counted
    return Hooks(calls.prepare, attributes, lambda: inside.calls > 0)


def _fixed_caches(model: PreTrainedModel, plan: KVPlan) -> Callable[..., Any]:
    """`model._prepare_cache_for_generation`, with a packed cache of fixed capacity where one serves."""
    caches = GenerationCaches(model, plan)
    original: Any = model._prepare_cache_for_generation

    def prepare(
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        serves = (
            model.device.type in replay.REPLAY_DEVICES
            and len(set(getattr(model, "hf_device_map", {}).values())) <= 1
            and plan.geometry is not None
            and getattr(model, "_can_compile_fullgraph", False)
            and generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
            and generation_config.cache_implementation is None
            and generation_config.use_cache is not False
            and model_kwargs.get("past_key_values") is None
            and not generation_config.is_assistant
        )
        past = model_kwargs.get("past_key_values")
        if isinstance(past, KVMixStaticCache) and past.grows:
            past.enlarge(_in_steps(max_cache_length))
        if serves:
            rows = batch_size * max(1, generation_config.num_return_sequences)
            model_kwargs["past_key_values"] = caches.new(rows, max_cache_length)
            return None
        return original(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)

    return prepare


def _nothing() -> None:
    return None


def _fixed_layers(cache: Cache) -> list[PromptFirstStaticLayer]:
    return [layer for layer in cache.layers if isinstance(layer, PromptFirstStaticLayer)]


def _capacity(layers: list[Any]) -> int:
    return min((x.max_cache_len for x in layers if isinstance(x, PromptFirstStaticLayer)), default=0)


def _in_steps(capacity: int) -> int:
    return -(-capacity // CAPACITY_STEP) * CAPACITY_STEP


def _check_room(fixed: list[PromptFirstStaticLayer], n: int) -> None:
    for layer in fixed:
        if layer.host_length + n > layer.max_cache_len:
            raise CapacityError.exceeded(n, layer.host_length, layer.max_cache_len)


def _advance(fixed: list[PromptFirstStaticLayer], n: int) -> Callable[[], None]:
    """What to do after a step of n tokens."""

    def finish() -> None:
        for layer in fixed:
            layer.host_length += n

    return finish


def _own(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) and x.storage_offset() else x


def _mark_length(x: Any, dim: int = 1) -> None:
    if isinstance(x, Tensor) and x.dim() > abs(dim) and x.shape[dim] > 1:
        torch._dynamo.maybe_mark_dynamic(x, dim % x.dim())


def _is_empty(cache: Any) -> bool:
    return cache is None or (
        isinstance(cache, Cache)
        and all(
            not (
                layer.has_tokens
                if isinstance(layer, PromptFirstStaticLayer)
                else getattr(layer, "is_initialized", True)
            )
            for layer in cache.layers
        )
    )


def _hides_nothing(mask: Any, n: int) -> bool:
    """Whether a mask is a tensor [B, n] without padding. Waits for the device."""
    return isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == n and bool(mask.all())


def _to_capacity(mask: Any, capacity: int) -> Any:
    """A mask [B, stored] with a column for every token there is room for, as transformers extends it.

    All steps then have a mask of one shape, for one graph and one recording.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] >= capacity:
        return mask
    mask = torch.nn.functional.pad(mask, (0, capacity - mask.shape[1]))
    _mark_length(mask)
    return mask


def _first_columns(mask: Any, n: int) -> Any:
    if isinstance(mask, dict):
        return {name: _first_columns(m, n) if name == "full_attention" else m for name, m in mask.items()}
    return mask[..., :n] if isinstance(mask, Tensor) and mask.dim() == 4 else mask
