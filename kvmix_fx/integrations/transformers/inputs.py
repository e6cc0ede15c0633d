"""What is done to the arguments of a call before the model sees them.

Rules for masks, in order. The first two are for masks [B, tokens] that hide nothing: no column is padding.

| cache | call | mask | becomes |
|---|---|---|---|
| empty, of any kind | n > 1, positions that go up by one (7) | [B, n] that hides nothing | None (1) |
| full rows | in generate() | [B, tokens] that hides nothing (2) | None (3) |
| fixed, empty | any | [B, 1, n, capacity] or [B, capacity] | [B, 1, n, n] or [B, n] (4) |
| fixed, not empty | with position_ids (5) | [B, tokens] | [B, capacity] (6) |

1. A graph can not look. Without a mask, prefill takes the fastest attention.
2. Looking waits for the device. After a call of one token generate() itself has added a one, so nobody looks.
3. Attention ends with the last token stored.
4. generate() made it for a cache that attends to all of its slots; the first call of ours attends to its own
   tokens. Of a dict of masks, the one named "full_attention"; all of them where windows are ours, too.
5. Without positions some models count the mask.
6. One shape for all steps: one graph and one recording.
7. Or none. Without a mask, positions that start again are the beginning of another text.

n: tokens of the call. "Fixed": with layers of fixed capacity of ours. "Full rows": a KVMixStaticCache of
sequences without padding, which is remembered from call to call. A cache becomes one when it is empty and
a call has no mask. It is one no longer when a mask stays.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from kvmix_fx import dynamo
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.contracts import NAMES, cache_name, given_cache, returned_cache
from kvmix_fx.errors import (
    CacheMutationError,
    CacheShapeError,
    CapacityError,
    KVMixError,
    ModelInputError,
    PlanMismatchError,
)
from kvmix_fx.integrations.transformers import owners, prompts
from kvmix_fx.integrations.transformers.caches import (
    KVMixStaticCache,
    let_grow,
    pack_sliding_layers,
    pack_static_layers,
)
from kvmix_fx.integrations.transformers.layers import (
    KVMixHybridLayer,
    KVMixIndexedLayer,
    KVMixSlidingLayer,
    KVMixStaticLayer,
    PromptFirstStaticLayer,
    count_apart,
    fixed_layers,
    of_kind,
)
from kvmix_fx.integrations.transformers.prompts import PlainPrompt
from kvmix_fx.parallel import check_placement, kv_heads_here
from kvmix_fx.plan import KVPlan
from kvmix_fx.runtime.shortcut import Shortcut
from kvmix_fx.runtime.step import Call, Lane

_COUNTED_TOKENS = r".*\.cumulative_length(_int)?$"
"""Where Dynamo finds the numbers of tokens that plain windows count."""


class InsideGenerate(threading.local):
    """Whether this thread is inside generate(), and between two single tokens of it."""

    calls = 0
    steady = False

    def __init__(self) -> None:
        """In no thread yet."""
        self._held: weakref.WeakSet[Cache] = weakref.WeakSet()

    def hold(self, cache: Cache) -> None:
        """Have a cache for this thread: inside generate() until its end.

        Raises:
            CacheSharedError: another thread has it.
        """
        owners.take(cache)
        if self.calls:
            self._held.add(cache)

    def release(self, cache: Cache) -> None:
        """Let other threads have a cache, unless generate() goes on with it."""
        if cache not in self._held:
            owners.release(cache)

    def end(self) -> None:
        """After the outermost generate()."""
        for cache in self._held:
            owners.release(cache)
        self._held.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model is not inside anything."""
        return InsideGenerate, ()


