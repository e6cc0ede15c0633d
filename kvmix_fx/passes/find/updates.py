"""Find writes to caches. `IDIOMS` lists the ways of writing that are known, an object for each."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.dynamo import example
from kvmix_fx.passes.sites import Idiom, Miss, Update

_CAT = {torch.cat, torch.concat, torch.concatenate, torch.ops.aten.cat.default}
_INDEX_COPY = {torch.Tensor.index_copy_, torch.ops.aten.index_copy_.default}
_FULL = slice(None)


class Concatenation:
    """New tokens behind those of a growing cache.

    before   k = cat([cache, new], 2); return attention(q, k, v), k
    after    o = attend(q, new, *cache's buffers); append_(*cache's buffers, new); return o
    """

    name = "cat"
    written_in_place = False

    def find(self, node: fx.Node, caches: Mapping[fx.Node, Any]) -> Update | Miss | None:
        """Any concatenation that a cache takes part in."""
        operands, dim = _concatenated(node)
        packed = [x for x in operands if x in caches]
        if not packed:
            return None
        reason = ""
        if dim not in (2, -2):
            reason = f"a cache is concatenated along dimension {dim}; along tokens, 2, it would be an append"
        elif len(operands) != 2:
            reason = f"{len(operands)} tensors are concatenated; an append is a cache and its new tokens"
        elif len(packed) == 2:
            reason = "two caches are concatenated"
        elif operands[0] is not packed[0]:
            reason = "a cache is concatenated behind other tokens; an append has it first"
        elif not isinstance(operands[1], fx.Node):
            reason = "what is concatenated with a cache is no tensor of the graph"
        elif getattr(caches[packed[0]], "is_fixed", False):
            reason = "a cache of fixed capacity is concatenated, with all its empty places"
        if reason:
            return Miss(node, reason, tuple(packed))
        return Update(self, node, packed[0], operands[1], caches[packed[0]])

    def first_and_last(self, graph: fx.Graph, update: Update) -> None:
        """The cache knows its length."""

    def plain(self, graph: fx.Graph, update: Update, history: fx.Node) -> fx.Node:
        """The history and the new tokens."""
        return graph.call_function(torch.cat, ([history, update.new], 2))


class IndexCopy:
    """New tokens at consecutive positions that a tensor names.

    before   cache.index_copy_(2, positions, new); return attention(q, cache, mask)
    after    s = positions[0]; o = attend(q, new, *cache's buffers, s); append_(*cache's buffers, new, s)
    """

    name = "index_copy_"
    written_in_place = True

    def find(self, node: fx.Node, caches: Mapping[fx.Node, Any]) -> Update | Miss | None:
        """Any `index_copy_` into a cache."""
        past, dim, positions, new = _index_copied(node)
        if not isinstance(past, fx.Node) or past not in caches:
            return None
        if dim not in (2, -2):
            return Miss(node, f"a cache is written along dimension {dim}, not along tokens (2)", (past,))
        return Update(self, node, past, new, caches[past], positions, _from_zero(positions))

    def first_and_last(self, graph: fx.Graph, update: Update) -> tuple[fx.Node, fx.Node]:
        """Of the positions."""
        positions: Any = update.positions
        with graph.inserting_after(positions):
            first = graph.call_function(operator.getitem, (positions, 0))
        with graph.inserting_after(first):
            return first, graph.call_function(operator.getitem, (positions, -1))

    def plain(self, graph: fx.Graph, update: Update, history: fx.Node) -> fx.Node:
        """The history with the new tokens at their positions."""
        positions: Any = update.positions
        return graph.call_function(torch.index_copy, (history, 2, positions, update.new))


class SetItem(IndexCopy):
    """The same, written as an assignment.

    before   cache[:, :, positions] = new; return attention(q, cache, mask)
    after    as for `index_copy_`
    """

    name = "setitem"

    def find(self, node: fx.Node, caches: Mapping[fx.Node, Any]) -> Update | Miss | None:
        """Any assignment to a part of a cache whose index holds a tensor."""
        past, index, new = _assigned(node, caches)
        if past is None or not any(isinstance(i, fx.Node) for i in index):
            return None
        if len(index) != 3 or index[:2] != (_FULL, _FULL):
            return Miss(node, "a cache is written at an index other than [:, :, positions]", (past,))
        return Update(self, node, past, new, caches[past], index[2], _from_zero(index[2]))


class SliceAssignment:
    """New tokens at positions between two numbers.

    before   cache[:, :, start:stop] = new; return attention(q, cache, mask)
    after    s = full((), start); o = attend(q, new, *cache's buffers, s); append_(*cache's buffers, new, s)
    """

    name = "slice"
    written_in_place = True

    def find(self, node: fx.Node, caches: Mapping[fx.Node, Any]) -> Update | Miss | None:
        """Any assignment to a part of a cache whose index holds no tensor."""
        past, index, new = _assigned(node, caches)
        if past is None or any(isinstance(i, fx.Node) for i in index):
            return None
        if len(index) != 3 or index[:2] != (_FULL, _FULL) or not isinstance(index[2], slice):
            return Miss(node, "a cache is written at an index other than [:, :, start:stop]", (past,))
        start, stop = index[2].start or 0, index[2].stop
        first, last, value = example(start), example(stop), example(new)
        # asked in this order, of numbers or of symbols, which then are guarded
        fits = (
            index[2].step in (None, 1)
            and last is not None
            and getattr(value, "shape", ())[2:3] != ()
            and first >= 0
            and last - first == value.shape[2]
        )
        if not fits:
            return Miss(
                node, "a cache is written at [start:stop], which is not as long as the tokens", (past,)
            )
        return Update(
            self, node, past, new, caches[past], (start, stop), isinstance(start, int) and start == 0
        )

    def first_and_last(self, graph: fx.Graph, update: Update) -> tuple[fx.Node, fx.Node]:
        """The two numbers as tensors."""
        start, stop = update.positions  # type: ignore[misc]
        like = {"dtype": torch.int64, "device": update.tensor.device}

        def known(bounds: tuple[Any, ...]) -> fx.Node:
            return [n for n in graph.nodes if n in bounds or n.op == "placeholder"][-1]

        # as early as may be: somebody may read the cache before it is written
        with graph.inserting_after(known((start,))):
            first = graph.call_function(torch.full, ((), start), like)
        with graph.inserting_after(known((first, stop))):
            end = graph.call_function(torch.full, ((), stop), like)
        with graph.inserting_after(end):
            return first, graph.call_function(operator.sub, (end, 1))

    def plain(self, graph: fx.Graph, update: Update, history: fx.Node) -> fx.Node:
        """The history with the new tokens in its slice."""
        return graph.call_function(torch.slice_scatter, (history, update.new, 2, *update.positions))  # type: ignore[misc]


class Read:
    """A cache that a graph reads and does not write: no idiom to be found, but what a site of it has."""

    name = "read"
    written_in_place = False

    def find(self, node: fx.Node, caches: Mapping[fx.Node, Any]) -> Update | None:
        """The cache itself."""
        return Update(self, node, node, None, caches[node]) if node in caches else None

    def first_and_last(self, graph: fx.Graph, update: Update) -> None:
        """Nothing is written."""

    def plain(self, graph: fx.Graph, update: Update, history: fx.Node) -> fx.Node:  # noqa: ARG002
        """The history."""
        return history


IDIOMS: tuple[Idiom, ...] = (Concatenation(), IndexCopy(), SetItem(), SliceAssignment())
READ = Read()


def packed_inputs(graph: fx.Graph) -> dict[fx.Node, QuantizedKVTensor]:
    """Placeholders that hold packed tensors, with their fake values."""
    found = {}
    for node in graph.nodes:
        if node.op == "placeholder" and isinstance(example(node), QuantizedKVTensor):
            found[node] = example(node)
    return found


def find_updates(graph: fx.Graph) -> list[Update | Miss]:
    """All writes to packed inputs in graph order, and what nearly is one."""
    return _find(graph, packed_inputs(graph))


def find_plain_writes(graph: fx.Graph) -> dict[fx.Node, Update]:
    """The writes in place to plain 4-D inputs, by input."""
    values = {node: example(node) for node in graph.nodes if node.op == "placeholder"}
    plain = {
        node: value
        for node, value in values.items()
        if isinstance(value, torch.Tensor) and not isinstance(value, QuantizedKVTensor) and value.dim() == 4
    }
    found = (update for update in _find(graph, plain) if isinstance(update, Update))
    return {update.past: update for update in found if update.idiom.written_in_place}


def _find(graph: fx.Graph, caches: Mapping[fx.Node, Any]) -> list[Update | Miss]:
    found = (idiom.find(node, caches) for node in graph.nodes for idiom in IDIOMS)
    return [update for update in found if update is not None]


def is_append(node: fx.Node) -> bool:
    """Whether this concatenates 4-D tensors along tokens (dim 2)."""
    operands, dim = _concatenated(node)
    return bool(operands) and dim in (2, -2) and getattr(example(node), "dim", lambda: 0)() == 4


def _concatenated(node: fx.Node) -> tuple[Sequence[Any], Any]:
    """What this node concatenates along which dimension; nothing if it does not."""
    if node.op != "call_function" or node.target not in _CAT:
        return (), None
    operands: Any = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return (operands if isinstance(operands, Sequence) else ()), dim


def _index_copied(node: fx.Node) -> list[Any]:
    """[written tensor, dimension, positions, new tokens] of an `index_copy_`, else None four times."""
    method = node.op == "call_method" and node.target == "index_copy_"
    if not method and not (node.op == "call_function" and node.target in _INDEX_COPY):
        return [None] * 4
    return [*node.args, *(node.kwargs[k] for k in ("dim", "index", "source") if k in node.kwargs)]


def _assigned(node: fx.Node, caches: Mapping[fx.Node, Any]) -> tuple[fx.Node | None, tuple[Any, ...], Any]:
    """(cache, index, new value) of an assignment to a part of a cache."""
    if node.op != "call_function" or node.target is not operator.setitem:
        return None, (), None
    past, index, new = node.args
    if not isinstance(past, fx.Node) or past not in caches:
        return None, (), None
    return past, index if isinstance(index, tuple) else (index,), new


def _from_zero(positions: Any) -> bool:
    """Whether these are 0, 1, 2, ... in every run: made so, and only used to write by them."""
    if not isinstance(positions, fx.Node) or positions.target is not torch.arange:
        return False
    bounds = len(positions.args) + len({"start", "end", "step"} & positions.kwargs.keys())
    return bounds == 1 and all(_writes_by(user, positions) for user in positions.users)


def _writes_by(node: fx.Node, positions: fx.Node) -> bool:
    """Whether this writes tokens of any tensor at these positions and does nothing else with them."""
    _, dim, copied, _ = _index_copied(node)
    if copied is positions:
        return dim in (2, -2)
    _, index, _ = _assigned(node, dict.fromkeys(node.all_input_nodes))
    return len(index) == 3 and index[:2] == (_FULL, _FULL) and index[2] is positions
