"""Files that earlier versions wrote still load, and read as they did. They are never written anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvmix_fx.cache import QuantizedKVTensor

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
