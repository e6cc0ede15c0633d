"""From token-by-token differences to the figures people know, each with a standard error where it has one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvmix_fx.errors import MissingPackageError

CURVE_POINTS = 8
"""Parts into which the generated steps are divided for `Evaluation.kl_by_step`."""


@dataclass(frozen=True)
class Figure:
    """A figure and its standard error over chunks of text; None for one chunk and for quantiles."""

    value: float
    standard_error: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return {"value": self.value, "standard_error": self.standard_error}


@dataclass(frozen=True)
class StepRange:
    """The mean KL divergence of the steps `first` to `last`, counted from 1 after the prompt."""

    first: int
    last: int
    kl: Figure


@dataclass(frozen=True)
class Evaluation:
    """What a plan costs a model, against its unquantized cache on the same tokens.

    Attributes:
        kl: KL(unquantized || packed) of each prediction, nats, float64 [chunks, steps].
        loss: negative log-likelihood of the text's next token, unquantized, nats, float64 [chunks, steps].
        loss_change: how much that grows with the packed cache, nats, float64 [chunks, steps].
        probability_change: of the text's next token, packed less unquantized, float64 [chunks, steps].
        same_top: whether both find the same token likeliest, bool [chunks, steps].
        cache_bytes: allocated by the packed cache of one chunk at its end.
        cache_bytes_16bit: by the unquantized one, in the model's own dtype.
        effective_bits: of the packed cache per element, scales, windows and slack counted.
        tokens_per_second: read by steps from the packed cache, all rows together.
        tokens_per_second_16bit: from the unquantized one.
        data: where the text came from and how it was cut.
        settings: prompt, steps, step and batch.
    """

    kl: Tensor
    loss: Tensor
    loss_change: Tensor
    probability_change: Tensor
    same_top: Tensor
    cache_bytes: int
    cache_bytes_16bit: int
    effective_bits: float
    tokens_per_second: float
    tokens_per_second_16bit: float
    data: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def perplexity_16bit(self) -> Figure:
        """Perplexity with the unquantized cache."""
        return _figure(self.loss, lambda x: math.exp(x.mean()))

    @property
    def perplexity_ratio(self) -> Figure:
        """Perplexity with the packed cache over that with the unquantized one."""
        return _figure(self.loss_change, lambda x: math.exp(x.mean()))

    @property
    def kl_mean(self) -> Figure:
        """Nats per token."""
        return _figure(self.kl, lambda x: float(x.mean()))

    @property
    def kl_worst_chunk(self) -> Figure:
        """Nats per token, in the chunk where it is most: a mean can hide one that breaks."""
        return Figure(float(self.kl.mean(1).max()))

    @property
    def same_top_share(self) -> Figure:
        """Of the predictions, from 0 to 1."""
        return _figure(self.same_top.double(), lambda x: float(x.mean()))

    @property
    def rms_probability_change(self) -> Figure:
        """Root of the mean square, from 0 to 1."""
        return _figure(self.probability_change, lambda x: float(x.square().mean().sqrt()))

    def kl_quantile(self, share: float) -> Figure:
        """The KL divergence that this share of the predictions does not exceed, interpolated; nats."""
        ordered = self.kl.flatten().sort().values
        place = share * (len(ordered) - 1)
        low = ordered[math.floor(place)]
        return Figure(float(low + (ordered[math.ceil(place)] - low) * (place % 1)))

    def kl_by_step(self, points: int = CURVE_POINTS) -> list[StepRange]:
        """Mean KL divergence of early and late steps.

        Errors that add up show as a rise; so does every tile that is packed on the way.
        """
        count = self.kl.shape[1]
        edges = sorted({round(n * count / points) for n in range(points + 1)})
        return [
            StepRange(first + 1, last, _figure(self.kl[:, first:last], lambda x: float(x.mean())))
            for first, last in itertools.pairwise(edges)
        ]

    def summary(self) -> dict[str, Any]:
        """JSON values for a plan's provenance: the leading figures, and what they were measured on."""
        whole = self.to_dict()
        names = ("kl_mean", "kl_worst_chunk", "kl_99", "perplexity_ratio", "same_top", "predictions")
        return {name: whole[name] for name in (*names, "data", "settings")}

    def to_dict(self) -> dict[str, Any]:
        """JSON values: every figure and its standard error."""
        figures = {
            "perplexity_ratio": self.perplexity_ratio,
            "perplexity_16bit": self.perplexity_16bit,
            "kl_mean": self.kl_mean,
            "kl_worst_chunk": self.kl_worst_chunk,
            "kl_median": self.kl_quantile(0.5),
            "kl_99": self.kl_quantile(0.99),
            "kl_99_9": self.kl_quantile(0.999),
            "kl_max": self.kl_quantile(1),
            "same_top": self.same_top_share,
            "rms_probability_change": self.rms_probability_change,
        }
        return {
            **{name: figure.to_dict() for name, figure in figures.items()},
            "kl_by_step": [
                {"first": part.first, "last": part.last, **part.kl.to_dict()} for part in self.kl_by_step()
            ],
            "cache_bytes": self.cache_bytes,
            "cache_bytes_16bit": self.cache_bytes_16bit,
            "effective_bits": self.effective_bits,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_16bit": self.tokens_per_second_16bit,
            "predictions": self.kl.numel(),
            "data": dict(self.data),
            "settings": dict(self.settings),
        }

    def plot(self, path: str | Path) -> Path:
        """Draw KL against generated steps, and how its tail falls, to a file (PNG, SVG or PDF by its name).

        Raises:
            MissingPackageError: matplotlib is not installed.
            ValueError: matplotlib knows no such kind of file.
        """
        figure_class = figure_of_matplotlib("drawing an evaluation")
        figure = figure_class(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        parts = self.kl_by_step(min(16, self.kl.shape[1]))
        middles = [(part.first + part.last) / 2 for part in parts]
        errors = [part.kl.standard_error or 0.0 for part in parts]
        left.errorbar(middles, [part.kl.value for part in parts], errors, marker="o", markersize=3, capsize=2)
        left.set_ylim(bottom=0)
        left.set_xlabel("generated steps")
        left.set_ylabel("KL divergence, nats per token")
        left.set_title("standard errors over chunks", fontsize=9)
        ordered = self.kl.flatten().sort(descending=True).values.clamp_min(1e-9)
        shares = torch.arange(1, len(ordered) + 1) / len(ordered)
        right.loglog(ordered.tolist(), shares.tolist())
        right.set_xlabel("KL divergence, nats")
        right.set_ylabel("share of predictions above it")
        for axis in (left, right):
            axis.grid(alpha=0.3)
        figure.savefig(path)
        return Path(path)


def figure_of_matplotlib(purpose: str) -> Any:
    """The class of a picture that needs no screen.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure as Picture
    except ImportError as error:
        raise MissingPackageError.for_extra("matplotlib", "plot", purpose) from error
    return Picture


def _figure(values: Tensor, summary: Callable[[Tensor], float]) -> Figure:
    """A summary of values [chunks, n], and its jackknife standard error over chunks."""
    chunks = values.shape[0]
    if chunks < 2:
        return Figure(summary(values))
    without = [summary(torch.cat((values[:n], values[n + 1 :]))) for n in range(chunks)]
    mean = sum(without) / chunks
    spread = sum((value - mean) ** 2 for value in without) * (chunks - 1) / chunks
    return Figure(summary(values), math.sqrt(spread))
