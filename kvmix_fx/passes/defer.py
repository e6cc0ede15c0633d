"""Take the appends of a step out of its graph, to run when the graph is done.

A graph that only reads the cache is functional: AOTAutograd and Inductor need no bookkeeping for eight
written buffers per layer, which would take longer than compiling the rest of a decode step. Nothing in a
step reads what it appends, so the order does not matter. The step's keys and values of all layers live
until its end, so this is for short steps only. What counts the tokens of each layer can be added up with
them, by one launch for all layers.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from kvmix_fx.dynamo import example, storage
from kvmix_fx.runtime.deferred import Deferred, FromInput, FromOutput
from kvmix_kernels import ops
from kvmix_kernels.tokens.ops import append_tiers_


def defer_appends(gm: fx.GraphModule, counters: bool) -> Deferred:
    """Edit a rewritten module so that it returns what its appends would store.

    Returns:
        The appends and counters. Wrapped in them, what the module was compiled to takes the same inputs,
        returns the same outputs as before the edit, appends and counts.
    """
    graph = gm.graph
    inputs = {node: i for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    flat: list[Any] = list(output.args[0])
    count = len(flat)
    added: dict[int, list[int]] = {}
    for node in _counters(graph, inputs) if counters else ():
        counter, number = cast("tuple[fx.Node, int]", node.args)
        added.setdefault(number, []).append(inputs[counter])
        graph.erase_node(node)
        # where the step's first token is stored is what the counter says until the end
        for position in [n for n in graph.nodes if _is_first_position(n, counter)]:
            position.replace_all_uses_with(counter)
    graph.eliminate_dead_code(lambda node: node.target not in (torch.arange, operator.add, operator.getitem))
    appends: list[tuple[Any, tuple[Any, ...]]] = []
    for node in [n for n in graph.nodes if n.target in (ops.append_, append_tiers_)]:
        arguments = tuple(_placed(argument, inputs, flat, count) for argument in node.args)
        appends.append((node.target, arguments))
        graph.erase_node(node)
    output.args = (tuple(flat),)
    graph.lint()
    gm.recompile()
    return Deferred(appends, count, added)


def _counters(graph: fx.Graph, inputs: dict[fx.Node, int]) -> list[fx.Node]:
    """Steps `input.add_(number)` after which nothing reads the input."""
    readers: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        for x in node.all_input_nodes:
            if isinstance(example(x), torch.Tensor):
                readers[storage(x)] = node
    return [
        node
        for node in graph.nodes
        if node.op == "call_method"
        and node.target == "add_"
        and node.args[0] in inputs
        and len(node.args) == 2
        and isinstance(node.args[1], int)
        and not node.users
        and not node.kwargs
        and readers[storage(node.args[0])] is node
    ]


def _is_first_position(node: Any, counter: fx.Node) -> bool:
    """Whether a node is `(arange(n) + counter)[0]`, as a number of the counter's kind."""
    if node.target is not operator.getitem or node.args[1] != 0:
        return False
    positions = node.args[0]
    if not isinstance(positions, fx.Node) or positions.target is not operator.add or positions.kwargs:
        return False
    steps = [x for x in positions.args if x is not counter]
    if len(steps) != 1 or not isinstance(steps[0], fx.Node):
        return False
    start, found = example(counter), example(positions)
    return (
        steps[0].target is torch.arange
        and len(steps[0].args) == 1
        and set(steps[0].kwargs) <= {"device", "dtype"}
        and (start.dim(), start.dtype, start.device) == (0, found.dtype, found.device)
    )


def _placed(argument: Any, inputs: dict[fx.Node, int], flat: list[Any], count: int) -> Any:
    """Where an argument is found when the graph is done; what it makes itself joins its outputs `flat`."""
    if isinstance(argument, (list, tuple)):
        return [_placed(item, inputs, flat, count) for item in argument]
    if not isinstance(argument, fx.Node):
        return argument
    if argument in inputs:
        return FromInput(inputs[argument])
    if argument not in flat[count:]:
        flat.append(argument)
    return FromOutput(flat.index(argument, count))
