"""What kernels pass to each other: one structure for what belongs together.

Kernels take flat parameters, as pointers, strides and counters specialise each in its own way, and put them
together inside. `Form`, `Scores` and `Steps` hold compile-time values and have to be declared so where they
are made (`K: tl.constexpr = Form(...)`).
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Form(NamedTuple):
    """How one tensor is stored; all of it known when the kernel is compiled.

    GROUP: tokens (AXIS 0) or channels (AXIS 1) that share a scale; BLOCK: tokens whose planes lie together;
    DP: D padded to a power of two.
    """

    BITS: Any
    AXIS: Any
    GROUP: Any
    D: Any
    BLOCK: Any
    DP: Any


class Stored(NamedTuple):
    """Pointers to the buffers of one tensor, of one head."""

    qdata: Any
    scale: Any
    zero: Any
    residual: Any


class Places(NamedTuple):
    """Where tokens lie: how many are alive, where the packed ones end, raw slots of sink and ring."""

    live: Any
    end: Any
    sink: Any
    ring: Any


class Mask(NamedTuple):
    """The mask of one row and head: pointer, offset of each column from the first, stride of tokens, columns in use."""

    ptr: Any
    at: Any
    stride: Any
    column_ok: Any


class Scores(NamedTuple):
    """What happens to scores. KIND: 0 no mask, 1 a boolean one, 2 an additive one; SHARED: all columns have the same."""

    KIND: Any
    SHARED: Any
    CAPPED: Any


class Steps(NamedTuple):
    """How the bulk is cut.

    TOKENS: of a step; SPREAD: sets of columns that take groups of their own; PART: groups whose offsets are
    multiplied with the queries at a time; SINGLE: no share has more; V_ALIGN: rows of values that a step
    may begin with are multiples of it.
    """

    TOKENS: Any
    SPREAD: Any
    PART: Any
    SINGLE: Any
    V_ALIGN: Any
    STAGES: Any
    PRECISION: Any
    PORTABLE: Any
