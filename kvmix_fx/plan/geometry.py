"""The sizes of a model's cache, read from its configuration by attribute names alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from kvmix_fx.errors import HeadSplitError, PlanFieldError, PlanGeometryError
from kvmix_fx.plan.checks import check_integer

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_QUERY_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_HEAD_DIM = ("head_dim", "d_kv")
_PER_LAYER = {*_QUERY_HEADS, *_KV_HEADS, *_HEAD_DIM, "v_head_dim"}
_WINDOWS = {
    "sliding_attention": "sliding_window",
    "hybrid_sliding": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
"""Layer types whose cache is a window, and what the configuration calls its length."""
_OF_WINDOWS = "swa_"
"""What some configurations put ahead of the name of a size, for layers with a window."""

_ADVICE = "pass ModelGeometry(num_layers=..., num_kv_heads=..., head_dim=...)"


@dataclass(frozen=True)
class LayerGeometry:
    """What one layer of a model caches.

    Attributes:
        num_kv_heads: 0 if it has no KV cache of its own (it is no attention, or reads another layer's).
        head_dim: channels of a key.
        value_dim: channels of a value; 0 for latents whose keys have no part with positions.
        window: tokens of a sliding or chunked window, 0 if all are kept.
        cross_heads: KV heads of cross-attention, which keeps the encoder's tokens besides; 0 for none.
    """

    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int = 0
    cross_heads: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_integer(field.name, getattr(self, field.name), 1 if field.name == "head_dim" else 0)


@dataclass(frozen=True)
class ModelGeometry:
    """The sizes a plan needs to know of a model.

    Attributes:
        num_layers: decoder layers.
        num_kv_heads: key/value heads of a layer (fewer than query heads under grouped-query attention).
        head_dim: channels of one head, the same for keys and values.
        layers: what each layer caches, if that is not the same for all: without a cache, with a window, with
            other heads. The two sizes above are then those of the first layer that has a cache.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerGeometry, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            check_integer(name, getattr(self, name), 1)
        object.__setattr__(self, "layers", tuple(self.layers))
        if len(self.layers) not in (0, self.num_layers):
            raise PlanFieldError(f"{len(self.layers)} layers are described, of {self.num_layers}", "layers")
        if set(self.layers) == {LayerGeometry(self.num_kv_heads, self.head_dim, self.head_dim)}:
            object.__setattr__(self, "layers", ())

    def layer(self, index: int) -> LayerGeometry:
        """What the layer `index` caches."""
        if self.layers:
            return self.layers[index]
        return LayerGeometry(self.num_kv_heads, self.head_dim, self.head_dim)

    def elements(self, length: int) -> int:
        """Keys' and values' elements that `length` tokens of one row have in a plain growing cache."""
        total = 0
        for layer in map(self.layer, range(self.num_layers)):
            stored = min(length, layer.window - 1) if layer.window else length
            total += (layer.num_kv_heads * stored + layer.cross_heads * length) * (
                layer.head_dim + layer.value_dim
            )
        return total

    def one_layer(self) -> ModelGeometry:
        """That of a model with one layer, of the sizes that most layers have."""
        return replace(self, num_layers=1, layers=())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `layers` only if there are any."""
        content = asdict(self)
        if not self.layers:
            del content["layers"]
        return content | ({"layers": [asdict(layer) for layer in self.layers]} if self.layers else {})

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ModelGeometry:
        """What `to_dict` made."""
        layers = tuple(LayerGeometry(**layer) for layer in content.get("layers", ()))
        return replace(cls(**{k: v for k, v in content.items() if k != "layers"}), layers=layers)

    def heads_per_rank(self, tp_size: int) -> int:
        """KV heads of a layer on each of `tp_size` ranks, among which tensor parallelism shares them out.

        Raises:
            HeadSplitError: there are fewer heads than ranks, or they do not divide evenly.
            PlanFieldError: tp_size is no integer, or below 1.
        """
        return self.shared_out(self.num_kv_heads, tp_size)

    @staticmethod
    def shared_out(heads: int, tp_size: int) -> int:
        """As `heads_per_rank`, for a layer of so many heads."""
        check_integer("tp_size", tp_size, 1)
        if heads % tp_size:
            fitting = [str(n) for n in range(1, heads + 1) if heads % n == 0]
            raise HeadSplitError(
                f"{heads} KV heads cannot be shared out among {tp_size} ranks: every rank needs "
                f"the same number of whole heads. Use a tp_size of {' or '.join(fitting)}, and further "
                "devices for replicas of the model"
            )
        return heads // tp_size

    @classmethod
    def of(cls, target: object) -> ModelGeometry:
        """The geometry of a model (its `config` is read), of a configuration, or `target` itself.

        Some models give layers other numbers of KV heads by a rule that their configuration does not state:
        their attention modules know.

        Raises:
            PlanGeometryError: a size is missing or unclear.
        """
        if isinstance(target, ModelGeometry):
            return target
        config = getattr(target, "config", target)
        geometry = cls.from_config(config)
        groups: Mapping[int, int] = {} if geometry._differs() else _query_groups(target)
        if len({*groups.values()}) < 2:
            return geometry
        queries = {i: _size(layer, _QUERY_HEADS) for i, layer in enumerate(_layers(_text_config(config)))}
        found = {i: queries[i] // n for i, n in groups.items() if i in queries and queries[i] % n == 0}
        return geometry._with_heads(found) if geometry.num_kv_heads in found.values() else geometry

    def _differs(self) -> bool:
        """Whether layers that have a cache have different numbers of KV heads."""
        return len({layer.num_kv_heads for layer in self.layers} - {0}) > 1

    def _with_heads(self, found: Mapping[int, int]) -> ModelGeometry:
        """The same with these numbers of KV heads in layers that have a cache."""
        layers = [self.layer(index) for index in range(self.num_layers)]
        layers = [
            replace(layer, num_kv_heads=found[index]) if layer.num_kv_heads and index in found else layer
            for index, layer in enumerate(layers)
        ]
        first = next((layer for layer in layers if layer.num_kv_heads), layers[0])
        return replace(self, num_kv_heads=max(1, first.num_kv_heads), layers=tuple(layers))

    @classmethod
    def from_config(cls, config: object) -> ModelGeometry:
        """Read a Hugging Face configuration, or any object that uses its attribute names.

        The text part of a composite configuration is taken. A missing `head_dim` is
        hidden size // query heads.

        Raises:
            PlanGeometryError: a size is missing or unclear.
        """
        encoder = bool(getattr(config, "is_encoder_decoder", False))
        config = _text_config(config)
        layers = tuple(_layer(layer, encoder) for layer in _layers(config))
        cached = next((layer for layer in layers if layer.num_kv_heads), layers[0])
        return cls(len(layers), max(1, cached.num_kv_heads), cached.head_dim, layers)


class _OfLayer:
    """A configuration as one layer has it.

    A list with an entry for every layer is this layer's entry, and a layer with a window has the sizes that
    are stated for such layers, where any are.
    """

    def __init__(self, config: object, index: int, count: int, kind: str) -> None:
        self.whole, self.kind = config, kind
        self._index, self._count = index, count

    def __getattr__(self, name: str) -> object:
        value = None
        if self.kind in _WINDOWS and name in _PER_LAYER:
            value = getattr(self.whole, _OF_WINDOWS + name, None)
        if value is None:
            value = getattr(self.whole, name, None)
        if name in _PER_LAYER and isinstance(value, (list, tuple)) and len(value) == self._count:
            return value[self._index]
        return value


def _layers(config: object) -> list[_OfLayer]:
    """A configuration's text part as each layer has it."""
    count = _size(config, _LAYERS)
    # a configuration whose sizes differ between layers has one of its own for each
    own = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config] * count  # type: ignore[attr-defined]
    types = _layer_types(config, count)
    return [_OfLayer(own[i], i, count, types[i]) for i in range(count)]


