"""Form sites out of attention calls and cache updates, and decide what happens to each.

Nothing is changed here. Every attention call becomes a site with an action, and with a reason
whenever it is not fully rewritten. What nearly is one, and caches that no site serves, are told as misses.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.dynamo import example, module_path, place
from kvmix_fx.errors import CacheMutationError, CacheShapeError
from kvmix_fx.passes.find.attention import look_for_attention
from kvmix_fx.passes.find.updates import (
    READ,
    find_plain_writes,
    find_updates,
    is_append,
    packed_inputs,
)
from kvmix_fx.passes.find.views import called, heads_root
from kvmix_fx.passes.sites import (
    ADOPT,
    APPEND,
    ATTEND,
    LEAVE,
    STORAGE,
    AttentionCall,
    Miss,
    PlainBuffers,
    Site,
    Update,
)

NO_CACHE = "keys and values do not leave the graph: there is no cache here"
STORED = "no attention that reads it was recognized, so every step unpacks one layer at a time"
COMPUTED = "what it attends to is computed from cached tensors, which are packed as storage"
OTHERS = "its cache keeps other tensors than those it attends to: they stay at 16 bits"
NEW_BUFFER = (
    "its cache is a buffer of fixed capacity that is made in this step, and stays at 16 bits: growing caches "
    "are packed, unless later steps give another reason"
)
SLIDING = "sliding window: only a slice of the keys is kept, so the cache stays small at 16 bits"


@dataclass
class Missed:
    """A miss, and the writes that it leaves without a reader that is known.

    query_length: tokens of the step, "?" where it does not tell. layer: of the plan, if its cache tells.
    """

    miss: Miss
    updates: tuple[Update, ...]
    query_length: str = "?"
    layer: int | None = None

    @property
    def module(self) -> str:
        """Qualified name of the module, '' if unknown."""
        return module_path(self.miss.node)


@dataclass(frozen=True)
class Matched:
    """What a graph was found to do with caches.

    sites: one per attention call, in graph order. leftover: writes that no site serves, two by two, which can
    share an append. missed: what is not rewritten besides sites; every write of `leftover` is in one of them.
    """

    sites: list[Site]
    leftover: list[tuple[Update, Update]]
    missed: list[Missed]


def match(graph: fx.Graph) -> Matched:
    """Find everything that concerns a cache, and decide what happens to it.

    Raises:
        CacheMutationError: a cache of fixed capacity is written in a way that cannot be carried out.
        CacheShapeError: a cache gets tokens of another dtype than it holds, or of other heads.
    """
    packed = packed_inputs(graph)
    writes = find_updates(graph)
    updates = [update for update in writes if isinstance(update, Update)]
    misses = [miss for miss in writes if isinstance(miss, Miss)]
    for update in updates:
        _check_tokens(update)
    by_result: dict[fx.Node, Update] = {}
    by_new: dict[fx.Node, Update] = {}
    for update in updates:
        by_result[update.node] = update
        if update.idiom.written_in_place:
            # later readers use the placeholder itself
            by_result[update.past] = update
        if update.new is not None:
            by_new[update.new] = update
    for node, tensor in packed.items():
        by_result.setdefault(node, Update(READ, node, node, None, tensor))
    outputs = _output_nodes(graph)
    plain = find_plain_writes(graph)
    calls = look_for_attention(graph)
    sites = [
        _site(call, by_result, by_new, outputs, plain) for call in calls if isinstance(call, AttentionCall)
    ]
    sites += _stored(outputs, sites)
    served = {update for site in sites for update in (site.key_update, site.value_update) if update}
    left = [update for update in updates if update not in served]
    _tell_computed(sites, left, outputs)
    pairs, single = _pairs(left)
    missed = []
    # what got furthest comes first
    for miss in (*(call for call in calls if isinstance(call, Miss)), *misses):
        read = dict.fromkeys(by_result[node] for node in miss.reads if node in by_result)
        length = "?" if miss in misses else str(example(miss.node).shape[-2])
        missed.append(Missed(miss, tuple(update for update in read if update not in served), length))
    told = {update for one in missed for update in one.updates}
    for pair in pairs:
        if not told & {*pair}:
            reason = "no attention that reads what is written here was recognized"
            miss = Miss(pair[0].node, reason, tuple(update.past for update in pair))
            missed.append(Missed(miss, pair, str(example(pair[0].new).shape[2])))
    missed += [Missed(_alone(update), (update,), str(example(update.new).shape[2])) for update in single]
    touched = {update.past for update in (*updates, *served)} | {n for m in missed for n in m.miss.reads}
    for node, tensor in packed.items():
        readers = [user for user in node.users if user.target != "size"]
        if node not in touched and readers:
            miss = Miss(readers[0], "a cache is read in a way that has no known spelling", (node,))
            missed.append(Missed(miss, (Update(READ, node, node, None, tensor),)))
    return Matched(sites, pairs, missed)


def _check_tokens(update: Update) -> None:
    new = None if update.new is None else example(update.new)
    if new is None:
        return
    if new.dtype != update.tensor.dtype:
        raise CacheShapeError(
            f"the model computes keys or values of dtype {new.dtype}, the cache holds {update.tensor.dtype}: "
            "go on under the autocast setting and the weights it was filled with, or start a new cache"
        )
    mine, held = ((x.shape[1], x.shape[3]) for x in (new, update.tensor))
    if update.tensor.is_fixed and mine != held:
        raise CacheShapeError(
            f"the model computes {mine[0]} KV heads of {mine[1]} channels for a cache of fixed capacity that "
            f"was made for {held[0]} of {held[1]}: make it for these or, where the model's configuration "
            "does not tell them, hand in a growing cache, which takes what comes"
        )


def _pairs(updates: list[Update]) -> tuple[list[tuple[Update, Update]], list[Update]]:
    """Writes two by two that one append can serve, and those that remain."""
    waiting: list[Update] = []
    pairs = []
    for update in updates:
        partner = next((other for other in waiting if _share(other, update)), None)
        if partner is None:
            waiting.append(update)
        else:
            waiting.remove(partner)
            pairs.append((partner, update))
    return pairs, waiting


def _share(a: Update, b: Update) -> bool:
    """Whether one append can serve both: as many tokens for the same place of caches of one length."""

    def sizes(update: Update) -> tuple[Any, ...]:
        return (update.tensor.shape[2], *example(update.new).shape[:3], update.tensor.is_fixed)

    if a.past is b.past:
        return False
    where = [update.positions for update in (a, b)]
    if all(isinstance(place, tuple) for place in where):  # numbers, each computed for every write
        where = [tuple(example(number) for number in place) for place in where]  # type: ignore[union-attr]
    # sizes that Dynamo knows as different symbols are compared as they are now, under a guard
    return where[0] == where[1] and all(x == y for x, y in zip(sizes(a), sizes(b), strict=True))


def _alone(update: Update) -> Miss:
    """Of a write without a partner: a growing cache becomes a plain one, for a graph can return one."""
    reason = "a cache is written without a second one that is written alike, as keys and values are"
    if update.idiom.written_in_place:
        raise CacheMutationError(f"{reason}; keep a cache that stands alone in a plain tensor")
    return Miss(update.node, f"{reason}: it is unpacked here and stays at 16 bits", (update.past,))


def _output_nodes(graph: fx.Graph) -> set[fx.Node]:
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    return set(output.all_input_nodes)


def _site(
    call: AttentionCall,
    by_result: dict[fx.Node, Update],
    by_new: dict[fx.Node, Update],
    outputs: set[fx.Node],
    plain: dict[fx.Node, Update],
) -> Site:
    module = module_path(call.node)
    known = {*by_result, *by_new, *outputs, *plain}
    key, value = (_root(node, known, outputs) for node in (call.key, call.value))
    k, v = by_result.get(key), by_result.get(value)
    if k is not None and v is not None:
        reason = _why_not_attend(call, k, v)
        action = STORAGE if reason else ATTEND
        return Site(call, module, k.idiom.name, action, reason, key_update=k, value_update=v)
    k, v = by_new.get(key), by_new.get(value)
    if k is not None and v is not None:
        # a first step that attends to its own tokens while the cache takes them
        return Site(call, module, k.idiom.name, APPEND, key_update=k, value_update=v)
    idiom = _plain_idiom(key)
    tail = kept_tail(key, value, outputs)
    if tail is not None:
        return Site(call, module, idiom, ADOPT, key_root=tail[0], value_root=tail[1], tail=tail[2])
    reason = _why_not_adopt(key, value, outputs)
    if reason:
        # a first step that attends to its own tokens while plain buffers take them
        taken = {update.new: update.past for update in plain.values()}
        roots = {"key_root": taken.get(key, key), "value_root": taken.get(value, value)}
        site = Site(call, module, idiom, LEAVE, reason, **roots)
        if key in plain and value in plain:
            site.buffers = PlainBuffers(key, value, plain[key])
        return site
    return Site(call, module, idiom, ADOPT, key_root=key, value_root=value)


def _root(node: fx.Node, known: Collection[fx.Node], outputs: set[fx.Node]) -> fx.Node:
    """What attention reads, as a cache has it: a cast ahead of both is part of it, one behind it is not."""
    root = heads_root(node)
    if root in known or kept_slices(root, outputs):
        return root
    return heads_root(node, casts=True)


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
    if is_append(key):
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
    if any(node in outputs and _is_buffer(node) for node in (key, value)):
        return NEW_BUFFER
    if key not in outputs or value not in outputs:
        if kept_slices(key, outputs):
            return SLIDING
        return NO_CACHE
    return ""


def _stored(outputs: Collection[fx.Node], sites: list[Site]) -> list[Site]:
    """Sites of plain keys and values that leave the graph for a cache and that no known attention reads.

    That they are a cache's is told by where they go: `keys` and `values` of one of its layers.
    """
    pairs: dict[str, dict[str, fx.Node]] = {}
    for node in outputs:
        layer, _, role = place(node).rpartition(".")
        if role in ("keys", "values") and layer.endswith("]"):
            pairs.setdefault(layer, {})[role] = node
    # attention that is left alone may read one tensor of a layer as it is, and something made of the other
    roots = {root for site in sites if site.action != LEAVE for root in (site.key_root, site.value_root)}
    updates = {update for site in sites for update in (site.key_update, site.value_update) if update}
    roots |= {node for update in updates for node in (update.node, update.new)}
    found = []
    for pair in pairs.values():
        if len(pair) < 2 or any(node in roots or node.op == "placeholder" for node in pair.values()):
            continue
        key, value = pair["keys"], pair["values"]
        if not all(_is_plain_cache(example(node)) and not _is_buffer(node) for node in (key, value)):
            continue
        starts = [_start_of_tail(node) if node.target is operator.getitem else None for node in (key, value)]
        if starts[0] != starts[1]:
            continue
        call = AttentionCall(max(key, value), key, key, value, None, 0.0, False, None)
        site = Site(call, module_path(key), _plain_idiom(key), ADOPT, STORED, key_root=key, value_root=value)
        site.stored, site.tail = True, starts[0]
        found.append(site)
    return sorted(found, key=lambda site: site.call.node)


def _tell_computed(sites: list[Site], left: list[Update], outputs: Collection[fx.Node]) -> None:
    """Attention in a module that has a cache is not without one, even if it reads something else."""
    modules = {module_path(update.node) for update in left} | {site.module for site in sites if site.stored}
    made = {module_path(node) for node in outputs if place(node).endswith("].keys") and _is_buffer(node)}
    kept = {module_path(node) for node in outputs if place(node).endswith(("].keys", "].values"))}
    for site in sites:
        if site.reason == NO_CACHE and site.module in modules | made:
            site.reason = COMPUTED if site.module in modules else NEW_BUFFER
        elif site.reason == NO_CACHE and site.module in kept:
            site.reason = OTHERS


def _is_buffer(node: fx.Node) -> bool:
    """Whether this is memory that is filled by position, and later written in place."""
    written = (user for user in node.users if user.args and user.args[0] is node)
    in_place = any(
        user.target is operator.setitem or called(user).rstrip("_") != called(user) for user in written
    )
    return in_place or called(node).removeprefix("new_").removesuffix("_like") in (
        "zeros",
        "empty",
        "full",
        "ones",
    )


def _is_plain_cache(x: Any) -> bool:
    plain = isinstance(x, torch.Tensor) and not isinstance(x, QuantizedKVTensor)
    return plain and x.dim() == 4 and x.is_floating_point()


def kept_tail(
    key: fx.Node, value: fx.Node, outputs: Collection[fx.Node]
) -> tuple[fx.Node, fx.Node, Any] | None:
    """(keys, values, start) where nothing but their last tokens leaves the graph, from one start on."""
    kept = [kept_slices(node, outputs) for node in (key, value)]
    if key in outputs or value in outputs or any(len(slices) != 1 for slices in kept):
        return None
    (keys,), (values,) = kept
    starts = [_start_of_tail(node) for node in (keys, values)]
    fits = starts[0] is not None and starts[0] == starts[1]
    if not fits or any(example(x).dim() != 4 or not example(x).is_floating_point() for x in (keys, values)):
        return None
    return keys, values, starts[0]


def _start_of_tail(node: fx.Node) -> Any:
    """Where x[:, :, start:] starts, also with a whole last dimension; None for other parts."""
    index: Any = node.args[1]
    if not isinstance(index, tuple) or len(index) not in (3, 4):
        return None
    *others, last = (index[0], index[1], *index[3:], index[2])
    whole = all(i == slice(None) for i in others)
    tail = isinstance(last, slice) and last.stop is None and last.step in (None, 1)
    return last.start if whole and tail else None


def kept_slices(node: fx.Node, outputs: Collection[fx.Node]) -> list[fx.Node]:
    """Slices of `node` that leave the graph in its place."""
    return [user for user in node.users if user in outputs and user.target is operator.getitem]
