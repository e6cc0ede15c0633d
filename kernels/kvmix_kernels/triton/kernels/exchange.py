"""What a step of one token changes in a high tier whose tokens are raw: scores, and who is in it when a tile is packed.

`kvmix_kernels.tokens.append` is the specification, bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvmix_kernels.triton.kernels.fields import packed_end_of

NOBODY = tl.constexpr(-(1 << 31))
"""The rank of what can not be in the tier."""

BINS = tl.constexpr(256)
"""Values of a byte of a rank; one is looked at in each pass over the candidates, the highest, with the sign, first."""

ROWS = tl.constexpr(16)
"""Tokens that are copied at a time."""


@triton.jit
def _faded(old, decay, more):
    """old * decay + more, each step rounded by itself."""
    return tl.fma(old, decay, tl.zeros_like(old)) + more


@triton.jit
def _ranked(score, position, is_newest, counts, length, PER_QUERY: tl.constexpr):
    """Whole numbers in the order of the ranks of candidates; NOBODY where they do not count."""
    rank = score
    if PER_QUERY:
        rank = tl.div_rn(score, tl.maximum(length - position, 1).to(tl.float32))
    # what is no number comes after all others, and after none of those that are not there
    rank = tl.where((rank == rank) & (rank != -float("inf")), rank, -1e38)
    rank = tl.where(is_newest | (rank == float("inf")), 3e38, rank)
    # 0 has two signs
    rank = tl.where(rank == 0.0, 0.0, rank)
    bits = rank.to(tl.int32, bitcast=True)
    return tl.where(counts, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), NOBODY)


@triton.jit
def _threshold(ranks_ptr, count, limit, BLOCK: tl.constexpr):
    """(the rank of the last of `limit` candidates, how many are above it); NOBODY if there are no more."""
    byte = tl.arange(0, BINS)
    prefix = limit * 0
    left = limit
    whole = limit * 0
    for i in tl.static_range(4):
        found = tl.zeros([BINS], tl.int32)
        for first in range(0, count, BLOCK):
            place = first + tl.arange(0, BLOCK)
            rank = tl.load(ranks_ptr + place, mask=place < count, other=NOBODY)
            counts = rank != NOBODY
            if i == 0:
                own = (rank >> 24) + BINS // 2
            else:
                own = (rank >> (24 - 8 * i)) & (BINS - 1)
                counts &= (rank >> (32 - 8 * i)) == prefix
            found += tl.histogram(own, BINS, mask=counts)
        above = tl.cumsum(found, 0, reverse=True)
        if i == 0:
            whole = tl.max(above, 0)
        here = tl.maximum(tl.max(tl.where(above >= left, byte, -1), 0), 0)
        left -= tl.sum(tl.where(byte > here, found, 0), 0)
        if i == 0:
            prefix = here - BINS // 2
        else:
            prefix = prefix * BINS + here
    none_left = whole <= limit
    return tl.where(none_left, NOBODY, prefix), tl.where(none_left, whole, limit - left)


@triton.jit
def _copy(
    high_ptr, residual_ptr, new_ptr, ring_slots, entering_ptr, slots_ptr, owner, count, slots, live, begin, sink, ring,
    D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Raw tokens that enter, into their slots."""
    channel = tl.arange(0, DP)
    for first in range(0, count, ROWS):
        place = first + tl.arange(0, ROWS)
        ok = place < count
        position = begin + tl.load(entering_ptr + place, mask=ok, other=0)
        slot = tl.load(slots_ptr + place, mask=ok, other=0)
        seen = ok[:, None] & (channel < D)[None, :]
        is_new = position >= live
        raw = sink + (position - sink) % ring
        x = tl.load(
            residual_ptr + (owner * ring_slots + raw)[:, None] * D + channel[None, :],
            mask=seen & (position < live)[:, None],
            other=0.0,
        )
        fresh = tl.load(new_ptr + channel, mask=channel < D, other=0.0).to(x.dtype)
        x = tl.where(is_new[:, None], fresh[None, :], x)
        tl.store(high_ptr + (owner * slots + slot)[:, None] * D + channel[None, :], x, mask=seen)


