"""The packed layout, as arithmetic on plain integers.

Every packer, unpacker, kernel, cache and estimate takes shapes, offsets and flush points from
here; nothing else restates them. This module imports neither torch nor Triton.

One cached tensor (the keys or the values of one layer) has logical shape [B, Hkv, L, D] and is
stored in four buffers:

    qdata       int16        [B, Hkv, tiles * tile, words]    packed codes
    scale       scale dtype  [B, Hkv, *grid]                  one per group
    zero_point  scale dtype  [B, Hkv, *grid]                  value of code 0, added after scaling
    residual    model dtype  [B, Hkv, sink + ring, D]         raw tokens: sink, then recent window

A token at position p is, for a tensor that holds `length` tokens and therefore
n = packed_tiles(length) tiles:

    p < sink                     raw, residual slot p
    p < sink + n * tile          packed, row p - sink of qdata
    otherwise                    raw, residual slot sink + (p - sink) % ring

A tensor of 16 bits is never packed: it keeps token p in residual slot p, and its residual has as
many slots as the tensor may hold tokens.

n depends on the length alone, so two caches of the same tokens store the same bits however the
tokens arrived, and a cache can find every token from the length (which may live on the device).

Words are *field-major along D*: b bits take W = D * b / 16 words per token, and field f of word j
(bits f*b .. f*b + b - 1) is channel f * W + j. A field is thus a contiguous slice of channels.

3 bits do not divide a word. Codes lie in *columns* of 3 * F bits: code f of column c is channel
f * C + c, for C columns of F codes. C is D / 8 (F = 8), or for heads of fewer than 128 channels the
double of it as long as that is at most 16. Two thirds of a column's bits are a piece of a word of the
wide plane (16 bits of it, 8, ...), the others a piece half as wide of the narrow plane, and one code is
cut in two: its high bits are on top of the wide piece, its low bits on top of the narrow one. With
C = D / 8, a wide piece holds codes 0 to 4 and one bit of code 5, a narrow one codes 6 and 7 and two
bits of code 5. Piece r of word j of a plane of W words belongs to column r * W + j.

Rows of two planes would not start where memory is fetched from. So the planes of a block of tokens
(`plane_block`) lie one behind the other: the rows of qdata that belong to a block hold first the wide
plane of all its tokens, then the narrow one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from kvmix_kernels.errors import CapacityError, FormatError, HeadSizeError

VERSION = 2
"""Of the layout, kept with saved caches. Version 1 laid out 3 bits in another way."""

WORD_BITS = 16
PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Per width the planes of a token, in bits per channel."""
RAW_BITS = 16
BITS = (*PLANES, RAW_BITS)

AXIS_CHANNEL = 0
AXIS_TOKEN = 1
AXES = {"channel": AXIS_CHANNEL, "token": AXIS_TOKEN}

SCALE_DTYPES = ("float16", "bfloat16", "float32")
SCALE_ITEMSIZE = (2, 2, 4)

WHOLE_HEAD = 0
"""As `group_size` with axis "token": one group over all channels of the head."""

GROWTH_TOKENS = 128
"""Growing buffers are enlarged by this many tokens at a time (or by a tile, if that is more).

A decode step reads the whole cache, so copying it every 128 steps adds below 2 % of traffic,
while a proportional rule would waste a share of the memory at every length.
"""

FIELD_CHANNELS = 16
"""Fields are made this wide where they can be: a product of tensor cores takes as many."""

BLOCK_TOKENS = 32
"""Most tokens in a block of planes."""

MIN_GROWING_TILES = 2
"""Growing buffers never hold 0 or 1 tiles, sizes for which compilers specialise their code."""


class TensorFormat(NamedTuple):
    """How one cached tensor is stored. A tuple of ints, so that ops take it as `int[]`.

    bits: 1, 2, 3, 4, 8 or 16 (raw); axis: AXIS_CHANNEL (a group is `group_size` consecutive
    tokens of one channel) or AXIS_TOKEN (`group_size` consecutive channels of one token);
    tile: tokens packed together; sink: leading tokens kept raw; window: recent tokens kept raw
    at least; scale_dtype: index into SCALE_DTYPES.
    """

    bits: int
    axis: int
    group_size: int
    tile: int
    sink: int
    window: int
    scale_dtype: int

    @property
    def is_raw(self) -> bool:
        """Whether tokens are never packed."""
        return self.bits == RAW_BITS

    @property
    def label(self) -> str:
        """The bits for people: "4"."""
        return str(self.bits)

    @property
    def ring(self) -> int:
        """Residual slots of the recent window: the window, and the tile that waits to be full."""
        return self.window + self.tile

    @property
    def residual_slots(self) -> int:
        """Raw slots of a packed tensor: sink and ring."""
        return self.sink + self.ring

    def packed_tiles(self, length: int) -> int:
        """Tiles that have been flushed once `length` tokens are stored."""
        if self.is_raw:
            return 0
        return max(0, length - self.sink - self.window) // self.tile

    def packed_end(self, length: int) -> int:
        """Position of the first token after the packed ones (at least `sink`)."""
        return self.sink + self.packed_tiles(length) * self.tile


