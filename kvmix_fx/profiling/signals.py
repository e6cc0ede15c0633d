"""The signals: what is measured of every layer's keys and values.

Each is a class that listens while prompts are read (`Observer`), and adds up. Those that only need norms
see the tensors in the forward; the others share one backward per prompt and kind of label, whatever
their number. Add one by writing a class with the decorator `signal`.

Labels are the text's next tokens ("text"), or tokens drawn from the model's own predictions ("sampled"),
which is what the Fisher information asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from kvmix_fx.errors import SignalUnavailable
from kvmix_fx.parallel import Ranks
from kvmix_fx.plan import QuantSpec
from kvmix_fx.plan.prices import Menu, Prices, Scores
from kvmix_fx.profiling.observe import ROLES, Observer
from kvmix_fx.profiling.rounding import round_trip

Labels = Literal["none", "text", "sampled"]
Hears = Literal["cache", "projection", "nothing"]


@dataclass(frozen=True)
class Observation:
    """One tensor of one prompt.

    Attributes:
        layer: its layer.
        role: "key" or "value".
        x: as cached [1, Hkv, L, D] (of this rank's heads), or the input of the projection [1, L, in].
        g: gradient of the loss, summed over the prompt's predictions, with respect to what packed tokens are
            read from [1, Hkv, L, D], or to the projection's outputs [1, L, n]; None without a backward.
        length: tokens that count; the rest is padding.
        rounded: what packing leaves of a tensor of this layer, called with x, a format and the tokens that
            count.
    """

    layer: int
    role: str
    x: Tensor
    g: Tensor | None
    length: int
    rounded: Callable[[Tensor, QuantSpec, Tensor | None], Tensor] = round_trip
    _errors: dict[tuple[QuantSpec, ...], list[Tensor]] = field(default_factory=dict, init=False, repr=False)

    @property
    def gradient(self) -> Tensor:
        """`g`, of a signal that has labels, in float32."""
        assert self.g is not None
        return self.g.float()

    def errors(self, formats: tuple[QuantSpec, ...]) -> list[Tensor]:
        """Rounding errors [1, Hkv, L, D] of every format, float32; computed once for all signals."""
        if formats not in self._errors:
            valid = None
            if self.length < self.x.shape[2]:
                valid = (torch.arange(self.x.shape[2], device=self.x.device) < self.length)[None]
            wide = self.x.float()
            found = [self.rounded(self.x, spec, valid).float() - wide for spec in formats]
            for error in found:
                # what padding loses by being left out of its group's range is of no interest
                error[:, :, self.length :] = 0
            self._errors[formats] = found
        return self._errors[formats]


class Signal:
    """One signal being measured.

    Attributes:
        name: in the registry.
        labels: of the loss whose gradient it hears; "none" for no backward.
        hears: what it is called with: cached tensors, projections, or nothing.
    """

    name: ClassVar[str]
    labels: ClassVar[Labels] = "text"
    hears: ClassVar[Hears] = "cache"

    def __init__(self, menu: Menu) -> None:
        """Start with nothing measured."""
        self.menu = menu
        self.prompts = 0
        self.tokens = 0
        self._sums: dict[tuple[int, str], Tensor] = {}

    def formats(self, role: str) -> tuple[QuantSpec, ...]:
        """What the menu offers for keys or values."""
        return self.menu.keys if role == "key" else self.menu.values

    def observe(self, seen: Observation) -> None:
        """Add one tensor of one prompt."""

    def end_prompt(self, predictions: int) -> None:
        """A prompt has been read, with this many predictions in its loss."""
        self.prompts += 1
        self.tokens += predictions

    def collect(self, ranks: Ranks) -> None:
        """All prompts have been read: make what each rank measured of its heads that of all heads.

        Raises:
            SignalUnavailable: the parts do not add up to the whole.
        """
        for place in sorted(self._sums):
            self._sums[place] = ranks.sum(self._sums[place])

    def result(self, observer: Observer) -> Scores | Prices:
        """What was measured.

        Raises:
            SignalUnavailable: this model does not tell.
        """
        raise NotImplementedError

    def _add(self, seen: Observation, amount: Tensor) -> None:
        place = (seen.layer, seen.role)
        self._sums[place] = self._sums[place] + amount.double() if place in self._sums else amount.double()

    def _sum(self, layer: int, role: str) -> Tensor:
        return self._sums[layer, role].cpu()

    def _scores(self, observer: Observer, number: Callable[[int, str], float]) -> Scores:
        """Zero for layers that stay at 16 bits whatever a plan says."""
        columns = {
            role: tuple(
                number(layer, role) if layer in observer.layers else 0.0
                for layer in range(observer.geometry.num_layers)
            )
            for role in ROLES
        }
        return Scores(self.name, columns["key"], columns["value"])

    def _prices(self, observer: Observer, numbers: Callable[[int, str], list[float]]) -> Prices:
        tables = {
            role: tuple(
                tuple(numbers(layer, role)) if layer in observer.layers else (0.0,) * len(self.formats(role))
                for layer in range(observer.geometry.num_layers)
            )
            for role in ROLES
        }
        return Prices(self.name, self.menu, tables["key"], tables["value"])


class NormSignal(Signal):
    """A signal whose score is a norm, mean over prompts. Ranks add up its squares, prompt by prompt."""

    def _add(self, seen: Observation, amount: Tensor) -> None:
        place, square = (seen.layer, seen.role), amount.double().square().reshape(1)
        self._sums[place] = torch.cat((self._sums[place], square)) if place in self._sums else square

    def result(self, observer: Observer) -> Scores:
        """Mean over prompts."""
        return self._scores(observer, lambda layer, role: float(self._sum(layer, role).sqrt().mean()))


SIGNALS: dict[str, type[Signal]] = {}
"""Every signal that is measured in passes over whole prompts, by name."""

_S = TypeVar("_S", bound=type[Signal])


def signal(name: str) -> Callable[[_S], _S]:
    """Register a class under `name`."""

    def register(cls: _S) -> _S:
        cls.name = name
        SIGNALS[name] = cls
        return cls

    return register


@signal("weight_gradient")
class WeightGradient(NormSignal):
    """KVmix (arXiv 2506.08018): ||dL/dW||_F of the key and value projections, mean over prompts.

    L is the mean loss over a prompt's next tokens. The gradient is dL/dW = G^T H, with G that of the
    projection's outputs and H its inputs, so one backward serves every layer and no weight needs a gradient.
    """

    labels = "text"
    hears = "projection"
    per_input: ClassVar[bool] = False

    def observe(self, seen: Observation) -> None:
        """Gradient of the weights, of one prompt."""
        h, g = (x.reshape(-1, x.shape[-1])[: seen.length].float() for x in (seen.x, seen.gradient))
        norm = torch.linalg.matrix_norm(g.t() @ h)
        if self.per_input:
            norm = norm / torch.linalg.matrix_norm(h)
        # the mean loss, as published: the sum's gradient over the predictions
        self._add(seen, norm / (seen.length - 1))

    def result(self, observer: Observer) -> Scores:
        """Mean over prompts."""
        _need_projections(observer)
        return super().result(observer)


@signal("weight_gradient_per_input")
class WeightGradientPerInput(WeightGradient):
    """KVmix's norm divided by ||H||_F, as its derivation of ||dL/dK|| would have it."""

    per_input = True


@signal("cache_gradient")
class CacheGradient(NormSignal):
    """||dL/dK||_F and ||dL/dV||_F of packed tokens, mean over prompts; L is the mean loss."""

    def observe(self, seen: Observation) -> None:
        """Norm of one prompt's gradient."""
        self._add(seen, seen.gradient.norm() / (seen.length - 1))


class _CacheNorm(NormSignal):
    labels = "none"
    order: ClassVar[int | str] = "fro"

    def observe(self, seen: Observation) -> None:
        """Norm of one prompt's tensor as a matrix [tokens, Hkv * D], by the square root of its tokens."""
        flat = seen.x[0, :, : seen.length].transpose(0, 1).flatten(1).float()
        self._add(seen, torch.linalg.matrix_norm(flat, ord=self.order) / math.sqrt(seen.length))


@signal("cache_norm_frobenius")
class CacheNormFrobenius(_CacheNorm):
    """KV-AdaQuant (arXiv 2502.15075) on what is cached: ||K||_F and ||V||_F, by the root of the tokens."""


@signal("cache_norm_spectral")
class CacheNormSpectral(_CacheNorm):
    """The same with the largest singular value of [tokens, Hkv * D]."""

    order = 2

    def collect(self, ranks: Ranks) -> None:
        """Singular values of parts do not add up."""
        if ranks.size > 1:
            raise SignalUnavailable(
                "it needs the channels of all heads at once, and each rank of tensor parallelism has its own"
            )


class _WeightNorm(Signal):
    labels = "none"
    hears = "nothing"
    order: ClassVar[int | str] = "fro"

    def result(self, observer: Observer) -> Scores:
        """Norms of the projection weights."""
        _need_projections(observer)
        for layer in observer.layers:
            for role in ROLES:
                info = observer.projection(layer, role)
                if not isinstance(info, str) and not info.is_affine:
                    raise SignalUnavailable(
                        f"the {role}s of layer {layer} are normalized after their projection, so the norm of "
                        "the weights says nothing about what is cached; use "
                        f"{self.name.replace('weight', 'cache')}"
                    )

        def number(layer: int, role: str) -> float:
            info = observer.projection(layer, role)
            assert not isinstance(info, str)
            return float(torch.linalg.matrix_norm(observer.ranks.cat(info.weight(), 0), ord=self.order))

        return self._scores(observer, number)


@signal("weight_norm_frobenius")
class WeightNormFrobenius(_WeightNorm):
    """KV-AdaQuant as published: ||W_K||_F and ||W_V||_F."""


@signal("weight_norm_spectral")
class WeightNormSpectral(_WeightNorm):
    """KV-AdaQuant's other choice: the largest singular values."""

    order = 2


@signal("gradient_error")
class GradientError(Signal):
    """PM-KVQ (thu-nics/PM-KVQ): mean |error x dL/dx| over elements, for every format; L is the mean loss."""

    def observe(self, seen: Observation) -> None:
        """All formats of one tensor."""
        gradient = seen.gradient / (seen.length - 1)
        errors = seen.errors(self.formats(seen.role))
        self._add(seen, torch.stack([(error * gradient).abs().mean() for error in errors]))

    def result(self, observer: Observer) -> Prices:
        """Mean over prompts, and over ranks, whose tensors are of one size."""
        count = self.prompts * observer.ranks.size
        return self._prices(observer, lambda layer, role: (self._sum(layer, role) / count).tolist())


@signal("fisher")
class Fisher(Signal):
    """Half the Fisher-weighted squared error: the KL divergence that a format costs, to second order.

    Moving a tensor by d changes the predictions by KL(p || p_d) = 1/2 d^T F d + O(d^3), where F is the Fisher
    information, the mean of g g^T over labels drawn from the model itself. Given the text before it, each
    token's gradient has mean zero over its own label, so products of different positions vanish and one
    backward of the summed loss, with one label drawn per position, estimates the sum over positions
    without bias. Of F the diagonal is kept: rounding errors of different elements are nearly
    independent. Nats per prediction.
    """

    labels = "sampled"

    def observe(self, seen: Observation) -> None:
        """All formats of one tensor."""
        gradient = seen.gradient
        costs = [(e * gradient).square().sum() / 2 for e in seen.errors(self.formats(seen.role))]
        self._add(seen, torch.stack(costs))

    def result(self, observer: Observer) -> Prices:
        """Mean over predictions."""
        return self._prices(observer, lambda layer, role: (self._sum(layer, role) / self.tokens).tolist())


@signal("empirical_fisher")
class EmpiricalFisher(Fisher):
    """`fisher` with the text's own next tokens as labels: one backward fewer where others hear it too.

    Where the text surprises the model, its gradients are larger than those of labels drawn from the model.
    """

    labels = "text"


@signal("fitted_distortion")
class FittedDistortion(Signal):
    """RateQuant (arXiv 2605.06675): squared gradient x distortion per head, distortion = alpha * beta^-bits.

    Alpha and beta are fitted for every head and group size to the measured squared error of the formats
    offered; a group size that comes with one width keeps its measured error. Half the sum over elements, per
    prediction: the unit of `fisher`, from which it differs by treating gradient and error as independent.
    """

    def observe(self, seen: Observation) -> None:
        """Squared gradient and mean squared errors of one tensor's heads."""
        channels = seen.x.shape[3]
        errors = [
            error.square().sum((0, 2, 3)) / (seen.length * channels)
            for error in seen.errors(self.formats(seen.role))
        ]
        self._add(seen, torch.stack([seen.gradient.square().sum((0, 2, 3)), *errors]))

    def collect(self, ranks: Ranks) -> None:
        """The heads of all ranks, each with its own fit."""
        for place in sorted(self._sums):
            self._sums[place] = ranks.cat(self._sums[place], 1)

    def result(self, observer: Observer) -> Prices:
        """The fit, weighted, summed over heads."""

        def numbers(layer: int, role: str) -> list[float]:
            formats = self.formats(role)
            costs = [0.0] * len(formats)
            for gradient, *errors in self._sum(layer, role).t().tolist():
                fitted = fit_distortion(formats, [error / self.prompts for error in errors])
                costs = [cost + gradient * error for cost, error in zip(costs, fitted, strict=True)]
            return [cost / (2 * self.tokens) for cost in costs]

        return self._prices(observer, numbers)


def fit_distortion(formats: tuple[QuantSpec, ...], errors: list[float]) -> list[float]:
    """Errors as alpha * beta^-bits, fitted by least squares of logarithms for each way of grouping."""
    smooth = list(errors)
    ways = {(spec.axis, spec.group_size) for spec in formats if not spec.is_raw}
    for way in ways:
        points = [
            (n, formats[n].bits, math.log(error))
            for n, error in enumerate(errors)
            if (formats[n].axis, formats[n].group_size) == way and not formats[n].is_raw and error > 0
        ]
        if len(points) < 2:
            continue
        mean_bits = sum(bits for _, bits, _ in points) / len(points)
        mean_log = sum(log for _, _, log in points) / len(points)
        spread = sum((bits - mean_bits) ** 2 for _, bits, _ in points)
        if spread == 0:
            continue
        slope = sum((bits - mean_bits) * (log - mean_log) for _, bits, log in points) / spread
        for n, bits, _ in points:
            smooth[n] = math.exp(mean_log + slope * (bits - mean_bits))
    return smooth


def _need_projections(observer: Observer) -> None:
    for layer in observer.layers:
        for role in ROLES:
            info = observer.projection(layer, role)
            if isinstance(info, str):
                raise SignalUnavailable(
                    f"the projection of the {role}s of layer {layer} is not known: {info}"
                )
