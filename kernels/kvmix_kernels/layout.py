"""The packed layout, as arithmetic on plain integers.

Every packer, unpacker, kernel, cache and estimate takes shapes, offsets and flush points from
here; nothing else restates them. This module imports neither torch nor Triton.

One cached tensor (the keys or the values of one layer) has logical shape [B, Hkv, L, D] and is
stored in the buffers that `TensorFormat.buffer_names` lists, in that order everywhere:

    qdata       int16        [B, Hkv, tiles * tile, words]    packed codes
    scale       scale dtype  [B, Hkv, *grid]                  one per group
    zero_point  scale dtype  [B, Hkv, *grid]                  value of code 0, added after scaling
    residual    model dtype  [B, Hkv, sink + ring, D]         raw tokens: sink, then recent window
    order       int32        [B, Hkv, D]                      channels as packed; with tiers alone
                uint8        [B, Hkv, tiles, D]               of each tile; int16 for more than 256 channels
    exact       bfloat16     [B, Hkv, tiles * tile, raw]      channels of 16 bits; buffers of APART are there
                                                              with a tier of them alone
    seen        float64      [B, Hkv, D]                      sizes of all queries so far; ORDER_TILE alone

and, with a high tier of Q slots (`HighTier`), in these behind them:

    high_qdata, high_scale, high_zero_point, high_residual    its tokens, slot by slot, as a tensor of its own
    positions   int32        [B, Hkv, Q]                      of the tokens in it
    scores      float32      [B, Hkv, Q]                      of keys: importance of the tokens in it
    waiting     float32      [B, Hkv, ring]                   of keys: importance of raw tokens, by ring slot
    skipped     uint8        [B, Hkv, tiles * tile]           of keys: 1 for packed tokens that are read from
                                                              the high tier alone, else 0
    balance     float32      [B, Hkv, D]                      of balanced keys: factors, powers of two

A slot holds a token if its position is at least `sink` and less than the end of the packed tokens, so
whatever shortens a tensor empties slots. `skipped` says the same by token and follows from the positions:
attention reads it in every step, and only packing a tile changes it. Balanced keys are multiplied by their
factor wherever they are stored, and queries divided by it: exact, for powers of two.

Words used throughout: a *segment* is tokens kept alike (sink, packed, window), a *tier* is channels with
bits of their own (a uniform format has one), a *digit* is a part of a code that is stored by itself, a
*plane* is words that lie together, a *field* is bits of a plane that are one slice of channels.

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

A code is the sum of its digits. Most widths have one; 6 bits are a digit of 4 and above it one of 2, each
laid out as codes of so many bits. A digit lies in one plane, or, if its bits do not divide a word, in two.

With *tiers* the channels of keys are packed in an order, the most important first: packed channel j is
channel order[j]. All but the dropped ones have a digit of 2 bits, the first of them a second one above it,
so 4 bits. Dropped channels come behind them; they have no codes, and their offset is the mean of their
group. Channels *apart*, the most important of all, are the last: scale and offset are 0, and each of their
tiers has a buffer of its own (`APART`).

Scales of one *byte* are float16 whose sign and last 7 bits are 0 (5 bits of exponent, 3 of mantissa). Their
offsets are a signed byte in quarters of the scale: x = s * (code + z / 4). *Symmetric* formats store no
offset: it is -s * (2^bits - 1) / 2. Under *rotation* tokens are multiplied by an orthonormal Hadamard matrix
(`hadamard_block` channels at a time) before they are rounded, and by it again when they are read.

A digit of 3 bits is cut. Codes lie in *columns* of 3 * F bits: code f of column c is channel f * C + c,
for C columns of F codes. C is D / 8 (F = 8), or for heads of fewer than 128 channels the
double of it as long as that is at most 16. Two thirds of a column's bits are a piece of a word of the
wide plane (16 bits of it, 8, ...), the others a piece half as wide of the narrow plane, and one code is
cut in two: its high bits are on top of the wide piece, its low bits on top of the narrow one. With
C = D / 8, a wide piece holds codes 0 to 4 and one bit of code 5, a narrow one codes 6 and 7 and two
bits of code 5. Piece r of word j of a plane of W words belongs to column r * W + j.

Rows of several planes would not start where memory is fetched from. So the planes of a block of tokens
(`plane_block`) lie one behind the other: the rows of qdata that belong to a block hold first the first
plane of all its tokens, then the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

from kvmix_kernels.errors import CapacityError, FormatError, HeadSizeError

VERSION = 2
"""Of the layout, kept with saved caches. Version 1 laid out 3 bits in another way."""

WORD_BITS = 16
DIGITS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((1,),),
    2: ((2,),),
    3: ((2, 1),),
    4: ((4,),),
    6: ((4,), (2,)),
    8: ((8,),),
    42: ((2,), (2,)),
}
"""Per width its digits, lowest first; per digit its planes, in bits per channel. All that a width is.

