"""How one attention launch is cut, as arithmetic on plain numbers: no tensor, no device, no Triton.

`attend_plan` chooses the path of the packed tokens, the columns, the shares of the tokens and the scratch that
they need. `attention.attend` checks its arguments, asks for a plan and launches.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from kvmix_kernels import layout
from kvmix_kernels.layout import AXIS_CHANNEL, AXIS_TOKEN, TensorFormat
from kvmix_kernels.triton import configs
from kvmix_kernels.triton.configs import AttendConfig, Gpu
from kvmix_kernels.triton.kernels.forms import ORDERED, ROTATED, TILED, Form

MIN_DOT = layout.FIELD_CHANNELS
"""Smallest inner dimension of a half-precision dot."""
MAX_GROUPS = 8
"""Most scales of a token that the bulk reads."""

MAX_BULK_COLUMNS = 16
"""Query rows of one program over bulk tokens; more take several, which share what L2 holds."""
MAX_COLUMNS = 64
"""Query rows of one program of the general path, and most that the bulk is read for: beyond, nothing is gained."""
UNGROUPED = 128
"""Of keys with scales per token: the group whose parameters they take, and most tokens that shares are counted in."""
PER_WARP = 64 * 128
"""Numbers of keys with scales per token that a warp has in a step: more spill, as scales of rows are held, too."""
MIN_PART, MAX_PART = 16, 32
"""Groups whose offsets are multiplied with queries at a time: rows of a dot, and what a warp's registers hold for 128 channels."""
FEW_SPLITS, LEAST_MERGED, MERGING = 16, 32, 264
"""Shares of a row that one warp adds up; fewest channels of several that share many; most programs that do."""
MERGED_AT_ONCE = 32 * 128
"""Numbers of partial outputs that the registers of the warp hold which merges a row."""
SHARED_BESIDE = 2048
"""Bytes of shared memory that a program has beside tokens."""
REST_SHARE, LEAST_REST_SHARE = 128, 32
"""Tokens outside the bulk that one program takes: no more, if it can be, and fewer where there are programs enough."""


class Step(NamedTuple):
    """What is asked for.

    heads: KV heads of all sequences; rows: query rows of one; D, Dv: channels of keys and values; length: tokens
    cached, or the capacity; new: the step's own; positive: whether larger products are larger scores; half:
    whether the query is in half precision; alike: whether all raw tokens are in the query's dtype.
    """

    heads: int
    rows: int
    D: int
    Dv: int
    length: int
    new: int
    positive: bool
    half: bool
    alike: bool


class AttendPlan(NamedTuple):
    """One launch of `attend_kernel` and one of `combine_kernel`.

    keys, values: how they are stored; columns, column_blocks: query rows of a program, and programs that share
    a head's; unit: tokens that its shares are counted in; tokens, spread, stages: of a step of the bulk, and how many groups it takes beside each other;
    bulk_splits, splits: shares of a head's tokens, those of the bulk and all; part, room: offsets that are
    made at a time, and that a share has room for; scratch: rows of as many numbers as columns that a share has,
    of offsets and then of queries in order; v_align: what rows of values begin at multiples of; rest_*: of
    the other tokens; warps, registers: of `attend_kernel`; merge_*: of `combine_kernel`.
    """

    keys: Form
    values: Form
    bulk: bool
    columns: int
    column_blocks: int
    unit: int
    tokens: int
    spread: int
    stages: int
    bulk_splits: int
    splits: int
    part: int
    room: int
    scratch: int
    v_align: int
    exact_half: bool
    rest_packed: bool
    rest_half: bool
    rest_tokens: int
    rest_stages: int
    warps: int
    registers: int
    merge_splits: int
    merge_chunk: int
    merge_rotated: bool
    merge_parts: int


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n (and at least 1)."""
    return 1 << max(0, n - 1).bit_length()


def has_bulk_path(key_format: TensorFormat, value_format: TensorFormat, D: int, Dv: int, rows: int) -> bool:
    """Whether packed tokens of these formats can take the fast path for `rows` query rows.

    Keys have one scale per channel, or scales per token for whole fields; values have scales per token.
    """
    k, v = key_format, value_format
    if k.is_raw or v.is_raw or v.axis != AXIS_TOKEN or rows > MAX_COLUMNS:
        return False
    if k.axis == AXIS_TOKEN and (k.rotation or not _groups_are_fields(k, D)):
        return False
    unit = bulk_unit(k)
    return unit >= MIN_DOT and unit & (unit - 1) == 0 and Dv // layout.channel_group(v, Dv) <= MAX_GROUPS


def bulk_unit(keys: TensorFormat) -> int:
    """Tokens that shares of the bulk are counted in: whole groups of keys, or parts of a tile."""
    return keys.group_size if keys.axis == AXIS_CHANNEL else min(UNGROUPED, keys.tile & -keys.tile)


def tuned_group(keys: TensorFormat) -> int:
    """The group of keys by which parameters of the bulk are found."""
    return keys.group_size if keys.axis == AXIS_CHANNEL else UNGROUPED


def _groups_are_fields(fmt: TensorFormat, head_dim: int) -> bool:
    """Whether the groups of a token's channels are few, and whole fields of each digit (`fields.field`)."""
    group = layout.channel_group(fmt, head_dim)
    widths = [digit.bits for digit in layout.digits(fmt.code)]
    fields = (layout.fold_copies(n, head_dim) * layout.plane_words(n, head_dim)[0] for n in widths)
    return head_dim // group <= MAX_GROUPS and all(group % channels == 0 for channels in fields)


