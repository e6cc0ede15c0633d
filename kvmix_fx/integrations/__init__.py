"""What other libraries need to work with packed caches. Importing this imports none of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from kvmix_fx.passes.shortcut import Shortcut
from kvmix_fx.plan import KVPlan

# before each call: (args, kwargs) -> (args, kwargs, what to do after the call succeeded)
Prepare = Callable[
    [tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any], Callable[[], None]]
]


class Hooks(NamedTuple):
    """What a library needs on a compiled model.

    prepare: runs before every call. attributes: set on the model itself while it is compiled. generating:
    whether a call is a step of the library's own loop, in which nothing but the arguments changes.
    """

    prepare: Prepare
    attributes: dict[str, Any]
    generating: Callable[[], bool]


def hooks_for(model: nn.Module, plan: KVPlan, shortcut: Shortcut) -> Hooks:
    """The hooks of a `model` about to be compiled.

    `shortcut` is taken while `generating`; what it knows is to be forgotten when that ends.
    """
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        from kvmix_fx.integrations.transformers import transformers_hooks

        return transformers_hooks(model, plan, shortcut)
    return Hooks(_as_they_are, {}, lambda: False)


def _as_they_are(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Callable[[], None]]:
    return args, kwargs, _nothing


def _nothing() -> None:
    return None