The functions from here to `cut_column` call no others, so that kernels can call them while they are compiled.
"""
TIERED = 42
"""As the width of a format with tiers: 4 bits in two digits, of which the higher has fewer channels."""
WIDTHS = tuple(width for width in DIGITS if width != TIERED)
"""Bits that codes can have."""
RAW_BITS = 16
BITS = (*WIDTHS, RAW_BITS)

AXIS_CHANNEL = 0
AXIS_TOKEN = 1
AXES = {"channel": AXIS_CHANNEL, "token": AXIS_TOKEN}

SCALE_DTYPES = ("float16", "bfloat16", "float32", "byte")
SCALE_ITEMSIZE = (2, 2, 4, 1)
BYTE_SCALES = SCALE_DTYPES.index("byte")
FLOAT_SCALES = SCALE_DTYPES[:BYTE_SCALES]

ORDERS = ("none", "plan", "prompt", "tile", "tile_keys")
"""Who says how the channels of a format with tiers are ordered: the plan, or the first tokens packed.

Or every tile for itself: by the queries seen until it is packed and the range of its keys, or by the sizes of
its keys alone.
"""
ORDER_NONE, ORDER_PLAN, ORDER_PROMPT, ORDER_TILE, ORDER_TILE_KEYS = range(5)

APART = {RAW_BITS: "exact"}
"""Tiers whose channels have no codes, by their bits: the buffer that each has; the most important first."""
TIER_BITS = (4, 2, 0, *APART)
"""Tiers in the order in which their channels are packed."""
TIER_CHANNELS = 8
"""Counts of channels of tiers are multiples of it: a word holds the 2-bit digits of as many."""
NAMED_TIERS = (*APART, 4, 2, 0)
"""Tiers as people give them, the most important channels first."""

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


BUFFER_NAMES = ("qdata", "scale", "zero_point", "residual")

NARROW_SPAN = 80
"""Percent of a group's range that codes of 2 bits cover where nobody says: in tiers and symmetric formats."""

ALL_CHANNELS = 0
"""As the channels of a tier: those of the whole head."""


PLAIN_NUMBERS = 7
"""Of the encoding of a format that has nothing but bits, axis, group, tile, sink, window and scale dtype."""


class Tier(NamedTuple):
    """Channels that are stored alike.

    bits: of their codes, 0 for dropped channels; channels: how many, or ALL_CHANNELS; span: how much of a
    group's range the codes cover, in percent.
    """

    bits: int
    channels: int = ALL_CHANNELS
    span: int = 100


POLICIES = ("accumulated", "mean", "last", "norm", "random", "oracle")
"""How tokens of a high tier are chosen; each is a file of `kvmix_kernels.importance`."""
HIGH_BITS = (RAW_BITS, 8, 4)
"""Bits that the tokens of a high tier can have: those whose rows can be exchanged one by one."""
HIGH_NAMES = ("high_qdata", "high_scale", "high_zero_point", "high_residual", "positions")
SCORE_NAMES = ("scores", "waiting")
SKIPPED_NAME = "skipped"
_HIGH_MARK = -1
"""What an encoded format begins with if it has a high tier."""


