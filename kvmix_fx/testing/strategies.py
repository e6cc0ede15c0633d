"""Hypothesis strategies for plans and their parts. Every drawn plan is legal for its head size."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from kvmix_fx.plan import KVPlan, LayerPlan, ModelGeometry, QuantSpec, WindowRule
from kvmix_fx.plan.schema import Axis, GroupSize, ScaleDtype
from kvmix_kernels import layout

HEAD_SIZES = (16, 32, 48, 64, 80, 96, 128, 256)


def geometries(max_layers: int = 6) -> st.SearchStrategy[ModelGeometry]:
    """Sizes of small models, with head sizes that can be packed."""
    return st.builds(
        ModelGeometry,
        num_layers=st.integers(1, max_layers),
        num_kv_heads=st.integers(1, 8),
        head_dim=st.sampled_from(HEAD_SIZES),
    )


@st.composite
def quant_specs(draw: st.DrawFn, head_dim: int = 128, bits: tuple[int, ...] = layout.BITS) -> QuantSpec:
    """Specs of one tensor, legal for heads of `head_dim` channels.

    Args:
        draw: given by hypothesis.
        head_dim: channels of the heads the spec is for.
        bits: widths to choose from.
    """
    along_tokens = st.sampled_from((16, 32, 64, 128)) | st.integers(1, 64)
    scale_dtype: ScaleDtype = draw(st.sampled_from(layout.FLOAT_SCALES))
    along_head = [size for size in range(16, head_dim + 1, 16) if head_dim % size == 0]
    axis: Axis = draw(st.sampled_from(("channel", "token")))
    group_size: GroupSize = draw(
        along_tokens if axis == "channel" else st.sampled_from((*along_head, "head"))
    )
    return QuantSpec(draw(st.sampled_from(bits)), axis, group_size, scale_dtype)


@st.composite
def layer_plans(draw: st.DrawFn, head_dim: int = 128, bits: tuple[int, ...] = layout.BITS) -> LayerPlan:
    """Plans of one layer, legal for heads of `head_dim` channels; tiles given and left to the default."""
    key, value = draw(quant_specs(head_dim, bits)), draw(quant_specs(head_dim, bits))
    group = math.lcm(key.tokens_per_group, value.tokens_per_group)
    return LayerPlan(
        key,
        value,
        WindowRule(length=draw(st.integers(0, 200))),
        sink_length=draw(st.integers(0, 40)),
        tile=draw(st.none() | st.integers(1, 4).map(group.__mul__)),
    )


@st.composite
def plans(
    draw: st.DrawFn, geometry: ModelGeometry | None = None, bits: tuple[int, ...] = layout.BITS
) -> KVPlan:
    """Plans of small models, with their geometry and some provenance.

    Args:
        draw: given by hypothesis.
        geometry: the model's sizes; None draws them.
        bits: widths to choose from.
    """
    geometry = geometry or draw(geometries())
    layers = draw(
        st.lists(
            layer_plans(geometry.head_dim, bits), min_size=geometry.num_layers, max_size=geometry.num_layers
        )
    )
    facts = st.dictionaries(
        st.text(max_size=8), st.integers() | st.text(max_size=8) | st.lists(st.booleans())
    )
    return KVPlan(
        tuple(layers),
        geometry,
        draw(facts),
        name=draw(st.text(max_size=12)),
        base_model=draw(st.none() | st.text(max_size=12)),
    )