@triton.jit(
    do_not_specialize=[
        "heads", "chunks", "length", "slots", "rows", "tile", "sink", "window", "ring", "share", "fixed", "recent",
    ]
)  # fmt: skip
def exchange_kernel(
    new_k_ptr, new_v_ptr, k_residual_ptr, v_residual_ptr, high_k_ptr, high_v_ptr, k_positions_ptr, v_positions_ptr,
    scores_ptr, waiting_ptr, skipped_ptr, mass_ptr, valid_ptr, start_ptr, ranks_ptr, lists_ptr,
    new_k_sb, new_k_sh, new_v_sb, new_v_sh, valid_sb, valid_ss, hidden_below,
    heads, chunks, length, slots, rows, tile, sink, window, ring, share, fixed, recent, decay,
    ON_DEVICE: tl.constexpr, MASS: tl.constexpr, FOUND: tl.constexpr, PER_QUERY: tl.constexpr, EVICTING: tl.constexpr,
    VALID: tl.constexpr, TILE: tl.constexpr, RING: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`tokens.append.append` of one token, but for the low tier's part of it. Buffers are dense.

    Grid: chunks of BLOCK slots, fastest, x heads x batch. As long as no tile is due they add up scores. When one
    is, the first chunk's program does all of its head: a step in `tile`. mass [batch * heads, slots + ring + 1]:
    what tokens got in this step, with MASS; with FOUND, [batch * heads], the new one's score alone. ranks [batch *
    heads, slots + tile] and lists [batch * heads, 3, tile] are scratch.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    pid = tl.program_id(0)
    chunk = pid % chunks
    owner = (pid // chunks).to(tl.int64)
    batch = owner // heads
    live = length
    fits = True
    if ON_DEVICE:
        live = tl.load(start_ptr).to(tl.int32)
        fits = live + 1 <= length
    begin = packed_end_of(live, tile, sink, window)
    end = tl.where(fits, packed_end_of(live + 1, tile, sink, window), begin)
    scores_ptr += owner * slots
    waiting_ptr += owner * ring
    own_slot = ((live - sink) % ring + ring) % ring
    found = 0.0
    if MASS:
        mass_ptr += owner * (slots + ring + 1)
        found = tl.load(mass_ptr + slots + ring)
    if FOUND:
        found = tl.load(mass_ptr + owner)

    if chunk == 0:
        at = tl.arange(0, RING)
        if MASS:
            old = tl.load(waiting_ptr + at, mask=at < ring, other=0.0)
            more = tl.load(mass_ptr + slots + at, mask=at < ring, other=0.0)
            tl.store(waiting_ptr + at, _faded(old, decay, more), mask=(at < ring) & (at != own_slot))
        # of the slots of tokens that wait, it is none
        tl.store(waiting_ptr + own_slot, found)
    if end == begin:
        if MASS:
            at = chunk * BLOCK + tl.arange(0, BLOCK)
            old = tl.load(scores_ptr + at, mask=at < slots, other=0.0)
            more = tl.load(mass_ptr + at, mask=at < slots, other=0.0)
            tl.store(scores_ptr + at, _faded(old, decay, more), mask=at < slots)
    elif chunk == 0:
        count = slots + tile
        ranks_ptr += owner * count
        entering_ptr = lists_ptr + owner * (3 * tile)
        slots_ptr = entering_ptr + tile
        entering_scores_ptr = (slots_ptr + tile).to(tl.pointer_type(tl.float32), bitcast=True)
        positions_ptr = k_positions_ptr + owner * slots
        skipped_ptr += owner * rows
        limit = tl.where(fixed > 0, fixed, share * (end - sink) // 100)
        newest = end - limit * recent // 100
        for first in range(0, slots, BLOCK):
            at = first + tl.arange(0, BLOCK)
            ok = at < slots
            score = tl.load(scores_ptr + at, mask=ok, other=0.0)
            if MASS:
                score = _faded(score, decay, tl.load(mass_ptr + at, mask=ok, other=0.0))
                tl.store(scores_ptr + at, score, mask=ok)
            position = tl.load(positions_ptr + at, mask=ok, other=-1)
            held = (position >= sink) & (position < begin)
            rank = _ranked(score, position, position >= newest, held, live + 1, PER_QUERY)
            tl.store(ranks_ptr + at, rank, mask=ok)
        # what the ring holds was stored by other threads
        tl.debug_barrier()
        tile_at = tl.arange(0, TILE)
        position = begin + tile_at
        in_ring = (position - sink) % ring
        leaving = (tile_at < tile) & (position < end)
        own_score = tl.load(waiting_ptr + in_ring, mask=leaving & (position < live), other=0.0)
        own_score = tl.where(position < live, own_score, found)
        competes = leaving
        if VALID != 0:
            entry = tl.load(valid_ptr + batch * valid_sb + position * valid_ss, mask=leaving, other=0)
            competes &= (entry != 0) if VALID == 1 else (entry.to(tl.float32) > hidden_below)
        rank = _ranked(own_score, position, position >= newest, competes, live + 1, PER_QUERY)
        tl.store(ranks_ptr + slots + tile_at, rank, mask=tile_at < tile)
        tl.debug_barrier()

        least, above = _threshold(ranks_ptr, count, limit, BLOCK)
        # of equals the first ones; who is in the tier comes before who is not
        ties = limit - above
        tied = limit * 0
        for first in range(0, slots, BLOCK):
            at = first + tl.arange(0, BLOCK)
            old_rank = tl.load(ranks_ptr + at, mask=at < slots, other=NOBODY)
            tied += tl.sum(((old_rank == least) & (old_rank != NOBODY)).to(tl.int32), 0)
        as_good = ((rank == least) & (rank != NOBODY)).to(tl.int32)
        enters = (rank > least) | ((as_good != 0) & (tied + tl.cumsum(as_good, 0) <= ties))
        number = enters.to(tl.int32)
        behind = tl.cumsum(number, 0) - number
        entered = tl.sum(number, 0)
        tl.store(entering_ptr + behind, tile_at, mask=enters)
        tl.store(entering_scores_ptr + behind, own_score, mask=enters)
        skips = enters | EVICTING
        tl.store(skipped_ptr + (position - sink), skips.to(tl.uint8), mask=leaving)
        tl.debug_barrier()

        free_before = limit * 0
        tied_before = limit * 0
        for first in range(0, slots, BLOCK):
            at = first + tl.arange(0, BLOCK)
            ok = at < slots
            old_rank = tl.load(ranks_ptr + at, mask=ok, other=NOBODY)
            old = tl.load(positions_ptr + at, mask=ok, other=-1)
            equal = ((old_rank == least) & (old_rank != NOBODY)).to(tl.int32)
            stays = (old_rank > least) | ((equal != 0) & (tied_before + tl.cumsum(equal, 0) <= ties))
            tied_before += tl.sum(equal, 0)
            free = (ok & (stays == 0)).to(tl.int32)
            taker = free_before + tl.cumsum(free, 0) - free
            free_before += tl.sum(free, 0)
            taken = (free != 0) & (taker < entered)
            who = tl.load(entering_ptr + taker, mask=taken, other=0)
            tl.store(slots_ptr + taker, at, mask=taken)
            kept = tl.where(taken, begin + who, tl.where(stays, old, -1))
            tl.store(positions_ptr + at, kept, mask=ok)
            tl.store(v_positions_ptr + owner * slots + at, kept, mask=ok)
            if not EVICTING:
                left = ok & (stays == 0) & (old >= sink) & (old < begin)
                tl.store(skipped_ptr + (old - sink), tl.zeros([BLOCK], tl.uint8), mask=left)
            score = tl.load(entering_scores_ptr + taker, mask=taken, other=0.0)
            tl.store(scores_ptr + at, score, mask=taken)
        tl.debug_barrier()
        _copy(
            high_k_ptr, k_residual_ptr, new_k_ptr + batch * new_k_sb + (owner % heads) * new_k_sh, sink + ring,
            entering_ptr, slots_ptr, owner, entered, slots, live, begin, sink, ring, D, DP,
        )  # fmt: skip
        _copy(
            high_v_ptr, v_residual_ptr, new_v_ptr + batch * new_v_sb + (owner % heads) * new_v_sh, sink + ring,
            entering_ptr, slots_ptr, owner, entered, slots, live, begin, sink, ring, DV, DVP,
        )  # fmt: skip
