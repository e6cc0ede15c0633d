"""profile(): from a model and a text to a Profile."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from kvmix_fx.parallel import check_placement
from kvmix_fx.plan import ModelGeometry
from kvmix_fx.plan.prices import Menu
from kvmix_fx.plan.schema import DEFAULT_SINK
from kvmix_fx.profiling.calibration import check_vocabulary, is_text, load_calibration, tokenizer_of
from kvmix_fx.profiling.measure import DIRECT_PROMPTS, KL, SCALED, check_signals, measure
from kvmix_fx.profiling.observe import Observer, observing
from kvmix_fx.profiling.orders import encoded
from kvmix_fx.profiling.report import ModelIdentity, Profile
from kvmix_fx.progress import progress as bar
from kvmix_kernels.layout import check_head_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SIGNALS = ("fisher_scaled", "fisher", "weight_gradient", "cache_norm_frobenius")
"""One forward and two backwards per prompt, and one forward per format offered. `Profile.plan` takes the
first, which beat the best uniform plan at every budget and on every text (docs/benchmarks/planner.md)."""


def profile(
    model: nn.Module,
    data: object = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    signals: Sequence[str] | str = DEFAULT_SIGNALS,
    menu: Menu | None = None,
    prompts: int | None = None,
    length: int | None = None,
    window: int = 32,
    sink_length: int = DEFAULT_SINK,
    seed: int = 0,
    checkpointing: bool | None = None,
    progress: bool = True,
) -> Profile:
    """Measure how much every layer's keys and values suffer from quantization.

    The model is traced by the pass's own site finder, so any model that can be packed can be profiled:
    frozen, quantized, in inference mode. Its parameters get no gradients; training flags and
    `requires_grad` are as before when this returns or raises.

    Under tensor parallelism every rank calls this with the same arguments and gets the profile of the whole
    model; let one of them save it.

    Args:
        model: a causal language model, called as model(input_ids=..., use_cache=True); its answer is, has or
            starts with the logits.
        data: calibration text; see `kvmix_fx.profiling.calibration.load_calibration`. None for the text that
            comes along. Use none that the plan will be judged on.
        tokenizer: of the model, for data that is text; None loads it by the model's name.
        signals: names; see `kvmix_fx.profiling.signals` and "kl", which reads the text once per layer, tensor
            and format.
        menu: formats to price; None for `Menu.default`. Where it has tiers of channels, their order is
            measured first; where it drops some, the divergence that this costs, layer by layer.
        prompts: pieces of text, at most (8). Gradients are of all of them; what is measured by putting
            formats into the model, but for "kl", is of 4, evenly spread.
        length: tokens of each (512).
        window: recent tokens that plans will keep raw; errors of nearer tokens do not count.
        sink_length: first tokens that plans will keep raw, likewise.
        seed: of labels that are drawn.
        checkpointing: keep only what enters each layer for the backward and compute the rest again, a third
            more time for a fraction of the memory. None: on accelerators only.
        progress: show a bar, if stderr is a terminal.

    Returns:
        The profile; `.plan(bits=3.0)` makes a plan, `.save(path)` keeps it.

    Raises:
        CalibrationError: the text is empty, too short or unreadable, or the loss on it is not finite.
        SignalError: a signal is unknown.
        SignalUnavailable: none of the signals can be had from this model.
        NoSiteError: no cache of this model can be packed.
        ProfileError: the model answers in no known form, or its layers differ in size.
        HeadSizeError, FormatError: the menu has a format that this model's heads cannot take.
        HeadSplitError, PlacementError: the model lies on devices in a way that cannot be traced.
    """
    names = [signals] if isinstance(signals, str) else list(dict.fromkeys(signals))
    check_signals(names)
    check_placement(model)
    observer = Observer(model, window, sink_length=sink_length)
    if tokenizer is None and is_text(data):
        tokenizer = tokenizer_of(model)
    calibration = load_calibration(
        data, tokenizer, prompts=prompts, length=length, shortest=2 * observer.first_packed_query
    )
    check_vocabulary(model, calibration)
    device = next(model.parameters()).device
    observer.checkpointing = device.type != "cpu" if checkpointing is None else checkpointing
    with observing(model):
        # one short look, to know the sizes
        observer.look(calibration.ids[:1].to(device))
        geometry = observer.geometry
        menu = Menu.default(geometry) if menu is None else menu
        for spec in (*menu.keys, *menu.values):
            check_head_size(spec.format(spec.tokens_per_group), geometry.head_dim)
        total = _reads(names, menu, len(observer.layers), len(calibration.lengths))
        with bar("profiling", total, progress and observer.ranks.rank == 0) as step:
            measured = measure(observer, calibration, names, menu, seed=seed, step=step)
    settings: dict[str, Any] = {
        "window": window, "sink_length": sink_length, "seed": seed, "version": _version(),
    }  # fmt: skip
    if measured.forwards:
        settings["loss"] = measured.loss
    return Profile(
        measured.scores,
        measured.prices,
        menu,
        geometry,
        ModelIdentity.of(model),
        calibration.describe(),
        settings,
        measured.unavailable,
        dict(observer.skipped),
        encoded(observer, observer.orders) if observer.orders else (),
        measured.drops,
    )


def reads(signals: Sequence[str], geometry: ModelGeometry, prompts: int) -> int:
    """How many times a prompt is read for these signals with the usual menu; what the bar counts."""
    return _reads(signals, Menu.default(geometry), geometry.num_layers, prompts)


def _reads(signals: Sequence[str], menu: Menu, layers: int, prompts: int) -> int:
    formats, dropping = len(menu.keys) + len(menu.values), len(menu.dropping())
    every = int(set(signals) != {KL}) + any(spec.tiers for spec in menu.keys)
    every += (1 + layers * formats) * (KL in signals)
    direct = (1 + layers * dropping) * (dropping > 0) + (1 + formats - dropping) * (SCALED in signals)
    return prompts * every + min(prompts, DIRECT_PROMPTS) * direct


def _version() -> str:
    try:
        return importlib.metadata.version("kvmix-fx")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


__all__ = ["DEFAULT_SIGNALS", "profile"]
