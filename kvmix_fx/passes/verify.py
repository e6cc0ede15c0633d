"""Invariants of a rewritten graph, checked after every rewrite."""

from __future__ import annotations

from collections.abc import Iterable

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.dynamo import example
from kvmix_fx.errors import RewriteInvariantError
from kvmix_fx.passes.rewrite import Rewritten
from kvmix_fx.passes.sites import ADOPT, APPEND, ATTEND, STORAGE, Site
from kvmix_kernels import ops
from kvmix_kernels.tokens import ops as token_ops


def verify(result: Rewritten, sites: Iterable[Site]) -> None:
    """Count what must be there and what must be gone.

    Raises:
        RewriteInvariantError: naming what does not add up.
    """
    nodes = list(result.module.graph.nodes)
    targets = [n.target for n in nodes if n.op == "call_function"]
    attends = sum(site.action == ATTEND for site in sites)
    found = targets.count(ops.attend) + targets.count(token_ops.attend_tiers)
    if found != attends:
        raise RewriteInvariantError(f"{attends} packed attention sites, {found} ops")
    if any(n.op == "placeholder" and isinstance(example(n), QuantizedKVTensor) for n in nodes):
        raise RewriteInvariantError("a packed tensor is still an input of the rewritten graph")
    adopted = {root for s in sites if s.action == ADOPT for root in (s.key_root, s.value_root)}
    found = targets.count(ops.quantize_pack) + 2 * targets.count(token_ops.pack_tiers)
    if found != len(adopted):
        raise RewriteInvariantError(f"{len(adopted)} tensors to pack, ops for {found}")
    written = {
        (s.key_update.past, s.value_update.past)
        for s in sites
        if s.action in (ATTEND, APPEND, STORAGE) and s.key_update and s.value_update and s.key_update.new
    }
    found = targets.count(ops.append_) + targets.count(token_ops.append_tiers_)
    if found < len(written):
        raise RewriteInvariantError(f"{len(written)} caches written, {found} append ops")
