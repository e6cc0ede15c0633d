"""The plan: for every layer, how its keys and its values are kept.

Frozen data that is checked when it is made, so a plan that exists can be carried out. Every size and
every rule about which parts fit together comes from `kvmix_kernels.layout`.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from kvmix_fx.errors import (
    FormatError,
    HeadSizeError,
    PlanFieldError,
    PlanGeometryError,
    PlanLayerError,
    RangeWarning,
)
from kvmix_fx.plan.checks import check_choice, check_integer, check_positive, check_type
from kvmix_fx.plan.geometry import LayerGeometry, ModelGeometry
from kvmix_fx.plan.orders import checked_tiers, decode_order
from kvmix_fx.plan.provenance import Provenance
from kvmix_fx.plan.selection import LayerSelection, select_layers
from kvmix_fx.plan.sizes import CACHE_KINDS, CacheKind, allocated_bytes, mean_bits
from kvmix_fx.plan.text import pair_label, parse_layer
from kvmix_fx.plan.token_tier import TokenTier
from kvmix_kernels import layout
from kvmix_kernels.layout import TensorFormat

Axis: TypeAlias = Literal["channel", "token"]
GroupSize: TypeAlias = int | Literal["head"]
ScaleDtype: TypeAlias = Literal["float16", "bfloat16", "float32", "byte"]

Order: TypeAlias = Literal["none", "plan", "prompt", "tile", "tile_keys"]
Rotation: TypeAlias = Literal["none", "hadamard"]

WINDOW_KINDS = ("fixed",)
ROTATIONS: tuple[Rotation, ...] = ("none", "hadamard")
PLAIN_FIELDS = ("bits", "axis", "group_size", "scale_dtype")
"""Of a spec, in plan files of version 1."""
SMALLEST_DEFAULT_TILE = 32
DEFAULT_SINK = 4
"""First tokens that plans of ours keep raw. Models attend to them from everywhere: four cost nothing at
length and take 40 to 60 % off the divergence at 2 bits (`benchmarks/README.md`)."""

NO_TIER_IN_WINDOW = (
    "a token tier is over all tokens, and a sliding window forgets some: take it away with "
    'plan.with_layers(LAYER, token_tier="none")'
)
NO_ORDERS_IN_WINDOW = (
    "a sliding window forgets tiles, which keys with an order of channels for every tile, or with channels "
    'at 16 bits, cannot: use order="prompt" or "plan" and tiers of 4, 2 and 0 bits for this layer'
)


def raw_window(window: int, recent: int, tile: int) -> str:
    """Why a layer with a window of so many tokens stays at 16 bits; '' if it need not."""
    if window - 1 > recent + tile:
        return ""
    return (
        f"a sliding window of {window} tokens is no longer than what the plan keeps raw of a layer: "
        f"{recent} recent tokens and a tile of {tile}"
    )


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor (the keys or the values of a layer) is quantized.

    Attributes:
        bits: 1, 2, 3, 4 or 8 bits per code; 16 keeps the tensor raw and makes the rest irrelevant.
        axis: "channel" gives every channel one scale and offset per `group_size` consecutive tokens;
            "token" gives every token one per `group_size` consecutive channels.
        group_size: elements that share a scale and an offset; "head", with axis "token" only, means all
            channels of the head.
        scale_dtype: dtype in which scales and offsets are stored; "byte" takes 8 bits for each.
        tiers: channels of keys with bits of their own, as (bits, channels): 16 bits (raw, in bfloat16),
            then 4, 2 and 0 (dropped: the group's mean is kept). They add up to the head, `bits` is then 4.
        order: with tiers, who says which channels come first: "plan" (`channel_order`), "prompt", chosen
            from queries and keys when a cache is first packed, or every tile for itself, from all queries so
            far and its keys ("tile") or from its keys alone ("tile_keys").
        channel_order: for "plan", the channels of every KV head in their order, as `encode_order` writes.
        rotation: "hadamard" rounds values in a rotated basis, or "none".
        symmetric: of rotated values, codes without an offset.
        range_factor: how much of a group's range the codes cover (of tiers, those of 2 bits); None is .8 for
            tiers and symmetric codes of 2 bits, else 1.

    Raises:
        PlanFieldError: a field has a wrong type or a value outside its choices.
        FormatError: the parts cannot be packed together.
    """

    bits: int
    axis: Axis = "channel"
    group_size: GroupSize = 32
    scale_dtype: ScaleDtype = "float16"
    tiers: tuple[tuple[int, int], ...] = ()
    order: Order = "none"
    channel_order: str = ""
    rotation: Rotation = "none"
    symmetric: bool = False
    range_factor: float | None = None

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, layout.BITS)
        check_choice("axis", self.axis, tuple(layout.AXES))
        check_choice("scale_dtype", self.scale_dtype, layout.SCALE_DTYPES)
        check_choice("order", self.order, layout.ORDERS)
        check_choice("rotation", self.rotation, ROTATIONS)
        check_type("symmetric", self.symmetric, bool)
        check_type("channel_order", self.channel_order, str)
        if self.range_factor is not None:
            check_positive("range_factor", self.range_factor)
            if not 0.01 <= self.range_factor <= 1:
                raise PlanFieldError(
                    f"range_factor must be from 0.01 to 1, the whole range, got {self.range_factor}",
                    "range_factor",
                )
            object.__setattr__(self, "range_factor", float(self.range_factor))
        object.__setattr__(self, "tiers", checked_tiers(self.tiers))
        if bool(self.channel_order) != (self.order == "plan"):
            raise PlanFieldError(
                'order="plan" and channel_order belong together: take both from a profile of the model, or '
                'let the prompt choose with order="prompt"',
                "channel_order",
            )
        if self.channel_order:
            decode_order(self.channel_order, sum(channels for _, channels in self.tiers))
        if self.group_size != "head":
            check_integer("group_size", self.group_size, 1)
            self.format(self.group_size if self.axis == "channel" else 1)
        elif self.axis == "channel":
            raise PlanFieldError(
                'group_size "head" needs axis="token": with axis="channel" a group runs along tokens, '
                "so give their number",
                "group_size",
            )
        else:
            self.format(1)

    def format(self, tile: int, sink: int = 0, window: int = 0) -> TensorFormat:
        """The storage format under a tile, a sink and a window, all in tokens.

        Raises:
            FormatError: the parts cannot be packed together.
        """
        return layout.make_format(
            self.bits,
            self.axis,
            layout.WHOLE_HEAD if self.group_size == "head" else self.group_size,
            tile,
            sink,
            window,
            self.scale_dtype,
            tiers=self.tiers,
            order=self.order,
            symmetric=self.symmetric,
            rotation=self.rotation != "none",
            span=None if self.range_factor is None else round(self.range_factor * 100),
        )

    def to_dict(self) -> dict[str, Any]:
        """As a plan file has it, without unused fields that its first version did not have."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        unused = {field.name for field in fields(self) if content[field.name] == field.default}
        content = {
            name: value for name, value in content.items() if name in PLAIN_FIELDS or name not in unused
        }
        return content | ({"tiers": [list(tier) for tier in self.tiers]} if self.tiers else {})

    @property
    def is_raw(self) -> bool:
        """Whether the tensor keeps the model's dtype."""
        return self.bits == layout.RAW_BITS

    @property
    def tokens_per_group(self) -> int:
        """Consecutive tokens that must be packed together."""
        return (
            self.group_size if self.axis == "channel" and self.group_size != "head" and not self.is_raw else 1
        )


