"""Prefill without a mask: attention under a plain causal mask becomes `is_causal=True`.

While it is traced, a model can not look whether a prompt is padded, so it builds the whole mask [B, 1, L, L],
and with an explicit mask attention can not take its fastest kernels. A mask that is nothing but "key position
<= query position" is recognized by the operations it is made of. Masks of sliding windows and of padded
prompts contain others and stay. Because of a mask models also repeat the heads of keys and values: kernels
for explicit masks do not share them. Without one they do, and copies of a long prompt are large.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from kvmix_fx import dynamo
from kvmix_fx.dynamo import example
from kvmix_fx.passes.find.attention import find_attention
from kvmix_fx.passes.find.views import heads_root
from kvmix_fx.passes.sites import AttentionCall

_ALLOWED = {torch.arange, operator.add, operator.getitem, operator.le}
_CHECKED_LENGTHS = (1, 2, 7)
_MAX_SHARED_HEAD_SIZE = 256
"""Attention that shares heads has no fast kernel for larger ones."""


def drop_causal_masks(graph: fx.Graph) -> int:
    """Edit calls of scaled_dot_product_attention whose mask is causal; returns how many there were."""
    found = 0
    causal: dict[fx.Node, bool] = {}
    for call in find_attention(graph):
        mask = call.mask
        if mask is None or call.is_causal or "attn_mask" not in call.node.kwargs:
            continue
        if not _square(call.query, call.key):
            continue
        if mask not in causal:
            causal[mask] = _is_causal(mask)
        if causal[mask]:
            call.node.kwargs = {**call.node.kwargs, "attn_mask": None, "is_causal": True}
            _share_heads(call)
            found += 1
    for mask, dropped in causal.items():
        if dropped:
            _erase(graph, mask)
    return found


def _share_heads(call: AttentionCall) -> None:
    """Hand the attention keys and values as they are before their heads are repeated."""
    key, value = heads_root(call.key), heads_root(call.value)
    repeated, k, v = (example(x).shape for x in (call.key, key, value))
    if k[1] == repeated[1] or k[1] != v[1] or k[3] != v[3] or k[3] > _MAX_SHARED_HEAD_SIZE:
        return
    query = example(call.query)
    # accelerators have no fast kernel for float32 either
    if query.device.type != "cpu" and query.dtype not in (torch.float16, torch.bfloat16):
        return
    call.node.replace_input_with(call.key, key)
    call.node.replace_input_with(call.value, value)
    call.node.kwargs = {**call.node.kwargs, "enable_gqa": True}
    for copy in (call.key, call.value):
        _erase(call.node.graph, copy)


def _square(query: fx.Node, key: fx.Node) -> bool:
    """Whether there is a key for every query, and more than one."""
    rows, columns = example(query).shape[2], example(key).shape[2]
    if dynamo.is_symbolic(rows) and dynamo.is_symbolic(columns):
        return bool(dynamo.expression(rows) == dynamo.expression(columns))
    return not dynamo.is_symbolic(rows) and not dynamo.is_symbolic(columns) and 1 < int(rows) == int(columns)


def _is_causal(mask: fx.Node) -> bool:
    """Whether `mask` compares two ranges of positions, and does it the right way round."""
    nodes, pending = set(), [mask]
    while pending:
        node = pending.pop()
        if node in nodes:
            continue
        nodes.add(node)
        pending += node.all_input_nodes
        size = node.op == "placeholder" and dynamo.is_symbolic(example(node))
        step = node.op == "call_function" and node.target in _ALLOWED
        if not size and not step and not (node.op == "call_method" and node.target == "expand"):
            return False
    # the operations could still be put together in another way, so look at what they yield
    ordered = [node for node in mask.graph.nodes if node in nodes]
    sizes = [node for node in ordered if node.op == "placeholder"]
    if not sizes:
        length = int(example(mask).shape[-1])
        return bool((_value(ordered, {}) == _triangle(length)).all())
    return all(
        bool((_value(ordered, dict.fromkeys(sizes, length)) == _triangle(length)).all())
        for length in _CHECKED_LENGTHS
    )


def _triangle(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def _value(ordered: list[fx.Node], known: dict[fx.Node, Any]) -> torch.Tensor:
    """What the last of the nodes computes, on the CPU; all sizes are `known`."""
    values: dict[fx.Node, Any] = dict(known)
    for node in ordered:
        if node in values:
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}
        if node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return torch.as_tensor(values[ordered[-1]])


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase what only a dropped mask or copy needed; none of it has an effect."""
    if node.users or node.op == "placeholder" or node._erased:
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for one in inputs:
        _erase(graph, one)