class HighTier(NamedTuple):
    """A second segment for tokens that matter: each KV head of each row has its own, in slots of their own.

    The low tier has every packed token as if there were no other; attention reads a token that is in the high
    tier there alone. So a token that leaves it is rounded once, and nothing moves.

    share: of the packed tokens, in percent, 0 for a fixed number; count: that number; bits: 16, 8 or 4;
    group_size: channels that share a scale, WHOLE_HEAD or a multiple of 16; policy: index into POLICIES;
    recent: part of the tier, in percent, that its newest tokens have whatever their scores; scored: 1 for
    keys, which keep the scores; balanced: 1 for keys that are multiplied by a factor per channel; evicting:
    1 if packed tokens outside the tier are not attended to, a control.
    """

    share: int
    count: int
    bits: int
    group_size: int
    policy: int
    recent: int
    scored: int
    balanced: int
    evicting: int

    def slots(self, packed: Any) -> Any:
        """Slots for a tensor that can have so many packed tokens."""
        return self.count or self.share * packed // 100

    def limit(self, packed: Any) -> Any:
        """Tokens of the tier once so many are packed; a number, or a tensor of one."""
        return self.count or self.share * packed // 100


class TensorFormat(NamedTuple):
    """How one cached tensor is stored.

    tiers: channels with bits of their own, in the order of TIER_BITS, one tier for a uniform format, whose
    bits are 1, 2, 3, 4, 6, 8 or 16 (raw); axis: AXIS_CHANNEL (a group is `group_size` consecutive tokens of
    one channel) or AXIS_TOKEN (`group_size` consecutive channels of one token); tile: tokens packed
    together; sink: leading tokens kept raw; window: recent tokens kept raw at least; scale_dtype: index into
    SCALE_DTYPES; symmetric, rotation: 1 or 0; order: index into ORDERS; high: tokens that are kept at more
    bits, or None.
    """

    tiers: tuple[Tier, ...]
    axis: int
    group_size: int
    tile: int
    sink: int
    window: int
    scale_dtype: int
    symmetric: int = 0
    rotation: int = 0
    order: int = ORDER_NONE
    high: HighTier | None = None

    @property
    def low(self) -> TensorFormat:
        """The format without its high tier."""
        return self if self.high is None else self._replace(high=None)

    @property
    def high_format(self) -> TensorFormat:
        """How the tokens of the high tier are stored: each by itself, slot after slot."""
        assert self.high is not None
        packed = self.high.bits != RAW_BITS
        rotation = self.rotation if packed else 0
        plain = TensorFormat(
            (Tier(self.high.bits),), AXIS_TOKEN, self.high.group_size, 1, 0, 0, self.scale_dtype
        )
        return plain._replace(rotation=rotation)

    @property
    def bits(self) -> int:
        """Bits of a code; of the widest tier."""
        return self.tiers[0].bits

    @property
    def code(self) -> int:
        """The width of its codes, a key of DIGITS: the bits, or TIERED."""
        return TIERED if len(self.tiers) > 1 else self.bits

    @property
    def label(self) -> str:
        """Its bits as people write them: "4", or "4/2 of 32/96" with tiers."""
        if len(self.tiers) == 1:
            return str(self.bits)
        named = sorted(self.tiers, key=lambda tier: NAMED_TIERS.index(tier.bits))
        bits, channels = ("/".join(map(str, part)) for part in list(zip(*named, strict=True))[:2])
        return f"{bits} of {channels}"

    @property
    def buffer_names(self) -> tuple[str, ...]:
        """The buffers of a tensor in this format, in the order in which ops take and return them."""
        names = BUFFER_NAMES
        if self.order != ORDER_NONE:
            apart = (APART[tier.bits] for tier in self.apart)
            names = (*names, "order", *apart, *(("seen",) if self.order == ORDER_TILE else ()))
        if self.high is None:
            return names
        scores = (*SCORE_NAMES, SKIPPED_NAME) if self.high.scored else ()
        return (*names, *HIGH_NAMES, *scores, *(("balance",) if self.high.balanced else ()))

    @property
    def by_tile(self) -> bool:
        """Whether every tile has an order of channels of its own."""
        return self.order in (ORDER_TILE, ORDER_TILE_KEYS)

    @property
    def sums_packed(self) -> bool:
        """Whether a weighted sum of packed tokens can be turned back at its end: all tiles are alike."""
        return not (self.by_tile or self.apart)

    @property
    def asks_queries(self) -> bool:
        """Whether an order of channels is chosen from queries."""
        return self.order in (ORDER_PROMPT, ORDER_TILE)

    @property
    def apart(self) -> tuple[Tier, ...]:
        """The tiers of APART that it has; their channels are the last ones."""
        return _apart(self.tiers)[0]

    @property
    def apart_counts(self) -> tuple[int, ...]:
        """Channels of each tier of APART, 0 where it has none."""
        return _apart(self.tiers)[1]

    @property
    def apart_channels(self) -> int:
        """Of all of them."""
        return sum(tier.channels for tier in self.apart)

    def channels(self, head_dim: int) -> tuple[int, int]:
        """Channels of the lowest digit (all but dropped ones and those apart) and of those above it."""
        if len(self.tiers) == 1:
            return head_dim, head_dim
        counts = {tier.bits: tier.channels for tier in self.tiers}
        return head_dim - counts.get(0, 0) - self.apart_channels, counts[4]

    def encode(self) -> list[int]:
        """As ops take it, an `int[]`. `decode` is the inverse; nothing else knows the order.

        PLAIN_NUMBERS, as formats had before there was more to say, and more where there is.
        """
        if self.high is not None:
            return [_HIGH_MARK, *self.high, *self.low.encode()]
        plain, more = [self.bits, *self[1:PLAIN_NUMBERS]], self[PLAIN_NUMBERS:-1]
        if self.tiers == (Tier(self.bits),) and not any(more):
            return plain
        return [*plain, *more, *(number for tier in self.tiers for number in tier)]

    @staticmethod
    def decode(numbers: Sequence[int]) -> TensorFormat:
        """The format that `encode` turned into these numbers.

        Raises:
            FormatError: they are not as many as a format has.
        """
        return _decoded(tuple(numbers))

    @property
    def is_raw(self) -> bool:
        """Whether tokens are never packed."""
        return self.tiers[0].bits == RAW_BITS

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

    def flushed_at(self, tile: int) -> int:
        """The length at which a tile, counted from 0, is packed."""
        return self.sink + self.window + (tile + 1) * self.tile

    def packed_end(self, length: int) -> int:
        """Position of the first token after the packed ones (at least `sink`)."""
        return self.sink + self.packed_tiles(length) * self.tile


