"""Invariants of a rewritten graph, checked after every rewrite."""

from __future__ import annotations

from collections.abc import Iterable

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.dynamo import example
from kvmix_fx.errors import RewriteInvariantError
from kvmix_fx.passes.rewrite import Rewritten
from kvmix_fx.passes.sites import ADOPT, APPEND, ATTEND, STORAGE, Site
from kvmix_kernels import ops


def verify(result: Rewritten, sites: Iterable[Site]) -> None:
    """Count what must be there and what must be gone.

    Raises:
        RewriteInvariantError: naming what does not add up.
    """
    nodes = list(result.module.graph.nodes)
    targets = [n.target for n in nodes if n.op == "call_function"]
    attends = sum(site.action == ATTEND for site in sites)
    if targets.count(ops.attend) != attends:
        raise RewriteInvariantError(f"{attends} packed attention sites, {targets.count(ops.attend)} ops")
    if any(n.op == "placeholder" and isinstance(example(n), QuantizedKVTensor) for n in nodes):
        raise RewriteInvariantError("a packed tensor is still an input of the rewritten graph")
    adopted = {root for s in sites if s.action == ADOPT for root in (s.key_root, s.value_root)}
    if targets.count(ops.quantize_pack) != len(adopted):
        raise RewriteInvariantError(f"{len(adopted)} tensors to pack, {targets.count(ops.quantize_pack)} ops")
    written = {
        (s.key_update.past, s.value_update.past)
        for s in sites
        if s.action in (ATTEND, APPEND, STORAGE) and s.key_update and s.value_update and s.key_update.new
    }
    if targets.count(ops.append_) < len(written):
        raise RewriteInvariantError(f"{len(written)} caches written, {targets.count(ops.append_)} append ops")
