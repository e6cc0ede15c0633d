"""Find products of one tensor with several weights, for a recorded step to do side by side.

before   q = linear(x, wq); k = linear(x, wk); v = linear(x, wv)
after    q, k, v = products(x, [wq, wk, wv], [None, None, None])

Each product is the one that it was: weights stay where they are, and results are the same numbers.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kvmix_fx.dynamo import example, fill_examples, storage
from kvmix_fx.passes.pieces import written
from kvmix_fx.runtime.branches import products

_NAMES = ("input", "weight", "bias")


def branch_products(gm: fx.GraphModule) -> int:
    """Edit a rewritten module.

    Returns:
        How many groups of products became one op.
    """
    fill_examples(gm)
    nodes = list(gm.graph.nodes)
    places = {node: i for i, node in enumerate(nodes)}
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        if node.target is torch._C._nn.linear and _is_plain(*_given(node), node):
            groups.setdefault(_given(node)[0], []).append(node)
    count = 0
    for x, group in groups.items():
        # all are done where the first was
        between = nodes[places[group[0]] : places[group[-1]]]
        if len(group) > 1 and not _writes(between, {y for node in group for y in node.all_input_nodes}):
            _join(gm, x, group)
            count += 1
    if count:
        gm.graph.lint()
        gm.recompile()
    return count


def _given(node: fx.Node) -> tuple[Any, Any, Any]:
    """The input, weight and bias of a `linear`."""
    given = dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
    return given["input"], given["weight"], given.get("bias")


def _is_plain(x: Any, weight: Any, bias: Any, result: fx.Node) -> bool:
    """Whether a `linear` multiplies a tensor with what is given to the graph, as they are."""
    tensors = [x, weight, *([] if bias is None else [bias])]
    if not all(isinstance(node, fx.Node) and isinstance(example(node), Tensor) for node in tensors):
        return False
    values = [example(node) for node in (*tensors, result)]
    return (
        all(node.op in ("placeholder", "get_attr") for node in tensors[1:])
        # weights of few bits, and those of several devices, have products of their own
        and not any(is_traceable_wrapper_subclass(value) for value in values)
        # autocast multiplies others than it is given
        and len({value.dtype for value in values}) == 1
        and values[0].is_floating_point()
        and values[1].dim() == 2
        and (bias is None or values[2].dim() == 1)
    )


def _writes(nodes: list[fx.Node], given: set[fx.Node]) -> bool:
    """Whether any of the nodes writes in place to what is given."""
    theirs = {storage(node) for node in given}
    return any(storage(x) in theirs for node in nodes for x in written(node))


def _join(gm: fx.GraphModule, x: fx.Node, group: list[fx.Node]) -> None:
    weights, biases = zip(*(_given(node)[1:] for node in group), strict=True)
    with gm.graph.inserting_before(group[0]):
        joined = gm.graph.call_function(products, (x, list(weights), list(biases)))
        parts = [gm.graph.call_function(operator.getitem, (joined, i)) for i in range(len(group))]
    fill_examples(gm, [joined, *parts])
    for node, part in zip(group, parts, strict=True):
        node.replace_all_uses_with(part)
        gm.graph.erase_node(node)
