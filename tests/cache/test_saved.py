"""Files that earlier versions wrote still load, and read as they did. They are never written anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from kvmix_fx.cache import QuantizedKVTensor, tiers
from kvmix_fx.errors import CacheStateError, CacheVersionError, TokenTierError
from kvmix_fx.testing.tensors import formats, values
from kvmix_kernels import layout
from tests.depth import examples

FROZEN = Path(__file__).parent / "frozen"


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@pytest.mark.parametrize("name", ["k3", "v2"])
def test_a_cache_of_layout_2_reads_as_it_did(name, kind):
    state = load_file(FROZEN / "layout2.safetensors")
    expected = state[f"{name}.{kind}.reads"]
    tensor = QuantizedKVTensor.from_state(state, f"{name}.{kind}.")
    assert tensor.is_fixed is (kind == "fixed")
    assert torch.equal(tensor.dequantize(), expected)
    assert torch.equal(QuantizedKVTensor.from_state(tensor.to_state()).dequantize(), expected)


@pytest.mark.parametrize("name", ["k3", "v2"])
def test_a_pickled_tensor_of_layout_2_reads_as_it_did(name):
    expected = load_file(FROZEN / "layout2.safetensors")[f"{name}.growing.reads"]
    tensor = torch.load(FROZEN / f"layout2_{name}.pt", weights_only=True)
    assert torch.equal(tensor.dequantize(), expected)
    # 66 tokens are packed or in the sink: what was packed is not rounded again
    longer = tensor.append(torch.ones(1, 2, 40, 32)).dequantize()
    assert torch.equal(longer[:, :, :66], expected[:, :, :66])


def saved(fmt, fixed):
    x = values("normal", (1, 2, 90, 64), 0)
    if not fixed:
        return QuantizedKVTensor.from_hp(x, fmt).to_state()
    tensor = QuantizedKVTensor.empty_fixed(1, 2, 100, 64, fmt, torch.float32, "cpu")
    return tensor.index_copy_(2, torch.arange(90), x).to_state()


def saved_tiers(fmt, high, role):
    """Keys (role 0) or values with a high tier of tokens."""
    both = layout.with_high(fmt, high), layout.with_high(fmt, high._replace(scored=0, balanced=0))
    x = values("normal", (1, 2, 90, 64), 0)
    return tiers.pack(x, x, both, x)[role].to_state()


tiered = st.builds(
    saved_tiers,
    formats(64, layout.WIDTHS).filter(lambda fmt: fmt.tile >= 7),
    st.builds(
        layout.make_high,
        share=st.just(25),
        bits=st.sampled_from(layout.HIGH_BITS),
        balanced=st.booleans(),
    ),
    st.sampled_from((0, 1)),
)


@st.composite
def damaged(draw):
    """A saved tensor with one part of it exchanged, and whether it says the same as before."""
    state = draw(st.one_of(st.builds(saved, formats(64), st.booleans()), tiered))
    name = draw(st.sampled_from(sorted(state)))
    part = state[name]
    match draw(st.sampled_from(("missing", "no tensor", "dtype", "shape", "number", "shorter"))):
        case "missing":
            del state[name]
        case "no tensor":
            state[name] = draw(st.sampled_from((None, 3, "text", [1, 2])))
        case "dtype":
            state[name] = part.to(draw(st.sampled_from((torch.int8, torch.float64, torch.bool))))
        case "shape":
            state[name] = part[None]
        case "number" if part.dtype in (torch.int64, torch.int32):
            flat = part.clone().reshape(-1)
            flat[draw(st.integers(0, len(flat) - 1))] = draw(
                st.one_of(st.integers(-3, 300), st.sampled_from((2**31 - 1, -(2**31))))
            )
            state[name] = flat.reshape(part.shape)
        case _:
            state[name] = part[..., :-1] if part.dim() else part + 1000
    return state


@settings(max_examples=examples(60))
@given(damaged())
def test_a_damaged_file_is_refused_or_reads_without_harm(state):
    """What passes the checks is as large as its format says, so that reading and appending stay inside."""
    try:
        tensor = QuantizedKVTensor.from_state(state)
    except (CacheStateError, CacheVersionError):
        return
    read = tensor.dequantize()
    assert read.shape == tensor.shape
    if tensor.format.high is not None:
        with pytest.raises(TokenTierError):
            torch.cat([tensor, torch.ones(1, 2, 3, 64)], 2)
    elif not tensor.is_fixed:
        longer = torch.cat([tensor, torch.ones(1, 2, 3, 64)], 2)
        assert longer.dequantize().shape[2] == tensor.shape[2] + 3


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("qdata", lambda x: x[:, :, :-32], '"scale" of a saved cache should be'),
        ("scale", lambda x: x[:, :, :-1], '"scale" of a saved cache should be'),
        ("order", lambda x: torch.zeros_like(x), "no permutation"),
        ("order", lambda x: x + 1, "no permutation"),
        ("live", lambda x: x + 1000, "says it holds 1090"),
        ("meta", lambda x: x.float(), "a list of int64"),
        ("residual", lambda x: x[:, :, :-1], '"residual" of a saved cache should be'),
    ],
)
def test_what_is_wrong_with_a_file_is_said(name, change, said):
    fmt = layout.make_format(
        4, group_size=32, tile=32, tiers=((4, 16), (2, 48)), order="prompt", sink=4, scale_dtype="byte"
    )
    state = saved(fmt, fixed=True)
    QuantizedKVTensor.from_state(state)
    with pytest.raises(CacheStateError, match=said):
        QuantizedKVTensor.from_state(state | {name: change(state[name])})
    del state[name]
    if name != "live":
        with pytest.raises(CacheStateError, match="is missing"):
            QuantizedKVTensor.from_state(state)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("high_residual", lambda x: x[:, :, :-1], '"high_residual" of a saved cache should be'),
        ("positions", lambda x: x.long(), '"positions" of a saved cache should be'),
        ("waiting", lambda x: x[..., :-1], '"waiting" of a saved cache should be'),
        ("balance", lambda x: x[..., :-1], '"balance" of a saved cache should be'),
        # behind the length: the mark, share, number, bits, group, policy, recent part, and what keys have
        ("meta", lambda x: changed(x, 1, -2), "no packed format has the numbers"),
        ("meta", lambda x: changed(x, 2, 100), "from 1 to 99 percent"),
        ("meta", lambda x: changed(x, 2, 1), "less than one token"),
        ("meta", lambda x: changed(x, 3, 5), "either a share of the tokens or a fixed number"),
        ("meta", lambda x: changed(x, 4, 3), "bits, got 3"),
        ("meta", lambda x: changed(x, 5, 5), "multiple of 16"),
        ("meta", lambda x: changed(x, 6, 99), "no packed format has the numbers"),
        ("meta", lambda x: changed(x, 17, 99), "no packed format has the numbers"),  # dtype of scales
        ("meta", lambda x: changed(x, 8, 2), "no packed format has the numbers"),
    ],
)
def test_what_is_wrong_with_a_high_tier_is_said(name, change, said):
    fmt = layout.make_format(4, group_size=16, tile=16, tiers=((16, 8), (4, 8), (2, 48)), order="tile")
    state = saved_tiers(fmt, layout.make_high(25, balanced=True), 0)
    back = QuantizedKVTensor.from_state(state)
    assert back.format.encode() == state["meta"].tolist()[1:-1]
    assert torch.equal(QuantizedKVTensor.from_state(back.to_state()).dequantize(), back.dequantize())
    with pytest.raises(CacheStateError, match=said):
        QuantizedKVTensor.from_state(state | {name: change(state[name])})
    del state[name]
    with pytest.raises(CacheStateError, match="is missing"):
        QuantizedKVTensor.from_state(state)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_file_without_codes_does_not_ask_for_more_memory_than_it_has(fixed):
    """A tile of 2^31 tokens was allocated with the next one."""
    fmt = layout.make_format(16, tile=8, sink=4)
    state = saved(fmt, fixed)
    QuantizedKVTensor.from_state(state)
    place = 1 + fmt.encode().index(8)
    with pytest.raises(CacheStateError, match='"residual" of a saved cache should be at least'):
        QuantizedKVTensor.from_state(state | {"meta": changed(state["meta"], place, 2**31 - 1)})


def changed(numbers, place, number):
    numbers = numbers.clone()
    numbers[place] = number
    return numbers
