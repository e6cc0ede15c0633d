"""Find attention: calls of scaled_dot_product_attention in two spellings, and what is written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from kvmix_fx.passes.find.written_out import find_written_out
from kvmix_fx.passes.sites import AttentionCall, Miss

TARGETS = {scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default}
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def find_attention(graph: fx.Graph) -> list[AttentionCall]:
    """All of it in graph order, arguments by name."""
    return [found for found in look_for_attention(graph) if isinstance(found, AttentionCall)]


def look_for_attention(graph: fx.Graph) -> list[AttentionCall | Miss]:
    """As `find_attention`, and what nearly is attention."""
    calls: list[AttentionCall | Miss] = []
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in TARGETS:
            written_out = find_written_out(node)
            if written_out is not None:
                calls.append(written_out)
            continue
        arguments: dict[str, Any] = dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
        calls.append(
            AttentionCall(
                node,
                arguments["query"],
                arguments["key"],
                arguments["value"],
                arguments.get("attn_mask"),
                arguments.get("dropout_p", 0.0),
                arguments.get("is_causal", False),
                arguments.get("scale"),
            )
        )
    return calls