@cache
def _apart(tiers: tuple[Tier, ...]) -> tuple[tuple[Tier, ...], tuple[int, ...]]:
    # kept, as every launch asks
    found = {tier.bits: tier for tier in tiers if tier.bits in APART and len(tiers) > 1}
    counts = tuple(found[bits].channels if bits in found else 0 for bits in APART)
    return tuple(found.values()), counts


@cache
def _decoded(numbers: tuple[int, ...]) -> TensorFormat:
    if numbers[:1] == (_HIGH_MARK,) and len(numbers) > len(HighTier._fields):
        end = 1 + len(HighTier._fields)
        return _decoded(numbers[end:])._replace(high=HighTier(*numbers[1:end]))
    count = len(TensorFormat._fields) - 1
    plain, more, tiers = numbers[1:PLAIN_NUMBERS], numbers[PLAIN_NUMBERS:count], numbers[count:]
    if (
        len(plain) != PLAIN_NUMBERS - 1
        or len(more) not in (0, 3)
        or len(tiers) % 3
        or bool(more) != bool(tiers)
    ):
        raise FormatError(f"a format is numbers as TensorFormat.encode writes them, got {len(numbers)}")
    found = tuple(Tier(*tiers[i : i + 3]) for i in range(0, len(tiers), 3)) or (Tier(numbers[0]),)
    symmetric, rotation, order = more or (0, 0, ORDER_NONE)
    return TensorFormat(found, *plain, symmetric, rotation, order)


