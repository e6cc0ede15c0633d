"""Take the appends of a step out of its graph, to run when the graph is done.

A graph that only reads the cache is functional: AOTAutograd and Inductor need no bookkeeping for eight
written buffers per layer, which would take longer than compiling the rest of a decode step. Nothing in a
step reads what it appends, so the order does not matter. The step's keys and values of all layers live
until its end, so this is for short steps only.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from kvmix_fx.runtime.deferred import Deferred, FromInput, FromOutput
from kvmix_kernels import ops
from kvmix_kernels.tokens.ops import append_tiers_


def defer_appends(gm: fx.GraphModule) -> Deferred:
    """Edit a rewritten module so that it returns what its appends would store.

    Returns:
        The appends. Wrapped in them, what the module was compiled to takes the same inputs, returns the same
        outputs as before the edit, and appends.
    """
    graph = gm.graph
    inputs = {node: i for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    flat: list[Any] = list(output.args[0])
    count = len(flat)
    appends: list[tuple[Any, tuple[Any, ...]]] = []
    for node in [n for n in graph.nodes if n.target in (ops.append_, append_tiers_)]:
        arguments = tuple(_placed(argument, inputs, flat, count) for argument in node.args)
        appends.append((node.target, arguments))
        graph.erase_node(node)
    output.args = (tuple(flat),)
    graph.lint()
    gm.recompile()
    return Deferred(appends, count)


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
