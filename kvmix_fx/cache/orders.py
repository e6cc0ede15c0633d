"""Orders of channels from a plan, as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmix_fx.errors import PlanLayerError
from kvmix_fx.parallel import own_heads
from kvmix_fx.plan import LayerPlan
from kvmix_fx.plan.orders import decode_order


def key_order(layer: LayerPlan, heads: int, head_dim: int, device: torch.device) -> Tensor | None:
    """The order in which a layer's plan has the channels of keys packed, int32 [Hkv, D]; None if it has none.

    Raises:
        PlanLayerError: the plan's order is for another number of KV heads.
    """
    if not layer.key.channel_order:
        return None
    found = own_heads(decode_order(layer.key.channel_order, head_dim), heads)
    if len(found) != heads:
        raise PlanLayerError(
            f"the plan has orders of channels for {len(found)} KV heads, the layer has {heads}: take the "
            'order from a profile of this model, or let the prompt choose with order="prompt"'
        )
    return torch.tensor(found, dtype=torch.int32, device=device)
