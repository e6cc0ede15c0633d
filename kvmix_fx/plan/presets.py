"""Plans of published methods, as far as segments of packed and raw tokens express them.

Each takes a `target`: a model, its configuration, a `ModelGeometry`, or just the number of layers (the plan
then carries no geometry until `for_model`). Keys are grouped along tokens in each channel and values along
channels in each token, after the rotary embedding; what is packed is never rounded twice.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence, Sized
from types import MappingProxyType
from typing import Any

from kvmix_fx.errors import HeadSizeError, PlanLayerError, PresetError
from kvmix_fx.plan.checks import check_integer, check_positive
from kvmix_fx.plan.geometry import ModelGeometry
from kvmix_fx.plan.schema import (
    DEFAULT_SINK,
    Axis,
    GroupSize,
    KVPlan,
    LayerPlan,
    QuantSpec,
    ScaleDtype,
    WindowRule,
    as_window,
)
from kvmix_fx.plan.selection import LayerSelection, select_layers
from kvmix_fx.plan.token_tier import Policy, TokenTier
from kvmix_kernels import layout


def uniform(
    target: object,
    key_bits: int,
    value_bits: int | None = None,
    group_size: int = 32,
    *,
    key_axis: Axis = "channel",
    value_axis: Axis = "token",
    window: WindowRule | int = 32,
    sink_length: int = DEFAULT_SINK,
    tile: int | None = None,
    scale_dtype: ScaleDtype = "float16",
    name: str | None = None,
) -> KVPlan:
    """The same bits in every layer.

    Args:
        target: model, configuration, ModelGeometry or number of layers.
        key_bits: bits of the keys' codes.
        value_bits: bits of the values' codes; None for those of the keys.
        group_size: elements per scale and offset, for keys and values.
        key_axis: grouping of the keys.
        value_axis: grouping of the values.
        window: recent tokens kept raw.
        sink_length: leading tokens kept raw.
        tile: tokens packed together; None for the smallest default.
        scale_dtype: dtype of scales and offsets.
        name: of the plan; None for one such as "uniform K4V2 g32".

    Raises:
        PlanFieldError: a value outside its choices.
        FormatError: parts that do not fit together.
        HeadSizeError: the target's heads cannot be packed so.
        PlanGeometryError: the target does not tell its sizes.
    """
    value_bits = key_bits if value_bits is None else value_bits
    layer = LayerPlan(
        QuantSpec(key_bits, key_axis, group_size, scale_dtype),
        QuantSpec(value_bits, value_axis, group_size, scale_dtype),
        as_window(window),
        sink_length,
        tile,
    )
    return _repeat(layer, target, name or f"uniform {layer.label} g{group_size}", "uniform")


def kivi(
    target: object,
    bits: int = 2,
    group_size: int = 32,
    window: WindowRule | int = 128,
    *,
    sink_length: int = 0,
) -> KVPlan:
    """KIVI (arXiv 2402.02750): one low bit width, keys per channel, values per token, a raw window.

    Groups of 32, scales and offsets in float16, no sinks, R = 128, as published. One thing differs: KIVI's
    window holds 0 to R - 1 recent keys and R recent values; here keys and values share one window that never
    falls below `window` tokens and holds up to a group more, so this plan keeps more keys raw. In the limit
    of long contexts its bits are KIVI's own.
    """
    layer = LayerPlan(
        QuantSpec(bits, "channel", group_size),
        QuantSpec(bits, "token", group_size),
        as_window(window),
        sink_length,
    )
    return _repeat(layer, target, f"kivi {bits}-bit", "kivi", "arXiv 2402.02750")


def kv_adaquant(
    target: object,
    key_bits: int = 4,
    value_bits: int = 2,
    *,
    key_axis: Axis = "token",
    key_group_size: GroupSize | None = None,
    value_group_size: GroupSize = "head",
    window: WindowRule | int = 64,
    sink_length: int = 0,
) -> KVPlan:
    """KV-AdaQuant (arXiv 2502.15075): more bits for keys than for values, K4V2 in every layer.

    Keys and values are grouped per token, 128 channels in the paper: one group per head here, which is the
    same for heads of 128. `key_axis="channel"` groups keys along 32 tokens of a channel instead, the variant
    that the paper's own study of group sizes favours. Two things differ. The paper's code rounds the whole
    cache again at each flush; here nothing is rounded twice. Its residual empties when it reaches 64 tokens;
    here it never falls below 64. The allocator of its repository is `kvmix_fx.plan.allocators` "greedy".
    """
    if key_group_size is None:
        key_group_size = "head" if key_axis == "token" else 32
    layer = LayerPlan(
        QuantSpec(key_bits, key_axis, key_group_size),
        QuantSpec(value_bits, "token", value_group_size),
        as_window(window),
        sink_length,
    )
    return _repeat(layer, target, f"kv-adaquant {layer.label}", "kv-adaquant", "arXiv 2502.15075")


def kvmix(
    target: object,
    high_key_layers: LayerSelection,
    high_value_layers: LayerSelection,
    *,
    high_key_bits: int = 3,
    high_value_bits: int = 4,
    low_bits: int = 2,
    group_size: int = 32,
    window: WindowRule | int = 32,
    sink_length: int = 0,
) -> KVPlan:
    """KVmix (arXiv 2506.08018): more bits in the layers whose keys, or whose values, matter most.

    The two rankings are independent; the paper takes the first 20 % of each. Either may be empty. Groups of
    32, keys per channel, values per token, after the rotary embedding, no sinks, as published. Two things
    differ.

    Its 3-bit keys put 11 elements into a 32-bit word, which clips every eleventh and needs a scale per 11
    tokens (5.8 bits per element); here 3 bits are dense, in groups like the others' (4.0 bits at 32), and
    `high_key_bits=4` is the next step up.

    Its window keeps a ratio r of *itself and what is new* (.1 at 2 bits, .2 above) whenever it flushes: with
    .2 a prompt of 688 leaves 144 tokens, the next steps 49 and 18, and from then on it is at most
    G / (1 - r). Here it is one group. There is no kind of window for that rule, nor for the one of a class in
    its repository, a ratio of the whole context. The first would make what is packed depend on how the tokens
    arrived, while here it follows from their number alone: appended one by one or at once, a cache holds the
    same bits. The second grows without end, and raw slots are allocated once; it would cost r * (16 - b) bits
    per element at any length, for b effective bits: 1.3 at 10 % and 2.6 at 20 % of the context at 3 bits.

    Args:
        target: model, configuration, ModelGeometry or number of layers.
        high_key_layers: layers with `high_key_bits`.
        high_value_layers: layers with `high_value_bits`.
        high_key_bits: bits of important keys.
        high_value_bits: bits of important values.
        low_bits: bits of all others.
        group_size: elements per scale and offset, for keys and values.
        window: recent tokens kept raw.
        sink_length: leading tokens kept raw.

    Raises:
        PlanLayerError: a layer the target does not have.
        PlanFieldError, FormatError, HeadSizeError, PlanGeometryError: as `uniform`.
    """
    layer = LayerPlan(
        QuantSpec(low_bits, "channel", group_size),
        QuantSpec(low_bits, "token", group_size),
        as_window(window),
        sink_length,
    )
    plan = _repeat(layer, target, "kvmix", "kvmix", "arXiv 2506.08018")
    if not _is_empty(high_key_layers):
        plan = plan.with_layers(high_key_layers, key=high_key_bits)
    if not _is_empty(high_value_layers):
        plan = plan.with_layers(high_value_layers, value=high_value_bits)
    return plan


TIER_STEPS = ((4, 2), (2, 2), (2, 3))
"""Of `tiers`, by rising bits: one of how many channels of keys is at 4 bits, and bits of values."""
DROPS_BELOW = 2.25
"""Bits below which `tiers` drops channels of keys, where it is told the layers that can do without them."""


def tiers(
    target: object,
    bits: float = 2.4,
    *,
    channel_orders: Sequence[str] | None = None,
    drop_layers: LayerSelection = (),
    group_size: int = 128,
    window: WindowRule | int = 32,
    sink_length: int = DEFAULT_SINK,
) -> KVPlan:
    """Channel tiers of keys, rotated values, scales of a byte and four sinks: the plan for who names none.

    Keys keep a part of their channels at 4 bits and the others at 2, values are rounded in a rotated basis.
    There are three such plans: a quarter of the channels at 4 bits and symmetric values of 2 (2.34 bits
    in all at head size 128, 2.375 at 64), half of them (2.59, 2.625), half of them and values of 3 bits
    (3.13, 3.19). Below 2.25 bits the layers of `drop_layers` keep of a quarter of their channels the mean
    of each group of tokens alone (2.1 if all do). One layer that cannot do without spoils everything, and
    it is another one in each model: take them from a profile, whose `droppable()` has measured every
    layer.
    Counts are rounded to multiples of 8 channels. The idea of tiers is MixKVQ's (arXiv 2512.19206) and
    Kitty's (arXiv 2511.18643); rotation is QuaRot's (arXiv 2404.00456).

    Args:
        target: model, configuration or ModelGeometry.
        bits: effective bits that are wished for: of the three the nearest is taken, which may have more
            (`plan.bits_per_element()` says how many it has).
        channel_orders: the order of channels of each layer, from `kvmix_fx.profiling.channel_orders`; None
            lets every prompt choose its own, which needs no calibration.
        drop_layers: layers that may drop channels; without any, less than 2.25 bits is not to be had.
        group_size: tokens of keys that share a scale.
        window: recent tokens kept raw.
        sink_length: leading tokens kept raw.

    Raises:
        PlanLayerError: not as many orders as layers, or a layer that there is not.
        PlanFieldError, FormatError, HeadSizeError, PlanGeometryError: as `uniform`.
    """
    check_positive("bits", bits)
    geometry = ModelGeometry.of(target)
    if channel_orders is not None and len(channel_orders) != geometry.num_layers:
        raise PlanLayerError(
            f"{len(channel_orders)} orders of channels for {geometry.num_layers} layers: take them from a "
            "profile of this model"
        )
    dropping = bits < DROPS_BELOW and not _is_empty(drop_layers)
    short = set(select_layers(drop_layers, geometry.num_layers)) if dropping else set()

    def layer(index: int, share: int, value_bits: int) -> LayerPlan:
        head_dim = geometry.layer(index).head_dim
        if geometry.layer(index).num_kv_heads:
            _check_head_dim(head_dim)
        high = max(8, head_dim // share // 8 * 8)
        rest = head_dim - high
        key = QuantSpec(
            4,
            "channel",
            group_size,
            "byte",
            tiers=((4, high), (2, rest - high), (0, high)) if index in short else ((4, high), (2, rest)),
            order="prompt" if channel_orders is None else "plan",
            channel_order="" if channel_orders is None else channel_orders[index],
        )
        value = QuantSpec(value_bits, "token", "head", "byte", rotation="hadamard", symmetric=value_bits == 2)
        return LayerPlan(key, value, as_window(window), sink_length)

    def plan(step: tuple[int, int]) -> KVPlan:
        layers = tuple(layer(index, *step) for index in range(geometry.num_layers))
        return KVPlan(layers, geometry, {"preset": "tiers"}, f"tiers {layers[0].label}")

    # channels are only dropped in the smallest
    plans = [plan(step) for step in (TIER_STEPS[:1] if dropping else TIER_STEPS)]
    return min(plans, key=lambda found: abs(found.bits_per_element() - bits))


def mikv(
    target: object,
    low_bits: int = 2,
    high_bits: int = 16,
    share: float = 0.2,
    *,
    policy: Policy = "accumulated",
    recent: float = 0.5,
    balancer: bool = True,
    channel_tiers: bool = False,
    window: WindowRule | int = 32,
    sink_length: int = 0,
) -> KVPlan:
    """MiKV (arXiv 2402.18096): tokens that matter at high bits, all others at low ones, none evicted.

    Keys and values are grouped per token, half a head a group. Differs from the paper: the low tier has codes
    of the tokens in the high tier too, which then can leave it without being rounded again; a raw window
    comes beside the recent half of the tier; who is in the tier is decided anew when a tile is packed, not at
    every step; factors of the balancer are powers of two.

    Args:
        target: model, configuration or ModelGeometry.
        low_bits: bits of all packed tokens; 0 ignores those outside the high tier, as eviction does (a
            control: codes of one bit are still stored).
        high_bits: bits of the tokens in the high tier: 16, 8 or 4.
        share: of the packed tokens, in the high tier.
        policy: how importance is counted, see `TokenTier`.
        recent: part of the tier that its newest tokens have.
        balancer: whether keys and queries are balanced.
        channel_tiers: the formats of `tiers` for the low tier, instead of the paper's; `low_bits` must be 2.
        window: recent tokens kept raw.
        sink_length: leading tokens kept raw.

    Raises:
        PresetError: `channel_tiers` with other bits than 2.
        PlanFieldError, FormatError, HeadSizeError, PlanGeometryError: as `uniform`.
    """
    check_integer("low_bits", low_bits, 0)
    geometry = ModelGeometry.of(target)
    half = max(16, geometry.head_dim // 2)
    group: GroupSize = half if half % 16 == 0 and geometry.head_dim % half == 0 else "head"
    tier = TokenTier(share, None, high_bits, group, policy, recent, balancer, low_bits == 0)
    facts = {"preset": "mikv", "source": "arXiv 2402.18096"}
    if channel_tiers:
        if low_bits != 2:
            raise PresetError(
                f"channel_tiers has low tiers of about 2 bits: leave low_bits at 2, got {low_bits}"
            )
        plan = tiers(geometry, window=window, sink_length=sink_length)
        return KVPlan(
            plan.with_layers("all", token_tier=tier).layers, geometry, facts, f"mikv over {plan.name}"
        )
    spec = QuantSpec(low_bits or 1, "token", group)
    layer = LayerPlan(spec, spec, as_window(window), sink_length, token_tier=tier)
    return KVPlan((layer,) * geometry.num_layers, geometry, facts, f"mikv {low_bits}/{high_bits} bits")


def zipcache(
    target: object,
    low_bits: int = 2,
    high_bits: int = 4,
    share: float = 0.6,
    *,
    window: WindowRule | int = 32,
    sink_length: int = 0,
) -> KVPlan:
    """ZipCache (arXiv 2405.14256): its score and its share of salient tokens, 4 bits above 2.

    The score is attention divided by the number of queries that saw the token. Differs from the paper: codes
    of the low tier are kept for salient tokens too, so this is larger than 4 bits and 2 bits by share; keys
    are grouped per channel in the low tier and per token in the high one; its scaling of the values' channels
    is left out; every query of the prompt counts, where ZipCache takes a sample.

    Args:
        target: model, configuration or ModelGeometry.
        low_bits: bits of all packed tokens.
        high_bits: bits of salient ones.
        share: of the packed tokens that is salient.
        window: recent tokens kept raw.
        sink_length: leading tokens kept raw.

    Raises:
        PresetError: `low_bits` of 0.
        PlanFieldError, FormatError, HeadSizeError, PlanGeometryError: as `uniform`.
    """
    check_integer("low_bits", low_bits, 0)
    if low_bits == 0:
        raise PresetError(
            'ZipCache evicts nothing: as a control, preset("mikv", low_bits=0) or TokenTier(evict=True) does'
        )
    geometry = ModelGeometry.of(target)
    layer = LayerPlan(
        QuantSpec(low_bits, "channel", 32),
        QuantSpec(low_bits, "token", "head"),
        as_window(window),
        sink_length,
        token_tier=TokenTier(share, None, high_bits, policy="mean", recent=0.0),
    )
    return _repeat(layer, geometry, f"zipcache {high_bits}/{low_bits} bits", "zipcache", "arXiv 2405.14256")


def mixkvq(
    target: object,
    raw_channels: int | None = None,
    high_channels: int | None = None,
    *,
    group_size: int = 32,
    window: WindowRule | int = 0,
    sink_length: int = 0,
) -> KVPlan:
    """MixKVQ (arXiv 2512.19206): channels of keys at 16, 4 and 2 bits, chosen anew for every 128 tokens.

    When 128 tokens wait they are packed together. A channel's salience is the mean size of the queries so
    far, over all query heads of the group, times the range of its keys; keys are per channel and values per
    token in groups of 32, with the smallest number as offset and nothing cut off. Raw channels are in
    bfloat16.

    Differs from the paper in three ways. Its thresholds of salience, searched for each model, give every tile
    its own counts; here counts are fixed, a sixteenth of the channels raw and an eighth at 4 bits, rounded up
    to multiples of 8. What it compares over all heads of a layer is compared within each KV head. And raw
    channels still have a scale and an offset, of 0: 1 bit each in groups of 32. The paper's names count codes
    alone (3.125 bits of keys and 2 of values at head size 128); with scales and orders it is 3.59.

    Args:
        target: model, configuration or ModelGeometry.
        raw_channels: channels of keys at 16 bits; None for a sixteenth of the head.
        high_channels: channels of keys at 4 bits; None for an eighth of the head.
        group_size: elements per scale and offset, for keys and values.
        window: recent tokens kept raw beside those that wait for a tile to be full.
        sink_length: leading tokens kept raw. The paper's main results name none; it also tried 32.

    Raises:
        PresetError: channels that leave none at 2 bits, or a head too small for all three.
        PlanFieldError, FormatError, HeadSizeError, PlanGeometryError: as `uniform`.
    """
    head_dim = ModelGeometry.of(target).head_dim
    _check_head_dim(head_dim)
    raw = _eights(head_dim / 16) if raw_channels is None else raw_channels
    high = _eights(head_dim / 8) if high_channels is None else high_channels
    if min(raw, high, head_dim - raw - high) <= 0:
        raise PresetError(
            f"{raw} raw channels and {high} at 4 bits leave {head_dim - raw - high} of {head_dim} at 2 bits: "
            "set raw_channels and high_channels to multiples of 8 that leave some; heads of 16 have none"
        )
    counts = ((16, raw), (4, high), (2, head_dim - raw - high))
    key = QuantSpec(4, "channel", group_size, tiers=counts, order="tile", range_factor=1.0)
    value = QuantSpec(2, "token", group_size)
    layer = LayerPlan(key, value, as_window(window), sink_length, TIER_TILE)
    return _repeat(layer, target, f"mixkvq {layer.label}", "mixkvq", "arXiv 2512.19206")


def kitty(
    target: object,
    share: float = 0.125,
    *,
    window: WindowRule | int = 128,
    sink_length: int = 32,
) -> KVPlan:
    """Kitty (arXiv 2511.18643): channels of keys at 4 and 2 bits, chosen anew for every 128 tokens.

    Channels are ranked by the mean size of their keys in those tokens, for each KV head; one scale and offset
    for a channel and 128 tokens. Values have 2 bits and one group a head. 32 sinks; 2.41 bits in all at head
    size 128, as published.

    Differs from the paper, whose window holds 0 to 127 recent keys and 128 recent values: keys and values
    share one that never falls below `window`, so 128 more keys are raw. Counts are multiples of 8 channels.

    Args:
        target: model, configuration or ModelGeometry.
        share: of the channels at 4 bits; .25 is Kitty-Pro.
        window: recent tokens kept raw.
        sink_length: leading tokens kept raw.

    Raises:
        PresetError: a share that leaves no channels at 2 bits or none at 4.
        PlanFieldError, FormatError, HeadSizeError, PlanGeometryError: as `uniform`.
    """
    head_dim = ModelGeometry.of(target).head_dim
    _check_head_dim(head_dim)
    high = _eights(head_dim * share)
    if not 0 < high < head_dim:
        raise PresetError(
            f"share={share} is {high} of {head_dim} channels at 4 bits, in multiples of 8: take a share that "
            "leaves some at 4 and some at 2 bits"
        )
    counts = ((4, high), (2, head_dim - high))
    key = QuantSpec(4, "channel", TIER_TILE, tiers=counts, order="tile_keys", range_factor=1.0)
    layer = LayerPlan(key, QuantSpec(2, "token", "head"), as_window(window), sink_length, TIER_TILE)
    return _repeat(layer, target, f"kitty {layer.label}", "kitty", "arXiv 2511.18643")


TIER_TILE = 128
"""Tokens that MixKVQ and Kitty pack together."""


def _check_head_dim(head_dim: int) -> None:
    """Raise HeadSizeError for heads that no tiers fit, before their counts are the ones that are wrong."""
    if head_dim % layout.WORD_BITS:
        raise HeadSizeError(
            f"heads of {head_dim} channels cannot be packed, only those of a multiple of {layout.WORD_BITS}: "
            "keep their layers at 16 bits, as the preset uniform does with key_bits=16"
        )


def _eights(channels: float) -> int:
    """The multiple of 8 that is no smaller, which counts of channels have to be."""
    return math.ceil(channels / 8) * 8


def default_plan(target: object) -> KVPlan:
    """The plan of who names none: the preset `tiers`, about 2.4 bits without calibration."""
    return tiers(target)


PRESETS: Mapping[str, Callable[..., KVPlan]] = MappingProxyType(
    {
        "uniform": uniform,
        "kivi": kivi,
        "kv-adaquant": kv_adaquant,
        "kvmix": kvmix,
        "mixkvq": mixkvq,
        "kitty": kitty,
        "tiers": tiers,
        "mikv": mikv,
        "zipcache": zipcache,
    }
)
"""The presets by the names that `preset` and the command line take."""


def preset(name: str, target: object, **options: Any) -> KVPlan:
    """Make the plan of the preset called `name`.

    Args:
        name: a key of `PRESETS`.
        target: model, configuration or ModelGeometry; for presets that need no head size a number of layers.
        options: what that preset takes.

    Raises:
        PresetError: no such preset, or an option it lacks or does not take.
    """
    make = PRESETS.get(name)
    if make is None:
        close = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        raise PresetError(f"there is no preset {name!r}{hint} known: {', '.join(PRESETS)}")
    signature = inspect.signature(make)
    try:
        signature.bind(target, **options)
    except TypeError as error:
        taken = ", ".join(signature.parameters)
        raise PresetError(f"preset {name!r}: {error}; it takes {taken}") from error
    return make(target, **options)


def _repeat(layer: LayerPlan, target: object, name: str, preset_name: str, source: str = "") -> KVPlan:
    provenance = {"preset": preset_name} | ({"source": source} if source else {})
    if isinstance(target, int) and not isinstance(target, bool):
        if target < 1:
            raise PlanLayerError(f"a plan needs at least one layer, got {target}")
        return KVPlan((layer,) * target, None, provenance, name)
    geometry = ModelGeometry.of(target)
    return KVPlan((layer,) * geometry.num_layers, geometry, provenance, name)


def _is_empty(selection: LayerSelection) -> bool:
    return isinstance(selection, Sized) and not isinstance(selection, str) and len(selection) == 0
