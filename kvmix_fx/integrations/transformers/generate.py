"""What is put in the place of a compiled model's own methods, for generate().

All of it is copied and pickled with the model, so nothing here holds the model in a closure.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from kvmix_fx.contracts import cache_name, given_cache
from kvmix_fx.integrations import Hooks
from kvmix_fx.integrations.transformers.batching import PackedBatching
from kvmix_fx.integrations.transformers.caches import KVMixStaticCache
from kvmix_fx.integrations.transformers.inputs import InsideGenerate, TransformersCalls
from kvmix_fx.integrations.transformers.pool import GenerationCaches, in_steps
from kvmix_fx.plan import KVPlan, ModelGeometry
from kvmix_fx.runtime import recording
from kvmix_fx.runtime.shortcut import Shortcut

log = logging.getLogger(__name__)


def transformers_hooks(model: PreTrainedModel, plan: KVPlan, shortcut: Shortcut) -> Hooks:
    """The hooks of a transformers model."""
    attributes: dict[str, Any] = {}
    if hasattr(model, "get_compiled_call"):
        attributes["get_compiled_call"] = AlreadyCompiled(model)
    if hasattr(model, "init_continuous_batching"):
        attributes["init_continuous_batching"] = PackedBatching(model, plan)
    inside = InsideGenerate()
    if isinstance(model, GenerationMixin):
        attributes["_prepare_cache_for_generation"] = FixedCaches(model, plan, inside)
        attributes["generate"] = Generate(model.generate, inside, shortcut)
    return Hooks(TransformersCalls(model, plan, shortcut, inside).prepare, attributes, windows=True)


class AlreadyCompiled:
    """`model.get_compiled_call`: the model itself.

    On accelerators generate() would compile a second time, around this and with another backend.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """`model`: whose method this is."""
        self._model = model

    def __call__(self, _config: Any = None) -> Any:
        """What generate() calls in every step."""
        return self._model.__call__


class Generate:
    """`model.generate`, which lets the steps in it be known as such."""

    def __init__(self, original: Any, inside: InsideGenerate, shortcut: Shortcut) -> None:
        """`original`: the model's own generate()."""
        functools.update_wrapper(self, original)
        self._original, self._inside, self._shortcut = original, inside, shortcut

    def __reduce__(self) -> tuple[Any, ...]:
        return Generate, (self._original, self._inside, self._shortcut)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original; what the short lane has learned is forgotten afterwards."""
        inside = self._inside
        inside.calls += 1
        inside.steady = False
        try:
            return self._original(*args, **kwargs)
        finally:
            inside.calls -= 1
            inside.steady = False
            if not inside.calls:
                inside.end()
            self._shortcut.forget()


class FixedCaches:
    """`model._prepare_cache_for_generation`, with a packed cache of fixed capacity where one serves."""

    def __init__(self, model: PreTrainedModel, plan: KVPlan, inside: InsideGenerate) -> None:
        """Start without caches."""
        self._model, self._plan, self._inside = model, plan, inside
        self._caches = GenerationCaches(model, plan)
        self._original: Any = model._prepare_cache_for_generation

    def __call__(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Put a cache into `model_kwargs`, as the original does."""
        past = given_cache(model_kwargs)
        if isinstance(past, KVMixStaticCache) and past.grows:
            self._inside.hold(past)
            past.enlarge(in_steps(max_cache_length))
        reason = _why_not_fixed(
            self._model, self._plan, generation_config, model_kwargs, generation_mode, max_cache_length
        )
        if reason:
            log.debug("generate() gets no packed cache of fixed capacity: %s", reason)
            return self._original(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        rows = batch_size * max(1, generation_config.num_return_sequences)
        model_kwargs[cache_name(GenerationMixin.prepare_inputs_for_generation)] = self._caches.new(
            rows, max_cache_length
        )
        return None


def _has_only_windows(plan: KVPlan, geometry: ModelGeometry) -> bool:
    """Whether every layer that the plan packs is a sliding or chunked window."""
    sizes = [geometry.layer(i) for i in range(geometry.num_layers)]
    packed = [s for s, layer in zip(sizes, plan.layers, strict=True) if s.num_kv_heads and not layer.is_raw]
    return bool(packed) and all(s.window for s in packed)


def _why_not_fixed(
    model: Any,
    plan: KVPlan,
    config: Any,
    model_kwargs: dict[str, Any],
    mode: GenerationMode,
    length: int,
) -> str:
    """Why a generate() call keeps the cache it would have without kvmix; empty if it gets a fixed one."""
    devices = set(getattr(model, "hf_device_map", {}).values())
    if model.device.type not in recording.REPLAY_DEVICES:
        return f"steps on {model.device.type} are not recorded"
    if len(devices) > 1:
        return f"the model is spread over {len(devices)} devices"
    if plan.geometry is None:
        return "the plan does not know the model's head sizes"
    if _has_only_windows(plan, plan.geometry) and not plan.packs_fixed_windows(in_steps(length)):
        return (
            "all layers of the model are windows, which take less packed in growing caches than all of "
            f"{in_steps(length)} tokens"
        )
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"transformers says that {type(model).__name__} cannot be compiled as one graph"
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"{getattr(mode, 'value', mode)} cuts or reorders its cache"
    if config.cache_implementation is not None:
        return f"cache_implementation={config.cache_implementation!r} was asked for"
    if config.use_cache is False:
        return "use_cache=False was asked for"
    if given_cache(model_kwargs) is not None:
        return "a cache was handed in"
    return "the model is another one's assistant" if config.is_assistant else ""
