"""What a signal hands to an allocator: scores of tensors, or prices of every way to keep them.

A tensor here is the keys or the values of one layer. Losses of different tensors are taken to add up, which
holds as long as each is small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import NamedTuple

from kvmix_fx.errors import PlanFieldError
from kvmix_fx.plan.geometry import ModelGeometry
from kvmix_fx.plan.schema import QuantSpec
from kvmix_kernels.layout import TIER_CHANNELS


@dataclass(frozen=True)
class Menu:
    """The ways in which keys and values may be kept.

    Attributes:
        keys: formats offered for the keys of every layer.
        values: formats offered for the values of every layer.
    """

    keys: tuple[QuantSpec, ...]
    values: tuple[QuantSpec, ...]

    @classmethod
    def default(cls, geometry: ModelGeometry) -> Menu:
        """All of `uniform`, and what lies between its formats.

        Further keys have scales of a byte (2 bits of them over .8 of the range) or tiers of channels: an
        eighth to three quarters at 4 bits and the others at 2, and one format that drops a quarter. Further
        values are rotated, with scales of a byte. Orders of channels belong to layers, so the menu leaves
        them to the prompt and `Profile.plan` puts in those that were measured.
        """
        plain, head_dim = cls.uniform(geometry), geometry.head_dim
        byte = [
            QuantSpec(bits, "channel", size, "byte", range_factor=NARROW_RANGE if bits == 2 else None)
            for bits, size in ((2, 32), (2, 64), (2, 128), (3, 128), (4, 128))
        ]
        shares = [(1, 7, 0), (2, 6, 0), (4, 4, 0), (6, 2, 0), (2, 4, 2)]
        counts = [[share * head_dim // 8 for share in part] for part in shares]
        tiers = [
            QuantSpec(
                4,
                "channel",
                TIERED_GROUP,
                "byte",
                tiers=tuple((bits, n) for bits, n in zip((4, 2, 0), part, strict=True) if n),
                order="prompt",
            )
            for part in counts
            if sum(part) == head_dim and not any(n % TIER_CHANNELS for n in part)
        ]
        values = [
            QuantSpec(bits, "token", "head", "byte", rotation="hadamard", symmetric=symmetric)
            for bits, symmetric in ((2, True), (2, False), (3, False), (4, False))
        ]
        if head_dim > 32 and head_dim % 32 == 0:
            values.insert(2, QuantSpec(2, "token", 32, "byte", rotation="hadamard"))
        return cls((*plain.keys, *byte, *tiers), (*plain.values, *values))

    @classmethod
    def uniform(
        cls,
        geometry: ModelGeometry,
        bits: Sequence[int] = (2, 3, 4, 8),
        group_sizes: Sequence[int] = (32, 64, 128),
    ) -> Menu:
        """Keys per channel in groups of tokens, values per token in groups of channels; float16 scales.

        Args:
            geometry: of the model; value groups divide its heads, and the whole head is always offered.
            bits: widths offered for both.
            group_sizes: offered for keys, and for values where they are below the head size.
        """
        along_head = [
            size for size in group_sizes if size < geometry.head_dim and geometry.head_dim % size == 0
        ]
        return cls(
            tuple(QuantSpec(b, "channel", size) for b in bits for size in group_sizes),
            tuple(QuantSpec(b, "token", size) for b in bits for size in (*along_head, "head")),
        )

    def predictable(self) -> Menu:
        """The formats whose error `distortion` knows, which is all that a score can be priced with."""
        return Menu(*(tuple(filter(is_predictable, specs)) for specs in (self.keys, self.values)))

    def dropping(self) -> tuple[int, ...]:
        """Positions of the formats of keys that drop channels."""
        return tuple(n for n, spec in enumerate(self.keys) if drops(spec))


NARROW_RANGE = 0.8
"""Of keys of 2 bits with scales of a byte: what is cut off costs less than wide steps do."""
TIERED_GROUP = 128
"""Tokens that share a scale in formats with tiers."""


def drops(spec: QuantSpec) -> bool:
    """Whether a format drops channels."""
    return any(bits == 0 for bits, _ in spec.tiers)


def keeping(spec: QuantSpec) -> QuantSpec:
    """A format that drops channels, with those at 2 bits instead."""
    counts = dict(spec.tiers)
    return replace(spec, tiers=((4, counts[4]), (2, counts.get(2, 0) + counts.get(0, 0))))


def is_predictable(spec: QuantSpec) -> bool:
    """Whether `distortion` says what a format costs: not with tiers, symmetric codes, or part of a range."""
    return not spec.tiers and not spec.symmetric and spec.range_factor is None


@dataclass(frozen=True)
class Scores:
    """How much each tensor matters, larger for those that quantization harms more; no unit.

    A score is a norm: of the tensor, of a gradient. Its square weighs the squared error of the tensor, and
    only ratios of scores matter.

    Attributes:
        signal: what was measured.
        keys: one number per layer.
        values: one number per layer.

    Raises:
        PlanFieldError: lengths differ, or a number is negative or not finite.
    """

    signal: str
    keys: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_layers(self.signal, self.keys, self.values)
        _check_numbers(self.signal, (*self.keys, *self.values))


@dataclass(frozen=True)
class Prices:
    """Predicted loss of every tensor under every format of a menu.

    Attributes:
        signal: what was measured.
        menu: the formats.
        keys: loss by layer and position in `menu.keys`.
        values: loss by layer and position in `menu.values`, in the same unit as the keys'.
        barred: layers and positions in `menu.keys` that no plan may have together, whatever the price.

    Raises:
        PlanFieldError: a table does not fit the menu, a loss is negative or not finite, or a layer may have
            no format at all.
    """

    signal: str
    menu: Menu
    keys: tuple[tuple[float, ...], ...]
    values: tuple[tuple[float, ...], ...]
    barred: frozenset[tuple[int, int]] = frozenset()

    def __post_init__(self) -> None:
        _check_layers(self.signal, self.keys, self.values)
        for layer in {layer for layer, _ in self.barred}:
            if all((layer, n) in self.barred for n in range(len(self.menu.keys))):
                raise PlanFieldError(
                    f"signal {self.signal!r}: no format of the menu is left for the keys of layer {layer}",
                    "barred",
                )
        for role, rows, options in (
            ("keys", self.keys, self.menu.keys),
            ("values", self.values, self.menu.values),
        ):
            for row in rows:
                if len(row) != len(options):
                    raise PlanFieldError(
                        f"signal {self.signal!r}: {len(row)} prices for the {len(options)} formats of the "
                        f"{role}",
                        role,
                    )
                _check_numbers(self.signal, row)

    def within(self, menu: Menu) -> Prices:
        """The prices of some of the formats.

        Raises:
            PlanFieldError: `menu` has a format that is not priced here.
        """
        places = []
        for role, wanted, known in (
            ("keys", menu.keys, self.menu.keys),
            ("values", menu.values, self.menu.values),
        ):
            missing = [spec for spec in wanted if spec not in known]
            if missing:
                raise PlanFieldError(
                    f"signal {self.signal!r} has no price for {missing[0]}: profile with a menu that has it",
                    role,
                )
            places.append([known.index(spec) for spec in wanted])
        keys, values = (
            tuple(tuple(row[n] for n in found) for row in rows)
            for found, rows in zip(places, (self.keys, self.values), strict=True)
        )
        barred = {(layer, n) for n, old in enumerate(places[0]) for layer, at in self.barred if at == old}
        return Prices(self.signal, menu, keys, values, frozenset(barred))

    @classmethod
    def from_scores(cls, scores: Scores, menu: Menu, head_dim: int) -> Prices:
        """Square of the score times the `distortion` of the format: a squared error weighed by the score.

        With w = score squared this is the loss of RateQuant (arXiv 2605.06675) and of KV-AdaQuant's allocator
        (arXiv 2502.15075), w * beta^-bits, with beta derived instead of fitted and with group sizes.
        """
        keys = [distortion(spec, head_dim) for spec in menu.keys]
        values = [distortion(spec, head_dim) for spec in menu.values]
        return cls(
            scores.signal,
            menu,
            tuple(tuple(score**2 * d for d in keys) for score in scores.keys),
            tuple(tuple(score**2 * d for d in values) for score in scores.values),
        )


class Drop(NamedTuple):
    """What dropping channels of one layer costs, nats per prediction: over all prompts, and in the worst."""

    mean: float
    worst: float


def distortion(spec: QuantSpec, head_dim: int) -> float:
    """Expected squared error of a quantized element, for independent normal elements of variance 1.

    The codes of a group cover its range in 2^b - 1 steps. Rounding errs by step^2 / 12 in the mean, and the
    expected range of G normal samples is close to 2 * quantile((G - 3/8) / (G + 1/4)) (Blom 1958), so

        distortion = (2 * quantile((G - 3/8) / (G + 1/4)) / (2^b - 1))^2 / 12.

    One bit more divides it by 5.4 (from 2 to 3) and 4.6 (from 3 to 4); RateQuant fitted beta = 5.0 to 5.3 to
    this quantizer. Groups of 64 instead of 32 multiply it by 1.28. A raw tensor has none.
    """
    if spec.is_raw:
        return 0.0
    group = head_dim if spec.group_size == "head" else spec.group_size
    if group == 1:
        return 0.0  # its own offset
    spread = 2 * NormalDist().inv_cdf((group - 3 / 8) / (group + 1 / 4))
    return (spread / (2**spec.bits - 1)) ** 2 / 12


def _check_layers(signal: str, keys: tuple[object, ...], values: tuple[object, ...]) -> None:
    if not keys or len(keys) != len(values):
        raise PlanFieldError(
            f"signal {signal!r}: needs one entry per layer for keys and for values, "
            f"got {len(keys)} and {len(values)}",
            "keys",
        )


def _check_numbers(signal: str, numbers: tuple[float, ...]) -> None:
    bad = [number for number in numbers if not math.isfinite(number) or number < 0]
    if bad:
        raise PlanFieldError(
            f"signal {signal!r}: a score must be finite and at least 0, got {bad[0]}", "scores"
        )