def make_format(
    bits: int,
    axis: str | int = "channel",
    group_size: int = 32,
    tile: int = 32,
    sink: int = 0,
    window: int = 32,
    scale_dtype: str | int = "float16",
) -> TensorFormat:
    """Check the parts of a format against each other and return it.

    Raises:
        FormatError: naming the part that does not fit and the values that would.
    """
    if bits not in BITS:
        raise FormatError(f"bits must be one of {BITS}, got {bits!r}")
    if isinstance(axis, str):
        if axis not in AXES:
            raise FormatError(f'axis must be "channel" or "token", got {axis!r}')
        axis = AXES[axis]
    if isinstance(scale_dtype, str):
        if scale_dtype not in SCALE_DTYPES:
            raise FormatError(f"scale_dtype must be one of {SCALE_DTYPES}, got {scale_dtype!r}")
        scale_dtype = SCALE_DTYPES.index(scale_dtype)
    if tile < 1:
        raise FormatError(f"tile must be at least 1 token, got {tile}")
    if sink < 0 or window < 0:
        raise FormatError(f"sink and window must not be negative, got {sink} and {window}")
    if bits != RAW_BITS:
        if axis == AXIS_CHANNEL:
            if group_size < 1 or tile % group_size:
                raise FormatError(
                    f"group_size {group_size} does not divide the tile of {tile} tokens: "
                    'with axis="channel" a group is consecutive tokens of one tile'
                )
        elif group_size != WHOLE_HEAD and (group_size < 16 or group_size % 16):
            raise FormatError(
                f'group_size {group_size} must be a multiple of 16 with axis="token" '
                f"(or {WHOLE_HEAD} for the whole head)"
            )
    return TensorFormat(bits, axis, group_size, tile, sink, window, scale_dtype)


@cache
def check_head_size(fmt: TensorFormat, head_dim: int) -> None:
    """Raise HeadSizeError if tokens of `head_dim` channels cannot be stored in this format."""
    if fmt.is_raw:
        return
    if head_dim < WORD_BITS or head_dim % WORD_BITS:
        raise HeadSizeError(
            f"head size {head_dim} is not a multiple of {WORD_BITS}: keep this layer at 16 bits"
        )
    group = channel_group(fmt, head_dim)
    if fmt.axis == AXIS_TOKEN and head_dim % group:
        fitting = [g for g in range(16, head_dim, 16) if head_dim % g == 0]
        raise HeadSizeError(
            f'group_size {group} does not divide the head size {head_dim} (axis="token" groups '
            f"channels): use one of {fitting} or the whole head"
        )


def channel_group(fmt: TensorFormat, head_dim: int) -> int:
    """Channels per group for axis "token"; resolves WHOLE_HEAD."""
    return head_dim if fmt.group_size == WHOLE_HEAD else fmt.group_size