def make_high(
    share: int = 0,
    count: int = 0,
    bits: int = RAW_BITS,
    group_size: int = WHOLE_HEAD,
    policy: str | int = "accumulated",
    recent: int = 50,
    balanced: bool = False,
    evicting: bool = False,
) -> HighTier:
    """Check the parts of a high tier and return it, as keys have it. `TensorFormat.high` wants it checked.

    Raises:
        FormatError: naming the part that does not fit and the values that would.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise FormatError(f"policy must be one of {POLICIES}, got {policy!r}")
        policy = POLICIES.index(policy)
    if bits not in HIGH_BITS:
        raise FormatError(f"tokens of a high tier have {HIGH_BITS} bits, got {bits!r}")
    if bool(share) == bool(count):
        raise FormatError("a high tier has either a share of the tokens or a fixed number of them")
    if not (0 <= share <= 99 and 0 <= recent <= 100):
        raise FormatError(
            f"the share of a high tier must be from 1 to 99 percent, and its recent part from 0 to 100, got "
            f"{share} and {recent}"
        )
    if count and count < 2:
        raise FormatError(f"a high tier of a fixed number has at least 2 tokens, got {count}")
    if group_size != WHOLE_HEAD and (group_size < 16 or group_size % 16):
        raise FormatError(f"group_size {group_size} of a high tier must be a multiple of 16, or {WHOLE_HEAD}")
    return HighTier(share, count, bits, group_size, policy, recent, 1, int(balanced), int(evicting))


def with_high(fmt: TensorFormat, high: HighTier) -> TensorFormat:
    """A packed format with a high tier.

    Raises:
        FormatError: the tensor is not packed, or the share of a tile is less than one token.
    """
    if fmt.is_raw:
        raise FormatError(
            'a tensor that stays at 16 bits has no high tier: take it from this layer (token_tier="none")'
        )
    if high.share and high.share * fmt.tile < 100:
        raise FormatError(
            f"{high.share} % of a tile of {fmt.tile} tokens is less than one token: take a larger tile, or "
            f"at least {-(-100 // fmt.tile)} %"
        )
    return fmt._replace(high=high)


def make_format(
    bits: int,
    axis: str | int = "channel",
    group_size: int = 32,
    tile: int = 32,
    sink: int = 0,
    window: int = 32,
    scale_dtype: str | int = "float16",
    tiers: Sequence[tuple[int, int]] = (),
    order: str | int = "none",
    symmetric: bool = False,
    rotation: bool = False,
    span: int | None = None,
) -> TensorFormat:
    """Check the parts of a format against each other and return it.

    `tiers` are (bits, channels), 16 bits (raw) first, then 4, 2 and 0 (dropped), which add up to the head; 4
    and one below must be there. `bits` is then 4, and `order` says who orders the channels. `span` is how
    much of a group's range the codes cover, of tiers those of 2 bits, in percent; None is 80 for tiers and
    symmetric codes of 2 bits, else 100.

    Raises:
        FormatError: naming the part that does not fit and the values that would.
    """
    if bits not in BITS:
        raise FormatError(f"bits must be one of {BITS}, got {bits!r}")
    if isinstance(order, str):
        if order not in ORDERS:
            raise FormatError(f"order must be one of {ORDERS}, got {order!r}")
        order = ORDERS.index(order)
    if span is not None and not 1 <= span <= 100:
        raise FormatError(f"span must be between 1 and 100 percent, got {span}")
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
    if rotation and (axis != AXIS_TOKEN or bits == RAW_BITS):
        raise FormatError(
            'rotation needs packed codes with axis="token": rotated keys lose the channels that tell them '
            "apart, so leave rotation to values"
        )
    if symmetric and not rotation:
        raise FormatError(
            "symmetric codes need rotation: without it they lose most of what values say; set rotation or "
            "leave symmetric out"
        )
    found = (Tier(bits, span=_span(bits, symmetric, span)),)
    if tiers:
        found = _tiers(tiers, bits, axis, order, span)
    elif order:
        raise FormatError("an order of channels needs tiers, which are packed in that order")
    return TensorFormat(
        found, axis, group_size, tile, sink, window, scale_dtype, int(symmetric), int(rotation), order
    )


def _span(bits: int, symmetric: bool, span: int | None) -> int:
    if span is not None:
        return span
    return NARROW_SPAN if symmetric and bits == 2 else 100


def _tiers(
    tiers: Sequence[tuple[int, int]], bits: int, axis: int, order: int, span: int | None
) -> tuple[Tier, ...]:
    given = [width for width, _ in tiers]
    if len(set(given)) != len(given) or given != [width for width in NAMED_TIERS if width in given]:
        raise FormatError(f"tiers must be of {NAMED_TIERS} bits, each once and in this order, got {given}")
    if 4 not in given or given[-1] == 4 or bits != 4:
        raise FormatError("tiers need some channels at 4 bits and others below: use bits=4, or bits alone")
    if any(count < TIER_CHANNELS or count % TIER_CHANNELS for _, count in tiers):
        raise FormatError(f"channels of a tier must be multiples of {TIER_CHANNELS}, got {tiers}")
    if axis != AXIS_CHANNEL:
        raise FormatError('tiers of channels need axis="channel"')
    if order == ORDER_NONE:
        raise FormatError('tiers need an order of channels: order="plan" or "prompt", "tile" or "tile_keys"')
    narrow = NARROW_SPAN if span is None else span
    counts = dict(tiers)
    packed = (width for width in TIER_BITS if width in counts)
    return tuple(Tier(width, counts[width], narrow if width == 2 else 100) for width in packed)


@cache
def check_head_size(fmt: TensorFormat, head_dim: int) -> None:
    """Raise HeadSizeError if tokens of `head_dim` channels cannot be stored in this format."""
    if fmt.is_raw:
        return
    if head_dim < WORD_BITS or head_dim % WORD_BITS:
        raise HeadSizeError(
            f"head size {head_dim} is not a multiple of {WORD_BITS}: keep this layer at 16 bits"
        )
    if len(fmt.tiers) > 1 and sum(tier.channels for tier in fmt.tiers) != head_dim:
        raise HeadSizeError(
            f"tiers of {[tier.channels for tier in fmt.tiers]} channels do not add up to the head size "
            f"{head_dim}: take counts that do"
        )
    if fmt.high is not None:
        check_head_size(fmt.high_format, head_dim)
    group = channel_group(fmt, head_dim)
    if fmt.axis == AXIS_TOKEN and head_dim % group:
        fitting = [g for g in range(16, head_dim, 16) if head_dim % g == 0]
        instead = f"one of {fitting} or the whole head" if fitting else 'group_size="head"'
        raise HeadSizeError(
            f'group_size {group} does not divide the head size {head_dim} (axis="token" groups '
            f"channels): use {instead}"
        )


def channel_group(fmt: TensorFormat, head_dim: int) -> int:
    """Channels per group for axis "token"; resolves WHOLE_HEAD."""
    return head_dim if fmt.group_size == WHOLE_HEAD else fmt.group_size


class Digit(NamedTuple):
    """A part of all codes. bits: its own; above: bits of the digits below it; first: its first plane."""

    bits: int
    above: int
    first: int


def digits(bits: int) -> tuple[Digit, ...]:
    """The digits of codes of so many bits, lowest first."""
    found: list[Digit] = []
    above = 0
    for planes in DIGITS[bits]:
        first = sum(len(earlier) for earlier in DIGITS[bits][: len(found)])
        found.append(Digit(sum(planes), above, first))
        above += sum(planes)
    return tuple(found)


def is_cut(bits: int) -> bool:
    """Whether codes of this width have a digit that lies in two planes."""
    return any(len(digit) > 1 for digit in DIGITS[bits])


def hadamard_block(head_dim: int) -> int:
    """Channels that are rotated together: the largest power of two that divides the head."""
    return head_dim & -head_dim


def words_per_token(bits: int, head_dim: int, above: int | None = None) -> int:
    """16-bit words that hold the codes of one token of one head; arguments as of `plane_words`."""
    return sum(
        (head_dim if above is None or i == 0 else above) * width // WORD_BITS
        for i, digit in enumerate(DIGITS[bits])
        for width in digit
    )


def row_words(fmt: TensorFormat, head_dim: int) -> int:
    """16-bit words of one token of one head: the rows of qdata."""
    return 0 if fmt.is_raw else words_per_token(fmt.code, *fmt.channels(head_dim))


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


def plane_words(bits: int, head_dim: int, above: int | None = None) -> tuple[int, ...]:
    """Words per token of each plane; `above`: channels of digits above the lowest, if they are fewer."""
    return tuple(
        (head_dim if above is None or i == 0 else above) * width // WORD_BITS
        for i, digit in enumerate(DIGITS[bits])
        for width in digit
    )


def plane_block(fmt: TensorFormat) -> int:
    """Tokens whose planes lie together; a power of two that divides the tile (1 for a single plane)."""
    several = not fmt.is_raw and len(plane_words(fmt.code, WORD_BITS)) > 1
    return min(BLOCK_TOKENS, fmt.tile & -fmt.tile) if several else 1


def fold_copies(bits: int, head_dim: int) -> int:
    """How many copies of a digit's first plane side by side make fields of FIELD_CHANNELS channels.

    For a digit that is cut also the number of pieces that a word of that plane is cut into.
    """
    width = DIGITS[bits][0][0]
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
def bit_fields(bits: int, head_dim: int, above: int | None = None) -> tuple[BitField, ...]:
    """Where all bits of all codes lie: digit by digit, plane by plane, in the order of channels."""
    return tuple(
        field._replace(plane=digit.first + field.plane, above=digit.above + field.above)
        for i, digit in enumerate(digits(bits))
        for field in _digit_fields(digit.bits, head_dim if above is None or i == 0 else above)
    )


def _digit_fields(bits: int, head_dim: int) -> list[BitField]:
    words = plane_words(bits, head_dim)
    if not is_cut(bits):
        return [BitField(0, f * bits, bits, 0, f * words[0]) for f in range(WORD_BITS // bits)]
    copies = fold_copies(bits, head_dim)
    wide, narrow, cut, high = cut_column(copies)
    columns, low = copies * words[0], bits - high
    found = []
    for f in range(cut + 1):
        count, above = (high, low) if f == cut else (bits, 0)
        for r in range(copies):
            found.append(BitField(0, r * wide + bits * f, count, above, f * columns + r * words[0]))
    for f in range(cut, 8 // copies):
        position, count = (narrow - low, low) if f == cut else (bits * (f - cut - 1), bits)
        for s in range(2 * copies):
            found.append(BitField(1, s * narrow + position, count, 0, f * columns + s * words[1]))
    return found


def scale_grid(fmt: TensorFormat, head_dim: int, tiles: int) -> tuple[int, int]:
    """Last two dimensions of `scale` for `tiles` tiles."""
    tokens = tiles * fmt.tile
    if fmt.is_raw:
        return (0, head_dim)
    if fmt.axis == AXIS_CHANNEL:
        return (tokens // fmt.group_size, head_dim)
    return (tokens, head_dim // channel_group(fmt, head_dim))


def zero_grid(fmt: TensorFormat, head_dim: int, tiles: int) -> tuple[int, int]:
    """Last two dimensions of `zero_point`: those of `scale`, or no columns for symmetric formats."""
    rows, columns = scale_grid(fmt, head_dim, tiles)
    return (rows, 0 if fmt.symmetric else columns)


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


def holds(fmt: TensorFormat, peak: float) -> bool:
    """Whether the format's scales and offsets have the range of elements up to `peak` in size.

    Scales of half precision or a byte end at 65504, and have fewer bits from 2^-14 down. What counts is that
    rounding them costs less than a quarter of a step at the far end of a group, for groups that span an
    eighth of the largest range.
    """
    if fmt.is_raw or peak == 0 or SCALE_DTYPES[fmt.scale_dtype] in ("bfloat16", "float32"):
        return True
    top = max(1, 2**fmt.bits - 1)
    least = top * 2.0**-13 if fmt.scale_dtype == BYTE_SCALES else top * top * 2.0**-21
    return least <= peak <= 30000.0


def widened(fmt: TensorFormat) -> TensorFormat:
    """The same format with scales and offsets of single precision, whose range is that of any model."""
    return fmt._replace(scale_dtype=SCALE_DTYPES.index("float32"))


def check_room(fmt: TensorFormat, rows: int, slots: int, length: int, count: int) -> None:
    """Raise CapacityError unless `count` tokens after `length` fit into buffers with so many rows and slots.

    rows: of qdata. slots: of the residual.
    """
    # the window always has room for a tile that is not full yet
    room = slots if fmt.is_raw else fmt.sink + rows + fmt.ring - 1
    if length + count > room:
        raise CapacityError.exceeded(count, length, room)


ORDER_ITEMSIZE = 4
POSITION_ITEMSIZE = 4
SCORE_ITEMSIZE = 4
SEEN_ITEMSIZE = 8


def tile_order_itemsize(head_dim: int) -> int:
    """Bytes of one channel's number in the order of a tile."""
    return 1 if head_dim <= 256 else 2


