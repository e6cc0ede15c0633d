"""Find attention that a model writes out: matmul, scale, cap, mask, softmax, matmul.

Models loaded with `attn_implementation="eager"` do, and models that cap their scores (Gemma 2) have to: SDPA
knows no cap. Everything between the two products must serve this attention alone.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from kvmix_fx.dynamo import example
from kvmix_fx.passes.sites import AttentionCall

_MATMUL = {torch.matmul, operator.matmul, "matmul"}
_SOFTMAX = {torch.softmax, F.softmax, "softmax"}
_TANH = {torch.tanh, F.tanh, "tanh"}
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE = {operator.iadd, "add_"}
_MUL = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_DIV = {operator.truediv, operator.itruediv, torch.div, "div", "div_"}
_DROPOUT = {F.dropout, torch.dropout}
_CASTS = {"to", "float", "type_as", "type"}


@dataclass
class _Scores:
    """What is known of scores on the way back from softmax to the product; `inside`: nodes passed."""

    scale: float = 1.0
    softcap: float = 0.0
    mask: fx.Node | None = None
    inside: list[fx.Node] = field(default_factory=list)


def find_written_out(node: fx.Node) -> AttentionCall | None:
    """The attention whose last product is `node`, if it has this form and nothing else reads its inside."""
    operands = _operands(node, _MATMUL)
    if operands is None:
        return None
    weights, value = operands
    found = _Scores()
    weights = _skip(weights, found, _is_cast, _is_idle_dropout)
    if not _is_softmax(weights):
        return None
    scores = _skip(_take(weights, found), found, _is_cast)
    product, found = _unmasked(scores, found)
    operands = _operands(product, _MATMUL)
    if operands is None or not _alone(product):
        return None
    query, turned = operands
    key = _turned(turned)
    if key is None or any(_rank(x) != 4 for x in (query, key, value)):
        return None
    if found.mask is not None and _columns(found.mask, -1) == 1 and _columns(key, 2) != 1:
        return None
    return AttentionCall(
        node, query, key, value, found.mask, 0.0, False, found.scale, found.softcap, (*found.inside, product)
    )


def _unmasked(scores: Any, found: _Scores) -> tuple[Any, _Scores]:
    """The product behind scores that may be masked, capped, then scaled (backwards), and what was found."""
    operands = _operands(scores, _ADD)
    if operands is not None:
        # the mask may stand on either side, unless it would be written to; the scores lead back to a product
        for first, mask in (operands,) if scores.target in _IN_PLACE else (operands, operands[::-1]):
            below = _Scores(mask=mask, inside=[*found.inside, scores])
            product = _uncapped(first, below)
            if _is_mask(mask) and _alone(scores) and _operands(product, _MATMUL) is not None:
                return product, below
        return None, found
    return _uncapped(scores, found), found


def _uncapped(scores: Any, found: _Scores) -> Any:
    softcap, capped = _factor(scores)
    if _is(capped, _TANH) and softcap > 0 and scores is not capped:
        if not (_alone(scores) and _alone(capped)):
            return None
        # cap * tanh(c x) is x times cap * c, capped
        found.softcap = found.scale = softcap
        found.inside += [scores, capped]
        scores = capped.args[0]
    while True:
        factor, inner = _factor(scores)
        if inner is scores:
            return _skip(scores, found, _is_cast)
        if not _alone(scores):
            return None
        found.scale *= factor
        found.inside.append(scores)
        scores = inner


def _factor(node: Any) -> tuple[float, Any]:
    """(c, x) if the node is x times or over a number, so that it is c * x; else (1, the node)."""
    for targets, is_product in ((_MUL, True), (_DIV, False)):
        if not _is(node, targets) or len(node.args) != 2 or node.kwargs:
            continue
        left, right = node.args
        number = _number(right)
        if number and isinstance(left, fx.Node):
            return (number if is_product else 1.0 / number), left
        number = _number(left)
        if number and is_product and isinstance(right, fx.Node):
            return number, right
    return 1.0, node


def _number(x: Any) -> float:
    """A factor that is the same in every call, 0 for none."""
    value = example(x)
    # Dynamo traces a number as a symbol when it met another one in the same code before, that of another
    # model, say; asking makes it one again, with a guard
    return float(value) if isinstance(value, int | float | torch.SymFloat) else 0.0


def _skip(node: Any, found: _Scores, *kinds: Callable[[Any], bool]) -> Any:
    """What is behind nodes of these kinds that nothing else reads."""
    while any(kind(node) for kind in kinds) and _alone(node):
        node = _take(node, found)
    return node


def _take(node: fx.Node, found: _Scores) -> Any:
    found.inside.append(node)
    return node.args[0]


def _is(node: Any, targets: set[Any]) -> bool:
    return (
        isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets
    )


def _operands(node: Any, targets: set[Any]) -> tuple[fx.Node, fx.Node] | None:
    if not _is(node, targets) or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    return (left, right) if isinstance(left, fx.Node) and isinstance(right, fx.Node) else None


def _alone(node: Any) -> bool:
    return isinstance(node, fx.Node) and len(node.users) == 1


def _rank(node: Any) -> int:
    value = example(node)
    return value.dim() if isinstance(value, torch.Tensor) else -1


def _is_cast(node: Any) -> bool:
    value = example(node)
    return _is(node, _CASTS) and isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_idle_dropout(node: Any) -> bool:
    if not _is(node, _DROPOUT):
        return False
    p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
    return training is False or p == 0


def _is_softmax(node: Any) -> bool:
    if not _is(node, _SOFTMAX) or not _alone(node):
        return False
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return dim in (-1, 3) and _rank(node) == 4


def _is_mask(node: Any) -> bool:
    """Whether these are numbers to be added."""
    value = example(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point() and 1 <= value.dim() <= 4


def _columns(node: fx.Node, dim: int) -> int | None:
    """How many keys there are along `dim`; None if that changes."""
    size = example(node).shape[dim]
    return size if isinstance(size, int) else None


def _turned(node: Any) -> fx.Node | None:
    """The node whose last two dimensions this one exchanges, if it does."""
    if _is(node, {"transpose", torch.transpose, "swapaxes"}) and not node.kwargs:
        source, *dims = node.args
        return source if sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3] else None
    if _is(node, {"permute", torch.permute}) and not node.kwargs:
        source, *dims = node.args
        order = dims[0] if len(dims) == 1 else dims
        return source if list(order) in ([0, 1, 3, 2], [0, 1, -1, -2]) else None
    if _is(node, {builtins.getattr}) and node.args[1] == "mT":
        return node.args[0]
    return None