class TokensCall(Call):
    """A call of a transformers model.

    tokens: ids [B, n] or embeddings [B, n, width]. batch, n: the first two sizes. mask_name: the argument
    that hides some of them. cache: the one it is given, if it is a Cache. fixed: its layers of fixed
    capacity. sliding: its packed layers of a window. windows: its plain ones of fixed capacity.
    """

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], generating: bool, model: TransformersCalls
    ) -> None:
        """A call of which nothing is known yet."""
        super().__init__(args, kwargs, generating)
        self._model = model
        self.tokens: Tensor | None = None
        self.batch = self.n = 0
        self.mask_name = "attention_mask"
        self.cache: Cache | None = None
        self.fixed: list[PromptFirstStaticLayer] = []
        self.sliding: list[KVMixSlidingLayer] = []
        self.windows: list[StaticSlidingWindowLayer] = []
        self._grown: list[Grown] = []
        self._empty_windows: list[StaticSlidingWindowLayer] = []
        self._without_states: list[LinearAttentionLayer] = []
        self._updated: dict[int, bool] = {}

    @property
    def own_cache(self) -> Cache | None:
        """The cache of the tokens themselves, without that of an encoder's."""
        cache = self.cache
        return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache

    @property
    def mask(self) -> Any:
        """What hides some of the tokens, None without."""
        return self.kwargs.get(self.mask_name)

    @mask.setter
    def mask(self, mask: Any) -> None:
        if mask is not None or self.mask_name in self.kwargs:
            self.kwargs[self.mask_name] = mask

    def finish(self) -> None:
        """Count the tokens that layers have got."""
        try:
            for window in self.sliding:
                window.count(self.n)
        except BaseException:
            self.failed()
            raise
        for layer in self.fixed:
            layer.host_length += self.n
        if self.lane is Lane.SHORT:
            for plain in self.windows:
                plain.cumulative_length_int += self.n
        self.release()

    def begin(self) -> None:
        """Remember what growing layers hold: if the model is traced in pieces, some may get their tokens."""
        caches = (
            (self.cache.self_attention_cache, self.cache.cross_attention_cache)
            if isinstance(self.cache, EncoderDecoderCache)
            else (self.cache,)
        )
        self._grown = [Grown(cache) for cache in caches if cache is not None]
        if self.own_cache is not None and self.lane is not Lane.SHORT:
            windows = of_kind(self.own_cache.layers, StaticSlidingWindowLayer)
            self._empty_windows = [window for window in windows if not window.cumulative_length_int]
            states = of_kind(self.own_cache.layers, LinearAttentionLayer)
            self._without_states = [layer for layer in states if not _has_state(layer)]
        if isinstance(self.cache, EncoderDecoderCache):
            self._updated = dict(self.cache.is_updated)

    def failed(self) -> None:
        """Take back what layers of fixed capacity have counted, and growing ones have been given."""
        try:
            self._take_back_plain()
            if self.cache is not None and _has_states(self.cache):
                _interrupted.add(self.cache)
            for layer in self.fixed:
                layer.take_back(self.n)
        finally:
            self.release()

    def release(self) -> None:
        """Let other threads have the cache."""
        if self.cache is not None:
            self._model.inside.release(self.cache)

    def reads_prompt(self) -> bool:
        """Whether it is the first call on a cache that `prompts.takes`."""
        return (
            self.n > 1
            and self.cache is not None
            and not self.kwargs.get("output_attentions")
            and _is_empty(self.cache)
            and prompts.takes(self._model.model, self.cache, self._model.plan)
        )

    def plain(self, forward: Callable[..., Any], meanwhile: Callable[[], None]) -> Any:
        """As `Call.plain`."""
        assert self.cache is not None
        return PlainPrompt(self.cache, self._model.plan, self._model.wide).run(
            forward, self.args, self.kwargs, meanwhile
        )

    def in_pieces(self) -> None:
        """As `Call.in_pieces`."""
        count_apart(self.fixed)

    def explained(self) -> KVMixError | None:
        """A cache of another number of KV heads: of another model, or of another number of ranks."""
        return None if self.own_cache is None else self._model.other_heads(self.own_cache)

    def widen(self, found: Sequence[tuple[int | None, int]]) -> None:
        """As `Call.widen`; this call's fixed layers are allocated anew, plain ones forget its tokens."""
        self._take_back_plain()
        for layer in self._without_states:
            # if the model is traced in pieces, a layer before has got some
            LinearAttentionLayer.reset(layer)
        self._model.widen(self, found)

    def _take_back_plain(self) -> None:
        """Give growing layers back what they held, and empty windows of fixed capacity that were empty."""
        for grown in self._grown:
            grown.restore()
        for window in self._empty_windows:
            window.reset()
        if isinstance(self.cache, EncoderDecoderCache):
            self.cache.is_updated.clear()
            self.cache.is_updated.update(self._updated)


