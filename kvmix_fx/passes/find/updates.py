"""Find writes to packed inputs: concatenation (growing) and writes by position (fixed)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.dynamo import example
from kvmix_fx.passes.sites import Update

_CAT = {torch.cat, torch.concat, torch.concatenate, torch.ops.aten.cat.default}
_INDEX_COPY = {torch.Tensor.index_copy_, torch.ops.aten.index_copy_.default}
_FULL = slice(None)


def packed_inputs(graph: fx.Graph) -> dict[fx.Node, QuantizedKVTensor]:
    """Placeholders that hold packed tensors, with their fake values."""
    found = {}
    for node in graph.nodes:
        if node.op == "placeholder" and isinstance(example(node), QuantizedKVTensor):
            found[node] = example(node)
    return found


def find_updates(graph: fx.Graph) -> list[Update]:
    """All writes to packed inputs that have a known spelling, in graph order."""
    packed = packed_inputs(graph)
    found = []
    for node in graph.nodes:
        update = _concatenation(node, packed) or _by_position(node, packed)
        if update is not None:
            found.append(update)
    return found


def find_plain_writes(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Plain 4-D inputs that are written by position along tokens, with the node of the positions."""
    found = {}
    for node in graph.nodes:
        written = _indexed(node)
        if written is None:
            continue
        buffer, positions, _ = written
        value = example(buffer)
        plain = isinstance(value, torch.Tensor) and not isinstance(value, QuantizedKVTensor)
        if buffer.op == "placeholder" and plain and value.dim() == 4:
            found[buffer] = positions
    return found


def cat_operands(node: fx.Node) -> list[fx.Node] | None:
    """Operands if this concatenates 4-D tensors along tokens (dim 2)."""
    if node.op != "call_function" or node.target not in _CAT:
        return None
    operands: Any = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    value = example(node)
    if not isinstance(operands, Sequence) or dim not in (2, -2) or getattr(value, "dim", lambda: 0)() != 4:
        return None
    return [o for o in operands if isinstance(o, fx.Node)]


def _concatenation(node: fx.Node, packed: dict[fx.Node, QuantizedKVTensor]) -> Update | None:
    operands = cat_operands(node)
    if operands is None or len(operands) != 2 or operands[0] not in packed or operands[1] in packed:
        return None
    return Update("cat", node, operands[0], operands[1], None, packed[operands[0]])


def _by_position(node: fx.Node, packed: dict[fx.Node, QuantizedKVTensor]) -> Update | None:
    written = _indexed(node)
    if written is None or written[0] not in packed:
        return None
    past, positions, new = written
    idiom = "setitem" if node.target is operator.setitem else "index_copy_"
    return Update(idiom, node, past, new, positions, packed[past], _from_zero(positions))


def _from_zero(positions: fx.Node) -> bool:
    """Whether these are 0, 1, 2, ... in every run: made so, and only used to write by them."""
    if positions.op != "call_function" or positions.target is not torch.arange:
        return False
    bounds = len(positions.args) + len({"start", "end", "step"} & positions.kwargs.keys())
    writes = (_indexed(user) for user in positions.users)
    return bounds == 1 and all(write is not None and write[1] is positions for write in writes)


def _indexed(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(written tensor, positions, new tokens) of a write along dim 2, in either spelling."""
    arguments: list[Any] = [*node.args]
    if node.op == "call_function" and node.target is operator.setitem:
        past, index, new = arguments
        whole = isinstance(index, tuple) and len(index) == 3 and index[:2] == (_FULL, _FULL)
        return (past, index[2], new) if whole and isinstance(index[2], fx.Node) else None
    method = node.op == "call_method" and node.target == "index_copy_"
    if not method and not (node.op == "call_function" and node.target in _INDEX_COPY):
        return None
    arguments += [node.kwargs[k] for k in ("dim", "index", "source") if k in node.kwargs]
    past, dim, positions, new = arguments
    return (past, positions, new) if dim in (2, -2) else None
