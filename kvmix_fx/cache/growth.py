"""Who may write into growing buffers, and when they are enlarged.

Several tensors can share buffers: a parent and the child made by appending to it, a rollback,
a fork. A tensor appends in place only while nobody alive stores later tokens in the same buffers;
otherwise it continues on a copy of its own. Raw slots are reused after a flush, so a flush
continues on a copy of the (small) residual: older tensors keep reading theirs.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.cached import Cached, allocate
from kvmix_kernels.layout import TensorFormat
from kvmix_kernels.reference import storage
from kvmix_kernels.tokens.read import overlaid


class Store:
    """Identity of one set of growing buffers; knows the leases of the tensors alive on it."""

    def __init__(self) -> None:
        """Start without leases."""
        self.leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        # by thread: up to where it is writing for a tensor that is not there yet
        self.claims: dict[int, int] = {}
        self.lock = threading.Lock()


class Lease:
    """One tensor's claim on the first `length` tokens of a store. Dies with its tensor."""

    def __init__(self, store: Store, length: int) -> None:
        """Register with the store."""
        self.store = store
        self.length = length
        with store.lock:
            store.leases.add(self)
            store.claims.pop(threading.get_ident(), None)

    def claim(self, extra: int) -> bool:
        """Whether this thread may write `extra` tokens behind, which touches nobody else's; others copy.

        The claim ends with the thread's next lease on the store. One that a failed step leaves only makes
        other threads copy.
        """
        store, me = self.store, threading.get_ident()
        with store.lock:
            ends = [other.length for other in store.leases]
            ends += [end for thread, end in store.claims.items() if thread != me]
            free = all(end <= self.length for end in ends)
            if free:
                store.claims[me] = self.length + extra
        return free


def enlarge(cached: Cached, tiles: int, slots: int) -> Cached:
    """A copy with room for at least `tiles` tiles and `slots` raw tokens, old tokens in place."""
    fmt, residual = cached.format, cached.residual
    B, H, rows, _ = cached.qdata.shape
    old_slots, D = residual.shape[2:]
    have = rows // fmt.tile
    new = allocate(B, H, D, max(tiles, have), max(slots, old_slots), fmt, residual.dtype, residual.device)
    for target, source in zip(new.tensors, cached.tensors, strict=True):
        target[:, :, : source.shape[2]].copy_(source)
    return new


def prepare_append(cached: Cached, lease: Lease, extra: int) -> tuple[Cached, Store]:
    """What `extra` tokens may be appended to in place, and its store.

    Copies only what must be copied: everything when another tensor holds later tokens or the
    buffers are too small, the residual when this append flushes, else nothing.
    """
    fmt, length = cached.format, lease.length
    tiles = layout.growing_tiles(fmt, length + extra)
    slots = layout.growing_slots(fmt, length + extra)
    small = cached.qdata.shape[2] < tiles * fmt.tile or cached.residual.shape[2] < slots
    if small or not lease.claim(extra):
        return enlarge(cached, tiles, slots), Store()
    flushes = fmt.packed_tiles(length + extra) > fmt.packed_tiles(length)
    if flushes:
        cached = cached.replace(residual=cached.residual.clone())
    if cached.seen is not None:
        # older tensors keep the sum of their own queries
        cached = cached.replace(seen=cached.seen.clone())
    return own_tier(cached, flushes), lease.store


def own_tier(cached: Cached, flushes: bool = True) -> Cached:
    """With a high tier that may be written: scores in every step, tokens when a tile is packed."""
    fmt = cached.format
    if fmt.high is None:
        return cached
    written = layout.HIGH_NAMES if flushes else ()
    if fmt.high.scored:
        written += (*layout.SCORE_NAMES, *((layout.SKIPPED_NAME,) if flushes else ()))
    return cached.replace(**{name: cached.named(name).clone() for name in written})


def without_front(cached: Cached, tiles: int, room: int) -> Cached:
    """A copy without its first `tiles` tiles, which are packed, and with room for `room` tokens.

    The format has no sink and no high tier, whose tokens have absolute positions. What follows has the places
    it would have if it had come first.
    """
    fmt, residual = cached.format, cached.residual
    assert fmt.high is None
    B, H, slots, D = residual.shape
    new = allocate(
        B,
        H,
        D,
        layout.growing_tiles(fmt, room),
        layout.growing_slots(fmt, room),
        fmt,
        residual.dtype,
        residual.device,
    )
    steps = (fmt.tile, layout.scale_grid(fmt, D, 1)[0], layout.zero_grid(fmt, D, 1)[0])
    pairs = list(zip(cached.tensors[:3], new.tensors[:3], steps, strict=True))
    if fmt.is_raw:
        pairs.append((residual, new.residual, fmt.tile))
    else:
        new.residual.copy_(residual.roll(-tiles * fmt.tile % slots, 2))
    for source, target, step in pairs:
        kept = source[:, :, tiles * step :][:, :, : target.shape[2]]
        target[:, :, : kept.shape[2]] = kept
    if cached.order is not None and new.order is not None:
        new.order.copy_(cached.order)
    return new


def rewind(cached: Cached, length: int, new_length: int) -> Cached:
    """What reads as the first `new_length` of `length` tokens.

    Tokens that were packed but belong into the window of the shorter cache are restored there
    from their codes, or from the high tier, on a copy of the residual. If new tokens later complete
    their tile they are rounded a second time, which is the price of a rollback past the window.
    """
    fmt = cached.format
    first, last = fmt.packed_end(new_length), min(new_length, fmt.packed_end(length))
    if fmt.is_raw or first >= last:
        return cached
    tokens = storage.read(cached.low, first, last, length).to(cached.residual.dtype)
    if fmt.high is not None:
        tokens = overlaid(cached, tokens, length, first)
    residual = cached.residual.clone()
    write_raw(residual, tokens, first, fmt)
    cached = cached.replace(residual=residual)
    if fmt.high is not None and fmt.high.scored:
        # nobody knows how much attention they got
        cached = cached.replace(waiting=torch.zeros_like(cached.named("waiting")))
    return cached


def write_raw(residual: Tensor, tokens: Tensor, first: int, fmt: TensorFormat) -> None:
    """Write raw tokens for the positions from `first` on into their slots."""
    last = first + tokens.shape[2]
    for start, stop, slot in storage.runs(first, last, fmt):
        residual[:, :, slot : slot + stop - start] = tokens[:, :, start - first : stop - first]
