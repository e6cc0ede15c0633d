"""Observation: what is seen, differentiated and exchanged is what decoding over a packed cache would read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

import kvmix_fx
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.errors import NoSiteError
from kvmix_fx.plan import KVPlan, LayerPlan, QuantSpec
from kvmix_fx.profiling.kl import read_in_formats
from kvmix_fx.profiling.observe import Listeners, Observer, observing
from kvmix_fx.profiling.rounding import round_trip
from kvmix_fx.testing.models import LEFT_ALONE, PACKED, WRITTEN_OUT, tiny_architecture, tiny_llama
from kvmix_fx.testing.simulate import teacher_forced
from kvmix_fx.testing.strategies import quant_specs
from kvmix_kernels import layout


def tokens(length: int = 128) -> torch.Tensor:
    return torch.randint(1, 128, (1, length), generator=torch.Generator().manual_seed(1))


@given(
    spec=quant_specs(32, layout.BITS),
    tokens=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_a_round_trip_is_what_a_packed_tensor_holds(spec: QuantSpec, tokens: int, seed: int) -> None:
    layer = LayerPlan(spec, QuantSpec(8, "token", "head"), window=kvmix_fx.WindowRule(length=0))
    fmt, _ = layer.formats(32)
    x = torch.randn(2, 2, tokens * layer.tile_length, 32, generator=torch.Generator().manual_seed(seed)) * 3
    want = QuantizedKVTensor.from_hp(x, fmt).dequantize()
    # one side may round a product before it adds the offset: two units in the last place of float32
    torch.testing.assert_close(round_trip(x, spec), want, rtol=2**-22, atol=1e-6)


def test_padding_does_not_widen_a_group() -> None:
    x = torch.randn(1, 2, 40, 32)
    valid = torch.arange(40)[None] < 35
    spoiled = x.clone()
    spoiled[:, :, 35:] = 1e4
    spec = QuantSpec(2, "channel", 32)
    got = round_trip(spoiled, spec, valid)[:, :, :35]
    assert torch.equal(got, round_trip(x, spec, valid)[:, :, :35])
    assert not torch.equal(round_trip(spoiled, spec)[:, :, :35], got)


@pytest.mark.parametrize("name", ["sdpa", "llama", "gemma2"])
def test_a_far_copy_is_read_as_decoding_reads_a_packed_cache(name: str) -> None:
    """One forward with rounded far copies gives the logits of real decoding, token by token."""
    model = tiny_llama() if name == "sdpa" else tiny_architecture(*WRITTEN_OUT[name], "eager")
    ids = tokens(100)
    sink = 0 if name == "llama" else 4
    layer = LayerPlan(QuantSpec(2, "channel", 32), QuantSpec(3, "token", 16), sink_length=sink)
    with observing(model):
        observer = Observer(model, window=32, sink_length=sink)
        plain = observer.read(ids)
        torch.testing.assert_close(plain, model(ids).logits, rtol=0, atol=1e-4)
        formats = {
            (n, role): spec for n in (0, 1) for role, spec in (("key", layer.key), ("value", layer.value))
        }
        rounded = read_in_formats(observer, ids, 100, formats)
    kvmix_fx.compile(model, KVPlan((layer, layer)), inner="eager")
    decoded = torch.cat([logits for _, logits in teacher_forced(model, ids, 1)], 1)
    torch.testing.assert_close(rounded, decoded, rtol=0, atol=5e-4)
    first = observer.first_packed_query
    moved = (plain - rounded).abs().amax((0, 2))
    assert moved[:first].max() < 1e-5
    assert moved[first:].mean() > 1e-2


def test_reading_from_a_layer_on_equals_reading_from_the_start() -> None:
    model, ids = tiny_llama(), tokens(100)
    with observing(model):
        observer = Observer(model)
        plain = observer.read(ids, keep=True)
        assert torch.equal(observer.read_from(1, ids), plain)
        for layer in (0, 1):
            observer.replacements = {(layer, "key"): torch.zeros_like}
            resumed = observer.read_from(layer, ids)
            assert torch.equal(resumed, observer.read(ids))
            assert (resumed - plain).abs().max() > 1e-2
            observer.replacements = {}
            observer.read(ids, keep=True)


def test_gradients_are_those_of_the_far_copy() -> None:
    """Checked against finite differences of exchanged copies."""
    model, ids = tiny_llama().double(), tokens(100)
    exact: dict[tuple[int, str], torch.Tensor] = {}
    gradients: dict[tuple[int, str], torch.Tensor] = {}

    def loss() -> torch.Tensor:
        return cross_entropy(observer.read(ids)[0, :-1], ids[0, 1:], reduction="sum")

    def hear(layer: int, role: str, x: torch.Tensor, g: torch.Tensor) -> None:
        exact[layer, role], gradients[layer, role] = x, g

    with observing(model):
        observer = Observer(model)
        observer.listeners = Listeners(gradient=hear)
        loss().backward()
        observer.listeners = Listeners()
        generator = torch.Generator().manual_seed(0)
        for place, x in exact.items():
            direction = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            ends = []
            for step in (1e-3, -1e-3):
                observer.replacements = {place: x + step * direction}
                ends.append(float(loss()))
            slope = (ends[0] - ends[1]) / 2e-3
            assert slope == pytest.approx(float((gradients[place] * direction).sum()), rel=2e-3)
            # tokens that never leave the window are read exact
            assert not gradients[place][:, :, 64:].any()
            assert gradients[place][:, :, :32].all()


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        *((name, False) for name in ("llama", "qwen3", "phi3", "gpt2", "gpt-neox", "opt", "falcon, new")),
        *((name, True) for name in ("phi3", "mixtral")),
    ],
)
def test_projections_are_found_whatever_the_model_calls_them(name: str, checkpointing: bool) -> None:
    """G^T H of keys and values against the slices of autograd's weight gradients."""
    model, ids = tiny_architecture(*PACKED[name]), tokens(70)
    found: dict[tuple[int, str], torch.Tensor] = {}
    with observing(model):
        observer = Observer(model, checkpointing=checkpointing)
        observer.listeners = Listeners(
            projected=lambda layer, role, h, g: found.update(
                {(layer, role): g.reshape(-1, g.shape[-1]).t() @ h.reshape(-1, h.shape[-1])}
            )
        )
        cross_entropy(observer.read(ids)[0, :-1], ids[0, 1:]).backward()
        shapes = {observer.projection(0, role).weight().shape for role in ("key", "value")}
    assert all(p.grad is None for p in model.parameters())
    cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).backward()
    geometry = observer.geometry
    for layer in range(2):
        key, value = expected(model, name, layer, geometry.num_kv_heads, geometry.head_dim)
        torch.testing.assert_close(found[layer, "key"], key, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found[layer, "value"], value, rtol=1e-3, atol=1e-5)
        assert key.norm() > 1e-4
    assert shapes == {key.shape}