@lru_cache(256)
def form_plan(fmt: TensorFormat, head_dim: int) -> Form:
    """How a tensor's tokens are to be read. Kept: every layer asks."""
    group = 1
    if not fmt.is_raw:
        group = layout.channel_group(fmt, head_dim) if fmt.axis == AXIS_TOKEN else fmt.group_size
    padded = max(16, next_power_of_2(head_dim))
    turned = ROTATED if fmt.rotation else TILED if fmt.by_tile else ORDERED if fmt.order else 0
    return Form(
        fmt.code, fmt.axis, group, head_dim, layout.plane_block(fmt), padded, *fmt.channels(head_dim),
        bool(fmt.symmetric), turned, fmt.apart_channels, *fmt.apart_counts,
    )  # fmt: skip


@lru_cache(256)
def attend_plan(
    key_format: TensorFormat,
    value_format: TensorFormat,
    step: Step,
    gpu: Gpu,
    config: AttendConfig | None = None,
) -> AttendPlan:
    """The plan of one launch; `config` overrides the parameters of `gpu`. Kept: every layer asks."""
    k, v = key_format, value_format
    keys, values = form_plan(k, step.D), form_plan(v, step.Dv)
    bulk = step.positive and has_bulk_path(k, v, step.D, step.Dv, step.rows)
    N = max(8, min(MAX_BULK_COLUMNS if bulk else MAX_COLUMNS, next_power_of_2(step.rows)))
    column_blocks = -(-step.rows // N)
    unit = bulk_unit(k) if bulk else keys.GROUP
    if config is None:
        group = tuned_group(k) if bulk else keys.GROUP
        config = configs.attend_config(gpu, k, v, step.D, group, N, bulk, step.heads)

    tokens = min(tuned_group(k), config.tokens)
    if k.axis == AXIS_TOKEN:
        tokens = min(tokens, max(MIN_DOT, PER_WARP // keys.DP * config.warps))
    # columns that rows do not need take other groups of keys
    spread = 1
    if bulk and column_blocks == 1 and k.axis == AXIS_CHANNEL and keys.TURNED != TILED:
        spread = max(1, min(N // next_power_of_2(step.rows), config.tokens // unit, config.spread))

    # shares: fixed by the capacity, filled evenly by however many tokens are alive
    heads = step.heads * column_blocks
    bulk_splits, part, room = 0, MIN_PART, 0
    outside = step.length + step.new
    same = (k.tile, k.sink, k.window) == (v.tile, v.sink, v.window)
    groups = _bulk_groups(k, v, step.length, unit) if bulk else 0
    bulk = groups > 0
    if bulk:
        fitting = min(groups, config.programs // heads, config.max_splits)
        bulk_splits = max(1, fitting, -(-groups * unit // (config.max_groups * tuned_group(k))))
        # of a share, which has room for the offsets of as many groups
        share = -(-groups // bulk_splits)
        # scales of a byte take registers where they become numbers
        largest = MIN_PART if k.scale_dtype == layout.BYTE_SCALES else MAX_PART
        most = largest * config.warps * 128 // next_power_of_2(max(128, step.D))
        part = max(MIN_PART, min(next_power_of_2(share), most))
        room = -(-share // part) * part
        # at no length are more tokens outside: sink, window, a tile not yet full, and where keys and
        # values differ the edges of groups
        apart = 0 if same else 2 * unit
        waiting = max(k.window + k.tile, v.window + v.tile)
        outside = min(outside, max(k.sink, v.sink) + waiting + apart + step.new)
    rest_packed = not (k.is_raw and v.is_raw) and not (bulk and same)
    if bulk:
        rest_splits = shares_of_rest(outside, heads, config.programs)
    else:
        rest_splits = max(1, min(-(-outside // REST_SHARE), config.programs // heads))
    splits = bulk_splits + rest_splits

    # the tuned parameters are those of half-precision tiles of raw tokens with heads of up to 128 channels
    rest_half = step.half and step.alike and not rest_packed
    rest_tokens, rest_stages = config.rest_tokens, config.rest_stages
    if not rest_half:
        rest_tokens, rest_stages = min(rest_tokens, 32), 1
    rest_tokens = max(16, min(rest_tokens, 64 * 128 // max(keys.DP, values.DP)))
    row = (keys.DP + values.DP) * (2 if rest_half else 4)
    while gpu.shared and (rest_stages + 2) * rest_tokens * row + SHARED_BESIDE > gpu.shared:
        # found by compiling: no GPU that a file is of has so little
        if rest_stages > 1:
            rest_stages -= 1
        elif rest_tokens > 16:
            rest_tokens //= 2
        else:
            break

    merge_parts = 1
    if splits > FEW_SPLITS and not (bulk and v.rotation):
        # few rows leave most of a GPU idle while one warp each adds up many shares
        merge_parts = max(1, min(values.DP // LEAST_MERGED, MERGING // (step.heads * step.rows)))
        merge_parts = next_power_of_2(merge_parts + 1) // 2

    return AttendPlan(
        keys=keys,
        values=values,
        bulk=bulk,
        columns=N,
        column_blocks=column_blocks,
        unit=unit,
        tokens=tokens * spread if bulk else 16,
        spread=spread,
        stages=config.stages,
        bulk_splits=bulk_splits,
        splits=splits,
        part=part,
        room=room,
        scratch=room + (step.D if bulk and keys.TURNED == ORDERED else 0),
        # of tiles of any number of tokens heads begin anywhere
        v_align=math.gcd(unit, k.sink - v.sink, v.tile if v.tile % 4 else 0),
        exact_half=step.half and layout.SCALE_DTYPES[k.scale_dtype] != "float32",
        rest_packed=rest_packed,
        rest_half=rest_half,
        rest_tokens=rest_tokens,
        rest_stages=rest_stages,
        warps=config.warps,
        registers=config.registers,
        merge_splits=next_power_of_2(splits),
        merge_chunk=merge_chunk(splits, values.DP // merge_parts),
        merge_rotated=bulk and bool(v.rotation),
        merge_parts=merge_parts,
    )


def merge_chunk(splits: int, channels: int) -> int:
    """Partial outputs of a row that are added up at a time; of few, more at a time is wasted work."""
    most = max(1, MERGED_AT_ONCE // channels)
    return min(next_power_of_2(splits), 8 if splits <= FEW_SPLITS else most, most)


def shares_of_rest(outside: int, heads: int, programs: int) -> int:
    """Programs for a head's tokens outside the bulk, of `programs` that the launch should have.

    They run after those of the bulk, or beside them where a GPU has room. One that reads many tokens, one step
    after another, is what a launch of few programs waits for.
    """
    room = 2 * programs // (3 * heads)
    return max(-(-outside // REST_SHARE), min(-(-outside // LEAST_REST_SHARE), room))


def _bulk_groups(k: TensorFormat, v: TensorFormat, length: int, group: int) -> int:
    """Whole groups of keys whose values are packed, too."""
    return max(0, min(k.packed_end(length), v.packed_end(length)) - max(k.sink, v.sink)) // group
