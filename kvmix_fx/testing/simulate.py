"""What a packed cache should answer, worked out a second way.

`SimulatedCache` serves an unmodified transformers model with plain tensors in which every flushed token has
been rounded and restored. It stores nothing packed and shares no arithmetic with the packed cache: only
the plan, and the rule that says when a tile is flushed, are the same. Agreement of the logits is evidence
that packing, flushing and attention over packed tokens do what the plan says.

Sees no attention masks: without padding only.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from kvmix_fx.plan import KVPlan, LayerPlan
from kvmix_fx.plan.schema import QuantSpec


class SimulatedLayer(DynamicLayer):
    """A growing layer of plain keys and values, the flushed ones rounded."""

    def __init__(self, layer_plan: LayerPlan) -> None:
        """Start empty."""
        super().__init__()
        self.layer_plan = layer_plan
        self.flushed_tiles = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Append [B, Hkv, n, D]; returns what this step attends to, its own tokens exact."""
        if self.is_initialized:
            self._flush(key_states.shape[-1])
        return super().update(key_states, value_states)

    def _flush(self, head_dim: int) -> None:
        # Keys and values have window, sink and tile in common, so either's format tells when.
        fmt = next((f for f in self.layer_plan.formats(head_dim) if not f.is_raw), None)
        if fmt is None:
            return
        # Of the length before this step: a step attends to the cache it found.
        due = fmt.packed_tiles(self.get_seq_length())
        if due == self.flushed_tiles:
            return
        tokens = slice(fmt.sink + self.flushed_tiles * fmt.tile, fmt.sink + due * fmt.tile)
        assert self.keys is not None
        assert self.values is not None
        for tensor, spec in ((self.keys, self.layer_plan.key), (self.values, self.layer_plan.value)):
            tensor[:, :, tokens] = round_trip(tensor[:, :, tokens], spec)
        self.flushed_tiles = due


class SimulatedCache(Cache):
    """Pass as `past_key_values` to a model that was not compiled. Cannot be cropped or reordered."""

    def __init__(self, plan: KVPlan) -> None:
        """Start empty, with one layer per layer of the plan."""
        super().__init__(layers=[SimulatedLayer(layer) for layer in plan.layers])


def round_trip(x: Tensor, spec: QuantSpec) -> Tensor:
    """Quantize and restore: what is left of x [B, Hkv, L, D] at `spec`'s bits.

    L must be a multiple of the group size with axis "channel".
    """
    if spec.is_raw:
        return x
    if spec.axis == "channel":
        x = x.transpose(2, 3)
    size = x.shape[3] if spec.group_size == "head" else spec.group_size
    wide = torch.promote_types(x.dtype, torch.float32)
    groups = x.unflatten(3, (-1, size)).to(wide)
    low, high = groups.amin(4, keepdim=True), groups.amax(4, keepdim=True)
    steps = 2**spec.bits - 1
    stored = getattr(torch, spec.scale_dtype)
    step, low = ((high - low) / steps).to(stored).to(wide), low.to(stored).to(wide)
    codes = ((groups - low) / step).round().clamp(0, steps).nan_to_num(0.0)
    restored = (codes * step + low).flatten(3).to(x.dtype)
    return restored.transpose(2, 3) if spec.axis == "channel" else restored


def teacher_forced(
    model: nn.Module, ids: Tensor, prefill: int, cache: object | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Read `ids` as generation would: the first `prefill` tokens at once, the others one at a time.

    Args:
        model: a transformers model, compiled by kvmix_fx or not.
        ids: [B, L].
        prefill: tokens of the first step.
        cache: passed to the first step; None lets the model make one.

    Yields:
        (position of the first token read, logits [B, n, vocabulary] of the step).
    """
    first = 0
    for last in (prefill, *range(prefill + 1, ids.shape[1] + 1)):
        with torch.no_grad():
            step = model(input_ids=ids[:, first:last], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        yield first, step.logits
        first = last