def expected(
    model: torch.nn.Module, name: str, layer: int, heads: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Autograd's gradients of the rows [n, in] that make keys and values."""
    gradients = {n: p.grad for n, p in model.named_parameters() if f".{layer}." in n and p.dim() == 2}

    def one(part: str) -> torch.Tensor:
        (gradient,) = [g for n, g in gradients.items() if part in n]
        assert gradient is not None
        return gradient

    width = heads * size
    if name == "gpt2":
        _, key, value = one("c_attn").t().split(width)
    elif name == "phi3":
        _, key, value = one("qkv_proj").split([128, width, width])
    elif name == "gpt-neox":
        _, key, value = one("query_key_value").view(heads, 3, size, -1).transpose(0, 1).flatten(1, 2)
    elif name == "falcon, new":
        # every KV head brings its query heads, then key, then value; the cache repeats both for all heads
        rows = one("query_key_value").view(2, -1, size, 128)
        key, value = rows[:, -2].flatten(0, 1), rows[:, -1].flatten(0, 1)
    else:
        return one("k_proj"), one("v_proj")
    return key, value


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_models_that_cannot_be_packed_cannot_be_observed(name: str) -> None:
    config, overrides, reason = LEFT_ALONE[name]
    with pytest.raises(NoSiteError, match=reason):
        kvmix_fx.profile(tiny_architecture(config, overrides), tokens(160))


def test_layers_that_stay_at_16_bits_are_skipped_and_cost_nothing() -> None:
    layers = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 32}
    profile = kvmix_fx.profile(
        tiny_architecture("Gemma3TextConfig", layers), tokens(160), signals="cache_norm_frobenius"
    )
    assert list(profile.skipped) == [0]
    assert "sliding window" in profile.skipped[0]
    assert profile.scores["cache_norm_frobenius"].keys[0] == 0
    assert profile.scores["cache_norm_frobenius"].keys[1] > 0
