"""Form sites out of attention calls and cache updates, and decide what happens to each.

Nothing is changed here. Every attention call becomes a site with an action, and with a reason
whenever it is not fully rewritten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.dynamo import example, module_path
from kvmix_fx.passes.find.attention import find_attention
from kvmix_fx.passes.find.updates import (
    cat_operands,
    find_plain_writes,
    find_updates,
    packed_inputs,
)
from kvmix_fx.passes.find.views import heads_root
from kvmix_fx.passes.sites import (
    ADOPT,
    APPEND,
    ATTEND,
    LEAVE,
    STORAGE,
    AttentionCall,
    PlainBuffers,
    Site,
    Update,
)


def find_sites(graph: fx.Graph) -> list[Site]:
    """A site per attention call, in graph order."""
    packed = packed_inputs(graph)
    updates = find_updates(graph)
    by_result: dict[fx.Node, Update] = {}
    by_new: dict[fx.Node, Update] = {}
    for update in updates:
        by_result[update.node] = update
        if update.idiom != "cat":
            # written in place: later readers use the placeholder itself
            by_result[update.past] = update
        if update.new is not None:
            by_new[update.new] = update
    for node, tensor in packed.items():
        by_result.setdefault(node, Update("read", node, node, None, None, tensor))
    outputs = _output_nodes(graph)
    plain = find_plain_writes(graph)
    return [_site(call, by_result, by_new, outputs, plain) for call in find_attention(graph)]


def _output_nodes(graph: fx.Graph) -> set[fx.Node]:
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    return set(output.all_input_nodes)


def _site(
    call: AttentionCall,
    by_result: dict[fx.Node, Update],
    by_new: dict[fx.Node, Update],
    outputs: set[fx.Node],
    plain: dict[fx.Node, fx.Node],
) -> Site:
    module = module_path(call.node)
    key, value = heads_root(call.key), heads_root(call.value)
    k, v = by_result.get(key), by_result.get(value)
    if k is not None and v is not None:
        reason = _why_not_attend(call, k, v)
        action = STORAGE if reason else ATTEND
        return Site(call, module, k.idiom, action, reason, key_update=k, value_update=v)
    k, v = by_new.get(key), by_new.get(value)
    if k is not None and v is not None:
        # a first step that attends to its own tokens while the cache takes them
        return Site(call, module, k.idiom, APPEND, key_update=k, value_update=v)
    idiom = _plain_idiom(key)
    reason = _why_not_adopt(key, value, outputs)
    if reason:
        site = Site(call, module, idiom, LEAVE, reason)
        if key in plain and value in plain:
            site.buffers = PlainBuffers(key, value, plain[key])
        return site
    return Site(call, module, idiom, ADOPT, key_root=key, value_root=value)


def _why_not_attend(call: AttentionCall, k: Update, v: Update) -> str:
    query = example(call.query)
    if (k.new is None) != (v.new is None) or k.tensor.is_fixed != v.tensor.is_fixed:
        return "keys and values are cached in different ways"
    if call.dropout_p != 0:
        return "attention dropout is on; call model.eval()"
    if call.is_causal is not False and query.shape[2] != 1:
        return "is_causal without a mask aligns to the first token, not to the last"
    if call.is_causal is not False:
        return "is_causal with one query attends to the first token only"
    if query.dim() != 4 or query.shape[1] % k.tensor.shape[1]:
        return f"query heads {tuple(query.shape)} are no multiple of the cached heads {tuple(k.tensor.shape)}"
    return ""


def _plain_idiom(key: fx.Node) -> str:
    if cat_operands(key) is not None:
        return "cat"
    return "in place" if key.op == "placeholder" else "none"


def _why_not_adopt(key: fx.Node, value: fx.Node, outputs: set[fx.Node]) -> str:
    if key.op == "placeholder" or value.op == "placeholder":
        return (
            "keys and values are plain buffers that a graph cannot replace: kvmix_fx.compile packs those of "
            "the model's own modules after this step, other caches must be handed in packed"
        )
    for name, node in (("keys", key), ("values", value)):
        x: Any = example(node)
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            return f"{name} are not [B, heads, L, D]"
        if isinstance(x, QuantizedKVTensor):
            return f"packed {name} are used in a way that has no known spelling"
        if not x.is_floating_point():
            return f"{name} are {x.dtype}, not floating point"
    if key not in outputs or value not in outputs:
        if _sliced_output(key, outputs):
            return "sliding window: only a slice of the keys is kept, so the cache stays small at 16 bits"
        return "keys and values do not leave the graph: there is no cache here"
    return ""


def _sliced_output(key: fx.Node, outputs: set[fx.Node]) -> bool:
    return any(user in outputs and user is not key for user in key.users)
