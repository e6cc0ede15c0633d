"""Cache layers: two that grow, one of them for a window, and two of fixed capacity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticIndexedLayer,
    StaticLayer,
)
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.cache.orders import key_order
from kvmix_fx.dynamo import mark_dimension
from kvmix_fx.errors import CacheMutationError
from kvmix_fx.plan import LayerPlan

OfKind = TypeVar("OfKind")


class Prompt(Protocol):
    """Who packs the first tokens of layers, once they have been attended to."""

    def take(self, layer: Any, keys: Tensor, values: Tensor) -> None:
        """A layer's first tokens [B, Hkv, n, D]."""


class KVMixDynamicLayer(DynamicLayer):
    """A growing layer that packs its first tokens itself when no compiled graph does."""

    prompt: Prompt | None = None

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
        if self.prompt is not None:
            self.prompt.take(self, key_states, value_states)
        else:
            self.keys, self.values = pack(self.layer_plan, key_states, value_states)
        return key_states, value_states

    def forget_prompt(self) -> None:
        """Forget the first tokens."""
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = None
        self.is_initialized = False


class KVMixSlidingLayer(DynamicLayer):
    """A growing layer of a sliding or chunked window, packed; whole tiles leave it at the front.

    A window of W tokens needs the last W - 1. The layer holds these, and up to a tile more; the model's mask
    hides what is too far away. Tokens leave between steps.
    """

    is_sliding = True
    is_croppable = True
    keys: Any
    values: Any

    def __init__(self, sliding_window: int, layer_plan: LayerPlan) -> None:
        """`sliding_window`: W, in tokens."""
        super().__init__()
        self.sliding_window = sliding_window
        self.layer_plan = layer_plan.in_window()
        self.record_past = False
        self.reset()

    @classmethod
    def over(cls, layer: DynamicSlidingWindowLayer, layer_plan: LayerPlan) -> KVMixSlidingLayer:
        """What holds the tokens of a layer of transformers' own, packed."""
        new = cls(layer.sliding_window, layer_plan)
        new.record_past = layer.record_past
        if layer.is_initialized and layer.cumulative_length:
            new._start(layer.keys, layer.values)
            if not isinstance(new.keys, QuantizedKVTensor):
                new.keys, new.values = pack(new.layer_plan, new.keys, new.values)
            new.count(layer.cumulative_length)
        return new

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, Hkv, n, D]; the first tokens are returned exact, what the window needs of them kept."""
        n = key_states.shape[-2]
        if self.is_initialized:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
        else:
            keys, values = key_states, value_states
            # no branch on the number of tokens, which a trace does not know; whole tiles, as ever
            far = 0 if self.record_past else torch.sym_max(0, n - self.sliding_window + 1)
            far = far // self.layer_plan.tile_length * self.layer_plan.tile_length
            self._start(key_states[:, :, far:], value_states[:, :, far:])
        if not torch.compiler.is_compiling():
            if not isinstance(self.keys, QuantizedKVTensor):
                self.keys, self.values = pack(self.layer_plan, self.keys, self.values)
            self.count(n)
        return keys, values

    def _start(self, keys: Any, values: Any) -> None:
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys, values
        self.is_initialized = True

    def count(self, n: int) -> None:
        """After `n` tokens were appended: let go of tiles that no later query sees."""
        self.host_length += n
        self._settle()

    def _settle(self) -> None:
        stored, tile = self.keys.shape[2], self.layer_plan.tile_length
        # what is packed ends at least a window of raw tokens before the last one
        needed = self.layer_plan.most_of_window(self.sliding_window) - tile + 1
        tiles = 0 if self.record_past else max(0, stored - needed) // tile
        if tiles and isinstance(self.keys, QuantizedKVTensor):
            room = needed + tile - 1
            self.keys, self.values = (x.without_front(tiles, room) for x in (self.keys, self.values))
            stored -= tiles * tile
        self._gone = _size(self.host_length - stored, self.device)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of the attention mask."""
        if not self.is_initialized:
            return query_length, 0
        return self.keys.shape[2] + query_length, self._gone.shape[0] - _OFFSET

    def get_seq_length(self) -> int:
        """Tokens that have been seen."""
        return self.keys.shape[2] + self._gone.shape[0] - _OFFSET if self.is_initialized else 0

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def activate_past_recording(self) -> None:
        """Keep what leaves the window until `crop` is called, which may bring it back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:  # type: ignore[override]
        """Remove the last `tokens_to_remove` (negative, as transformers passes it) tokens.

        Raises:
            CacheMutationError: tokens that the window would reach again have left the cache.
        """
        if not self.is_initialized:
            return
        length = self.host_length
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)
        kept = max(0, self.keys.shape[2] - remove)
        if remove and kept < min(length - remove, self.sliding_window - 1):
            raise CacheMutationError(
                f"tokens that a window of {self.sliding_window} would reach again have left the cache: call "
                "cache.activate_past_recording() before the steps that may be taken back"
            )
        if remove:
            self.keys, self.values = self.keys[:, :, :kept], self.values[:, :, :kept]
        self.host_length = length - remove
        recorded, self.record_past = self.record_past, False
        self._settle()
        self.record_past = recorded

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = None
        self.is_initialized = False
        self.host_length = 0
        self._gone = _size(0, "cpu")


_OFFSET = 2
"""Compilers take sizes of 0 and 1 for constants."""


def _size(number: int, device: Any) -> Tensor:
    """A number that changes from step to step, as a size: compilers take others for constants."""
    with torch.inference_mode(False):
        x = torch.empty(number + _OFFSET, 0, device=device)
    mark_dimension(x, 0)
    return x


def pack(layer_plan: LayerPlan, keys: Tensor, values: Tensor) -> tuple[QuantizedKVTensor, QuantizedKVTensor]:
    """The first keys and values [B, Hkv, n, D] of a growing layer, packed as planned."""
    key_format, value_format = layer_plan.formats(keys.shape[-1], values.shape[-1])
    order = key_order(layer_plan, keys.shape[1], keys.shape[-1], keys.device)
    return (
        QuantizedKVTensor.from_hp(keys, key_format, hint=order),
        QuantizedKVTensor.from_hp(values, value_format),
    )


class PromptFirstStaticLayer(StaticLayer):
    """A plain layer of fixed capacity whose first step attends to its own tokens only.

    transformers' StaticLayer attends to all of its slots, empty ones included. Packed layers do
    not, and layers that share a mask must agree.
    """

    keys: Any
    values: Any
    cumulative_length: Any
    prompt: Prompt | None = None

    def __init__(self, max_cache_len: int) -> None:
        """`max_cache_len`: capacity in tokens."""
        super().__init__(max_cache_len)
        # a plain bool: the first step runs another graph anyway
        self.has_tokens = False
        # tokens stored, known without asking the device
        self.host_length = 0
        # whether a step that failed has left less than it found
        self.interrupted = False

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store [B, Hkv, n, D]. The first tokens are returned themselves, so prefill is exact."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n = key_states.shape[-2]
        if self.prompt is not None and not self.has_tokens:
            self.prompt.take(self, key_states, value_states)
            self.cumulative_length.add_(n)
            self.has_tokens = True
            return key_states, value_states
        positions = torch.arange(n, device=self.device)
        if self.has_tokens:
            # the pass sees that a first step starts at 0, and appends without asking the device
            positions = positions + self.cumulative_length
        for tensor, states in ((self.keys, key_states), (self.values, value_states)):
            self._before_write(tensor)
            tensor.index_copy_(2, positions, states)
        self.cumulative_length.add_(n)
        if not self.has_tokens:
            self.has_tokens = True
            return key_states, value_states
        return self.keys, self.values

    def _before_write(self, tensor: Any) -> None:
        """What a packed layer does."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of the attention mask."""
        # not max_cache_len: compilers take an attribute for a constant, and a size for a size
        return (self.keys.shape[2] if self.has_tokens else query_length), 0

    def get_seq_length(self) -> Any:
        """Tokens stored: 0 for an empty cache, else a tensor on the device."""
        if not self.has_tokens:
            # a number, so that the first step's mask and positions depend on no data
            return 0
        # transformers counts windows by numbers, which writes that follow leave as they are
        return self.cumulative_length.clone() if self.is_sliding else super().get_seq_length()

    def enlarge(self, capacity: int) -> None:
        """Make room for `capacity` tokens, keeping those stored."""
        if self.is_initialized:
            self.keys, self.values = (self._enlarged(x, capacity) for x in (self.keys, self.values))
        self.max_cache_len = capacity

    def narrow(self, capacity: int) -> None:
        """Take `enlarge` back without asking for memory: room for `capacity` tokens, where it was."""
        if self.is_initialized:
            self.keys, self.values = (self._narrowed(x, capacity) for x in (self.keys, self.values))
        self.max_cache_len = capacity

    def take_back(self, n: int) -> None:  # noqa: ARG002
        """Forget a step of `n` tokens that was interrupted, whatever of it has been done."""
        if self.is_initialized:
            self.cumulative_length.fill_(self.host_length)
            self.has_tokens = self.host_length > 0

    def _enlarged(self, x: Any, capacity: int) -> Any:
        larger = x.new_zeros(*x.shape[:2], capacity, x.shape[3])
        larger[:, :, : x.shape[2]] = x
        return larger

    def _narrowed(self, x: Any, capacity: int) -> Any:
        return x[:, :, :capacity]

    def reset(self) -> None:
        """Forget all tokens, keep the buffers."""
        super().reset()
        self.has_tokens = False
        self.host_length = 0
        self.interrupted = False


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
        key_format, value_format = self.layer_plan.formats(self.k_head_dim, self.v_head_dim)
        if live is None:
            live = torch.zeros((), dtype=torch.int64, device=self.device)
        shape = (self.batch_size, self.num_heads, self.max_cache_len)
        order = key_order(self.layer_plan, self.num_heads, self.k_head_dim, self.device)
        self.keys = QuantizedKVTensor.empty_fixed(
            *shape, self.k_head_dim, key_format, self.dtype, self.device, live, order
        )
        self.values = QuantizedKVTensor.empty_fixed(
            *shape, self.v_head_dim, value_format, value_states.dtype, self.device, live
        )
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.is_initialized = True

    def _before_write(self, tensor: Any) -> None:
        # the tensors of a cache share a counter. In eager mode the first that is written moves it on, which
        # the others would take for a rollback of their own tokens
        if not torch.compiler.is_compiling():
            tensor.live.copy_(self.cumulative_length)

    def reset(self) -> None:
        """Forget all tokens, keep the buffers."""
        forget([self])

    def forget_prompt(self) -> None:
        """Forget the first tokens, of which some may have been packed."""
        if self.is_initialized:
            forget([self])

    def forget_rest(self) -> None:
        """Forget what a layer keeps besides keys and values."""

    def take_back(self, n: int) -> None:
        """As above. Raw slots that were free are free again; a longer step has written over tokens."""
        if not self.is_initialized:
            return
        # also if the device does not answer any more
        self.interrupted = True
        super().take_back(n)
        for tensor in (self.keys, self.values):
            tensor.live.fill_(self.host_length)
        self.interrupted = not all(_untouched(t, self.host_length, n) for t in (self.keys, self.values))

    def _enlarged(self, x: QuantizedKVTensor, capacity: int) -> QuantizedKVTensor:
        return x.enlarged(capacity)

    def _narrowed(self, x: QuantizedKVTensor, capacity: int) -> QuantizedKVTensor:
        return x.narrowed(capacity)

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


