"""Find writes to packed inputs: concatenation (growing) and writes by position (fixed)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.passes.dynamo import example
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
        update = _concatenation(node, packed) or _index_copy(node, packed) or _setitem(node, packed)
        if update is not None:
            found.append(update)
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


def _index_copy(node: fx.Node, packed: dict[fx.Node, QuantizedKVTensor]) -> Update | None:
    method = node.op == "call_method" and node.target == "index_copy_"
    if not method and not (node.op == "call_function" and node.target in _INDEX_COPY):
        return None
    arguments: list[Any] = [*node.args]
    arguments += [node.kwargs[k] for k in ("dim", "index", "source") if k in node.kwargs]
    past, dim, positions, new = arguments
    if past not in packed or dim not in (2, -2):
        return None
    return Update("index_copy_", node, past, new, positions, packed[past])


def _setitem(node: fx.Node, packed: dict[fx.Node, QuantizedKVTensor]) -> Update | None:
    if node.op != "call_function" or node.target is not operator.setitem or node.args[0] not in packed:
        return None
    arguments: list[Any] = [*node.args]
    past, index, new = arguments
    by_position = isinstance(index, tuple) and len(index) == 3 and index[:2] == (_FULL, _FULL)
    if not by_position or not isinstance(index[2], fx.Node):
        return None
    return Update("setitem", node, past, new, index[2], packed[past])
