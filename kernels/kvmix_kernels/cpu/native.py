"""The C kernel behind decode attention on CPUs: compiled once by the system's compiler, called by ctypes.

torch.compile needs a compiler for CPUs anyhow. The library is kept in the user's cache directory under a
name that depends on all it was made from. OpenMP is not linked but found in the process, so that the kernel
runs on the threads that torch has.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.cached import Cached
from kvmix_kernels.errors import KernelMemoryError
from kvmix_kernels.folders import cache_folder
from kvmix_kernels.layout import APART, AXIS_CHANNEL, BYTE_SCALES, TIER_BITS, TIER_CHANNELS, TensorFormat
from kvmix_kernels.reference.storage import runs

SOURCE = Path(__file__).with_name("attend.c")
FLAGS = ("-x", "c", "-std=gnu11", "-O3", "-march=native", "-fopenmp-simd", "-fPIC", "-shared")
FLAGS += ("-fno-math-errno", "-fno-trapping-math")
COMPILERS = ("gcc", "cc", "g++", "clang")
"""Tried in this order where the environment names none, in CC or CXX, that exists."""

# as in attend.c
MAX_ROWS = 32
MAX_HEAD_DIM = 256
_LANES = 16
_FIELDS = 16
_MAX_DIGITS = 2
_DIGIT = _FIELDS + 9
_RUNS = 6
_ENDLESS = 1 << 62
_RESIDUAL, _PACKED, _FRESH = range(3)
_FLOATS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_MASKS = {**_FLOATS, torch.bool: 3}
_CODES = {torch.int16: 4}
_BYTES = {torch.uint8: 5}
_QUARTERS = {torch.int8: 6}
_ORDERS = {**_CODES, **_BYTES, torch.int32: 7}
_APART = {torch.bfloat16: 1}
_CALL = struct.Struct("=13q2d7q")
_TENSORS = struct.Struct(f"={5 * (6 + len(APART))}q")
_NO_MEMORY = 1

Kernel = Callable[[bytes], int]
Described = tuple[int, int, int, int, int]
"""The kernel's `Tensor`: address, strides of batch, head, token, dtype."""
_NONE: Described = (0, 0, 0, 0, 0)


