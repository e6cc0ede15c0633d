"""What a match binds: cache updates, attention calls, and the sites they form; and what nearly was one."""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import fx


class Miss(NamedTuple):
    """Something that is nearly of a known form.

    node: where it was looked for. reason: what kept it from being found. reads: nodes that stand for cached
    tensors there, as far as they are known: keys and values of attention, the packed input of a write.
    """

    node: fx.Node
    reason: str
    reads: tuple[fx.Node, ...] = ()


class Idiom(Protocol):
    """A way of writing a cache. Those that the pass knows are listed in `find.updates.IDIOMS`.

    name: in reports. written_in_place: whether later readers use the cache itself, not what the writing node
    returns.
    """

    name: str
    written_in_place: bool

    def find(self, node: fx.Node, caches: Mapping[fx.Node, Any]) -> Update | Miss | None:
        """The write that `node` is to one of `caches` (inputs and their fake values).

        None: it is no write of this kind. A Miss: it is one, in a form that cannot be carried out on packed
        tokens.
        """
        ...

    def first_and_last(self, graph: fx.Graph, update: Update) -> tuple[fx.Node, fx.Node] | None:
        """The positions of the first and the last token written, int64 [] on the cache's device.

        Made in the graph where they are known. None: behind all tokens that are there, as growing caches do.
        """
        ...

    def plain(self, graph: fx.Graph, update: Update, history: fx.Node) -> fx.Node:
        """What readers of the cache see after the write, computed from the unpacked `history` before it."""
        ...


@dataclass(frozen=True, eq=False)
class Update:
    """Tokens written to one input that is a cache.

    idiom: how it is written. node: the writing node (the input itself if it is only read).
    past: the input. new: the new tokens [B, Hkv, n, D], None if it is only read.
    tensor: the fake value of `past`, a QuantizedKVTensor unless the cache is the model's own plain buffer.
    positions: what the idiom goes by in a cache of fixed capacity, alike for writes to the same positions.
    from_zero: whether the graph alone tells that the first position is 0.
    """

    idiom: Idiom
    node: fx.Node
    past: fx.Node
    new: fx.Node | None
    tensor: Any
    positions: Hashable = None
    from_zero: bool = False


# what a mask does to scores
ADDED = "added"
HIDDEN = "hides where it is true"
SEEN = "hides where it is false"


class Mask(NamedTuple):
    """One of several masks: what it does, one of the constants above, and the node."""

    kind: str
    node: fx.Node


@dataclass(frozen=True)
class AttentionCall:
    """One scaled-dot-product-attention node with its arguments by name.

    masks: in place of `mask`, where there are several or one that is not added; `with_one_mask` makes one of
    them. softcap: bound of the scores, 0 for none. inside: what only this attention needs of the graph, last
    first, where it is written out; `node` is then its last product. sinks: logits of a learned sink, [Hq].
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    dropout_p: Any
    is_causal: Any
    scale: float | None
    softcap: float = 0.0
    inside: tuple[fx.Node, ...] = ()
    sinks: fx.Node | None = None
    masks: tuple[Mask, ...] = ()

    @property
    def is_masked(self) -> bool:
        """Whether it has a mask, or several."""
        return self.mask is not None or bool(self.masks)

    def with_one_mask(self) -> AttentionCall:
        """The same with all its masks as one, which is made in the graph ahead of it."""
        if not self.masks:
            return self
        graph = self.node.graph
        seen: fx.Node | None = None
        added: fx.Node | None = None
        with graph.inserting_before(self.node):
            for kind, node in self.masks:
                if kind == ADDED:
                    added = node if added is None else graph.call_function(operator.add, (added, node))
                    continue
                shown = node if kind == SEEN else graph.call_function(torch.logical_not, (node,))
                seen = shown if seen is None else graph.call_function(torch.logical_and, (seen, shown))
            if seen is not None and added is not None:
                seen = graph.call_function(torch.where, (seen, added, -math.inf))
        return replace(self, mask=added if seen is None else seen, masks=())


# what happens to a site
ATTEND = "packed attention"
ADOPT = "packed on exit"
APPEND = "packed append"
STORAGE = "packed storage only"
STORE = "packed on exit, for storage only"
LEAVE = "left at 16 bits"
# what happens to what is no site
NOT_RECOGNIZED = "not recognized"


@dataclass(frozen=True)
class PlainBuffers:
    """Fixed buffers in the model's dtype, written by position: placeholders, and the write of the keys."""

    key: fx.Node
    value: fx.Node
    write: Update


@dataclass
class Site:
    """An attention call and the cache it reads.

    action: one of the constants above. reason: why not more was done ('' if it was).
    layer: of the plan; None without a cache, or where nothing tells. key_update, value_update: writes to
    packed inputs. key_root, value_root: plain keys and values; where they are packed (action ADOPT) they are
    [B, Hkv, L, D] and leave the graph as the cache; else they or the buffers that take them, if any do.
    buffers: plain buffers of the model's own that can be packed after this step. tail: the start of the
    slice, where only the last of the keys and values leave the graph, which `key_root` and `value_root` are.
    stored: whether this is no attention, but a cache that none reads which is known; `call` then only says
    where it is in the graph.
    """

    call: AttentionCall
    module: str
    idiom: str
    action: str
    reason: str = ""
    layer: int | None = None
    key_update: Update | None = None
    value_update: Update | None = None
    key_root: fx.Node | None = None
    value_root: fx.Node | None = None
    buffers: PlainBuffers | None = None
    tail: Any = None
    stored: bool = False