class Grown:
    """What the growing layers of a cache held before a step, whose tensors no step changes."""

    def __init__(self, cache: Cache) -> None:
        """Keep references."""
        self._cache, self._count = cache, len(cache.layers)
        self._held = [(layer, dict(vars(layer))) for layer in of_kind(cache.layers, DynamicLayer)]

    def restore(self) -> None:
        """Give them back, and forget layers that are new."""
        del self._cache.layers[self._count :]
        for layer, held in self._held:
            vars(layer).clear()
            vars(layer).update(held)


_interrupted: weakref.WeakSet[Cache] = weakref.WeakSet()
"""Caches in which states may have been changed by a step that failed."""


def _has_states(cache: Cache) -> bool:
    """Whether some layer has states of a linear attention, which a step changes in place."""
    return any(map(_has_state, _layers(cache)))


def _has_state(layer: Any) -> bool:
    states = getattr(layer, "has_previous_state", False)
    return any(
        states.values() if isinstance(states, dict) else states if isinstance(states, list) else [states]
    )


class TransformersCalls:
    """What a compiled transformers model does before each forward."""

    def __init__(
        self, model: PreTrainedModel, plan: KVPlan, shortcut: Shortcut, inside: InsideGenerate
    ) -> None:
        """Keep what the checks need."""
        self.model, self.plan, self.shortcut, self.inside = model, plan, shortcut, inside
        self.wide: set[tuple[int | None, int]] = set()
        self._parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
        self._cache_name = cache_name(type(model).forward)

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Check the inputs, bring them and the cache into the form the graph expects, choose the lane.

        Raises:
            ModelInputError: no tokens. CapacityError: a fixed cache is too small; nothing was written.
            CacheShapeError, PlanMismatchError: the cache belongs to another batch, dtype, device or plan.
        CacheSharedError: another thread uses it.
        """
        args, kwargs = self._by_name(args, kwargs)
        call = TokensCall(args, kwargs, self.inside.calls > 0, self)
        if any(kwargs.get(name) for name in _RECORDED):
            _install_recorders(self.model)
        if not self._find_tokens(call):
            self._choose_lane(call)
            return call
        if call.cache is not None:
            self.inside.hold(call.cache)
        try:
            for step in self._STEPS:
                step(self, call)
            checks = (type(self)._check_room,) if call.lane is Lane.SHORT else self._CHECKS
            for check in checks:
                check(self, call)
        except BaseException:
            call.release()
            raise
        call.begin()
        return call

    def widen(self, call: TokensCall, found: Sequence[tuple[int | None, int]]) -> None:
        """Remember the tensors whose scales are wide, and allocate those of this call anew."""
        self.wide |= set(found)
        for layer in call.fixed:
            if not layer.host_length:
                # the step has counted its tokens
                layer.cumulative_length.zero_()
                layer.has_tokens = False
                layer.is_initialized &= not isinstance(layer, KVMixStaticLayer)
        self._allocate(call)

    def _by_name(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with what has a name passed by it, for caches and masks are looked up so."""
        names: list[str] = []
        for parameter in self._parameters[: len(args)]:
            if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.name in kwargs:
                break
            names.append(parameter.name)
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in NAMES:
            if name in named and name != self._cache_name and self._cache_name not in named:
                # one name, one graph; the model would rename it as well
                named[self._cache_name] = named.pop(name)
        return args[len(names) :], named

    def other_heads(self, cache: Cache) -> CacheShapeError | None:
        """What to say of a packed cache that has another number of KV heads than this model; None if none."""
        geometry = self.plan.geometry
        if geometry is None:
            return None
        for index, layer in enumerate(_layers(cache)):
            keys = getattr(layer, "keys", None)
            if not isinstance(keys, QuantizedKVTensor) or index >= geometry.num_layers:
                continue
            here = kv_heads_here(self.model, geometry.layer(index).num_kv_heads)
            if keys.shape[1] != here:
                return CacheShapeError(
                    f"layer {index} of the cache holds {keys.shape[1]} KV heads, the model has {here} in "
                    "this process: a cache goes on in the model that filled it, on as many ranks. Load it "
                    "there, or read the tokens again into a new cache"
                )
        return None

    def _find_tokens(self, call: TokensCall) -> bool:
        """Whether the call has tokens, as ids or embeddings; of an encoder-decoder, those of the decoder."""
        kwargs, decodes = call.kwargs, self.model.config.is_encoder_decoder
        names = ("decoder_input_ids", "decoder_inputs_embeds") if decodes else ("input_ids", "inputs_embeds")
        others = () if decodes else call.args[:1]
        given = [x for x in (*(kwargs.get(name) for name in names), *others) if x is not None]
        tokens = given[0] if given else None
        if not isinstance(tokens, Tensor):
            return False
        call.tokens = tokens
        call.mask_name = "decoder_attention_mask" if decodes else "attention_mask"
        call.batch, call.n = tokens.shape[:2]
        if call.batch == 0 or call.n == 0:
            raise ModelInputError(f"input of shape {list(tokens.shape)} holds no tokens; pass at least one")
        cache = given_cache(kwargs)
        call.cache = cache if isinstance(cache, Cache) else None
        return True

    def _own_slices(self, call: TokensCall) -> None:
        """A slice of longer rows brings its place in them, and their length, into the graph."""
        if call.n == 1:
            call.args = tuple(_own(x) for x in call.args)
            for name in ("input_ids", "position_ids"):
                if name in call.kwargs:
                    call.kwargs[name] = _own(call.kwargs[name])

    def _mark_lengths(self, call: TokensCall) -> None:
        """Have tracing take the sizes that change for symbols.

        Else the first prompt's length would be compiled in, and the second would recompile; likewise a
        cache's capacity, by way of masks [B, 1, n, capacity].
        """
        _mark_length(call.tokens)
        _mark_length(call.kwargs.get("position_ids"))
        for masks in {id(x): x for x in (call.mask, call.kwargs.get("attention_mask"))}.values():
            for mask in masks.values() if isinstance(masks, dict) else (masks,):
                _mark_length(mask)
                _mark_length(mask, -1)

    def _drop_mask_of_a_prompt(self, call: TokensCall) -> None:
        if (
            call.n > 1
            and _is_empty(given_cache(call.kwargs))
            and _hides_nothing(call.mask, call.n)
            and _is_one_text(call.kwargs.get("position_ids"))
        ):
            call.mask = None

    def _drop_mask_of_full_rows(self, call: TokensCall) -> None:
        """Keep account of whether no row of the cache has padding; such a step has no mask."""
        cache = call.cache
        if not isinstance(cache, KVMixStaticCache):
            return
        mask = call.mask
        empty = _is_empty(cache)
        if not (empty or cache.full_rows):
            cache.full_rows = False
        elif mask is None:
            cache.full_rows = True
        elif not empty and call.generating and isinstance(mask, Tensor) and mask.dim() == 2:
            # between its single tokens generate() itself adds ones to the mask; else look, and wait for it
            cache.full_rows = self.inside.steady or _hides_nothing(mask, mask.shape[1])
            if cache.full_rows:
                call.mask = None
        else:
            cache.full_rows = False

    def _note_single_token(self, call: TokensCall) -> None:
        self.inside.steady = call.generating and call.n == 1

    def _pack_static_layers(self, call: TokensCall) -> None:
        if isinstance(call.own_cache, StaticCache) and self.plan.geometry is not None:
            pack_static_layers(call.own_cache, self.plan)
            if isinstance(call.cache, EncoderDecoderCache):
                let_grow(call.cache.cross_attention_cache)
        if call.own_cache is not None:
            call.fixed = fixed_layers(call.own_cache)

    def _pack_sliding_layers(self, call: TokensCall) -> None:
        cache = call.own_cache
        if cache is not None:
            pack_sliding_layers(cache, self.plan)
            call.sliding = of_kind(cache.layers, KVMixSlidingLayer)

    def _fit_mask(self, call: TokensCall) -> None:
        if not call.fixed:
            return
        # a cache may have more layers than the model fills
        if not any(layer.has_tokens for layer in call.fixed):
            # generate() built the mask for a plain StaticCache, which attends to all of its slots;
            # the first step of a packed one attends to its own tokens
            call.mask = _first_columns(call.mask, call.n, _masks_of(_layers(call.own_cache)))
        elif call.kwargs.get("position_ids") is not None:
            # without positions some models count the mask
            call.mask = _to_capacity(call.mask, call.fixed[0].max_cache_len)

    def _choose_lane(self, call: TokensCall) -> None:
        if call.own_cache is not None:
            call.windows = of_kind(call.own_cache.layers, StaticSlidingWindowLayer)
            if call.windows or of_kind(call.own_cache.layers, DynamicSlidingWindowLayer):
                call.changing = _COUNTED_TOKENS
        if not call.generating or call.args:
            return
        # a window that is not full is written by another graph
        full = all(window.cumulative_length_int >= window.max_cache_len for window in call.windows)
        call.counts = len(call.windows) if full else -1
        if full and self.shortcut.serves(call.kwargs):
            call.lane = Lane.SHORT

    def _check_plan(self, call: TokensCall) -> None:
        plan = getattr(call.cache, "plan", None)
        if plan is not None and plan.digest != self.plan.digest:
            raise PlanMismatchError(
                f"this cache was made for {plan!r}, the model was compiled with {self.plan!r}: make the "
                "cache from the plan given to kvmix_fx.compile"
            )

    def _check_whole(self, call: TokensCall) -> None:
        if call.cache is None or call.cache not in _interrupted:
            return
        if _has_states(call.cache):
            raise CacheMutationError(
                "a step on this cache was interrupted after states of its linear attention had changed: call "
                "cache.reset() and fill it anew"
            )
        _interrupted.discard(call.cache)

    def _check_room(self, call: TokensCall) -> None:
        for layer in call.fixed:
            if layer.interrupted:
                raise CacheMutationError(
                    "a step on this cache was interrupted after it had written over tokens: call "
                    "cache.reset() and fill it anew"
                )
            if layer.host_length + call.n > layer.max_cache_len:
                raise CapacityError.exceeded(call.n, layer.host_length, layer.max_cache_len)

    def _mark_plain_layers(self, call: TokensCall) -> None:
        """Packed layers grow without recompiling; plain ones beside them must not spoil that."""
        for layer, layer_plan in zip(_layers(call.own_cache), self.plan.layers, strict=False):
            if layer_plan.is_raw and isinstance(layer, DynamicLayer):
                _mark_length(layer.keys, 2)
                _mark_length(layer.values, 2)
        for window in of_kind(_layers(call.own_cache), DynamicSlidingWindowLayer):
            keys = window.keys
            # a layer that a model's own code fills may be initialized before it has tokens of any shape
            if isinstance(keys, Tensor) and keys.dim() == 4 and keys.shape[2] < window.sliding_window - 1:
                _mark_length(window.keys, 2)
                _mark_length(window.values, 2)
        for layer in _layers(call.own_cache):
            # of sparse attention, which chooses tokens by them
            _mark_length(getattr(layer, "indexer_keys", None), 1)
            _mark_length(getattr(layer, "indexer_position_ids", None), -1)

    def _allocate(self, call: TokensCall) -> None:
        live: Tensor | None = None
        dtypes: tuple[torch.dtype, torch.dtype] | None = None
        for index, layer in enumerate(_layers(call.own_cache)):
            if isinstance(layer, PromptFirstStaticLayer) and not layer.is_initialized:
                assert self.plan.geometry is not None
                sizes = self.plan.geometry.layer(index)
                heads = kv_heads_here(self.model, sizes.num_kv_heads)
                dtypes = dtypes or self._cached_dtypes()
                keys, values = (
                    torch.empty(call.batch, heads, 0, channels, dtype=dtype, device=self.model.device)
                    for channels, dtype in zip((sizes.head_dim, sizes.value_dim), dtypes, strict=True)
                )
                if isinstance(layer, KVMixStaticLayer):
                    layer.layer_plan = layer.layer_plan.widened(
                        [role for number, role in self.wide if number == index]
                    )
                    # one counter for all layers: a step then updates one number
                    layer.lazy_initialization(keys, values, live)
                    live = layer.keys.live
                else:
                    layer.lazy_initialization(keys, values)

    def _has_one_dtype(self) -> bool:
        """Whether all that a model computes is of the dtype of its weights."""
        if torch.is_autocast_enabled(self.model.device.type):
            return False
        return len({p.dtype for p in self.model.parameters() if p.is_floating_point()}) <= 1

    def _cached_dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of keys and values, as the model computes them now."""
        if not self._has_one_dtype() and not self.model.config.is_encoder_decoder:
            # weights do not tell, one token does
            token = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
            with torch.no_grad():
                result = type(self.model).forward(self.model, input_ids=token, use_cache=True)
            for layer in getattr(returned_cache(result), "layers", ()):
                if isinstance(getattr(layer, "keys", None), Tensor):
                    return layer.keys.dtype, layer.values.dtype
        return self.model.dtype, self.model.dtype

    def _leave_inference_mode(self, call: TokensCall) -> None:
        """Copy a packed cache that was made in inference mode, whose tensors could not be written outside."""
        if torch.is_inference_mode_enabled() or call.cache is None:
            return
        copies: dict[int, Tensor] = {}

        def normal(x: Tensor) -> Tensor:
            if not x.is_inference():
                return x
            return copies.setdefault(id(x), x.clone())

        for layer in _layers(call.cache):
            for name in ("keys", "values", "cumulative_length"):
                x = getattr(layer, name, None)
                if isinstance(x, QuantizedKVTensor):
                    live = () if x.live is None else (x.live,)
                    if any(t.is_inference() for t in (*x.cached.tensors, *live)):
                        setattr(layer, name, x.map_buffers(normal, *map(normal, live)))
                elif isinstance(x, Tensor) and isinstance(layer, PromptFirstStaticLayer):
                    setattr(layer, name, normal(x))

    def _check_packed(self, call: TokensCall) -> None:
        checked = False
        for layer in _layers(call.cache):
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
                mine = (call.batch, self.model.dtype, self.model.device)
                theirs = (tensor.shape[0], tensor.dtype, tensor.device)
                if mine != theirs and (mine[::2] != theirs[::2] or self._has_one_dtype()):
                    # else tracing sees what dtype the model really computes, and checks it
                    check_placement(self.model)  # weights that were offloaded after compile() say a device
                    raise CacheShapeError(
                        f"the model gets (batch, dtype, device) {mine}, the cache holds {theirs}: continue "
                        "with the batch the cache was filled with, or start a new cache"
                    )

    # In this order, because
    # - marks are for tensors as the caller made them; a rule that makes a mask marks it where it must;
    # - the mask of full rows asks what the last call was, so this one is noted after it;
    # - masks are fitted to layers that are ours, so plain ones are exchanged first;
    # - the short lane knows the last step's arguments as the graph got them, so the lane is chosen last.
    _STEPS = (
        _own_slices,
        _mark_lengths,
        _drop_mask_of_a_prompt,
        _drop_mask_of_full_rows,
        _note_single_token,
        _pack_static_layers,
        _pack_sliding_layers,
        _fit_mask,
        _choose_lane,
    )
    # What the cache cannot do is found before anything is allocated. In the short lane it is the cache of the
    # step before, and only its room has shrunk.
    _CHECKS = (
        _check_plan,
        _check_whole,
        _check_room,
        _leave_inference_mode,
        _mark_plain_layers,
        _allocate,
        _check_packed,
    )


_RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Arguments that have transformers record what modules compute."""