def buffer_nbytes(fmt: TensorFormat, head_dim: int, tiles: int, slots: int, itemsize: int) -> int:
    """Bytes of all buffers for one batch row and one KV head."""
    raw = slots * head_dim * itemsize
    if fmt.is_raw:
        return raw
    (rows, columns), (_, offsets) = scale_grid(fmt, head_dim, tiles), zero_grid(fmt, head_dim, tiles)
    codes = tiles * fmt.tile * row_words(fmt, head_dim) * 2
    codes += tiles * fmt.tile * sum(tier.bits * tier.channels for tier in fmt.apart) // 8
    order = head_dim * ORDER_ITEMSIZE if fmt.order else 0
    if fmt.by_tile:
        order = tiles * head_dim * tile_order_itemsize(head_dim)
        order += head_dim * SEEN_ITEMSIZE if fmt.order == ORDER_TILE else 0
    tier = 0 if fmt.high is None else _high_nbytes(fmt, fmt.high, head_dim, tiles, itemsize)
    return codes + rows * (columns + offsets) * SCALE_ITEMSIZE[fmt.scale_dtype] + raw + order + tier


def high_shape(fmt: TensorFormat, tiles: Any) -> tuple[Any, Any]:
    """Slots of the high tier of a tensor of so many tiles: as tiles and as raw slots of its own format."""
    assert fmt.high is not None
    slots = fmt.high.slots(tiles * fmt.tile)
    return (0, slots) if fmt.high.bits == RAW_BITS else (slots, fmt.high_format.residual_slots)