def attend(
    query: Tensor,
    new_keys: Tensor | None,
    new_values: Tensor | None,
    keys: Cached,
    values: Cached,
    mask: Tensor | None,
    length: int,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor | None:
    """`kvmix_kernels.reference.attention.attend`: same arguments, equal up to rounding.

    `sums`, float32 [B, Hq, Lq, 2], gets the best score of each query and the sum of weights against it; the
    output then stays float32.

    Its scratch does not grow with the tokens.

    Returns:
        None if the kernel does not take these arguments, or if there is no kernel.
    """
    B, Hq, Lq, D = query.shape
    Hkv, Dv = keys.residual.shape[1], values.residual.shape[3]
    group = Hq // Hkv if Hkv else 0
    new = 0 if new_keys is None else new_keys.shape[2]
    fits = 0 < group * Lq <= MAX_ROWS and group * Hkv == Hq and B > 0 and length >= 0
    fits = fits and values.format.sums_packed
    if not fits or (new_keys is None) != (new_values is None):
        return None
    sinks = None if sink_logits is None else sink_logits.float().contiguous()
    if sinks is not None and sinks.shape != (Hq,):
        return None
    q = _describe(query, (B, Hq, Lq, D), _FLOATS)
    m = _NONE if mask is None else _describe_mask(mask, (B, Hq, Lq, length + new))
    k = _describe_cache(keys, new_keys, length, (B, Hkv, new, D))
    v = _describe_cache(values, new_values, length, (B, Hkv, new, Dv))
    if q is None or m is None or k is None or v is None:
        return None
    function = kernel()
    if function is None:
        return None
    out = torch.empty(B, Hq, Lq, Dv)
    origin = 0 if keys.format.is_raw else keys.format.sink
    threads = torch.get_num_threads()
    sizes = B, Hkv, group, Lq, length + new, origin, threads
    places = (out.data_ptr(), *(0 if x is None else x.data_ptr() for x in (sums, sinks)))
    call = _CALL.pack(*q, *m, *places, scale, softcap, *sizes)
    failed = function(call + k + v)
    if failed == _NO_MEMORY:
        raise KernelMemoryError("no memory for partial results of attention: use a smaller batch")
    return None if failed else out if sums is not None else out.to(query.dtype)


def _describe(
    x: Tensor, shape: tuple[int, int, int, int], dtypes: dict[torch.dtype, int]
) -> Described | None:
    """A tensor with at least the tokens of `shape`; None if the kernel cannot read it."""
    dtype = dtypes.get(x.dtype)
    B, H, tokens, D = shape
    if dtype is None or x.dim() != 4:
        return None
    b, h, n, d = x.shape
    batch, head, token, channel = x.stride()
    if b != B or h != H or n < tokens or d != D or (channel != 1 and d > 1):
        return None
    return x.data_ptr(), batch, head, token, dtype


def _describe_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> Described | None:
    """A mask that broadcasts to [B, Hq, Lq, S] and may be longer."""
    if mask.dim() == 0 or mask.shape[-1] < shape[3]:
        return None
    return _describe(mask.expand(*shape[:3], -1), (*shape[:3], mask.shape[-1]), _MASKS)


def _describe_cache(
    cached: Cached, new: Tensor | None, length: int, shape: tuple[int, int, int, int]
) -> bytes | None:
    """The kernel's `Cached`, for `length` stored tokens and new ones of `shape`, [B, Hkv, Ln, D]."""
    B, H, Ln, D = shape
    placed = _place(cached.format, length, Ln, D)
    if placed is None:
        return None
    fmt = cached.format
    codes = step = zero_point = order = _NONE
    apart = [_NONE] * len(APART)
    if placed.rows:
        scales, offsets = (_BYTES, _QUARTERS) if fmt.scale_dtype == BYTE_SCALES else (_FLOATS, _FLOATS)
        codes = _describe(cached.qdata, (B, H, placed.rows, placed.words), _CODES)
        step = _describe(cached.scale, (B, H, *placed.grid), scales)
        if codes is None or step is None or codes[3] != placed.words or step[3] != placed.grid[1]:
            return None
        if not fmt.symmetric:
            found = _describe(cached.zero_point, (B, H, *placed.grid), offsets)
            if found is None or found[3] != placed.grid[1]:
                return None
            zero_point = found
        if cached.order is not None:
            found = None
            if cached.order.dim() == 3 + fmt.by_tile:
                orders = cached.order if fmt.by_tile else cached.order.unsqueeze(2)
                found = _describe(orders, (B, H, placed.orders, D), _ORDERS)
            if found is None:
                return None
            order = found
        for i, (count, part) in enumerate(zip(fmt.apart_counts, cached.apart, strict=True)):
            if part is not None:
                found = _describe(part, (B, H, placed.rows, count), _APART)
                if found is None:
                    return None
                apart[i] = found
    residual = _describe(cached.residual, (B, H, placed.slots, D), _FLOATS)
    fresh = _NONE if new is None else _describe(new, shape, _FLOATS)
    if residual is None or fresh is None:
        return None
    return (
        _TENSORS.pack(*codes, *step, *zero_point, *residual, *fresh, *order, *itertools.chain(*apart))
        + placed.rest
    )


class _Placed(NamedTuple):
    """What buffers must hold, and the rest of the kernel's `Cached`."""

    rows: int
    words: int
    grid: tuple[int, int]
    orders: int
    slots: int
    rest: bytes


@functools.lru_cache(256)
def _place(fmt: TensorFormat, length: int, new: int, head_dim: int) -> _Placed | None:
    """Where positions 0..length + new - 1 lie; None for formats that the kernel does not take.

    Kept, as the layers of a step ask for the same.
    """
    if head_dim % _LANES or not 0 < head_dim <= MAX_HEAD_DIM:
        return None
    group = words = block = rotated = center = count = 0
    digits = [0] * (_DIGIT * _MAX_DIGITS)
    if not fmt.is_raw:
        by_channel = fmt.axis == AXIS_CHANNEL
        group = fmt.group_size if by_channel else layout.channel_group(fmt, head_dim)
        # formats come as plain integers, which nobody need have checked
        whole = group > 0 and not (fmt.tile % group if by_channel else head_dim % group or group % _LANES)
        if not whole or not _add_up(fmt, head_dim):
            return None
        kept, above = fmt.channels(head_dim)
        planes = layout.plane_words(fmt.code, kept, above)
        words = sum(planes)
        block = layout.plane_block(fmt) if len(planes) > 1 else _ENDLESS
        rotated = layout.hadamard_block(head_dim) if fmt.rotation else 0
        center = 1 - 2**fmt.bits if fmt.symmetric else 0
        described = [
            _digit(digit, above if digit.above else kept, sum(planes[: digit.first]))
            for digit in layout.digits(fmt.code)
        ]
        count = len(described)
        if count > _MAX_DIGITS:
            return None
        digits[: count * _DIGIT] = itertools.chain(*described)
    sink, end, tiles = min(length, fmt.sink), fmt.packed_end(length), fmt.packed_tiles(length)
    parts = [(_RESIDUAL, *run) for run in runs(0, length if fmt.is_raw else sink, fmt)]
    if tiles:
        parts.append((_PACKED, sink, end, 0))
    if not fmt.is_raw:
        parts += [(_RESIDUAL, *run) for run in runs(end, length, fmt)]
    if new:
        parts.append((_FRESH, length, length + new, 0))
    if len(parts) > _RUNS:
        return None
    orders = tiles if fmt.by_tile else 1
    numbers = [head_dim, int(fmt.axis == AXIS_CHANNEL), group]
    numbers += [fmt.tile if fmt.by_tile else 0, orders, *fmt.apart_counts, rotated, center, block]
    numbers += [count, *digits, len(parts)]
    for part in parts:
        numbers += part
    numbers += [0] * (4 * (_RUNS - len(parts)))
    return _Placed(
        rows=tiles * fmt.tile,
        words=words,
        grid=layout.scale_grid(fmt, head_dim, tiles),
        orders=orders,
        slots=max((p[3] + p[2] - p[1] for p in parts if p[0] == _RESIDUAL), default=0),
        rest=struct.pack(f"={len(numbers)}q", *numbers),
    )


def _add_up(fmt: TensorFormat, head_dim: int) -> bool:
    """Whether the tiers of a format, if it has several, are what heads of this size can have."""
    if len(fmt.tiers) == 1:
        return True
    given = [tier.bits for tier in fmt.tiers]
    counts = [tier.channels for tier in fmt.tiers]
    return (
        given[0] == TIER_BITS[0]
        and given == [bits for bits in TIER_BITS if bits in given]
        and all(count > 0 and count % TIER_CHANNELS == 0 for count in counts)
        and sum(counts) == head_dim
        and fmt.axis == AXIS_CHANNEL
    )


def _digit(digit: layout.Digit, channels: int, before: int) -> list[int]:
    """The kernel's `Digit`: which words it unpacks, and from what.

    `before`: words of a token in the planes of the digits below it.

    These are the words stored, or for a digit that is cut whole columns: the narrow piece lowest, then the
    high bits of the code that was cut, which makes it whole, then the codes of the wide piece.
    """
    planes, fields = layout.plane_words(digit.bits, channels), layout.bit_fields(digit.bits, channels)
    if layout.is_cut(digit.bits):
        copies = layout.fold_copies(digit.bits, channels)
        cut = layout.cut_column(copies)
        words, mask = copies * planes[0], (1 << digit.bits) - 1
        wide = (f for f in fields if f.plane == 0 and f.position < cut.wide)
        whole = (f.position for f in wide if f.count == digit.bits)
        lower = (f.position for f in fields if f.plane == 1 and f.position < cut.narrow)
        masks = [mask << cut.narrow + cut.high + p for p in whole]
        masks += [mask << p for p in lower]
        rest = [*planes, before, digit.above, cut.wide, cut.narrow, cut.high]
    else:
        words = planes[0]
        masks = [(1 << f.count) - 1 << f.position for f in fields]
        rest = [words, 0, before, digit.above, 0, 0, 0]
    return [words, *masks, *[0] * (_FIELDS - len(masks)), *rest, channels]


_compiling = threading.Lock()
_kernels: list[Kernel | None] = []


def kernel() -> Kernel | None:
    """The function `kvmix_attend`, compiled if need be; None, after one warning, if that is not possible."""
    if not _kernels:
        with _compiling:
            if not _kernels:
                _kernels.append(_load())
    return _kernels[0]


def _load() -> Kernel | None:
    if not sys.platform.startswith("linux") or sys.byteorder != "little":
        return None
    try:
        with _own(build()) as library:
            function = ctypes.CDLL(library).kvmix_attend
    except (OSError, AttributeError, subprocess.SubprocessError) as failure:
        said = getattr(failure, "stderr", None) or failure
        warnings.warn(
            f"no compiled kernel for packed caches on CPU, slower PyTorch ops instead: {said}. "
            "Install gcc, or name a C compiler in CC, and let KVMIX_CACHE_DIR be a directory of your own",
            stacklevel=2,
        )
        return None
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    return function


def build() -> Path:
    """The library, from the cache or compiled now.

    Raises:
        OSError: no compiler was found, or the cache cannot be written.
        subprocess.SubprocessError: the compiler failed.
    """
    command = _compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, timeout=60)
    made_from = (SOURCE.read_text(), *FLAGS, *command, version.stdout, _processor())
    digest = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:16]
    folder = cache_folder()
    library = folder / f"attend-{digest}.so"
    try:
        with _own(library):
            return library
    except OSError:
        # not there, or not ours: in a directory that others can write into it could be anything
        folder.mkdir(parents=True, exist_ok=True)
        # other processes may be doing the same: each has its own file until it is whole
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / library.name
            subprocess.run(
                [*command, *FLAGS, "-o", str(made), str(SOURCE)],
                capture_output=True,
                text=True,
                check=True,
                timeout=300,
            )
            made.chmod(0o755)
            made.replace(library)
    return library


@contextlib.contextmanager
def _own(library: Path) -> Iterator[str]:
    """A path by which a library can be loaded that nobody else wrote, or can write or exchange meanwhile.

    Raises:
        OSError: it is missing, or belongs to another user than this one or root, or others may write it.
    """
    descriptor = os.open(library, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        found = os.fstat(descriptor)
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
            raise PermissionError(f"{library} belongs to another user, or others may write it")
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _compiler() -> list[str]:
    for named in (os.environ.get("CC"), os.environ.get("CXX"), *COMPILERS):
        command = shlex.split(named or "")
        if command and shutil.which(command[0]):
            return command
    raise FileNotFoundError("no C compiler found")


def _processor() -> str:
    """What -march=native depends on: home directories are shared between machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    kept = ("vendor_id", "cpu family", "model", "flags", "features", "cpu part", "isa")
    return "\n".join(dict.fromkeys([platform.machine(), *(s for s in lines if s.lower().startswith(kept))]))