@dataclass(frozen=True)
class WindowRule:
    """Which recent tokens of a layer stay raw.

    Attributes:
        kind: "fixed", the only kind: at least `length` recent tokens, whatever the context. KVmix's windows
            are ratios; `kvmix_fx.plan.presets.kvmix` says what they would be and why there are none.
        length: tokens kept raw at least. Up to one tile more waits to be packed.

    Raises:
        PlanFieldError: another kind, or a negative length.
    """

    kind: str = "fixed"
    length: int = 32

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, WINDOW_KINDS)
        check_integer("length", self.length, 0)


@dataclass(frozen=True)
class LayerPlan:
    """How one layer keeps its cache. Keys and values share window, sink and tile.

    Attributes:
        key: how keys are quantized.
        value: how values are quantized.
        window: recent tokens kept raw.
        sink_length: leading tokens kept raw. None here, as in plan files that do not say; whatever makes a
            plan of its own accord (the presets of ours, the allocators) keeps `DEFAULT_SINK`.
        tile: tokens packed together, a multiple of every group that runs along tokens. None takes the
            smallest such number from 32 up.
        token_tier: tokens that are kept at more bits; None for all alike.

    Warns:
        RangeWarning: values that are not rotated have a range factor below 1.

    Raises:
        PlanFieldError: a field has a wrong type or a value outside its choices.
        FormatError: a group along tokens does not divide the tile.
    """

    key: QuantSpec
    value: QuantSpec
    window: WindowRule = WindowRule()
    sink_length: int = 0
    tile: int | None = None
    token_tier: TokenTier | None = None

    def __post_init__(self) -> None:
        check_type("key", self.key, QuantSpec)
        check_type("value", self.value, QuantSpec)
        check_type("window", self.window, WindowRule)
        check_integer("sink_length", self.sink_length, 0)
        if self.tile is not None:
            check_integer("tile", self.tile, 1)
        if self.token_tier is not None:
            check_type("token_tier", self.token_tier, TokenTier)
            self._check_high_bits(self.token_tier)
        if self.value.tiers:
            raise PlanFieldError("tiers are of keys: values have no order of channels", "value")
        if self.key.rotation != "none":
            raise PlanFieldError(
                "keys are not rotated: it takes away the channels that tell them apart; rotate values",
                "key",
            )
        factor = self.value.range_factor
        if factor is not None and factor < 1 and self.value.rotation == "none" and not self.value.is_raw:
            warnings.warn(
                f"range_factor={factor} cuts off the largest values, which are not rotated: rotate them "
                '(rotation="hadamard") or leave range_factor at 1',
                RangeWarning,
                stacklevel=3,
            )
        self._formats()

    @classmethod
    def parse(
        cls, text: str, head_dim: int | None = None, *, window: int = 32, tile: int | None = None
    ) -> LayerPlan:
        """The layer that a text such as "k4v2 g64 w128 s4" describes.

        Keys are grouped per channel, values per token, in groups of 32 unless the text says otherwise.

        Args:
            text: bits of keys and values, then group size, recent window and sink where they are not usual.
            head_dim: channels of a head; values are grouped per head where groups are no smaller than it.
            window: recent tokens kept raw if the text names no number.
            tile: tokens packed together.

        Raises:
            PlanFieldError: the text cannot be read, or a value is outside its choices.
            FormatError: its parts do not fit together.
        """
        said = parse_layer(text)
        group = 32 if said.group_size is None else said.group_size
        whole = head_dim is not None and group >= head_dim
        return cls(
            QuantSpec(said.key_bits, "channel", group),
            QuantSpec(said.value_bits, "token", "head" if whole else group),
            WindowRule(length=window if said.window is None else said.window),
            said.sink_length or 0,
            tile,
        )

    def to_dict(self) -> dict[str, Any]:
        """As a plan file has it."""
        content = asdict(self) | {"key": self.key.to_dict(), "value": self.value.to_dict()}
        if self.token_tier is None:
            del content["token_tier"]
        return content

    @property
    def labels(self) -> tuple[str, str]:
        """The bits of keys and of values for people: ("4", "2")."""
        key, value = self._formats()
        return key.label, value.label

    @property
    def label(self) -> str:
        """The bits for people: "K4V2"."""
        return pair_label(*self.labels)

    @property
    def is_raw(self) -> bool:
        """Whether both tensors stay raw; such a layer keeps the model's own plain cache."""
        return self.key.is_raw and self.value.is_raw

    @property
    def tile_length(self) -> int:
        """Tokens packed together, with the default resolved."""
        if self.tile is not None:
            return self.tile
        group = math.lcm(self.key.tokens_per_group, self.value.tokens_per_group)
        return -(-SMALLEST_DEFAULT_TILE // group) * group

    def in_window(self) -> LayerPlan:
        """This plan for a layer whose tokens leave a window at its front: without a sink, which would too."""
        return replace(self, sink_length=0) if self.sink_length else self

    def most_of_window(self, window: int) -> int:
        """The most tokens of a sliding window that a growing cache holds when a step is done."""
        if self.is_raw:
            return window - 1
        return max(window - 1, self.window.length) + self.tile_length - 1

    def widened(self, roles: Collection[int]) -> LayerPlan:
        """With scales of single precision for keys (role 0), values (1) or both."""
        key, value = (
            replace(spec, scale_dtype="float32") if role in roles and not spec.is_raw else spec
            for role, spec in enumerate((self.key, self.value))
        )
        return replace(self, key=key, value=value)

    def packs_window(self, window: int) -> bool:
        """Whether anything of a sliding window of so many tokens is packed."""
        return not self.is_raw and not self.whole_window(window)

    def whole_window(self, window: int) -> str:
        """Why a sliding window of so many tokens stays raw in a packed layer; '' if it does not."""
        if self.token_tier is not None:
            return NO_TIER_IN_WINDOW
        if not all(fmt.sums_packed for fmt in self._formats()):
            return NO_ORDERS_IN_WINDOW
        return raw_window(window, self.window.length, self.tile_length)

    def formats(self, head_dim: int, value_dim: int | None = None) -> tuple[TensorFormat, TensorFormat]:
        """Storage formats of the keys and the values for heads of `head_dim` channels.

        `value_dim`: channels of a value, if they are others. Values without any are not packed.

        Raises:
            HeadSizeError: a tensor with such heads cannot be packed as planned.
        """
        formats = self._formats()
        if value_dim == 0 and not self.is_raw:
            formats = formats[0], self._format("value", QuantSpec(layout.RAW_BITS))
        sizes = head_dim, head_dim if value_dim is None else value_dim
        for role, fmt, size in zip(("key", "value"), formats, sizes, strict=True):
            try:
                layout.check_head_size(fmt, size)
            except HeadSizeError as error:
                raise HeadSizeError(f"{role}: {error}") from None
        return formats

    def gains(self, tier: TokenTier) -> bool:
        """Whether a high tier has more bits than this packed layer, in keys or values, and nowhere fewer."""
        low = self._most_bits()
        return min(low) < tier.bits >= max(low)

    def _most_bits(self) -> tuple[int, int]:
        key, value = (max(spec.bits, *(bits for bits, _ in spec.tiers), 0) for spec in (self.key, self.value))
        return key, value

    def _check_high_bits(self, tier: TokenTier) -> None:
        packed = not (self.key.is_raw or self.value.is_raw)
        if packed and not tier.evict and not self.gains(tier):
            key, value = self._most_bits()
            raise PlanFieldError(
                f"a high tier of {tier.bits} bits over K{key}V{value} keeps those that matter at no more "
                'bits than the others: take more (TokenTier(bits=16)), or no tier (token_tier="none")',
                "token_tier",
            )

    def _formats(self) -> tuple[TensorFormat, TensorFormat]:
        return self._format("key", self.key), self._format("value", self.value)

    def _format(self, role: str, spec: QuantSpec) -> TensorFormat:
        try:
            fmt = spec.format(self.tile_length, self.sink_length, self.window.length)
            if self.token_tier is None:
                return fmt
            return layout.with_high(fmt, self.token_tier.format(scored=role == "key"))
        except FormatError as error:
            raise FormatError(f"{role}: {error}") from None


@dataclass(frozen=True, repr=False)
class KVPlan:
    """One `LayerPlan` for every layer of a model. Immutable, hashable, picklable.

    Attributes:
        layers: the plan of each layer, first to last.
        geometry: sizes of the model, needed by every figure in bytes; `for_model` fills it in.
        provenance: how the plan was made; informative only.
        name: what reports call the plan.
        base_model: model the plan was made for, as a path or Hub id; informative only.

    Raises:
        PlanFieldError: a field has a wrong type.
        PlanLayerError: no layers, or not as many as the geometry has.
        HeadSizeError: the geometry's heads cannot be packed as planned; names the layer.
    """

    layers: tuple[LayerPlan, ...]
    geometry: ModelGeometry | None = None
    provenance: Mapping[str, Any] = Provenance()
    name: str = "custom"
    base_model: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not isinstance(self.provenance, Provenance):
            check_type("provenance", self.provenance, Mapping)
            object.__setattr__(self, "provenance", Provenance(self.provenance))
        check_type("name", self.name, str)
        if self.base_model is not None:
            check_type("base_model", self.base_model, str)
        if not self.layers:
            raise PlanLayerError("a plan needs at least one layer")
        for index, layer in enumerate(self.layers):
            check_type(f"layers[{index}]", layer, LayerPlan)
        if self.geometry is not None:
            check_type("geometry", self.geometry, ModelGeometry)
            self._check_geometry(self.geometry)

    def _check_geometry(self, geometry: ModelGeometry) -> None:
        if geometry.num_layers != len(self.layers):
            raise PlanLayerError(
                f"the plan has {len(self.layers)} layers, the model has {geometry.num_layers}; "
                "build the plan from this model, as KVPlan.uniform(model, key_bits=4, value_bits=2) does"
            )
        for index, layer in enumerate(self.layers):
            sizes = geometry.layer(index)
            if not sizes.num_kv_heads:
                continue
            try:
                layer.formats(sizes.head_dim, sizes.value_dim)
            except HeadSizeError as error:
                raise HeadSizeError(f"layer {index}, {error}") from None
            if layer.key.channel_order:
                heads = len(decode_order(layer.key.channel_order, sizes.head_dim))
                if heads != sizes.num_kv_heads:
                    raise PlanLayerError(
                        f"layer {index} has orders of channels for {heads} KV heads, the model has "
                        f"{sizes.num_kv_heads}: take the order from a profile of this model"
                    )

    @classmethod
    def uniform(
        cls,
        target: object,
        key_bits: int,
        value_bits: int | None = None,
        group_size: int = 32,
        **options: Any,
    ) -> KVPlan:
        """The same bits in every layer; see `kvmix_fx.plan.presets.uniform`."""
        from kvmix_fx.plan import presets

        return presets.uniform(target, key_bits, value_bits, group_size, **options)

    @classmethod
    def preset(cls, name: str, target: object, **options: Any) -> KVPlan:
        """A published method's plan by name; see `kvmix_fx.plan.presets.preset`."""
        from kvmix_fx.plan import presets

        return presets.preset(name, target, **options)

    def with_layers(
        self,
        selection: LayerSelection,
        *,
        key: QuantSpec | int | None = None,
        value: QuantSpec | int | None = None,
        window: WindowRule | int | None = None,
        sink_length: int | None = None,
        tile: int | None = None,
        token_tier: TokenTier | Literal["none"] | None = None,
    ) -> KVPlan:
        """A copy in which the selected layers are changed; what is None stays.

        Args:
            selection: an int, several, a range, a slice, or a text such as "0-3,-1", "last:2", "all".
            key: a new spec, or new bits in the layer's present spec.
            value: likewise.
            window: a new rule, or the length of a fixed window.
            sink_length: leading tokens kept raw.
            tile: tokens packed together.
            token_tier: tokens kept at more bits; "none" takes a tier away. A layer that becomes raw has none.

        Raises:
            PlanLayerError: a selected layer does not exist, or none is selected.
            PlanFieldError: the selection cannot be read, or a value has a wrong type.
            FormatError: the new parts do not fit together.
        """
        chosen = set(select_layers(selection, len(self.layers)))

        def change(layer: LayerPlan) -> LayerPlan:
            specs = _changed_spec(layer.key, key), _changed_spec(layer.value, value)
            raw = all(spec.is_raw for spec in specs)
            tier = layer.token_tier if token_tier is None else token_tier
            return LayerPlan(
                *specs,
                layer.window if window is None else as_window(window),
                layer.sink_length if sink_length is None else sink_length,
                layer.tile if tile is None else tile,
                None if raw or tier == "none" else tier,
            )

        layers = (change(layer) if index in chosen else layer for index, layer in enumerate(self.layers))
        return replace(self, layers=tuple(layers))

    def for_model(self, model: object) -> KVPlan:
        """The plan with the geometry of `model` (or configuration), after checking that it fits.

        Raises:
            PlanLayerError: the model has another number of layers.
            HeadSizeError: its heads cannot be packed as planned; names the layer.
            PlanGeometryError: the model does not tell its sizes.
        """
        geometry = ModelGeometry.of(model)
        return self if geometry == self.geometry else replace(self, geometry=geometry)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of what the runtime acts on: the layers, with default tiles resolved.

        Geometry, provenance and names do not enter, so `for_model` leaves the digest alone.
        """
        layers = [replace(layer, tile=layer.tile_length).to_dict() for layer in self.layers]
        canonical = json.dumps(layers, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def key_bits(self) -> float:
        """Mean bits of the keys' codes over the layers."""
        return sum(layer.key.bits for layer in self.layers) / len(self.layers)

    @property
    def value_bits(self) -> float:
        """Mean bits of the values' codes over the layers."""
        return sum(layer.value.bits for layer in self.layers) / len(self.layers)

    def nominal_bits(self) -> float:
        """Mean bits of the codes alone; what the cache costs is `bits_per_element`."""
        return (self.key_bits + self.value_bits) / 2

    def bits_per_element(self, length: int | None = None) -> float:
        """Mean bits per cached element over all layers, keys and values.

        Counts codes, scales and offsets, and with a length also the raw tokens of sink and window, at
        16 bits. Slots that are allocated and still empty are left to `nbytes`.

        Args:
            length: tokens in the cache; None for the limit of long contexts, where raw tokens vanish.

        Raises:
            PlanGeometryError: a group spans the head, or tokens have tiers, and the plan carries no geometry.
            PlanFieldError: a length below 1.
        """
        if length is not None:
            check_integer("length", length, 1)
        if self.geometry is None:
            formats = [fmt for layer in self.layers for fmt in layer._formats()]
            if any(fmt.high or (fmt.group_size == layout.WHOLE_HEAD and not fmt.is_raw) for fmt in formats):
                self._needed_geometry()
            # only groups that span the head, and positions, are measured by its size
            return sum(mean_bits(fmt, 0, length) for fmt in formats) / len(formats)
        bits = elements = 0.0
        for _, layer, sizes in self._cached_layers():
            for fmt, channels in zip(layer._formats(), (sizes.head_dim, sizes.value_dim), strict=True):
                bits += sizes.num_kv_heads * channels * mean_bits(fmt, channels, length)
                elements += sizes.num_kv_heads * channels
        return bits / elements if elements else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one more token of one batch row costs in a long context, over all layers and ranks.

        Windows do not grow, so layers that have one cost nothing.
        """
        self._needed_geometry()
        total = 0.0
        for _, layer, sizes in self._cached_layers():
            for fmt, channels in zip(layer._formats(), (sizes.head_dim, sizes.value_dim), strict=True):
                if not sizes.window:
                    total += sizes.num_kv_heads * channels * mean_bits(fmt, channels, None)
        return total / 8

    def _cached_layers(self) -> Iterator[tuple[LayerPlan, LayerPlan, LayerGeometry]]:
        """The layers that have a cache: as planned, with windows left at 16 bits so, and its sizes."""
        geometry = self._needed_geometry()
        for index, layer in enumerate(self.layers):
            sizes = geometry.layer(index)
            if sizes.num_kv_heads and (not sizes.window or layer.packs_window(sizes.window)):
                yield layer, layer, sizes
            elif sizes.num_kv_heads:
                yield layer, replace(layer, key=_RAW, value=_RAW, token_tier=None), sizes

    def nbytes(
        self,
        batch: int,
        length: int,
        *,
        itemsize: int = 2,
        cache: CacheKind = "growing",
        tp_size: int = 1,
        source_length: int | None = None,
    ) -> int:
        """Bytes that a cache under this plan allocates, in all or on one rank.

        A layer that keeps both tensors raw is left to the model's own cache and counted at exactly
        `length` tokens, or as many as its window has. A packed window is counted at its largest, in a growing
        cache; see `packs_fixed_windows` for those of fixed capacity. Layers without a KV cache cost nothing.

        Args:
            batch: rows.
            length: tokens stored for a growing cache, capacity in tokens for a fixed one.
            itemsize: bytes of one element of the model's dtype.
            cache: "growing" or "fixed".
            tp_size: ranks among which tensor parallelism shares the KV heads out; the figure is that of
                one rank, and all ranks together allocate tp_size times as much. 1 counts the whole cache.
            source_length: tokens of the encoder, which models with cross-attention keep besides; None for as
                many as `length`.

        Raises:
            PlanGeometryError: the plan carries no geometry.
            PlanFieldError: an argument that is no count, or an unknown kind of cache.
            HeadSplitError: the KV heads cannot be shared out among so many ranks.
        """
        check_integer("batch", batch, 1)
        check_integer("length", length, 0)
        check_integer("itemsize", itemsize, 1)
        check_choice("cache", cache, CACHE_KINDS)
        source = length if source_length is None else source_length
        check_integer("source_length", source, 0)
        geometry = self._needed_geometry()
        geometry.heads_per_rank(tp_size)
        whole = cache == "fixed" and self.packs_fixed_windows(length)
        total = 0
        for planned, layer, sizes in self._cached_layers():
            tokens = length
            if sizes.window and whole:
                layer = planned
            elif sizes.window and cache == "fixed":
                layer = replace(layer, key=_RAW, value=_RAW, token_tier=None)
                tokens = min(length, sizes.window)
            elif sizes.window:
                layer = layer.in_window()
                tokens = min(length, layer.most_of_window(sizes.window))
            own = _layer_bytes(layer, sizes, tokens, itemsize, cache)
            total += geometry.shared_out(sizes.num_kv_heads, tp_size) * own
            if sizes.cross_heads:
                across = _layer_bytes(layer, sizes, source, itemsize, cache)
                total += geometry.shared_out(sizes.cross_heads, tp_size) * across
        return batch * total

    def packs_fixed_windows(self, capacity: int) -> bool:
        """Whether a cache of fixed capacity keeps all tokens of its windows, packed.

        It does where that takes no more than the windows do at 16 bits, and where no token ever leaves them.
        All of a model's windows share a mask, so all of them are kept so or none.
        """
        geometry = self._needed_geometry()
        for layer, sizes in zip(self.layers, map(geometry.layer, range(len(self.layers))), strict=True):
            if sizes.num_kv_heads and sizes.window < capacity and sizes.window:
                raw = sizes.window * 2 * (sizes.head_dim + sizes.value_dim)
                if _layer_bytes(layer, sizes, capacity, 2, "fixed") > raw:
                    return False
        return True

    def _needed_geometry(self) -> ModelGeometry:
        if self.geometry is None:
            raise PlanGeometryError(
                "this figure depends on the model's sizes: use plan.for_model(model), "
                "or make the plan with geometry=ModelGeometry(...)"
            )
        return self.geometry

    def check_policies(self) -> None:
        """Raise PlanFieldError if a tier of tokens has a policy that calls of a model cannot follow."""
        for index, layer in enumerate(self.layers):
            if layer.token_tier is not None and layer.token_tier.policy == "oracle":
                raise PlanFieldError(
                    f'layer {index}: the policy "oracle" takes scores that its caller gives, a model gives '
                    "none. Take accumulated, mean, last or norm (or random, a control)",
                    "policy",
                )

    def __repr__(self) -> str:
        count = sum(layer.token_tier is not None for layer in self.layers)
        tiered = f"token tiers in {count}, " if count else ""
        return (
            f"KVPlan({self.name!r}, {len(self.layers)} layers, key_bits={self.key_bits:.4g}, "
            f"value_bits={self.value_bits:.4g}, {tiered}digest={self.digest[:12]!r})"
        )

    def __str__(self) -> str:
        return self.describe()

    def describe(self) -> str:
        """A short table, one row for all layers planned alike."""
        from kvmix_fx.plan.describe import describe

        return describe(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan file's content as plain JSON values, with the digest."""
        from kvmix_fx.plan import io

        return io.to_dict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> KVPlan:
        """The plan written in `content`; see `kvmix_fx.plan.io` for what may be left out.

        Raises:
            PlanFileError: naming the entry that is wrong.
            PlanVersionError: the content is of a newer format.
        """
        from kvmix_fx.plan import io

        return io.from_dict(content)

    def to_json(self) -> str:
        """The plan file's text, one layer a line."""
        from kvmix_fx.plan import io

        return io.to_json(self)

    @classmethod
    def from_json(cls, text: str) -> KVPlan:
        """The plan written in JSON `text`. Raises as `from_dict` does."""
        from kvmix_fx.plan import io

        return io.from_json(text)

    def save(self, path: str | Path) -> Path:
        """Write the plan file; returns its path."""
        from kvmix_fx.plan import io

        return io.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> KVPlan:
        """Read a plan file. Raises as `from_dict` does, naming the file."""
        from kvmix_fx.plan import io

        return io.load(path)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `kvmix_plan.json` into `folder`, made if missing; returns the file's path."""
        from kvmix_fx.plan import io

        return io.save_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path, revision: str | None = None) -> KVPlan:
        """Read `kvmix_plan.json` from a local folder, or else from a Hub repository.

        Args:
            folder_or_hub_id: a folder, a plan file, a Hub id such as "organisation/name", or a plan that
                comes along, such as "kvmix:smollm2-135m/2.5" (see `kvmix_fx.plan.shipped_plans`).
            revision: branch, tag or commit of the Hub repository.

        Raises:
            PlanFileError: no such folder or repository, no plan in it, or a wrong entry.
            PlanVersionError: the file is of a newer format.
            MissingPackageError: the Hub is needed and huggingface_hub is not installed.
        """
        from kvmix_fx.plan import io

        return io.from_pretrained(folder_or_hub_id, revision)


_RAW = QuantSpec(layout.RAW_BITS)


def _layer_bytes(layer: LayerPlan, sizes: LayerGeometry, tokens: int, itemsize: int, cache: CacheKind) -> int:
    """Bytes of one KV head of a layer that holds so many tokens."""
    channels = sizes.head_dim, sizes.value_dim
    if layer.is_raw:
        return tokens * sum(channels) * itemsize
    both = zip(layer._formats(), channels, strict=True)
    return sum(allocated_bytes(fmt, size, tokens, itemsize, cache) for fmt, size in both)


def as_window(window: WindowRule | int) -> WindowRule:
    """A fixed window of that length, unless it is a rule already."""
    if isinstance(window, WindowRule):
        return window
    check_integer("window", window, 0)  # by the name that it was given under
    return WindowRule(length=window)


def _changed_spec(spec: QuantSpec, change: QuantSpec | int | None) -> QuantSpec:
    if change is None:
        return spec
    return change if isinstance(change, QuantSpec) else replace(spec, bits=change)
