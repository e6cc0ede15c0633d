"""Find learned attention sinks: one more score a head, which takes its share and has no value.

before   w = softmax(cat([scores, sinks], -1), -1)[..., :-1]                     (a column; gpt-oss, MiMo-V2)
         o = (softmax(scores, -1) @ v) * sigmoid(logsumexp(scores, -1) - sinks)  (a factor; Granite SWA)
found    the logits [Hq]

Both are the same: the share of all keys is 1 / (1 + exp(sink - logsumexp)).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from kvmix_fx.dynamo import example
from kvmix_fx.passes.find.views import called

_VIEWS = {"reshape", "view", "expand", "unsqueeze", "getitem", "to", "float", "type_as"}
_MOVES = {"reshape", "view", "unsqueeze", "to", "float", "type_as"}
_FULL = slice(None)
_LAST = (-1, 3)


class Factor(NamedTuple):
    """node: the scaled output. scores: what the softmax takes. sinks: as written. inside: what was passed."""

    node: fx.Node
    scores: fx.Node
    sinks: fx.Node
    inside: list[fx.Node]


def dropped_column(node: Any) -> fx.Node | None:
    """What `node` is all but the last column of."""
    if called(node) != "getitem" or not isinstance(node.args[1], tuple):
        return None
    *before, last = node.args[1]
    whole = before == [Ellipsis] or before == [_FULL] * 3
    return node.args[0] if whole and last == slice(None, -1) else None


def appended_column(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(scores, sinks) that `node` puts side by side."""
    if called(node) not in ("cat", "concat", "concatenate"):
        return None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    parts = node.args[0] if node.args else node.kwargs.get("tensors", ())
    return (parts[0], parts[1]) if dim in _LAST and len(parts) == 2 and _is_column(parts[1]) else None


def _is_column(node: Any) -> bool:
    value = example(node)
    return isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[3] == 1


def below_the_highest(node: Any) -> tuple[fx.Node, list[fx.Node]] | None:
    """(x, nodes passed) where `node` is x less its highest number in each row."""
    if called(node) not in ("sub", "isub", "sub_") or len(node.args) != 2 or node.kwargs:
        return None
    scores, highest = node.args
    passed = [node]
    if called(highest) == "getitem" and highest.args[1] == 0:
        passed.append(highest)
        highest = highest.args[0]
    if called(highest) not in ("max", "amax") or highest.args[0] is not scores:
        return None
    passed.append(highest)
    named = dict(zip(("dim", "keepdim"), highest.args[1:], strict=False)) | highest.kwargs
    alone = all(len(x.users) == 1 for x in passed[1:])
    return (scores, passed) if alone and named.get("dim") in _LAST and named.get("keepdim") else None


def factor(product: fx.Node) -> Factor | None:
    """The factor that scales a product of weights and values by its share."""
    user = next(iter(product.users), None)
    if user is None or len(product.users) > 1 or called(user) not in ("mul", "imul", "mul_"):
        return None
    others = [x for x in user.args if x is not product]
    if len(others) != 1 or not _is_column(others[0]):
        return None
    passed = [product]
    gate = _behind_moves(others[0], passed)
    if called(gate) != "sigmoid":
        return None
    passed.append(gate)
    difference = _behind_moves(gate.args[0], passed)
    if called(difference) != "sub" or len(difference.args) != 2:
        return None
    lse, sinks = difference.args
    if called(lse) != "logsumexp" or not isinstance(sinks, fx.Node):
        return None
    dim = lse.args[1] if len(lse.args) > 1 else lse.kwargs.get("dim")
    passed += [difference, lse]
    alone = all(len(x.users) == 1 for x in passed)
    return Factor(user, lse.args[0], sinks, passed) if dim in _LAST and alone else None


def _behind_moves(node: Any, passed: list[fx.Node]) -> Any:
    while called(node) in _MOVES:
        passed.append(node)
        node = node.args[0]
    return node


def logits(node: Any, heads: Any) -> fx.Node | None:
    """The numbers, one a query head, that `node` shows as [.., heads, .., 1] or [.., heads, ..]."""
    while isinstance(node, fx.Node):
        value = example(node)
        if value.dim() == 1:
            return node if value.shape[0] == heads else None
        if called(node) not in _VIEWS or value.dim() < 3 or value.shape[1] != heads:
            return None
        if called(node) == "getitem" and not _adds_dimensions(node.args[1]):
            return None
        source: Any = node.args[0]
        # what is made of one dimension has the heads as its only one
        if example(source).dim() == 1 and value.numel() != heads:
            return None
        node = source
    return None


def _adds_dimensions(index: Any) -> bool:
    return isinstance(index, tuple) and all(i is None or i == _FULL for i in index)


__all__ = ["Factor", "appended_column", "below_the_highest", "dropped_column", "factor", "logits"]
