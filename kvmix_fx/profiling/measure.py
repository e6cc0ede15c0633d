"""Read the prompts once, measure every signal that was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kvmix_fx.errors import CalibrationError, SignalError, SignalUnavailable
from kvmix_fx.plan.prices import TIERED_GROUP, Drop, Menu, Prices, Scores
from kvmix_fx.profiling.calibration import Calibration
from kvmix_fx.profiling.kl import measure_drops, measure_kl, scale_prices
from kvmix_fx.profiling.observe import Listeners, Observer
from kvmix_fx.profiling.orders import measure_orders
from kvmix_fx.profiling.signals import SIGNALS, Fisher, Labels, Observation, Signal

KL = "kl"
"""Name of the direct signal, which reads the prompts once for every tensor and format."""

SCALED = "fisher_scaled"
"""Name of `fisher` scaled by direct measurements, which reads the prompts once for every format."""

DIRECT_PROMPTS = 4
"""Prompts on which formats are put into all layers, and channels dropped: most of the time goes there.

SmolLM2, 8 prompts of 512 tokens: by the prices of all 8, plans from these 4 lose 0.1 % more than the best at
2.5 bits, 2 % at 3.0, 0.6 % at 2.2. Plans that drop no channels lose 3, 0.7 and 36 % more. On 6 pieces of
other text, nats a token, of 8 prompts, of 4, without drops: .0133, .0136, .0155 at 2.5 bits; .0075, .0079,
.0075 at 3.0."""


@dataclass
class Measured:
    """What came out, and what it took.

    drops: what dropping channels costs each layer, by position of the format in the menu's keys.
    loss: mean over the text's tokens, nats. forwards, backwards: of whole prompts.
    """

    scores: dict[str, Scores] = field(default_factory=dict)
    drops: dict[int, tuple[Drop, ...]] = field(default_factory=dict)
    prices: dict[str, Prices] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    loss: float = math.nan
    forwards: int = 0
    backwards: int = 0


def known_signals() -> tuple[str, ...]:
    """Names of all signals."""
    return (*SIGNALS, SCALED, KL)


def check_signals(names: Sequence[str]) -> None:
    """Raise SignalError unless all are known, and there are any."""
    unknown = [name for name in names if name not in known_signals()]
    if unknown or not names:
        raise SignalError(f"signals are some of {', '.join(known_signals())}; got {unknown or 'none'}")


def measure(
    observer: Observer,
    calibration: Calibration,
    names: Sequence[str],
    menu: Menu,
    *,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> Measured:
    """Measure signals. The model must be in the state that `observing` sets.

    Args:
        observer: of the model.
        calibration: what is read.
        names: signals.
        menu: formats of those that price formats.
        seed: of the labels that are drawn.
        step: called after every prompt, and after every forward of the direct signal.

    Raises:
        CalibrationError: the loss or a gradient is not finite.
        SignalError: a name is unknown.
        SignalUnavailable: none of the signals can be had.
    """
    check_signals(names)
    measured = Measured()
    if any(spec.tiers for spec in menu.keys) and not observer.orders:
        observer.orders = measure_orders(observer, calibration, TIERED_GROUP, step)
        measured.forwards += len(calibration.lengths)
    passing = [name for name in names if name in SIGNALS]
    if SCALED in names and Fisher.name not in names:
        passing.append(Fisher.name)
    listening = [SIGNALS[name](menu) for name in passing]
    if listening:
        _read(observer, calibration, listening, measured, seed, step)
    for one in listening:
        try:
            one.collect(observer.ranks)
            result = one.result(observer)
        except SignalUnavailable as why:
            measured.unavailable[one.name] = str(why)
            continue
        (measured.prices if isinstance(result, Prices) else measured.scores)[one.name] = result  # type: ignore[index]
    direct = calibration.spread(DIRECT_PROMPTS)
    if menu.dropping():
        measured.drops = measure_drops(observer, direct, menu, step)
    if SCALED in names:
        fisher = measured.prices[Fisher.name]
        measured.prices[SCALED] = scale_prices(observer, direct, fisher, step, measured.drops)
        formats = len(menu.keys) + len(menu.values) - len(menu.dropping())
        measured.forwards += len(direct.lengths) * (1 + formats)
        if Fisher.name not in names:
            del measured.prices[Fisher.name]
    if KL in names:
        measured.prices[KL] = measure_kl(observer, calibration, menu, step)
    if measured.unavailable and not (measured.scores or measured.prices):
        reasons = "; ".join(f"{name}: {why}" for name, why in measured.unavailable.items())
        raise SignalUnavailable(
            f"none of these signals can be had from this model, so ask for another. {reasons}"
        )
    return measured


def _read(
    observer: Observer,
    calibration: Calibration,
    listening: list[Signal],
    measured: Measured,
    seed: int,
    step: Callable[[], None],
) -> None:
    """One forward per prompt, and one backward per kind of label."""
    device = next(observer.model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    # the order is fixed, so that drawn labels do not depend on what else is measured
    kinds: list[Labels] = [
        kind for kind in ("text", "sampled") if any(one.labels == kind for one in listening)
    ]
    total = 0.0
    for number, (row, length) in enumerate(zip(calibration.ids, calibration.lengths, strict=True)):
        hearing = _Hearing(observer, listening, length)
        observer.listeners = hearing.listeners()
        try:
            loss = _read_prompt(observer, row[:length].to(device), len(row), kinds, hearing, generator)
        finally:
            observer.listeners = Listeners()
        if not math.isfinite(loss):
            raise CalibrationError(
                f"the loss on calibration prompt {number} is {loss}: check that the model gives finite "
                "logits (float16 often overflows; load it in bfloat16 or float32)"
            )
        total += loss
        measured.forwards += 1
        measured.backwards += len(kinds)
        for one in listening:
            one.end_prompt(length - observer.first_packed_query - (one.labels == "text"))
        step()
    measured.loss = total / sum(length - 1 for length in calibration.lengths)


def _read_prompt(
    observer: Observer,
    ids: Tensor,
    padded: int,
    kinds: Sequence[Labels],
    hearing: _Hearing,
    generator: torch.Generator,
) -> float:
    """Read ids [L], padded to one length for all prompts; returns the loss summed over the text's tokens.

    A function of its own, so that nothing of one prompt is alive while the next is read.
    """
    length, first = len(ids), observer.first_packed_query
    logits = observer.read(torch.nn.functional.pad(ids, (0, padded - length))[None])[0, :length]
    with torch.no_grad():
        text = float(_loss(logits[:-1], ids[1:]))
    if math.isfinite(text):
        for kind in kinds:
            hearing.kind = kind
            if kind == "text":
                loss = _loss(logits[:-1], ids[1:])
            else:
                # every rank draws from the same predictions, but for the last bit of some of them
                labels = observer.ranks.first(_draw(logits[first:], generator))
                loss = _loss(logits[first:], labels)
            loss.backward(retain_graph=kind != kinds[-1])  # type: ignore[no-untyped-call]
    return text


class _Hearing:
    """Passes what an observer tells of one prompt to the signals it is for."""

    def __init__(self, observer: Observer, signals: list[Signal], length: int) -> None:
        self._observer = observer
        self.kind: Labels = "none"
        self._signals = signals
        self._length = length

    def listeners(self) -> Listeners:
        by_need = {(one.hears, one.labels != "none") for one in self._signals if one.hears != "nothing"}
        return Listeners(
            self._cached if ("cache", False) in by_need else None,
            self._gradient if ("cache", True) in by_need else None,
            self._projected if ("projection", True) in by_need else None,
        )

    def _cached(self, layer: int, role: str, x: Tensor) -> None:
        self._tell("cache", "none", layer, role, x, None)

    def _gradient(self, layer: int, role: str, x: Tensor, g: Tensor) -> None:
        self._tell("cache", self.kind, layer, role, x, g)

    def _projected(self, layer: int, role: str, h: Tensor, g: Tensor) -> None:
        self._tell("projection", self.kind, layer, role, h, g)

    def _tell(self, hears: str, kind: Labels, layer: int, role: str, x: Tensor, g: Tensor | None) -> None:
        seen = Observation(layer, role, x, g, self._length, partial(self._observer.rounded, layer))
        for one in self._signals:
            if one.hears == hears and one.labels == kind:
                one.observe(seen)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    # the sum: its gradients are far from float16's smallest numbers, and signals divide as they need
    return cross_entropy(logits.float(), labels, reduction="sum")


@torch.no_grad()
def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token per position [n], from the model's own predictions [n, vocabulary]."""
    return torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)[:, 0]
