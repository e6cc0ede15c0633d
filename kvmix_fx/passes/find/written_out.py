"""Find attention that a model writes out: matmul, scale, cap, mask, softmax, matmul.

Models loaded with `attn_implementation="eager"` do, and models that cap their scores (Gemma 2) have to: SDPA
knows no cap. Everything between the two products must serve this attention alone.

before   s = q @ k.transpose(2, 3) * c; w = softmax(s + mask, -1); o = w @ v
found    AttentionCall(node=o, query=q, key=k, value=v, mask=mask, scale=c, inside=(w, s + mask, s, q @ ...))

There may be several masks: terms that are added, and places where scores are filled with a very low number
(`masked_fill`, `where`).

Learned sinks are found in either of the spellings of `learned_sinks`.

Where a softmax over a product weighs something in another form, the answer is a `Miss` that says what is in
the way.
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
from kvmix_fx.passes.find import learned_sinks
from kvmix_fx.passes.find.views import called, heads_root
from kvmix_fx.passes.sites import ADDED, HIDDEN, SEEN, AttentionCall, Mask, Miss

READS_WEIGHTS = "something else reads the weights"
"""Why attention whose weights are returned is none."""

_MATMUL = {torch.matmul, operator.matmul, "matmul"}
_SOFTMAX = {torch.softmax, F.softmax, "softmax"}
_TANH = {torch.tanh, F.tanh, "tanh"}
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE = {operator.iadd, "add_"}
_MUL = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_DIV = {operator.truediv, operator.itruediv, torch.div, "div", "div_"}
_DROPOUT = {F.dropout, torch.dropout}
_CASTS = {"to", "float", "type_as", "type"}
_PRODUCTS = _MATMUL | {torch.bmm, torch.baddbmm, torch.einsum, "bmm", "baddbmm"}
# what may lie between a product and what becomes of its numbers, for a search that only tells what was missed
_PASSED = {
    "mul", "div", "add", "sub", "imul", "iadd", "truediv", "itruediv", "neg", "tanh", "clamp", "where",
    "masked_fill", "to", "float", "type_as", "type", "dropout", "getitem", "slice", "narrow", "cat",
    "contiguous", "view", "reshape", "flatten", "transpose", "permute", "expand", "unsqueeze", "squeeze",
    "nan_to_num",
}  # fmt: skip
_VERY_LOW = -1e4
"""What stands for minus infinity in half precision."""
_SEARCHED = 32
"""Nodes that this search looks at, at most."""


@dataclass
class _Scores:
    """What is known of scores on the way back from softmax to the product; `inside`: nodes passed.

    sinks: a column or a factor that is to be logits of a learned sink.
    """

    scale: float = 1.0
    softcap: float = 0.0
    masks: list[Mask] = field(default_factory=list)
    sinks: fx.Node | None = None
    inside: list[fx.Node] = field(default_factory=list)


def find_written_out(node: fx.Node) -> AttentionCall | Miss | None:
    """The attention whose last product is `node`, if it has this form and nothing else reads its inside.

    A Miss at the softmax where `node` multiplies what a softmax over a product gave, in any other form; else
    None.
    """
    if not _is(node, _PRODUCTS):
        return None
    found = _match(node)
    if isinstance(found, AttentionCall):
        return found
    for weights in node.all_input_nodes:
        softmax = _behind(weights, _is_weights)
        product = None if softmax is None else _behind(softmax.args[0], _is_product)
        if softmax is not None and product is not None:
            others = (x for x in (*product.all_input_nodes, *node.all_input_nodes) if x is not weights)
            reads = dict.fromkeys(heads_root(_turned(x) or x) for x in others)
            return Miss(softmax, f"attention written out in another form: {found}", tuple(reads))
    return None


def _match(node: fx.Node) -> AttentionCall | str:
    """The attention, or what is in the way."""
    operands = _operands(node, _MATMUL)
    if operands is None:
        return f"weights and values are multiplied by {called(node)}, not by matmul"
    weights, value = operands
    found = _Scores()
    weights = _skip(weights, found, _is_cast, _is_idle_dropout)
    all_but_one = learned_sinks.dropped_column(weights)
    if all_but_one is not None:
        if not _alone(weights, found):
            return READS_WEIGHTS
        found.inside.append(weights)
        weights = all_but_one
    factor = learned_sinks.factor(node)
    if factor is not None:
        node, found.sinks = factor.node, factor.sinks
        found.inside += factor.inside
    reason = _why_no_softmax(weights, found)
    if reason:
        return reason
    scores = _skip(_take(weights, found), found, _is_cast)
    if factor is not None and factor.scores is not scores:
        return "what is scaled is no attention over the scores that its factor is made of"
    less = learned_sinks.below_the_highest(scores)
    if less is not None and _alone(scores, found):
        found.inside += less[1]
        scores = less[0]
    appended = learned_sinks.appended_column(scores)
    if (appended is None) != (all_but_one is None):
        return "a column is added to the scores or dropped from the weights, and not both"
    if appended is not None:
        if not _alone(scores, found):
            return "something else reads the scores"
        found.inside.append(scores)
        scores, found.sinks = appended
    product, found = _unmasked(scores, found)
    if isinstance(product, str):
        return product
    operands = _operands(product, _MATMUL)
    assert operands is not None
    query, turned = operands
    key = _turned(turned)
    if key is None:
        return f"keys are turned by {called(turned)}, which does not just exchange their last two dimensions"
    if any(_rank(x) != 4 for x in (query, key, value)):
        return "queries, keys and values are not all [B, heads, L, D]"
    if _columns(key, 2) != 1 and any(_columns(mask.node, -1) == 1 for mask in found.masks):
        return "the mask has one column for all keys"
    sinks = None
    if found.sinks is not None:
        sinks = learned_sinks.logits(found.sinks, example(query).shape[1])
        if sinks is None:
            return "what joins the scores or scales the output is no sink, one number for each head"
    inside = tuple(sorted((*found.inside, product), reverse=True))
    one = found.masks[0].node if len(found.masks) == 1 and found.masks[0].kind == ADDED else None
    return AttentionCall(
        *(node, query, key, value, one, 0.0, False, found.scale, found.softcap, inside, sinks),
        () if one is not None else tuple(found.masks),
    )


def _why_no_softmax(weights: Any, found: _Scores) -> str:
    """Why these are not the weights that a softmax over keys gave to one reader; empty if they are."""
    if _is(weights, _DROPOUT) and not _is_idle_dropout(weights):
        return "weights are dropped at random (model.eval() ends that)"
    known = _is(weights, _SOFTMAX) or _is_cast(weights) or _is_idle_dropout(weights)
    if known and not _alone(weights, found):
        return READS_WEIGHTS
    if not _is(weights, _SOFTMAX):
        return f"{called(weights)} lies between softmax and values"
    if _rank(weights) != 4:
        return "weights are not [B, heads, Lq, L]"
    dim = weights.kwargs.get("dim", weights.args[1] if len(weights.args) > 1 else None)
    return "" if dim in (-1, 3) else f"softmax runs along dimension {dim}, not over the keys"


def _unmasked(scores: Any, found: _Scores) -> tuple[fx.Node | str, _Scores]:
    """The product behind scores that may be masked, capped, then scaled (backwards), and what was found.

    In place of the product, what is in the way of one.
    """
    floored = _floored(scores)
    if floored is not None and _alone(scores, found):
        found.inside.append(scores)
        return _unmasked(floored, found)
    filled = _filled(scores)
    operands = _operands(scores, _ADD)
    if operands is None and filled is None:
        return _uncapped(scores, found), found
    if not _alone(scores, found):
        return "something else reads the scores", found
    inside = [*found.inside, scores]
    if filled is not None:
        below = _Scores(masks=[*found.masks, filled[1]], sinks=found.sinks, inside=inside)
        return _unmasked(filled[0], below)
    assert operands is not None
    if scores.target in _IN_PLACE and not _behind(operands[0], _is_product):
        return "the scores are added to something else in place", found
    reasons = []
    # the mask may stand on either side, unless it would be written to; the scores lead back to a product
    for first, mask in (operands,) if scores.target in _IN_PLACE else (operands, operands[::-1]):
        above = _Scores(masks=[*found.masks, Mask(ADDED, mask)], sinks=found.sinks, inside=inside)
        product, below = _unmasked(first, above)
        if isinstance(product, fx.Node):
            if _is_mask(mask):
                return product, below
            product = "what is added to the scores is no mask of 1 to 4 dimensions"
        # of the side where scores are
        reasons.insert(0 if _behind(first, _is_product) else len(reasons), product)
    return reasons[0], found


def _filled(scores: Any) -> tuple[Any, Mask] | None:
    """Scores, and where a number that softmax makes 0 stands in their place."""
    name = called(scores).rstrip("_")
    if name not in ("masked_fill", "where") or len(scores.args) != 3 or scores.kwargs:
        return None
    first, second, third = scores.args
    kind, node, inner = (HIDDEN, second, first) if name == "masked_fill" else (SEEN, first, second)
    value = example(node)
    boolean = isinstance(value, torch.Tensor) and value.dtype == torch.bool and 1 <= value.dim() <= 4
    return (inner, Mask(kind, node)) if boolean and _constant(third) <= _VERY_LOW else None


def _floored(scores: Any) -> Any:
    """Scores of which a very low number takes the place of lower ones; None for anything else."""
    low = scores.args[1] if called(scores) in ("max", "maximum", "clamp_min") and len(scores.args) == 2 else 0
    return scores.args[0] if _constant(low) <= _VERY_LOW else None


def _constant(x: Any) -> float:
    """A number, also as a tensor that the graph makes of one; 0 for anything else."""
    if isinstance(x, fx.Node) and x.op == "call_function" and x.target in (torch.tensor, torch.full):
        x = x.args[-1]
    return float(x) if isinstance(x, int | float) else 0.0


def _uncapped(scores: Any, found: _Scores) -> fx.Node | str:
    """The product behind scores that may be scaled, then capped (backwards), or what is in the way."""
    softcap, capped = _factor(scores)
    if _is(capped, _TANH) and softcap > 0 and scores is not capped:
        if not (_alone(scores, found) and _alone(capped, found)):
            return "something else reads the scores"
        # cap * tanh(c x) is x times cap * c, capped
        found.softcap = found.scale = softcap
        found.inside += [scores, capped]
        scores = capped.args[0]
    while True:
        factor, inner = _factor(scores)
        if inner is scores:
            break
        if not _alone(scores, found):
            return "something else reads the scores"
        found.scale *= factor
        found.inside.append(scores)
        scores = inner
    product = _skip(scores, found, _is_cast)
    if _operands(product, _MATMUL) is None:
        return f"{called(product)} lies between the product of queries and keys and softmax"
    return product if _alone(product, found) else "something else reads the scores"


def _behind(node: Any, wanted: Callable[[Any], bool]) -> fx.Node | None:
    """The nearest such node that this one is made of, by way of what changes numbers one by one."""
    pending, seen = [node], set()
    while pending and len(seen) < _SEARCHED:
        node = pending.pop(0)
        if not isinstance(node, fx.Node) or node in seen:
            continue
        if wanted(node):
            return node
        seen.add(node)
        if called(node).rstrip("_") in _PASSED:
            pending += node.all_input_nodes
    return None


def _is_weights(node: Any) -> bool:
    """Whether this is a softmax over a product."""
    return _is(node, _SOFTMAX) and _behind(node.args[0] if node.args else None, _is_product) is not None


def _is_product(node: Any) -> bool:
    return _is(node, _PRODUCTS)


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
    while any(kind(node) for kind in kinds) and _alone(node, found):
        node = _take(node, found)
    return node


def _take(node: fx.Node, found: _Scores) -> Any:
    found.inside.append(node)
    return node.args[0]


def _is(node: Any, targets: set[Any]) -> bool:
    called_so = isinstance(node, fx.Node) and node.op in ("call_function", "call_method")
    # all arguments by keyword is no spelling that is known here
    return called_so and node.target in targets and bool(node.args)


def _operands(node: Any, targets: set[Any]) -> tuple[fx.Node, fx.Node] | None:
    if not _is(node, targets) or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    return (left, right) if isinstance(left, fx.Node) and isinstance(right, fx.Node) else None


def _alone(node: Any, found: _Scores) -> bool:
    """Whether nothing reads this but one node, or those that were passed."""
    return isinstance(node, fx.Node) and (len(node.users) == 1 or all(x in found.inside for x in node.users))


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
