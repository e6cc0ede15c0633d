"""Which channels of keys matter most, for plans with tiers: an order for every layer and KV head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kvmix_fx.errors import ProfileError
from kvmix_fx.plan.orders import encode_order
from kvmix_fx.profiling.calibration import load_calibration
from kvmix_fx.profiling.observe import Listeners, Observer, observing
from kvmix_fx.profiling.run import _check_vocabulary, _is_text, _tokenizer_of

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
    if tokenizer is None and _is_text(data):
        tokenizer = _tokenizer_of(model)
    calibration = load_calibration(data, tokenizer, prompts=prompts, length=length, shortest=group_size)
    _check_vocabulary(model, int(calibration.ids.max()))
    sizes: dict[int, list[Tensor]] = {}
    spreads: dict[int, list[Tensor]] = {}

    def asked(layer: int, query: Tensor, keys: Tensor) -> None:
        B, heads, L, D = keys.shape
        whole = L // group_size * group_size
        groups = keys[:, :, :whole].float().view(B, heads, -1, group_size, D)
        spreads.setdefault(layer, []).append((groups.amax(3) - groups.amin(3)).mean((0, 2)))
        size = query.float().abs().view(B, heads, -1, L, D).mean((0, 2, 3))
        sizes.setdefault(layer, []).append(size)

    device = next(model.parameters()).device
    with observing(model):
        observer.look(calibration.ids[:1].to(device))
        observer.listeners = Listeners(asked=asked)
        for ids, count in zip(calibration.ids, calibration.lengths, strict=True):
            observer.read(ids[None, : count // group_size * group_size].to(device))
    missing = sorted(set(range(observer.geometry.num_layers)) - set(sizes))
    if missing:
        raise ProfileError(f"layers {missing} cannot be packed, so their channels have no order")
    orders = []
    for layer in sorted(sizes):
        score = torch.stack(sizes[layer]).mean(0) * torch.stack(spreads[layer]).mean(0)
        orders.append(encode_order(score.argsort(dim=1, descending=True, stable=True).tolist()))
    return tuple(orders)
