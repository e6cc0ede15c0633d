"""See the graphs a pass gets and leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


class RecordingBackend:
    """An inner compiler that keeps every graph it is given and runs it eagerly."""

    def __init__(self) -> None:
        """Empty."""
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        """Dynamo's calling convention."""
        self.graphs.append(gm)
        return gm.forward


def count_ops(gm: fx.GraphModule, target: Any) -> int:
    """Nodes that call `target` (a function, op or method name)."""
    return sum(node.target == target for node in gm.graph.nodes)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a node that calls one of our ops, by the names of its schema."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
