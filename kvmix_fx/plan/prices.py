"""What a signal hands to an allocator: scores of tensors, or prices of every way to keep them.

A tensor here is the keys or the values of one layer. Losses of different tensors are taken to add up, which
holds as long as each is small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from kvmix_fx.errors import PlanFieldError
from kvmix_fx.plan.geometry import ModelGeometry
from kvmix_fx.plan.schema import QuantSpec


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
    def default(
        cls,
        geometry: ModelGeometry,
        bits: Sequence[int] = (2, 3, 4, 8),
        group_sizes: Sequence[int] = (32, 64, 128),
    ) -> Menu:
        """Keys per channel in groups of tokens, values per token in groups of channels.

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

    Raises:
        PlanFieldError: a table does not fit the menu, or a loss is negative or not finite.
    """

    signal: str
    menu: Menu
    keys: tuple[tuple[float, ...], ...]
    values: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        _check_layers(self.signal, self.keys, self.values)
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
