"""What other libraries need to work with packed caches. Importing this imports none of them."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import nn

from kvmix_fx.plan import KVPlan
from kvmix_fx.runtime.shortcut import Shortcut
from kvmix_fx.runtime.step import Call, Prepare


class Hooks(NamedTuple):
    """What a library needs on a compiled model.

    prepare: runs before every call, and chooses its lane. attributes: set on the model itself while it is
    compiled. Both are copied and pickled with the model, so neither may hold it in a closure.
    windows: whether `prepare` makes a sliding window of what a first step has left of packed tokens.
    """

    prepare: Prepare
    attributes: dict[str, Any]
    windows: bool = False


def called_models(model: nn.Module) -> list[nn.Module]:
    """The models inside a wrapper that its forward and generate() hand their work on to.

    Empty if `model` is no wrapper. Several: nothing tells which of them is meant.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or isinstance(model, transformers.PreTrainedModel):
        return []
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if id(module) not in inside and isinstance(module, transformers.PreTrainedModel):
            inside.update(id(part) for part in module.modules())
            found.append(module)
    return found


def hooks_for(model: nn.Module, plan: KVPlan, shortcut: Shortcut) -> Hooks:
    """The hooks of a `model` about to be compiled.

    `shortcut`: the short lane, for steps of the library's own loop; what it knows is to be forgotten when
    that ends.
    """
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        from kvmix_fx.integrations.transformers import transformers_hooks

        return transformers_hooks(model, plan, shortcut)
    return Hooks(Call, {})
