"""A graph cut into segments, run one after another.

Two things need it: a backward that keeps the inputs of a segment instead of everything inside (gradient
checkpointing, for any model), and reading a text again from one layer on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes as a module of their own.

    inputs: names of the values it takes. outputs: names of those it hands on. last_uses: names no later
    segment needs.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last_uses: tuple[str, ...]


class SegmentedGraph:
    """Runs what `gm` computes, segment by segment.

    Attributes:
        segments: in order; a new one starts at each of the nodes given.
        checkpointing: keep only the inputs of segments for the backward, and compute the rest again.
        keep: remember the inputs of every segment, for `resume_at`.
        resume_at: the next call starts at this segment, with the inputs it had when last kept.
    """

    def __init__(self, gm: fx.GraphModule, starts: Sequence[fx.Node]) -> None:
        """Cut before each of `starts`. The nodes are copied."""
        nodes = list(gm.graph.nodes)
        self._placeholders = [node.name for node in nodes if node.op == "placeholder"]
        self._result: Any = _map(nodes[-1].args[0], fx.Node, lambda node: _Name(node.name))
        self.segments = _cut(gm, nodes, set(starts))
        self.checkpointing = False
        self.keep = False
        self.resume_at: int | None = None
        self._kept: list[dict[str, Any]] = []

    def forget(self) -> None:
        """Let go of kept inputs."""
        self._kept = []

    def __call__(self, *args: Any) -> Any:
        """Inputs of `gm` to its outputs."""
        first = self.resume_at or 0
        values = dict(zip(self._placeholders, args, strict=True)) if not first else dict(self._kept[first])
        if self.keep:
            self._kept = []
        for segment in self.segments[first:]:
            if self.keep:
                self._kept.append(dict(values))
            inputs = [values[name] for name in segment.inputs]
            if self.checkpointing:
                outputs = checkpoint(segment.module, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                outputs = segment.module(*inputs)
            for name in segment.last_uses:
                values.pop(name, None)
            values.update(zip(segment.outputs, outputs, strict=True))
        return _map(self._result, _Name, lambda name: values[name.name])


@dataclass(frozen=True)
class _Name:
    name: str


def _map(tree: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """`tree` of tuples, lists and dicts with its leaves of one type changed."""

    def one(leaf: Any) -> Any:
        return change(leaf) if isinstance(leaf, kind) else leaf

    return fx.node.map_aggregate(tree, one)


def _cut(gm: fx.GraphModule, nodes: list[fx.Node], starts: set[fx.Node]) -> list[Segment]:
    parts: list[list[fx.Node]] = [[]]
    for node in nodes:
        if node in starts:
            parts.append([])
        if node.op not in ("placeholder", "output"):
            parts[-1].append(node)
    part_of = {node: number for number, part in enumerate(parts) for node in part}
    final = len(parts)
    # a value is needed until its last reader; what the graph returns is needed to the end
    last_use = {
        node: max((final if user.op == "output" else part_of[user] for user in node.users), default=-1)
        for node in nodes
    }
    segments = []
    for number, part in enumerate(parts):
        graph = fx.Graph()
        inside = set(part)
        outer = dict.fromkeys(a for node in part for a in node.all_input_nodes if a not in inside)
        copies = {node: graph.placeholder(node.name) for node in outer}
        for node in part:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        handed_on = [node for node in part if last_use[node] > number]
        graph.output(tuple(copies[node] for node in handed_on))
        segments.append(
            Segment(
                fx.GraphModule(gm, graph),
                tuple(node.name for node in outer),
                tuple(node.name for node in handed_on),
                tuple(node.name for node, last in last_use.items() if last == number),
            )
        )
    return segments