def _install_recorders(model: PreTrainedModel) -> None:
    """What the model does itself at a call that records outputs, in a way that cannot be traced.

    A model inside another may have done it before; a second time it would record everything twice.
    """
    for one in model.modules():
        if isinstance(one, PreTrainedModel) and not any(
            getattr(part, "_output_capturing_hooks_installed", False) for part in one.modules()
        ):
            maybe_install_capturing_hooks(one)


def _layers(cache: Cache | None) -> list[Any]:
    """The layers of a cache; of both caches of an encoder-decoder."""
    if isinstance(cache, EncoderDecoderCache):
        return [*_layers(cache.self_attention_cache), *_layers(cache.cross_attention_cache)]
    return [] if cache is None else list(cache.layers)


def _own(x: Any) -> Any:
    if not isinstance(x, Tensor) or (x.is_contiguous() and not x.storage_offset()):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _mark_length(x: Any, dim: int = 1) -> None:
    if isinstance(x, Tensor) and x.dim() > abs(dim) and x.shape[dim] > 1:
        dynamo.mark_dimension(x, dim)


def _is_empty(cache: Any) -> bool:
    return cache is None or (isinstance(cache, Cache) and not any(map(_has_tokens, _layers(cache))))


def _has_tokens(layer: Any) -> bool:
    if isinstance(layer, PromptFirstStaticLayer):
        return layer.has_tokens
    if isinstance(layer, StaticSlidingWindowLayer):
        # one that was emptied keeps its buffers
        return bool(layer.cumulative_length_int)
    return bool(getattr(layer, "is_initialized", True))


