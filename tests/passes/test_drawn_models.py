"""Models that nobody wrote: compiled logits equal those over packed storage, or a reason says why not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st

import kvmix_fx
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.errors import DequantizeWarning
from kvmix_fx.testing.drawn import CHOICES, HEAD_DIM, DrawnModel, Spec
from kvmix_fx.testing.tensors import error_budget
from kvmix_kernels import layout

PROMPT, STEPS, CAPACITY, B = 37, (1, 1, 3, 1), 64, 2
FORMATS = layout.make_format(2, "channel", 16, 16, 0, 8), layout.make_format(2, "token", 16, 16, 0, 8)


def plan(layers):
    layer = kvmix_fx.LayerPlan(
        kvmix_fx.QuantSpec(2, "channel", 16),
        kvmix_fx.QuantSpec(2, "token", 16),
        kvmix_fx.WindowRule(length=8),
        tile=16,
    )
    return kvmix_fx.KVPlan((layer,) * layers)


specs = st.builds(Spec, **{name: st.sampled_from(found) for name, found in CHOICES.items()})


def mask_of(kind, start, n, columns, dtype):
    """[B, 1, n, columns]; the first row is padded on the left; None for causal prompts and single steps."""
    if kind == "causal" and (start == 0 or n == 1) and columns == start + n:
        return None
    places = torch.arange(columns)
    seen = (places <= (start + torch.arange(n))[:, None]).expand(B, 1, n, columns)
    if kind == "rows":
        seen = seen[:1]
    else:
        seen = seen & (places >= torch.tensor([5, 0])[:, None, None, None])
        seen = seen | (places == (start + torch.arange(n))[:, None])
    if kind == "additive":
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(torch.float32).min)
    return seen


def plain(past, dtype=None):
    if past is None:
        return None

    def numbers(t):
        return (t.dequantize() if isinstance(t, QuantizedKVTensor) else t.clone()).to(dtype or t.dtype)

    return [tuple(map(numbers, kv)) for kv in past]


def flat(past):
    return [t for kv in past for t in kv]


def check(spec):
    """One model, a prompt and some steps. Returns whether it was packed, and its report."""
    warnings.simplefilter("ignore", DequantizeWarning)
    torch._dynamo.reset()
    model = DrawnModel(spec).eval()
    eager, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    kvmix_fx.compile(model, plan(spec.layers), inner="eager", on_nothing="ignore")
    generator = torch.Generator().manual_seed(1)
    past = exact_past = None
    if spec.fixed:
        shape = (B, spec.heads[1], CAPACITY, HEAD_DIM)
        past = [
            tuple(QuantizedKVTensor.empty_fixed(*shape, f, torch.float32, "cpu") for f in FORMATS)
            for _ in range(spec.layers)
        ]
        exact_past = plain(past)
    start, lost = 0, 0.0
    for n in (PROMPT, *STEPS):
        x = torch.randn(B, n, spec.heads[0] * HEAD_DIM, generator=generator)
        columns = CAPACITY if spec.fixed else start + n
        given_ = torch.arange(start, start + n), start
        before = plain(past)
        mask = mask_of(spec.mask, start, n, columns, torch.float32)
        with torch.no_grad():
            want, present = eager(x, before, *given_, mask)
            wide_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
            ideal, _ = wide(x.double(), plain(past, torch.float64), *given_, wide_mask)
            # the same model on a cache that nobody has rounded
            exact, exact_past = eager(x, plain(exact_past), *given_, mask)
            appended = [
                expected(t, new[:, :, start : start + n], start, n)
                for t, new in zip(flat(past or plain(present)), flat(present), strict=True)
            ]
            got, past = model(x, past, *given_, mask)
        budget = max(error_budget(want, ideal, 30.0), 2e-5)
        error = (got - want).abs().max().item()
        assert error <= budget, (
            f"step at {start} of {n}: {error} > {budget}\n{kvmix_fx.compiled(model).report}"
        )
        for t, tokens, new in zip(flat(past), appended, flat(present), strict=True):
            if not isinstance(t, QuantizedKVTensor):
                torch.testing.assert_close(t, new, atol=1e-4, rtol=1e-4)
            elif tokens is not None and start:  # padding of a prompt widens no group, and nobody says so here
                # rounding may fall to the other side where keys differ in the last bit
                off = (t.dequantize() - tokens).abs()
                assert (off > 1e-4).float().mean() < 0.01
        lost = max(lost, (got - exact).abs().max().item())
        start += n
    report = kvmix_fx.compiled(model).report
    kvmix_fx.restore(model)
    packed = any(isinstance(t, QuantizedKVTensor) for t in flat(past))
    return packed, lost, report


def expected(t, new, start, n):
    """What a packed tensor reads as once `new` is in it."""
    if not isinstance(t, QuantizedKVTensor):
        return None
    longer = copy.deepcopy(t)
    if t.is_fixed:
        return longer.index_copy_(2, torch.arange(start, start + n), new).dequantize()
    return longer.append(new).dequantize()


# a model takes seconds: what failed is told as it was drawn
@settings(
    max_examples=max(8, settings.default.max_examples // 5),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
@given(specs)
def test_a_drawn_model_equals_packed_storage_or_says_why_not(spec):
    packed, lost, report = check(spec)
    note(str(report))
    assert all(site.reason for site in report.sites if not site.rewritten), report
    if packed:
        assert lost > 1e-3, "nothing was rounded"
    else:
        assert report.skipped(), report
        assert lost < 1e-4


@pytest.mark.parametrize(
    "spec",
    [
        Spec(consumer="all values", cache="index_copy_"),
        Spec(consumer="past before", cache="slice"),
        Spec(consumer="past after", cache="cat"),
    ],
    ids=lambda spec: spec.consumer,
)
def test_who_reads_a_cache_beside_attention_sees_what_the_model_wrote(spec):
    """After a write in place the step's tokens were not there; after an append raw ones were gone."""
    packed, _, report = check(spec)
    assert packed
    assert all(site.rewritten for site in report.sites)
