"""Decide which layer of the plan each site is: the place of its keys and values in the cache tells.

A cached tensor comes into a graph from somewhere and leaves it for somewhere: say,
"L['past_key_values'].layers[3].keys" or "result<1>[3][0]". What the places of keys and values have in common
is the layer's place, and its last number is the layer. That holds in any piece of a model that is traced by
itself, and whatever its modules are called.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from kvmix_fx.dynamo import module_path, place
from kvmix_fx.passes.match import Missed, kept_slices
from kvmix_fx.passes.sites import Site

_NUMBER = re.compile(r"(<\d+>|(?<![A-Za-z0-9])\d+(?![A-Za-z0-9]))")
"""Numbers that stand for themselves; in "<1>" those that only say which argument or result it is."""


@dataclass(frozen=True)
class _Place:
    """What the places of keys and values have in common: a text and the numbers in it, in order.

    by_module: whether it is the place of a module, where numbers may mean blocks, layers in blocks, experts.
    """

    text: str
    numbers: tuple[str, ...]
    by_module: bool


def assign_layers(
    graph: fx.Graph, sites: list[Site], missed: Sequence[Missed] = (), count: int | None = None
) -> None:
    """Set `site.layer`; None for what has no cache, and where nothing tells the layer.

    Args:
        graph: which all of it was matched on.
        sites: attention calls.
        missed: what is not rewritten besides.
        count: layers of the plan. Caches that no place tells apart are taken in order of appearance, but only
            if all of them are in this graph. None: they are.
    """
    outputs = next(n for n in reversed(graph.nodes) if n.op == "output").all_input_nodes
    all_of = [*sites, *missed]
    cached = [_cached(site, outputs) for site in sites] + [_read(one, outputs) for one in missed]
    places = [_common([place(node) for node in nodes]) for nodes in cached]
    known = [one for one in places if one is not None]
    for one, where in zip(all_of, places, strict=True):
        one.layer = None if where is None else _number(where, known)
    caches = [site for site, nodes in zip(sites, cached, strict=False) if nodes]
    if caches and all(site.layer is None for site in caches) and count in (None, len(caches)):
        for order, site in enumerate(caches):
            site.layer = order


def _number(where: _Place, places: Sequence[_Place]) -> int | None:
    """The one number of a place that says which layer it is."""
    alike = [o.numbers for o in places if o.text == where.text and len(o.numbers) == len(where.numbers)]
    certain = [n for n in where.numbers if n[0] != "<"]
    if len(certain) == 1 or (certain and not where.by_module):
        return int(certain[-1])
    varying = [n for n, *others in zip(where.numbers, *alike, strict=True) if len({*others}) > 1]
    return int(varying[0].strip("<>")) if len(varying) == 1 else None


def _common(paths: Sequence[str]) -> _Place | None:
    """The place that tensors at `paths` share; None for a path that is unknown, or nothing in common."""
    if not paths or not all(paths):
        return None
    split = [_NUMBER.split(path) for path in paths]
    if len({len(parts) for parts in split}) > 1:
        return None
    columns = list(zip(*split, strict=True))
    shared = [column[0] if len({*column}) == 1 else None for column in columns[1::2]]
    text = "|".join(sorted({"".join(parts[::2]) for parts in split}))
    return _Place(text, tuple(n for n in shared if n is not None), "_modules[" in text)


def _cached(site: Site, outputs: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes whose place is that of a site's keys and values; empty if it has no cache."""
    if site.key_update is not None and site.value_update is not None:
        return [site.key_update.past, site.value_update.past]
    if site.buffers is not None:
        return [site.buffers.key, site.buffers.value]
    roots = [root for root in (site.key_root, site.value_root) if root is not None]
    return [node for root in roots for node in _kept(root, outputs)]


def _kept(root: fx.Node, outputs: Sequence[fx.Node]) -> list[fx.Node]:
    """The input or output that keys or values are, or the slice of them that a sliding window keeps."""
    return [root] if root.op == "placeholder" or root in outputs else kept_slices(root, outputs)


def _read(one: Missed, outputs: Sequence[fx.Node]) -> list[fx.Node]:
    """As `_cached`, for what was missed: what it is known to read, else what its own module caches."""
    nodes = [update.past for update in one.updates]
    nodes = nodes or [node for read in one.miss.reads for node in _kept(read, outputs)]
    if nodes or not one.module:
        return nodes
    return [node for node in outputs if module_path(node) == one.module]