def _query_groups(model: object) -> dict[int, int]:
    """Query heads of a KV head in each layer, as transformers' attention modules of a model say.

    Layers whose modules disagree are left out, and so are all parts of a model that do not generate.
    """
    decoder = getattr(model, "get_decoder", lambda: model)()
    modules = getattr(decoder, "modules", tuple)()
    found: dict[int, set[int]] = {}
    for module in modules:
        index, groups = getattr(module, "layer_idx", None), getattr(module, "num_key_value_groups", None)
        if isinstance(index, int) and isinstance(groups, int) and groups > 0:
            found.setdefault(index, set()).add(groups)
    return {index: groups.pop() for index, groups in found.items() if len(groups) == 1}


def _layer(config: _OfLayer, encoder: bool) -> LayerGeometry:
    """What a layer caches."""
    kind = config.kind
    latent = _first(config, ("kv_lora_rank",))
    if latent is not None and _has_cache(kind):
        # latent attention caches what keys and values are computed from, and the part of keys with positions
        rotary = _first(config, ("qk_rope_head_dim",))
        rotary = 0 if rotary == 0 else _integer("qk_rope_head_dim", rotary)
        return LayerGeometry(1, _integer("kv_lora_rank", latent), rotary)
    head_dim = _first(config, _HEAD_DIM)
    if head_dim == 0 and not _has_cache(kind):
        return LayerGeometry(0, 1, 1)  # all layers that have a cache have latents
    if head_dim is None:
        head_dim = _size(config, _WIDTH) // _size(config, _QUERY_HEADS)
    value_dim = _first(config, ("v_head_dim",))
    # Falcon's newer checkpoints repeat keys and values for every query head before they cache them; its
    # older ones and GPT-BigCode share one KV head whatever num_kv_heads says.
    if getattr(config, "new_decoder_architecture", False):
        num_kv_heads = _size(config, _QUERY_HEADS)
    elif getattr(config, "multi_query", False):
        num_kv_heads = 1
    else:
        num_kv_heads = _size(config, (*_KV_HEADS, *_QUERY_HEADS))
    window = _first(config, (_WINDOWS[kind],)) if kind in _WINDOWS else None
    return LayerGeometry(
        num_kv_heads if _has_cache(kind) else 0,
        _integer("head_dim", head_dim),
        _integer("v_head_dim", head_dim if value_dim is None else value_dim),
        0 if window is None else _integer(_WINDOWS[kind], window),
        num_kv_heads if encoder else 0,
    )


def _layer_types(config: object, count: int) -> Sequence[str]:
    """The type of each layer, in transformers' names; layers that read another's cache are "shared"."""
    named = _first(config, ("layer_types", "layers_block_type"))
    if isinstance(named, Sequence) and len(named) == count:
        types = [str(name) for name in named]
    else:
        windows = [
            kind
            for kind in ("sliding_attention", "chunked_attention")
            if getattr(config, _WINDOWS[kind], None)
        ]
        types = [windows[0] if windows else "full_attention"] * count
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    return [*types[: count - shared], *["shared"] * shared]


def _has_cache(kind: str) -> bool:
    """Whether a layer of this type keeps keys and values of tokens."""
    return kind.startswith("hybrid") or ("attention" in kind and kind != "linear_attention")


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
        kind = type(config.whole if isinstance(config, _OfLayer) else config).__name__
        raise PlanGeometryError(f"{kind} has none of {', '.join(names)}: {_ADVICE}")
    return _integer(names[0], value)


def _integer(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanGeometryError(f"{name} should be one positive integer and is {value!r}: {_ADVICE}")
    return value
