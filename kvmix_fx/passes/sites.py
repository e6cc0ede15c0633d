"""What a match binds: cache updates, attention calls, and the sites they form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from kvmix_fx.cache import QuantizedKVTensor


@dataclass(frozen=True)
class Update:
    """Tokens written to one packed input.

    idiom: how it is written ("cat", "index_copy_", "setitem", or "read" for none).
    node: the writing node (the placeholder itself for "read").
    past: the packed placeholder. new: the new tokens [B, Hkv, n, D], None for "read".
    positions: for fixed caches, the int64 tensor of consecutive positions. from_zero: whether the graph alone
    tells that the first of them is 0.
    """

    idiom: str
    node: fx.Node
    past: fx.Node
    new: fx.Node | None
    positions: fx.Node | None
    tensor: QuantizedKVTensor
    from_zero: bool = False


@dataclass(frozen=True)
class AttentionCall:
    """One scaled-dot-product-attention node with its arguments by name.

    softcap: bound of the scores, 0 for none. inside: what only this attention needs of the graph, last first,
    where it is written out; `node` is then its last product.
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


# what happens to a site
ATTEND = "packed attention"
ADOPT = "packed on exit"
APPEND = "packed append"
STORAGE = "packed storage only"
LEAVE = "left at 16 bits"


@dataclass(frozen=True)
class PlainBuffers:
    """Fixed buffers in the model's dtype, written by position: placeholders and positions."""

    key: fx.Node
    value: fx.Node
    positions: fx.Node


@dataclass
class Site:
    """An attention call and the cache it reads.

    action: one of the constants above. reason: why not more was done ('' if it was).
    key_update, value_update: writes to packed inputs. key_root, value_root: plain [B, Hkv, L, D]
    nodes that leave the graph as the cache (action ADOPT). buffers: plain buffers of the model's
    own that can be packed after this step.
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
