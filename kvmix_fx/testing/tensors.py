"""Input factories and tolerances shared by tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.cached import Cached
from kvmix_kernels.layout import TensorFormat
from kvmix_kernels.reference.scales import load_scale, load_zero

FAMILIES = ("normal", "outlier channels", "constant", "huge", "tiny", "offset", "signed zeros")


def values(family: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor [B, H, L, D] of one family of values.

    "huge" spans what a float16 scale still holds; "offset" is a small signal on a large mean.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if family == "outlier channels":
        x[..., :: max(1, shape[-1] // 3)] *= 50
    elif family == "constant":
        x = x[..., :1, :1].expand(shape).clone()
    elif family == "huge":
        x = (x * 1e4).clamp(-3e4, 3e4)
    elif family == "tiny":
        x *= 1e-6
    elif family == "offset":
        x = x * 0.1 + 100
    elif family == "signed zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    return x.to(dtype)


def formats(
    head_dim: int, bits: tuple[int, ...] = layout.BITS, plain: bool = False, keys: bool = True
) -> st.SearchStrategy[TensorFormat]:
    """Formats legal for heads of `head_dim` channels, with windows and sinks of odd lengths.

    `plain`: without tiers, rotation, symmetric codes, narrowed ranges and scales of a byte. `keys`: whether
    with what kernels take of keys alone: orders of tiles, and channels apart.
    """

    @st.composite
    def draw_format(draw: st.DrawFn) -> TensorFormat:
        width = draw(st.sampled_from(bits))
        axis = draw(st.sampled_from(("channel", "token")))
        if axis == "channel":
            group = draw(st.sampled_from((1, 8, 16, 32)))
            tile = group * draw(st.integers(1, 3))
        else:
            sizes = [g for g in range(16, head_dim + 1, 16) if head_dim % g == 0]
            group = draw(st.sampled_from((*sizes, layout.WHOLE_HEAD)))
            tile = draw(st.sampled_from((1, 7, 32)))
        more: dict[str, Any] = {"bits": width}
        if not plain and width != layout.RAW_BITS and draw(st.booleans()):
            more |= draw(extras(head_dim, axis, 4 in bits, keys))
        return layout.make_format(
            axis=axis,
            group_size=group,
            tile=tile,
            sink=draw(st.sampled_from((0, 1, 4))),
            window=draw(st.sampled_from((0, 1, 5, 32))),
            scale_dtype=draw(st.sampled_from(layout.FLOAT_SCALES if plain else layout.SCALE_DTYPES)),
            **more,
        )

    return draw_format()


def extras(
    head_dim: int, axis: str, tiers: bool = True, keys: bool = True
) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of `make_format` that few formats have: rotation, symmetric codes, tiers, narrow ranges."""
    span = st.sampled_from((None, 80))
    if axis == "token":
        return st.fixed_dictionaries({"rotation": st.just(True), "symmetric": st.booleans(), "span": span})
    if not tiers:
        return st.fixed_dictionaries({"span": span})
    counts = st.sampled_from([t for t in tier_counts(head_dim) if keys or t[0][0] not in layout.APART])
    order = st.sampled_from(("prompt", *(("tile", "tile_keys") if keys else ())))
    return st.fixed_dictionaries({"bits": st.just(4), "tiers": counts, "order": order, "span": span})


def tier_counts(head_dim: int) -> list[tuple[tuple[int, int], ...]]:
    """Tiers for a head: a quarter or half of it at 4 bits, with or without dropped ones and ones apart."""
    found: list[tuple[tuple[int, int], ...]] = []
    for high in {8, head_dim // 4 // 8 * 8, head_dim // 2 // 8 * 8} - {0}:
        found.append(((4, high), (2, head_dim - high)))
        if head_dim - high > 8:
            found += [((4, high), (2, head_dim - high - 8), (0, 8)), ((4, high), (0, head_dim - high))]
            found += [((bits, 8), (4, high), (2, head_dim - high - 8)) for bits in layout.APART]
    return found


def poison(cached: Cached) -> Cached:
    """The same shapes filled with what must never be read: 0xAA bytes and NaN.

    What a sequence has once stays, for it is read: an order of its channels, sums over its queries.
    """
    # 0xAA in each byte
    integers = {torch.int16: -21846, torch.uint8: 0xAA, torch.int8: -86}

    def poisoned(name: str, b: Tensor) -> Tensor:
        if name == "seen" or (name == "order" and not cached.format.by_tile):
            return b.clone()
        return torch.full_like(b, integers.get(b.dtype, float("nan")))

    named = zip(cached.format.buffer_names, cached.tensors, strict=True)
    return cached._replace(tensors=tuple(poisoned(name, buffer) for name, buffer in named))


def error_budget(low: Tensor, exact: Tensor, factor: float = 3.0) -> float:
    """Allowed absolute error: a small multiple of what `low` loses against the float64 `exact`.

    low: the same computation by a trusted implementation in the precision under test.
    """
    lost = (low.double() - exact.double()).abs().max().item()
    return factor * lost + 1e-7 * (1 + exact.abs().max().item())


def split_sums_lose(query: Tensor, keys: Cached, stored: Cached, scale: float, exact: Tensor) -> float:
    """What float32 loses in attention that sums offsets apart from what they may cancel."""

    def largest(cached: Cached) -> float:
        step = load_scale(cached.scale, cached.format, torch.float64)
        grids = (step * (2**cached.format.bits - 1), load_zero(step, cached.zero_point, cached.format))
        most = sum(float(g.nan_to_num(0.0).abs().amax()) for g in grids if g.numel())
        # turned back, the errors of all channels may add up in one
        return most * layout.hadamard_block(cached.head_dim) ** 0.5 if cached.format.rotation else most

    of_scores = largest(keys) * float(query.double().abs().sum(-1).max()) * scale
    return 2**-22 * (of_scores * float(exact.abs().max()) + largest(stored))
