"""What kernels pass to each other: one structure for what belongs together.

A kernel takes the `Form` of a tensor as one constant, its buffers as one tuple and their strides as another
(`common.buffers`, `common.strides`), and makes of them what device functions take: `K: tl.constexpr =
as_form(K_FORM)`, `stored(k_buffers, k_strides, ...)`. Counters are parameters of their own, for they are not
specialised. What holds compile-time values has to be declared so where it is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ROTATED, ORDERED, TILED = 1, 2, 3
"""What packed channels are, in `Form.TURNED`; 0 where they are the model's."""


class Form(NamedTuple):
    """How one tensor is stored; all of it known when the kernel is compiled.

    BITS: the width of its codes, as `layout.DIGITS` names them; GROUP: tokens (AXIS 0) or channels (AXIS 1)
    that share a scale; BLOCK: tokens whose planes lie together; DP: D padded to a power of two; KEPT, HIGH:
    channels of the lowest digit and of those above; SYMMETRIC: whether there are no offsets; TURNED: ROTATED if
    packed tokens are rotated, ORDERED if their channels are in an order, TILED if they are in one of every tile;
    APART: the last channels, which are in buffers of their own; then, in the order of `layout.APART`, how many are
    in each: RAW: in 16 bits.
    """

    BITS: Any
    AXIS: Any
    GROUP: Any
    D: Any
    BLOCK: Any
    DP: Any
    KEPT: Any
    HIGH: Any
    SYMMETRIC: Any
    TURNED: Any
    APART: Any = 0
    RAW: Any = 0


class Packing(NamedTuple):
    """How tiles of one tensor are packed: its `Form`, and how a program's tokens are cut.

    SCALE_DTYPE: index into `layout.SCALE_DTYPES`; FIELDS, WORDS, WORDS_P, TOKENS: a program holds FIELDS tiles
    [TOKENS, WORDS] of channels that share words, padded to WORDS_P; MARGIN, MARGIN_HIGH: what share of the range
    is cut off at either end, of all channels or of those below HIGH.
    """

    X: Any
    SCALE_DTYPE: Any
    FIELDS: Any
    WORDS: Any
    WORDS_P: Any
    TOKENS: Any
    MARGIN: Any
    MARGIN_HIGH: Any


class Stored(NamedTuple):
    """Pointers to the buffers of one tensor, of one head; tile: tokens of one."""

    qdata: Any
    scale: Any
    zero: Any
    residual: Any
    order: Any
    exact: Any
    tile: Any


class Places(NamedTuple):
    """Where tokens lie: how many are alive, where the packed ones end, raw slots of sink and ring."""

    live: Any
    end: Any
    sink: Any
    ring: Any


class Mask(NamedTuple):
    """The mask of one row and head.

    Pointer, offset of each column from the first, stride of tokens, columns in use; skip: bytes of the head's
    packed tokens, 0 for those that count.
    """

    ptr: Any
    at: Any
    stride: Any
    column_ok: Any
    skip: Any


class Scores(NamedTuple):
    """What happens to scores.

    KIND: 0 no mask, 1 a boolean one, 2 an additive one; SHARED: all columns have the same; SKIP: whether packed
    tokens can be skipped; PLACED: tokens are slots of a high tier; KEPT: weights are stored.
    """

    KIND: Any
    SHARED: Any
    CAPPED: Any
    SKIP: Any
    PLACED: Any
    KEPT: Any


class Slots(NamedTuple):
    """Slots of a high tier that a program takes: one step of them out of `splits`, from the `split`-th on.

    positions: of the tokens in them; count: slots; sink, end: which positions are those of tokens.
    """

    positions: Any
    count: Any
    split: Any
    splits: Any
    sink: Any
    end: Any


class Kept(NamedTuple):
    """Where weights of a head's tokens go, in half precision, and what they are relative to.

    weights: [tokens, rows], from token `first` on; tops: the running maximum of each step, [steps, N].
    """

    weights: Any
    tops: Any
    first: Any
    rows: Any


class Steps(NamedTuple):
    """How the bulk is cut.

    UNIT: tokens that shares are counted in: those of a group of keys, or with scales per token what divides a tile;
    PAGE: tokens of a page, 0 where tokens lie in a row; TOKENS: of a step; SPREAD: sets of columns that take groups of their own; PART: groups whose offsets are
    multiplied with the queries at a time; SINGLE: no share has more; V_ALIGN: rows of values that a step
    may begin with are multiples of it.
    """

    UNIT: Any
    TOKENS: Any
    SPREAD: Any
    PART: Any
    SINGLE: Any
    V_ALIGN: Any
    STAGES: Any
    PRECISION: Any
    PORTABLE: Any
    WARPS: Any
    PAGE: Any


class Pages(NamedTuple):
    """The pages of a share of tokens.

    table: pointer to their blocks; hidden: first tokens that do not count; head: the KV head; then what
    `fields.stored` makes pointers of.
    """

    table: Any
    hidden: Any
    head: Any
    k_buffers: Any
    k_strides: Any
    v_buffers: Any
    v_strides: Any
