"""The sizes of a model's cache, read from its configuration by attribute names alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from kvmix_fx.errors import HeadSplitError, PlanGeometryError
from kvmix_fx.plan.checks import check_integer

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_QUERY_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_WIDTH = ("hidden_size", "n_embd", "d_model")

_ADVICE = "pass ModelGeometry(num_layers=..., num_kv_heads=..., head_dim=...)"


@dataclass(frozen=True)
class ModelGeometry:
    """The sizes a plan needs to know of a model.

    Attributes:
        num_layers: decoder layers with a KV cache.
        num_kv_heads: key/value heads of a layer (fewer than query heads under grouped-query attention).
        head_dim: channels of one head, the same for keys and values.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for field in fields(self):
            check_integer(field.name, getattr(self, field.name), 1)

    def heads_per_rank(self, tp_size: int) -> int:
        """KV heads of a layer on each of `tp_size` ranks, among which tensor parallelism shares them out.

        Raises:
            HeadSplitError: there are fewer heads than ranks, or they do not divide evenly.
            PlanFieldError: tp_size is no integer, or below 1.
        """
        check_integer("tp_size", tp_size, 1)
        if self.num_kv_heads % tp_size:
            fitting = [str(n) for n in range(1, self.num_kv_heads + 1) if self.num_kv_heads % n == 0]
            raise HeadSplitError(
                f"{self.num_kv_heads} KV heads cannot be shared out among {tp_size} ranks: every rank needs "
                f"the same number of whole heads. Use a tp_size of {' or '.join(fitting)}, and further "
                "devices for replicas of the model"
            )
        return self.num_kv_heads // tp_size

    @classmethod
    def of(cls, target: object) -> ModelGeometry:
        """The geometry of a model (its `config` is read), of a configuration, or `target` itself.

        Raises:
            PlanGeometryError: a size is missing, or differs between layers or between keys and values.
        """
        if isinstance(target, ModelGeometry):
            return target
        return cls.from_config(getattr(target, "config", target))

    @classmethod
    def from_config(cls, config: object) -> ModelGeometry:
        """Read a Hugging Face configuration, or any object that uses its attribute names.

        The text part of a composite configuration is taken. A missing `head_dim` is
        hidden size // query heads.

        Raises:
            PlanGeometryError: a size is missing, or differs between layers or between keys and values.
        """
        config = _text_config(config)
        if _first(config, ("kv_lora_rank",)) is not None:
            raise PlanGeometryError(
                "this model uses latent attention, whose keys and values differ in head size; "
                "plans cover one head size for both"
            )
        num_layers = _size(config, _LAYERS)
        head_dim = _first(config, ("head_dim",))
        if head_dim is None:
            head_dim = _size(config, _WIDTH) // _size(config, _QUERY_HEADS)
        # Falcon's newer checkpoints repeat keys and values for every query head before they cache them; its
        # older ones and GPT-BigCode share one KV head whatever num_kv_heads says.
        if getattr(config, "new_decoder_architecture", False):
            num_kv_heads = _size(config, _QUERY_HEADS)
        elif getattr(config, "multi_query", False):
            num_kv_heads = 1
        else:
            num_kv_heads = _size(config, (*_KV_HEADS, *_QUERY_HEADS))
        return cls(num_layers, num_kv_heads, _integer("head_dim", head_dim))


def _text_config(config: object) -> object:
    choose = getattr(config, "get_text_config", None)
    if choose is None:
        return config
    try:
        return choose(decoder=True)
    except ValueError as error:
        raise PlanGeometryError(
            f"the configuration has several text parts ({error}); pass the one whose cache the plan is for"
        ) from error


def _first(config: object, names: Iterable[str]) -> object:
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError as error:  # how transformers answers for a size that varies by layer
            raise PlanGeometryError(
                f"{name} differs between the layers of this model; plans cover one value for all"
            ) from error
        if value is not None:
            return value
    return None


def _size(config: object, names: tuple[str, ...]) -> int:
    value = _first(config, names)
    if value is None:
        raise PlanGeometryError(f"{type(config).__name__} has none of {', '.join(names)}: {_ADVICE}")
    return _integer(names[0], value)


def _integer(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanGeometryError(f"{name} should be one positive integer and is {value!r}: {_ADVICE}")
    return value
