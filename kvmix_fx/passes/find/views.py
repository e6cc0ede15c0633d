"""See through the views between a cache and attention: repeated heads and layout no-ops."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from kvmix_fx.dynamo import example

_RESHAPES = {"reshape", "view", "flatten", "contiguous"}
_FULL = slice(None)


def heads_root(node: fx.Node, casts: bool = False) -> fx.Node:
    """The [B, Hkv, L, D] node that `node` repeats along heads (or `node` itself).

    Knows three spellings: x[:, :, None].expand(B, H, G, L, D).reshape(B, H * G, L, D);
    x.repeat_interleave(G, 1); and x.contiguous(). With `casts` also sees through those to float32 and back.
    """
    while True:
        inner = _contiguous(node) or _repeat_interleave(node) or _expand_reshape(node)
        inner = inner or (_cast(node) if casts else None)
        if inner is None:
            return node
        node = inner


def called(node: Any) -> str:
    """Name of the function or method that makes a node, '' for what nothing does."""
    if not isinstance(node, fx.Node):
        return ""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _cast(node: fx.Node) -> fx.Node | None:
    """What a node is in another floating-point dtype, on the same device."""
    if called(node) not in ("to", "float", "type_as", "type") or not isinstance(node.args[0], fx.Node):
        return None
    before, after = example(node.args[0]), example(node)
    alike = before.is_floating_point() and after.is_floating_point() and before.device == after.device
    return node.args[0] if alike else None


def _contiguous(node: fx.Node) -> fx.Node | None:
    return node.args[0] if called(node) == "contiguous" and isinstance(node.args[0], fx.Node) else None


def _repeat_interleave(node: fx.Node) -> fx.Node | None:
    if called(node) != "repeat_interleave":
        return None
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else None)
    repeats = node.kwargs.get("repeats", node.args[1] if len(node.args) > 1 else None)
    source = node.args[0]
    if not isinstance(source, fx.Node) or not isinstance(repeats, int) or dim not in (1, -3):
        return None
    return source


def _expand_reshape(node: fx.Node) -> fx.Node | None:
    if called(node) not in _RESHAPES:
        return None
    expanded: Any = node.args[0]
    if called(expanded) != "expand":
        return None
    unsqueezed: Any = expanded.args[0]
    source: Any = None
    if called(unsqueezed) == "unsqueeze" and unsqueezed.args[1] in (2, -3):
        source = unsqueezed.args[0]
    elif unsqueezed.op == "call_function" and unsqueezed.target is operator.getitem:
        index = unsqueezed.args[1]
        inserts_group = isinstance(index, tuple) and len(index) >= 3 and index[2] is None
        if inserts_group and all(i == _FULL for n, i in enumerate(index) if n != 2):
            source = unsqueezed.args[0]
    if not isinstance(source, fx.Node):
        return None
    shapes: list[Any] = [getattr(example(n), "shape", None) for n in (source, expanded, node)]
    if any(s is None for s in shapes):
        return None
    inner, wide, flat = shapes
    # [B, H, L, D] -> [B, H, G, L, D] -> [B, H * G, L, D] and nothing else
    fits = len(inner) == 4 and len(wide) == 5 and len(flat) == 4 and isinstance(wide[2], int)
    return source if fits and flat[1] == inner[1] * wide[2] and flat[3] == inner[3] else None