def _hides_nothing(mask: Any, n: int) -> bool:
    """Whether a mask is a tensor [B, n] without padding. Waits for the device."""
    return isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == n and bool(mask.all())


def _is_one_text(positions: Any) -> bool:
    """Whether positions [..., n] go up by one.

    Without a mask models take positions that start again for the beginning of another text, which does not
    see the one before it. With a mask of ones they do not.
    """
    return positions is None or (isinstance(positions, Tensor) and bool((positions.diff() == 1).all()))


def _to_capacity(mask: Any, capacity: int) -> Any:
    """A mask [B, stored] with a column for every token there is room for, as transformers extends it.

    All steps then have a mask of one shape, for one graph and one recording.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] >= capacity:
        return mask
    mask = torch.nn.functional.pad(mask, (0, capacity - mask.shape[1]))
    _mark_length(mask)
    return mask


def _masks_of(layers: Sequence[Any]) -> Callable[[str], bool]:
    """Whether the mask of this name is for layers of ours.

    Names are types of layers, but some models have their own: those are told only where all layers are ours,
    or no windows are.
    """
    ours = [layer for layer in layers if isinstance(layer, PromptFirstStaticLayer)]
    if not any(isinstance(layer, StaticLayer) for layer in layers if layer not in ours):
        return lambda _: True
    windows = any(layer.is_sliding for layer in ours)
    known = {
        "full_attention": True,
        "indexed_attention": any(isinstance(layer, KVMixIndexedLayer) for layer in ours),
        "hybrid": any(isinstance(layer, KVMixHybridLayer) and not layer.is_sliding for layer in ours),
    }
    return lambda name: known.get(name, windows)


def _first_columns(mask: Any, n: int, is_ours: Callable[[str], bool]) -> Any:
    if isinstance(mask, dict):
        return {name: _first_columns(m, n, is_ours) if is_ours(name) else m for name, m in mask.items()}
    return mask[..., :n] if isinstance(mask, Tensor) and mask.dim() in (2, 4) else mask