def _high_nbytes(fmt: TensorFormat, high: HighTier, head_dim: int, tiles: int, itemsize: int) -> int:
    slots = high.slots(tiles * fmt.tile)
    tokens = buffer_nbytes(fmt.high_format, head_dim, *high_shape(fmt, tiles), itemsize)
    scores = (slots + fmt.ring) * SCORE_ITEMSIZE + tiles * fmt.tile if high.scored else 0
    return tokens + slots * POSITION_ITEMSIZE + scores + high.balanced * head_dim * SCORE_ITEMSIZE


def bits_per_packed_element(fmt: TensorFormat, head_dim: int) -> float:
    """Bits of one packed element: its code and its share of scale and offset, and of the order of its tile.

    A high tier that is a share of the tokens is counted with its share, and with what says who is in it. What
    a sequence has once, such as an order of its channels or a high tier of a fixed number, is not in it.
    `head_dim` is asked for groups that span the head, and for positions.
    """
    if fmt.is_raw:
        return float(RAW_BITS)
    codes = float(fmt.bits)
    if len(fmt.tiers) > 1:
        channels = sum(tier.channels for tier in fmt.tiers)
        codes = sum(tier.bits * tier.channels for tier in fmt.tiers) / channels
        if fmt.by_tile:
            codes += 8 * tile_order_itemsize(channels) / fmt.tile
    group = fmt.group_size if fmt.axis == AXIS_CHANNEL else channel_group(fmt, head_dim)
    numbers = 1 if fmt.symmetric else 2
    packed = codes + numbers * 8 * SCALE_ITEMSIZE[fmt.scale_dtype] / group
    if fmt.high is None:
        return packed
    skipped = fmt.high.scored * 8 / head_dim
    return packed + skipped + fmt.high.share / 100 * bits_per_high_element(fmt, head_dim)


def bits_per_high_element(fmt: TensorFormat, head_dim: int) -> float:
    """Bits of one element in the high tier, its share of positions and scores included."""
    assert fmt.high is not None
    beside = POSITION_ITEMSIZE + SCORE_ITEMSIZE * fmt.high.scored
    return bits_per_packed_element(fmt.high_format, head_dim) + 8 * beside / head_dim