class KVMixHybridLayer(LinearAttentionLayer, KVMixStaticLayer):
    """A packed layer of fixed capacity that has the states of a linear attention besides, as they are."""

    def __init__(self, layer: LinearAttentionLayer, layer_plan: LayerPlan, max_cache_len: int) -> None:
        """`layer`: transformers' own, whose states are taken over. `max_cache_len`: capacity in tokens."""
        LinearAttentionLayer.__init__(self, number_of_states=layer.number_of_states)
        vars(self).update({name: vars(layer)[name] for name in vars(self)})
        KVMixStaticLayer.__init__(self, max_cache_len, layer_plan)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Keys and values come by position and states by name, as transformers tells them apart."""
        if args:
            KVMixStaticLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Forget all tokens and states, keep the buffers."""
        KVMixStaticLayer.reset(self)

    def forget_rest(self) -> None:
        """Forget the states."""
        LinearAttentionLayer.reset(self)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take rows by their index."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        KVMixStaticLayer.reorder_cache(self, beam_idx)

    def take_back(self, n: int) -> None:
        """As above; the states of a linear attention cannot be, once there were any."""
        held = bool(self.host_length)
        super().take_back(n)
        self.interrupted = self.interrupted or held


INDEXED_LATENTS = "indexed_attention" in LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
"""Whether sparse attention caches latents, as configurations say; older versions cache all heads."""