def words_per_token(bits: int, head_dim: int) -> int:
    """16-bit words that hold the codes of one token of one head."""
    return sum(head_dim * width // WORD_BITS for width in PLANES[bits])


def reads(version: int, bits: int) -> bool:
    """Whether what was packed under a version of the layout is laid out as described here."""
    return version == VERSION or (version == 1 and bits != 3)


class BitField(NamedTuple):
    """`count` bits of all words of a plane, from `position` on.

    They are the bits from `above` on of the codes of as many channels, from `channel` on.
    """

    plane: int
    position: int
    count: int
    above: int
    channel: int


def plane_words(bits: int, head_dim: int) -> tuple[int, ...]:
    """Words per token of each plane."""
    return tuple(head_dim * width // WORD_BITS for width in PLANES[bits])


def plane_block(fmt: TensorFormat) -> int:
    """Tokens whose planes lie together; a power of two that divides the tile (1 for a single plane)."""
    return min(BLOCK_TOKENS, fmt.tile & -fmt.tile) if len(PLANES.get(fmt.bits, ())) > 1 else 1


def fold_copies(bits: int, head_dim: int) -> int:
    """How many copies of the first plane's words side by side make fields of FIELD_CHANNELS channels.

    For 3 bits also the number of pieces that a wide word is cut into.
    """
    width = PLANES[bits][0]
    words = head_dim * width // WORD_BITS
    copies = 1
    while copies * 2 * words <= FIELD_CHANNELS and copies * 2 * width <= WORD_BITS:
        copies *= 2
    return copies


class Cut(NamedTuple):
    """How a 3-bit column is cut: bits of its two pieces, the code that is in both, its high bits."""

    wide: int
    narrow: int
    code: int
    high: int


def cut_column(copies: int) -> Cut:
    """The cut of the columns of which a wide word holds `copies`."""
    wide = WORD_BITS // copies
    return Cut(wide, wide // 2, wide // 3, wide % 3)


@cache
def bit_fields(bits: int, head_dim: int) -> tuple[BitField, ...]:
    """Where all bits of all codes lie, plane by plane, in the order of channels."""
    words = plane_words(bits, head_dim)
    if bits != 3:
        return tuple(BitField(0, f * bits, bits, 0, f * words[0]) for f in range(WORD_BITS // bits))
    copies = fold_copies(bits, head_dim)
    wide, narrow, cut, high = cut_column(copies)
    columns, low = copies * words[0], 3 - high
    found = []
    for f in range(cut + 1):
        count, above = (high, low) if f == cut else (3, 0)
        for r in range(copies):
            found.append(BitField(0, r * wide + 3 * f, count, above, f * columns + r * words[0]))
    for f in range(cut, 8 // copies):
        position, count = (narrow - low, low) if f == cut else (3 * (f - cut - 1), 3)
        for s in range(2 * copies):
            found.append(BitField(1, s * narrow + position, count, 0, f * columns + s * words[1]))
    return tuple(found)


def scale_grid(fmt: TensorFormat, head_dim: int, tiles: int) -> tuple[int, int]:
    """Last two dimensions of `scale` and `zero_point` for `tiles` tiles."""
    tokens = tiles * fmt.tile
    if fmt.is_raw:
        return (0, head_dim)
    if fmt.axis == AXIS_CHANNEL:
        return (tokens // fmt.group_size, head_dim)
    return (tokens, head_dim // channel_group(fmt, head_dim))


def growing_tiles(fmt: TensorFormat, length: int, maximum: Callable[[Any, Any], Any] = max) -> int:
    """Tiles allocated for a growing tensor of `length` tokens: room for the next token's flush.

    `maximum` lets a tracer pass a max that does not branch on a symbolic length.
    """
    if fmt.is_raw:
        return 0
    flushed: int = maximum(0, length + 1 - fmt.sink - fmt.window) // fmt.tile
    tiles: int = maximum(MIN_GROWING_TILES, _grown(flushed, fmt.tile))
    return tiles


def growing_slots(fmt: TensorFormat, length: int, maximum: Callable[[Any, Any], Any] = max) -> int:
    """Residual slots allocated for a growing tensor of `length` tokens."""
    if not fmt.is_raw:
        return fmt.residual_slots
    tiles: int = maximum(MIN_GROWING_TILES, _grown(length // fmt.tile + 1, fmt.tile))
    return fmt.sink + tiles * fmt.tile


def _grown(tiles: int, tile: int) -> int:
    step = max(1, GROWTH_TOKENS // tile)
    return (tiles + step - 1) // step * step


def fixed_tiles(fmt: TensorFormat, capacity: int) -> int:
    """Tiles allocated for a fixed tensor of `capacity` tokens."""
    return fmt.packed_tiles(capacity)


def fixed_slots(fmt: TensorFormat, capacity: int) -> int:
    """Residual slots allocated for a fixed tensor of `capacity` tokens."""
    return fmt.sink + -(-capacity // fmt.tile) * fmt.tile if fmt.is_raw else fmt.residual_slots


def check_room(fmt: TensorFormat, rows: int, slots: int, length: int, count: int) -> None:
    """Raise CapacityError unless `count` tokens after `length` fit into buffers with so many rows and slots.

    rows: of qdata. slots: of the residual.
    """
    # the window always has room for a tile that is not full yet
    room = slots if fmt.is_raw else fmt.sink + rows + fmt.ring - 1
    if length + count > room:
        raise CapacityError.exceeded(count, length, room)


def buffer_nbytes(fmt: TensorFormat, head_dim: int, tiles: int, slots: int, itemsize: int) -> int:
    """Bytes of all four buffers for one batch row and one KV head."""
    raw = slots * head_dim * itemsize
    if fmt.is_raw:
        return raw
    rows, columns = scale_grid(fmt, head_dim, tiles)
    codes = tiles * fmt.tile * words_per_token(fmt.bits, head_dim) * 2
    return codes + 2 * rows * columns * SCALE_ITEMSIZE[fmt.scale_dtype] + raw


def bits_per_packed_element(fmt: TensorFormat, head_dim: int) -> float:
    """Bits of one packed element: its code and its share of scale and offset."""
    if fmt.is_raw:
        return float(RAW_BITS)
    group = fmt.group_size if fmt.axis == AXIS_CHANNEL else channel_group(fmt, head_dim)
    return fmt.bits + 2 * 8 * SCALE_ITEMSIZE[fmt.scale_dtype] / group
