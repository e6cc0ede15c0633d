"""torchao's affine primitives as an independent oracle, and its quantized weights under our pass."""

from __future__ import annotations

import pytest
import torch

import kvmix_fx
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.testing.models import tiny_llama
from kvmix_kernels import layout
from kvmix_kernels.cached import Cached
from kvmix_kernels.reference import quantize as q

pytest.importorskip("torchao", reason='torchao is not installed: pip install "kvmix-fx[ao]"')


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_codes_and_scales_equal_torchao(bits, axis):
    from torchao.quantization.quant_primitives import (
        MappingType,
        ZeroPointDomain,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    x = torch.randn(2, 3, 64, 64)
    fmt = layout.make_format(bits, axis, 32, 32, scale_dtype="float32")
    codes, scale, zero_point = q.quantize(x, None, fmt)
    block = (1, 1, 32, 1) if axis == "channel" else (1, 1, 1, 32)
    # torchao's integer zero point cannot express a min offset, so its scale is compared, and its
    # quantizer is run with our offset subtracted
    ao_scale, _ = choose_qparams_affine(
        x, MappingType.ASYMMETRIC, block, torch.uint8, 0, 2**bits - 1, scale_dtype=torch.float32
    )
    spread = scale.repeat_interleave(32, 2) if axis == "channel" else scale.repeat_interleave(32, 3)
    offset = zero_point.repeat_interleave(32, 2) if axis == "channel" else zero_point.repeat_interleave(32, 3)
    torch.testing.assert_close(ao_scale.reshape(scale.shape), scale, rtol=1e-5, atol=1e-7)
    zeros = torch.zeros_like(ao_scale)
    ao_codes = quantize_affine(
        x - offset, block, scale.reshape(ao_scale.shape), zeros, torch.uint8, 0, 2**bits - 1
    )
    same = ao_codes.to(torch.int16) == codes
    # both round half to even, after a division that may differ in the last place
    assert same.float().mean() > 0.999
    assert (ao_codes.to(torch.int16) - codes).abs().max() <= 1
    back = dequantize_affine(
        codes.to(torch.uint8), block, scale.reshape(ao_scale.shape), zeros, torch.uint8, 0, 2**bits - 1
    )
    packed = (q.pack(codes, bits, layout.plane_block(fmt)), scale, zero_point, x)
    ours = q.dequantize(Cached(fmt, packed), 0, 64)
    torch.testing.assert_close(back + offset, ours, rtol=1e-5, atol=1e-6)
    assert spread.shape == x.shape
    assert ZeroPointDomain is not None


def test_a_model_with_torchao_weights_generates():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = tiny_llama()
    quantize_(model.model, Int8WeightOnlyConfig())
    ids = torch.randint(1, 128, (2, 70))
    arguments = {
        "max_new_tokens": 40,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    plain = model.generate(ids, **arguments)
    plan = kvmix_fx.KVPlan.uniform(model, 8, window=16)
    kvmix_fx.compile(model, plan, inner="eager")
    got = model.generate(ids, **arguments)
    assert all(isinstance(layer.keys, QuantizedKVTensor) for layer in got.past_key_values.layers)
    difference = max(
        (a - b).abs().max().item() for a, b in zip(got.logits[:8], plain.logits[:8], strict=True)
    )
    assert 0 < difference < 0.05
    assert kvmix_fx.compiled(model).report.rewritten_layers() == [0, 1]
