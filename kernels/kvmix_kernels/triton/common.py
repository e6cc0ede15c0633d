"""What every launcher needs: dense inner dimensions, the device, the numeric types."""

from __future__ import annotations

import contextlib
from functools import cache

import torch
import triton.language as tl
from torch import Tensor

from kvmix_kernels.cached import RESIDUAL, Cached
from kvmix_kernels.errors import CacheShapeError, CapacityError
from kvmix_kernels.layout import APART
from kvmix_kernels.triton import ahead
from kvmix_kernels.triton.kernels import fields

PLACES = 1 << 31
"""Of the numbers of one head in a buffer."""

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def model_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a floating dtype."""
    return _TYPES[dtype]


def inner_dense(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def near(x: Tensor) -> Tensor:
    """`inner_dense` of a step's queries or keys: places of its heads and tokens are 32-bit numbers."""
    x = inner_dense(x)
    sizes, steps = x.shape, x.stride()
    return x.contiguous() if max(sizes[1] * steps[1], sizes[2] * steps[2]) >= PLACES else x


def check_places(tokens: int, *head_dims: int) -> None:
    """Raise CapacityError if one head has more numbers than kernels have places for; heads lie anywhere."""
    channels = max(head_dims)
    if tokens * channels >= PLACES:
        raise CapacityError(
            f"{tokens} tokens of {channels} channels are 2**31 numbers or more in one head, whose places are "
            f"32-bit numbers: at most {(PLACES - 1) // channels} tokens fit; set KVMIX_KERNELS=reference before the "
            "import to do without these kernels"
        )


def check_rows(cached: Cached) -> None:
    """Raise if a buffer that is written in place has rows that are not dense."""
    for buffer in cached.tensors:
        if buffer.numel() and (
            buffer.stride(-1) != 1 or (buffer.dim() == 4 and buffer.stride(2) != buffer.shape[3])
        ):
            raise CacheShapeError(
                f"a cache buffer of shape {list(buffer.shape)} has strides {list(buffer.stride())}: its last "
                "two dimensions must be contiguous; allocate it with kvmix_kernels.cached.allocate"
            )


def check_grids(cached: Cached) -> None:
    """Raise if scales and offsets do not lie alike: kernels compute one place for both."""
    scale, zero_point = cached.scale, cached.zero_point
    if cached.format.symmetric:
        return
    strides = zip(scale.shape, scale.stride(), zero_point.stride(), strict=True)
    if any(size > 1 and one != other for size, one, other in strides):
        raise CacheShapeError(
            f"scales have strides {list(scale.stride())} and zero points {list(zero_point.stride())}: they "
            "must be equal; allocate both with kvmix_kernels.cached.allocate"
        )


_NONE = (0, 0) * (1 + len(APART))


def strides(cached: Cached) -> tuple[int, ...]:
    """Of batch and head, as `fields.stored` takes them; scales and offsets have the same."""
    qdata, scale, _, residual = cached.tensors[: RESIDUAL + 1]
    found = (*qdata.stride()[:2], *scale.stride()[:2], *residual.stride()[:2])
    # what a launch costs its host is felt where steps are not recorded; most formats have no more
    if len(cached.tensors) == RESIDUAL + 1:
        return found + _NONE
    for part in (cached.order, *cached.apart):
        found += (0, 0) if part is None else part.stride()[:2]
    return found


def buffers(cached: Cached) -> tuple[Tensor, ...]:
    """The buffers as `fields.stored` takes them: in place of an order or of tiers that are not there, others."""
    first = cached.tensors[: RESIDUAL + 1]
    if len(cached.tensors) == RESIDUAL + 1:
        return first + (cached.residual,) * (len(_NONE) // 2)
    more = (cached.residual if part is None else part for part in (cached.order, *cached.apart))
    return (*first, *more)


def in_pairs(x: Tensor) -> Tensor:
    """`x`, or a copy if its rows do not begin at pairs of numbers, of which kernels read both at once."""
    steps = (step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)
    aligned = ahead.compiling() or x.data_ptr() % (2 * x.element_size()) == 0
    if aligned and not any(step % 2 for step in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU current; nothing on a CPU (the interpreter)."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(x: Tensor) -> int:
    """Multiprocessors of the tensor's GPU; a few in the interpreter, to exercise loops."""
    return _multiprocessors(x.device.index) if x.is_cuda else 3


def portable(x: Tensor) -> bool:
    """Whether to do without PTX: in the interpreter and on GPUs that are not NVIDIA's."""
    return fields.INTERPRET or not x.is_cuda or torch.version.hip is not None


@cache
def _capability(index: int | None) -> int:
    return torch.cuda.get_device_capability(index)[0]


def starts_early(x: Tensor) -> bool:
    """Whether a kernel can be started before the one ahead of it ends (programmatic dependent launch)."""
    return not portable(x) and _capability(x.device.index) >= 9
