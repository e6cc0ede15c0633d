"""What other libraries need to work with packed caches. Importing this imports none of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from kvmix_fx.plan import KVPlan

# before each call: (args, kwargs) -> (args, kwargs, what to do after the call succeeded)
Prepare = Callable[
    [tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any], Callable[[], None]]
]


def prepare_for(model: nn.Module, plan: KVPlan) -> Prepare:
    """The function to run before every call of a compiled `model`."""
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        from kvmix_fx.integrations.transformers import TransformersCalls

        return TransformersCalls(model, plan).prepare
    return lambda args, kwargs: (args, kwargs, _nothing)


def _nothing() -> None:
    return None
