"""The direct signal: put one tensor into one format, and see how far the predictions move."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvmix_fx.plan.prices import Menu, Prices
from kvmix_fx.profiling.calibration import Calibration
from kvmix_fx.profiling.observe import ROLES, Listeners, Observer
from kvmix_fx.profiling.rounding import round_trip


@torch.no_grad()
def measure_kl(
    observer: Observer, calibration: Calibration, menu: Menu, step: Callable[[], None] = lambda: None
) -> Prices:
    """KL(unquantized || one tensor of one layer in one format), nats per prediction.

    Every query reads the tensor as decoding would: rounded where its tokens have left the window, exact
    elsewhere. One forward from that layer on, per layer, tensor and format: exact, and slow.

    Args:
        observer: of the model.
        calibration: what is read; predictions count from the first that finds packed tokens.
        menu: formats to try.
        step: called after every forward.
    """
    device = next(observer.model.parameters()).device
    first = observer.first_packed_query
    found: dict[tuple[int, str], Tensor] = {}
    for row, length in zip(calibration.ids, calibration.lengths, strict=True):
        ids = row[None].to(device)
        cached: dict[tuple[int, str], Tensor] = {}
        observer.listeners = Listeners(
            cached=lambda layer, role, x, into=cached: into.update({(layer, role): x})
        )
        reference = _log_probabilities(observer.read(ids, keep=True), first, length)
        step()
        observer.listeners = Listeners()
        valid = (torch.arange(ids.shape[1], device=device) < length)[None]
        try:
            for (layer, role), x in cached.items():
                formats = menu.keys if role == "key" else menu.values
                costs = torch.zeros(len(formats), dtype=torch.float64)
                for n, spec in enumerate(formats):
                    if not spec.is_raw:
                        observer.replacements = {(layer, role): round_trip(x, spec, valid)}
                        moved = _log_probabilities(observer.read_from(layer, ids), first, length)
                        costs[n] = float((reference.exp() * (reference - moved)).sum(dtype=torch.float64))
                    step()
                found[layer, role] = found.get((layer, role), 0) + costs
        finally:
            observer.replacements = {}
            observer.forget()
    total = sum(length - first for length in calibration.lengths)
    tables = {}
    for role in ROLES:
        nothing = [0.0] * len(menu.keys if role == "key" else menu.values)
        tables[role] = tuple(
            # the mean of a divergence is not negative; its floating-point sum may be, by a rounding error
            tuple((found[layer, role] / total).clamp(min=0).tolist())
            if (layer, role) in found
            else tuple(nothing)
            for layer in range(observer.geometry.num_layers)
        )
    return Prices("kl", menu, tables["key"], tables["value"])


def _log_probabilities(logits: Tensor, first: int, length: int) -> Tensor:
    return logits[0, first:length].detach().float().log_softmax(-1)
