"""Scores under masks and caps, and exponentials in the units that the mask allows."""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Start of a running maximum. Finite, so that a row that attends to nothing has weights of 0."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

MAX_LOOK = tl.constexpr(128)
"""Numbers that a program reads at a time before its loop, for each group of PART."""


@triton.jit
def rounded_product(x, y):
    """x * y, rounded. A plain product that is added to the one of another lane is contracted: each lane with its
    own, so lanes that hold the same sum would differ in its last bit."""
    return tl.fma(x, tl.broadcast_to(y, x.shape), tl.zeros_like(x))


@triton.jit
def exp(x, KIND: tl.constexpr):
    """exp of scores under a mask of this kind."""
    # an additive mask may hold the lowest finite number, which must not be scaled: scores then
    # stay in natural units, otherwise they are in units of log 2
    if KIND == 2:
        x = x * LOG2E
    return tl.exp2(x)


@triton.jit
def capped(score, cap):
    """cap * tanh(score / cap), for a cap in the units of the scores."""
    # of a large score the exponential is infinite, and what remains of the fraction is 0
    return cap - 2.0 * cap / (1.0 + tl.exp2(score * (2.0 * LOG2E / cap)))


@triton.jit
def under_mask(score, mask, position, ok, S: tl.constexpr):
    """Scores [tokens, columns] under the mask. `position` and `ok` are [tokens], S is a `Scores`."""
    if S.KIND == 0:
        return tl.where(ok[:, None], score, -float("inf"))
    # a shared mask is loaded as a vector: the compiler then moves the mask to where the scores are, not the
    # scores to where a tile of the mask is
    if S.SHARED:
        entry_ptr = mask.ptr + position.to(tl.int64) * mask.stride
    else:
        # one number an entry instead of two for an address
        entry_ptr = mask.ptr + ((position * mask.stride)[:, None] + mask.at[None, :])
        ok = ok[:, None] & mask.column_ok[None, :]
    if S.KIND == 1:
        seen = tl.load(entry_ptr, mask=ok, other=0) != 0
        if S.SHARED:
            seen = seen[:, None]
        return tl.where(seen, score, -float("inf"))
    added = tl.load(entry_ptr, mask=ok, other=0.0).to(tl.float32)
    if S.SHARED:
        added = added[:, None]
        ok = ok[:, None]
    return tl.where(ok, score + added, -float("inf"))


@triton.jit
def reach(mask, first_position, tokens, S: tl.constexpr, LOOK: tl.constexpr):
    """(how many tokens from the first are hidden, up to where the mask changes anything) of a shared mask."""
    unseen = tokens
    changed = tokens * 0
    for part in tl.range(0, tokens, LOOK, num_stages=1):
        token = part + tl.arange(0, LOOK)
        entry_ptr = mask.ptr + (first_position + token).to(tl.int64) * mask.stride
        # behind the last token, what changes nothing
        if S.KIND == 1:
            entry = tl.load(entry_ptr, mask=token < tokens, other=1)
            seen = entry != 0
            plain = seen
        else:
            entry = tl.load(entry_ptr, mask=token < tokens, other=0.0)
            seen = entry != -float("inf")
            plain = entry == 0
        unseen = tl.minimum(unseen, tl.min(tl.where(seen, token, tokens), 0))
        changed = tl.maximum(changed, tl.max(tl.where(plain, 0, token + 1), 0))
    return unseen, changed
