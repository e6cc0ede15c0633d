"""Bring products of matrices into the one form that attention is searched in, matmul of [B, H, L, D].

before   w = bmm(q3, k.reshape(B * H, L, D).mT).view(B, H, n, L) + mask
         o = bmm(softmax(w.view(B * H, n, L), -1), v.reshape(B * H, L, D)).view(B, H, n, D)
after    w = matmul(q3.unflatten(0, (-1, H)), k.transpose(-1, -2)) + mask
         o = matmul(softmax(w, -1), v)

What lies between is done to [B, H, ..] as well, as long as it concerns numbers one by one or the last
dimension. An `einsum` that is a product of matrices becomes one. A number that scales the scores and is a
tensor goes to the queries.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from kvmix_fx import dynamo
from kvmix_fx.dynamo import example
from kvmix_fx.passes.find.views import called

_RESHAPES = {"reshape", "view", "flatten", "unflatten"}
_TURNS = {"transpose", "swapaxes"}
_FACTORS = {"mul", "truediv", "div"}
_ONE_BY_ONE = {"dropout", "to", "float", "type_as", "contiguous", "add", "masked_fill", *_FACTORS}
_PRODUCTS = {"bmm", "baddbmm", "einsum", "matmul"}
_ERASED = {"softmax", "zeros", *_RESHAPES, *_TURNS, *_ONE_BY_ONE, *_PRODUCTS}
# {batch}{row}{inner}, {batch}{two letters} -> {batch}{row}{column}
_MATRICES = re.compile(r"(\w+)(\w)(\w),\1(\w\w)->\1\2(\w)")


def normalize_products(gm: fx.GraphModule) -> None:
    """Edit the graph. Its results stay the same but for rounding."""
    _Normalizer(gm).run()


class _Normalizer:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.graph = gm, gm.graph
        self.known: dict[fx.Node, fx.Node | None] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            name = called(node)
            if node._erased:
                continue
            if name == "einsum":
                self._write_as_matmul(node)
            elif name in ("bmm", "baddbmm", "matmul") and _rank(node) == 3:
                self._multiply_unfolded(node)
            elif name in _RESHAPES and _folds(node, node.args[0]):
                whole = self._unfolded(node.args[0])
                if whole is not None:
                    _replace(node, whole)
            elif name in _FACTORS:
                self._move_factor(node)

    def _write_as_matmul(self, node: fx.Node) -> None:
        """An einsum that multiplies the last two dimensions of two tensors as matrices."""
        equation, *operands = node.args
        if len(operands) == 1 and isinstance(operands[0], Sequence):
            operands = list(operands[0])
        terms = _MATRICES.fullmatch(equation.replace(" ", "")) if isinstance(equation, str) else None
        if terms is None or len(operands) != 2:
            return
        batch, row, inner, right, column = terms.groups()
        all_differ = len({*batch, row, inner, column}) == len(batch) + 3
        if not all_differ or right not in (inner + column, column + inner):
            return
        left, other = operands
        with self.graph.inserting_before(node):
            if right[0] == column:
                other = self._new("transpose", other, -1, -2)
            _replace(node, self._new(torch.matmul, left, other))

    def _multiply_unfolded(self, node: fx.Node) -> None:
        """A product of matrices of [B * H, ..], as one of [B, H, ..] that is folded."""
        adds = called(node) == "baddbmm"
        names = ("input", "batch1", "batch2") if adds else ("input", "mat2")
        given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
        factors = [given.get(name) for name in names[-2:]]
        wholes = [self._unfolded(x) for x in factors]
        heads = next((example(x).shape[1] for x in wholes if x is not None), None)
        if heads is None:
            return
        with self.graph.inserting_before(node):
            both = [self._split(x, heads) if y is None else y for x, y in zip(factors, wholes, strict=True)]
            product = self._new(torch.matmul, *both)
            if given.get("alpha", 1) != 1:
                product = self._new(torch.mul, product, given["alpha"])
            # what is added most often is room for the result
            if adds and given.get("beta", 1) != 0 and called(given["input"]) != "zeros":
                term = self._split(given["input"], heads)
                if given.get("beta", 1) != 1:
                    term = self._new(torch.mul, term, given["beta"])
                product = self._new(torch.add, product, term)
            _replace(node, self._new("flatten", product, 0, 1))

    def _unfolded(self, node: Any) -> fx.Node | None:
        """The numbers of a node [B * H, ..] as [B, H, ..], made from what makes it; None if nothing tells."""
        if node not in self.known:
            self.known[node] = self._find_unfolded(node)
        return self.known[node]

    def _find_unfolded(self, node: Any) -> fx.Node | None:
        if _rank(node) != 3 or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        name, (source, *others) = called(node), node.args
        if name in _RESHAPES:
            return source if _folds(source, node) else None
        turned = name in _TURNS and {*others} in ({1, 2}, {-1, -2})
        summed = name == "softmax" and node.kwargs.get("dim", others[0] if others else None) in (-1, 2)
        whole = self._unfolded(source) if turned or summed or name in _ONE_BY_ONE else None
        if whole is None:
            return None
        heads = example(whole).shape[1]
        with self.graph.inserting_before(node):
            others = [self._split(x, heads) if _rank(x) == 3 else x for x in node.args[1:]]
            if turned:
                new = self._new("transpose", whole, -1, -2)
            elif summed:
                new = self._new(torch.softmax, whole, -1, dtype=node.kwargs.get("dtype"))
            else:
                new = self._new(node.target, whole, *others, **node.kwargs)
            _replace(node, self._new("flatten", new, 0, 1))
        return new

    def _split(self, node: Any, heads: int) -> fx.Node:
        """[B * H, ..] as [B, H, ..]; what is the same for all of them stays as it is."""
        whole = self._unfolded(node)
        if whole is not None or _same(example(node).shape[:1], [1]):
            return node if whole is None else whole
        return self._new("unflatten", node, 0, (-1, heads))

    def _move_factor(self, node: fx.Node) -> None:
        """Scores times or over a number that is a tensor, as a product of queries that are."""
        product: Any
        product, factor = node.args if len(node.args) == 2 else (None, None)
        alone = isinstance(product, fx.Node) and called(product) == "matmul" and len(product.users) == 1
        if not alone or _rank(product) != 4 or _rank(factor) != 0 or node.kwargs:
            return
        query, key = product.args  # type: ignore[union-attr]
        with self.graph.inserting_before(node):
            scaled = self._new(node.target, query, factor)
            _replace(node, self._new(torch.matmul, scaled, key))

    def _new(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        make = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = make(target, args, {name: value for name, value in kwargs.items() if value is not None})
        dynamo.fill_examples(self.gm, [node])
        return node


def _replace(node: fx.Node, new: fx.Node) -> None:
    """Put `new` in place of a node, and erase that with what only it needed, none of which has an effect."""
    for name, value in node.meta.items():
        new.meta.setdefault(name, value)
    node.replace_all_uses_with(new)
    pending = [node]
    while pending:
        node = pending.pop()
        if not node.users and not node._erased and called(node) in _ERASED:
            pending += node.all_input_nodes
            node.graph.erase_node(node)


def _folds(inner: Any, outer: Any) -> bool:
    """Whether `outer` [B * H, ..] has the numbers of `inner` [B, H, ..] in their order, if it is a view."""
    if _rank(inner) != 4 or _rank(outer) != 3:
        return False
    (batch, heads, *rest), (both, *others) = example(inner).shape, example(outer).shape
    return isinstance(heads, int) and _same([batch * heads, *rest], [both, *others])


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether sizes are equal whatever the numbers behind symbols; to ask these would make guards."""
    written = ([dynamo.expression(n) if dynamo.is_symbolic(n) else n for n in x] for x in (some, others))
    return len(some) == len(others) and all(a == b for a, b in zip(*written, strict=True))


def _rank(node: Any) -> int:
    value = example(node)
    return value.dim() if isinstance(node, fx.Node) and isinstance(value, torch.Tensor) else -1
