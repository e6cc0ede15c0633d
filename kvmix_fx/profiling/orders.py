"""Which channels of keys matter most, for plans with tiers: an order for every layer and KV head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kvmix_fx.errors import ProfileError
from kvmix_fx.plan.orders import encode_order
from kvmix_fx.profiling.calibration import (
    Calibration,
    check_vocabulary,
    is_text,
    load_calibration,
    tokenizer_of,
)
from kvmix_fx.profiling.observe import Listeners, Observer, Scoring, observing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def channel_orders(
    model: nn.Module,
    data: object = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: int | None = None,
    length: int | None = None,
    group_size: int = 128,
) -> tuple[str, ...]:
    """Order the channels of every layer's keys by what rounding them would do to the scores.

    The score of a channel is the mean size of the queries in it, over the query heads that share it, times
    the mean range of the keys in groups of tokens: the error of a rounded channel grows with its range, and
    counts with the query's size. One forward per prompt.

    Args:
        model: a causal language model, as for `kvmix_fx.profile`.
        data: calibration text, likewise. Use none that the plan will be judged on.
        tokenizer: of the model, for data that is text.
        prompts: pieces of text, at most (8).
        length: tokens of each (512).
        group_size: tokens of a group, as the plan will have it.

    Returns:
        One text per layer, as `QuantSpec.channel_order` and the preset "tiers" take it.

    Raises:
        CalibrationError, NoSiteError: as `kvmix_fx.profile`.
        ProfileError: a layer cannot be packed, so it has no order.
    """
    observer = Observer(model)
    if tokenizer is None and is_text(data):
        tokenizer = tokenizer_of(model)
    calibration = load_calibration(data, tokenizer, prompts=prompts, length=length, shortest=group_size)
    check_vocabulary(model, calibration)
    with observing(model):
        observer.look(calibration.ids[:1].to(next(model.parameters()).device))
        found = measure_orders(observer, calibration, group_size)
    missing = sorted(set(range(observer.geometry.num_layers)) - set(found))
    if missing:
        raise ProfileError(f"layers {missing} cannot be packed, so their channels have no order")
    return encoded(observer, found)


def measure_orders(
    observer: Observer, calibration: Calibration, group_size: int, step: Callable[[], None] = lambda: None
) -> dict[int, Tensor]:
    """The order of channels of every layer that can be packed, int64 [Hkv, D] of this rank's heads.

    Args:
        observer: of the model.
        calibration: what is read; prompts of fewer tokens than a group are one group.
        group_size: tokens of a group.
        step: called after every prompt.
    """
    sizes: dict[int, list[Tensor]] = {}
    spreads: dict[int, list[Tensor]] = {}
    reading = calibration.lengths[0]

    def asked(layer: int, query: Tensor, keys: Tensor, _scoring: Scoring) -> None:
        B, heads, _, D = keys.shape
        size = min(group_size, reading)
        whole = reading // size * size
        groups = keys[:, :, :whole].float().view(B, heads, -1, size, D)
        spreads.setdefault(layer, []).append((groups.amax(3) - groups.amin(3)).mean((0, 2)))
        asking = query[:, :, :whole].float().abs().view(B, heads, -1, whole, D)
        sizes.setdefault(layer, []).append(asking.mean((0, 2, 3)))

    device = next(observer.model.parameters()).device
    observer.listeners = Listeners(asked=asked)
    try:
        with torch.no_grad():
            for ids, reading in zip(calibration.ids, calibration.lengths, strict=True):  # noqa: B007
                observer.read(ids[None].to(device))
                step()
    finally:
        observer.listeners = Listeners()
    scores = {
        layer: torch.stack(sizes[layer]).mean(0) * torch.stack(spreads[layer]).mean(0) for layer in sizes
    }
    return {layer: score.argsort(dim=1, descending=True, stable=True) for layer, score in scores.items()}


def encoded(observer: Observer, orders: Mapping[int, Tensor]) -> tuple[str, ...]:
    """Orders of all heads as plans have them, one text per layer; empty for layers without one."""
    texts = {layer: encode_order(observer.ranks.cat(orders[layer], 0).tolist()) for layer in sorted(orders)}
    return tuple(texts.get(layer, "") for layer in range(observer.geometry.num_layers))