class KVMixIndexedLayer(KVMixStaticLayer):
    """A packed layer of fixed capacity, and the keys by which sparse attention chooses tokens as they are."""

    is_indexer_initialized: bool
    indexer_keys: Any
    indexer_position_ids: Any
    indexer_cumulative_length: Any

    def __init__(self, layer: StaticIndexedLayer, layer_plan: LayerPlan) -> None:
        """`layer`: transformers' own, whose other keys are taken over."""
        super().__init__(layer.max_cache_len, layer_plan)
        self.indexer_position_ids = None  # older versions of transformers have none
        vars(self).update({name: value for name, value in vars(layer).items() if "indexer" in name})
        self.has_indexed = layer.is_indexer_initialized

    lazy_initialization_indexer = StaticIndexedLayer.lazy_initialization_indexer

    def update_indexer(self, states: Tensor) -> Tensor:
        """Store [B, n, D]. The first are returned themselves, as keys and values are."""
        stored = StaticIndexedLayer.update_indexer(self, states)  # type: ignore[arg-type]
        first, self.has_indexed = not self.has_indexed, True
        return states if first else stored

    def forget_rest(self) -> None:
        """Forget the keys of the indexer."""
        self.has_indexed = False
        self.indexer_position_ids = None
        if self.is_indexer_initialized:
            self.indexer_keys.zero_()
            self.indexer_cumulative_length.zero_()

    def enlarge(self, capacity: int) -> None:
        """Make room for `capacity` tokens, keeping those stored."""
        super().enlarge(capacity)
        if self.is_indexer_initialized:
            more = capacity - self.indexer_keys.shape[1]
            self.indexer_keys = torch.nn.functional.pad(self.indexer_keys, (0, 0, 0, more))

    def take_back(self, n: int) -> None:
        """As above; what lies beyond their length is written over."""
        super().take_back(n)
        self._index_only(self.host_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `tokens_to_remove` (negative, as transformers passes it) tokens."""
        super().crop(tokens_to_remove)
        self._index_only(self.host_length)

    def _index_only(self, length: int) -> None:
        self.has_indexed = length > 0
        if self.is_indexer_initialized:
            self.indexer_cumulative_length.fill_(length)
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., :length]

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take rows by their index."""
        super().reorder_cache(beam_idx)
        self._take_rows(lambda x, dim: x.index_select(dim, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        super().batch_repeat_interleave(repeats)
        self._take_rows(lambda x, dim: x.repeat_interleave(repeats, dim))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows."""
        super().batch_select_indices(indices)
        self._take_rows(lambda x, dim: x.index_select(dim, indices.to(x.device)))

    def _take_rows(self, take: Callable[[Tensor, int], Tensor]) -> None:
        if self.is_indexer_initialized:
            self.indexer_keys = take(self.indexer_keys, 0)
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = take(self.indexer_position_ids, 1)


def _untouched(tensor: QuantizedKVTensor, length: int, n: int) -> bool:
    """Whether an append of `n` tokens to so many, done or not, leaves these readable."""
    fmt = tensor.format
    if not length or fmt.is_raw:
        return True
    if fmt.high is not None or tensor.cached.seen is not None:
        return False  # scores and sums have been added to
    return n <= fmt.ring - max(0, length - fmt.packed_end(length))


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
        layer.interrupted = False
        counters[id(layer.cumulative_length)] = layer.cumulative_length
        if layer.is_initialized:
            for tensor in (layer.keys, layer.values):
                counters[id(tensor.live)] = tensor.live
                raw.append(tensor.residual)
                if tensor.format.high is not None:
                    raw.append(tensor.high_residual)
    for tensors in (list(counters.values()), raw):
        if tensors:
            torch._foreach_zero_(tensors)
    for layer in layers:
        layer.forget_rest()


def count_apart(layers: list[PromptFirstStaticLayer]) -> None:
    """Give every packed layer a counter of its own, where layers of a cache share one."""
    seen: set[int] = set()
    for layer in layers:
        if not isinstance(layer, KVMixStaticLayer) or not layer.is_initialized:
            continue
        live = layer.keys.live
        if id(live) in seen:
            live = live.clone()
            layer.keys.live = layer.values.live = live
        seen.add(id(live))


def fixed_layers(cache: Cache) -> list[PromptFirstStaticLayer]:
    """The layers of a cache that have a fixed capacity of ours, packed or not."""
    return of_kind(cache.layers, PromptFirstStaticLayer)


def of_kind(layers: Sequence[Any], kind: type[OfKind]) -> list[OfKind]:
    """Those of a class. Every step asks this of every layer, and an abstract class answers in Python."""
    kinds = {found for found in set(map(type, layers)) if issubclass(found, kind)}
    return [layer for layer in layers if type(layer) in kinds]


def capacity_of(layers: list[Any]) -> int:
    """Tokens there is room for in all `fixed_layers` of a cache's layers; 0 without any."""
    return min((x.max_cache_len for x in layers if isinstance(x, PromptFirstStaticLayer)), default=0)
