"""Input factories and tolerances shared by tests and benchmarks."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvmix_kernels import layout
from kvmix_kernels.cached import Cached
from kvmix_kernels.layout import TensorFormat

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


def formats(head_dim: int, bits: tuple[int, ...] = layout.BITS) -> st.SearchStrategy[TensorFormat]:
    """Formats legal for heads of `head_dim` channels, with windows and sinks of odd lengths."""

    @st.composite
    def draw_format(draw: st.DrawFn) -> TensorFormat:
        axis = draw(st.sampled_from(("channel", "token")))
        if axis == "channel":
            group = draw(st.sampled_from((1, 8, 16, 32)))
            tile = group * draw(st.integers(1, 3))
        else:
            sizes = [g for g in range(16, head_dim + 1, 16) if head_dim % g == 0]
            group = draw(st.sampled_from((*sizes, layout.WHOLE_HEAD)))
            tile = draw(st.sampled_from((1, 7, 32)))
        return layout.make_format(
            draw(st.sampled_from(bits)),
            axis,
            group,
            tile,
            draw(st.sampled_from((0, 1, 4))),
            draw(st.sampled_from((0, 1, 5, 32))),
            draw(st.sampled_from(layout.SCALE_DTYPES)),
        )

    return draw_format()


def poison(cached: Cached) -> Cached:
    """The same shapes filled with what must never be read: 0xAA codes and NaN."""
    # 0xAAAA as int16
    return cached.map(lambda b: torch.full_like(b, float("nan") if b.is_floating_point() else -21846))


def error_budget(low: Tensor, exact: Tensor, factor: float = 3.0) -> float:
    """Allowed absolute error: a small multiple of what `low` loses against the float64 `exact`.

    low: the same computation by a trusted implementation in the precision under test.
    """
    lost = (low.double() - exact.double()).abs().max().item()
    return factor * lost + 1e-7 * (1 + exact.abs().max().item())
