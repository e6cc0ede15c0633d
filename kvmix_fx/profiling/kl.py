"""The direct signals: put tensors into a format, and see how far the predictions move."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kvmix_fx.plan import QuantSpec
from kvmix_fx.plan.prices import Drop, Menu, Prices, keeping
from kvmix_fx.profiling.calibration import Calibration
from kvmix_fx.profiling.observe import ROLES, Listeners, Observer


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
    found = _one_by_one(observer, calibration, {"key": menu.keys, "value": menu.values}, step)
    total = sum(calibration.lengths) - observer.first_packed_query * len(calibration.lengths)
    tables = {}
    for role in ROLES:
        nothing = [0.0] * len(_formats(menu, role))
        tables[role] = tuple(
            # the mean of a divergence is not negative; its floating-point sum may be, by a rounding error
            tuple((found[layer, role].sum(0) / total).clamp(min=0).tolist())
            if (layer, role) in found
            else tuple(nothing)
            for layer in range(observer.geometry.num_layers)
        )
    return Prices("kl", menu, tables["key"], tables["value"])


@torch.no_grad()
def measure_drops(
    observer: Observer, calibration: Calibration, menu: Menu, step: Callable[[], None] = lambda: None
) -> dict[int, tuple[Drop, ...]]:
    """What dropping channels costs: KL(unquantized || some channels of the keys of one layer dropped).

    The other channels are exact, so the format's own rounding is not in it. No cheap signal sees the layer
    that cannot do without its channels, and it is another one in each model. One forward from that layer on,
    per layer and format that drops some.

    Args:
        observer: of the model, with its `orders`.
        calibration: what is read.
        menu: whose formats that drop channels are tried.
        step: called after every forward.

    Returns:
        One `Drop` per layer, by position in `menu.keys`.
    """
    places = menu.dropping()
    specs = tuple(menu.keys[n] for n in places)

    def dropped(layer: int, x: Tensor, spec: QuantSpec, valid: Tensor) -> Tensor:
        gone = observer.orders[layer][:, -dict(spec.tiers)[0] :]
        mask = torch.zeros(x.shape[1], x.shape[3], dtype=torch.bool, device=x.device)
        mask.scatter_(1, gone.to(x.device), True)
        return torch.where(mask[:, None], observer.rounded(layer, x, spec, valid), x)

    found = _one_by_one(observer, calibration, {"key": specs}, step, dropped)
    counts = torch.tensor(calibration.lengths, dtype=torch.float64) - observer.first_packed_query
    drops = {}
    for n, place in enumerate(places):
        sums = [
            found[layer, "key"][:, n].clamp(min=0) if (layer, "key") in found else torch.zeros_like(counts)
            for layer in range(observer.geometry.num_layers)
        ]
        drops[place] = tuple(
            Drop(float(one.sum() / counts.sum()), float((one / counts).max())) for one in sums
        )
    return drops


def _one_by_one(
    observer: Observer,
    calibration: Calibration,
    offered: Mapping[str, tuple[QuantSpec, ...]],
    step: Callable[[], None],
    changed: Callable[[int, Tensor, QuantSpec, Tensor], Tensor] | None = None,
) -> dict[tuple[int, str], Tensor]:
    """Sums of KL over the predictions of each prompt, [prompts, formats], one tensor and format at a time.

    changed: what becomes of a tensor, by layer, format and the tokens that count; None for rounding.
    """
    changed = observer.rounded if changed is None else changed
    device = next(observer.model.parameters()).device
    first = observer.first_packed_query
    found: dict[tuple[int, str], list[Tensor]] = {}
    for row, length in zip(calibration.ids, calibration.lengths, strict=True):
        ids = row[None].to(device)
        cached: dict[tuple[int, str], Tensor] = {}
        observer.listeners = Listeners(
            cached=lambda layer, role, x, into=cached: into.update({(layer, role): x})
        )
        reference = log_probabilities(observer.read(ids, keep=True), first, length)
        step()
        observer.listeners = Listeners()
        valid = (torch.arange(ids.shape[1], device=device) < length)[None]
        try:
            for (layer, role), x in cached.items():
                if role not in offered:
                    continue
                costs = torch.zeros(len(offered[role]), dtype=torch.float64)
                for n, spec in enumerate(offered[role]):
                    if not spec.is_raw:
                        observer.replacements = {(layer, role): changed(layer, x, spec, valid)}
                        moved = log_probabilities(observer.read_from(layer, ids), first, length)
                        costs[n] = divergence(reference, moved)
                    step()
                found.setdefault((layer, role), []).append(costs)
        finally:
            observer.replacements = {}
            observer.forget()
    return {place: torch.stack(costs) for place, costs in found.items()}


def scale_prices(
    observer: Observer,
    calibration: Calibration,
    prices: Prices,
    step: Callable[[], None] = lambda: None,
    dropped: Mapping[int, tuple[Drop, ...]] | None = None,
) -> Prices:
    """Prices made to agree with the divergence of every format in all layers at once.

    Second-order prices tell layers apart but fall short where errors are large: at 2 bits the divergence of
    keys grows faster than the square. So each format is put into the keys (or values) of all layers, which
    takes one forward, and its prices are scaled so that their sum over layers is the measured divergence.

    One layer that cannot do without its channels would spoil the sum of all. So a format that drops channels
    has the price of the same format with those channels at 2 bits, and what dropping them was measured to
    cost this layer.

    Args:
        observer: of the model.
        calibration: what is read.
        prices: in nats per prediction.
        step: called after every forward.
        dropped: what `measure_drops` found.
    """
    dropped = dropped or {}
    device = next(observer.model.parameters()).device
    first = observer.first_packed_query
    sums = {role: torch.zeros(len(_formats(prices.menu, role)), dtype=torch.float64) for role in ROLES}
    with torch.no_grad():
        for row, length in zip(calibration.ids, calibration.lengths, strict=True):
            ids = row[None].to(device)
            reference = log_probabilities(observer.read(ids), first, length)
            step()
            for role in ROLES:
                for n, spec in enumerate(_formats(prices.menu, role)):
                    if role == "key" and n in dropped:
                        continue
                    moved = read_in_formats(
                        observer, ids, length, {(layer, role): spec for layer in observer.layers}
                    )
                    sums[role][n] += divergence(reference, log_probabilities(moved, first, length))
                    step()
    total = sum(length - first for length in calibration.lengths)
    tables = []
    for role, table in zip(ROLES, (prices.keys, prices.values), strict=True):
        predicted = torch.tensor(table, dtype=torch.float64).sum(0)
        measured = (sums[role] / total).clamp(min=0)
        factors = torch.where(predicted > 0, measured / predicted, 1.0).tolist()
        if role == "key":
            factors = [1.0 if n in dropped else factor for n, factor in enumerate(factors)]
        tables.append([[p * f for p, f in zip(row, factors, strict=True)] for row in table])
    for n, costs in dropped.items():
        kept = keeping(prices.menu.keys[n])
        same = prices.menu.keys.index(kept) if kept in prices.menu.keys else n
        for row, cost in zip(tables[0], costs, strict=True):
            row[n] = row[same] + cost.mean
    keys, values = (tuple(map(tuple, table)) for table in tables)
    return Prices(f"{prices.signal}_scaled", prices.menu, keys, values)


@torch.no_grad()
def read_in_formats(
    observer: Observer, ids: Tensor, length: int, formats: Mapping[tuple[int, str], QuantSpec]
) -> Tensor:
    """Logits [1, L, vocabulary] as decoding with these formats gives them, by layer and role; others exact.

    One forward: what is rounded is what the layers compute from each other's rounded caches.

    Args:
        observer: of the model.
        ids: [1, L].
        length: tokens that are no padding.
        formats: how tensors are kept.
    """
    valid = (torch.arange(ids.shape[1], device=ids.device) < length)[None]
    observer.replacements = {
        place: lambda x, place=place, spec=spec: observer.rounded(place[0], x, spec, valid)
        for place, spec in formats.items()
    }
    try:
        return observer.read(ids)
    finally:
        observer.replacements = {}


def _formats(menu: Menu, role: str) -> tuple[QuantSpec, ...]:
    return menu.keys if role == "key" else menu.values


def divergence(reference: Tensor, moved: Tensor) -> float:
    """The sum of KL(reference || moved) over predictions, nats, from log-probabilities [n, vocabulary]."""
    # rows first: summing all of them in float64 takes longer than the rest
    return float((reference.exp() * (reference - moved)).sum(-1).sum(dtype=torch.float64))


def log_probabilities(logits: Tensor, first: int, length: int) -> Tensor:
    """Log-probabilities [n, vocabulary], float32, of the tokens `first` to `length` of logits [1, L, ...]."""
    return logits[0, first:length].detach().float().log_softmax(-1)
