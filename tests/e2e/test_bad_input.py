"""Bad input gets one clear error, and nothing is lost: the model still runs, the cache is not corrupted."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

import kvmix_fx
from kvmix_fx import errors
from kvmix_fx.integrations.transformers import KVMixCache, KVMixStaticCache
from kvmix_fx.testing.models import tiny_llama

from .marks import needs_installed


def tokens(rows=2, length=70):
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def one_layer():
    return tiny_llama(num_hidden_layers=1)


@pytest.fixture
def ready(one_layer):
    model = one_layer
    return kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 2, window=16), inner="eager")


def forward(model, ids, past=None):
    with torch.no_grad():
        return model(ids, past_key_values=past, use_cache=True)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_plan_with_another_number_of_layers(model, layers):
    before = dict(vars(model))
    with pytest.raises(errors.PlanLayerError, match=f"plan has {layers} layers, the model has 2"):
        kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(layers, 2))
    assert vars(model) == before


def test_a_policy_whose_scores_a_model_cannot_give(model):
    before = dict(vars(model))
    plan = kvmix_fx.KVPlan.preset("mikv", model, policy="oracle")
    with pytest.raises(errors.PlanFieldError, match=r'layer 0: the policy "oracle" takes scores .* Take acc'):
        kvmix_fx.compile(model, plan)
    assert vars(model) == before


def test_groups_that_do_not_fit_the_head(model):
    plan = kvmix_fx.KVPlan.uniform(2, 2, group_size=64)
    with pytest.raises(errors.HeadSizeError, match=r"layer 0.*use one of \[16\] or the whole head"):
        kvmix_fx.compile(model, plan)
    assert torch.equal(model.generate(tokens(), max_new_tokens=1)[:, :70], tokens())


@pytest.mark.parametrize("fixed", [False, True])
def test_a_cache_of_another_number_of_heads(ready, fixed):
    """Such as one that was saved by a rank of several."""
    plan = kvmix_fx.compiled(ready).plan
    other = kvmix_fx.compile(tiny_llama(num_hidden_layers=1, num_key_value_heads=4), plan, inner="eager")
    cache = KVMixStaticCache(plan, other.config, 80) if fixed else KVMixCache(plan, other.config)
    forward(other, tokens(), cache)
    with pytest.raises(errors.CacheShapeError, match="holds 4 KV heads, the model has 2 in this process"):
        forward(ready, tokens(length=1), cache)


@needs_installed
def test_a_backend_refuses_a_plan_for_other_heads(one_layer):
    plan = kvmix_fx.KVPlan.uniform(kvmix_fx.ModelGeometry(1, 8, 32), 2)
    one_layer.compile(backend="kvmix", options={"plan": plan, "inner": "eager"})
    with pytest.raises(Exception, match="for 8 KV heads of 32, layer 0 of this model has 2 of 32: make it"):
        forward(one_layer, tokens())


def test_weights_that_were_offloaded_after_compiling(ready):
    """The hook is a stand-in for accelerate's, which lets a model say that it is on no device."""
    cache = kvmix_fx.returned_cache(forward(ready, tokens()))
    ready._hf_hook = types.SimpleNamespace(offload=True)
    parameters = {name: nn.Parameter(p.to("meta"), False) for name, p in ready.named_parameters()}
    with pytest.raises(errors.PlacementError, match="offloaded and fetched in every step"):
        torch.func.functional_call(ready, parameters, (tokens(length=1),), {"past_key_values": cache})


def test_a_plan_is_needed(model):
    with pytest.raises(errors.BackendOptionError, match="needs a plan"):
        kvmix_fx.compile(model, {"bits": 2})
    with pytest.raises(errors.BackendOptionError, match=r"KVPlan\.from_pretrained\(file\)"):
        kvmix_fx.compile(model, "plan.json")


def test_a_cache_without_room_for_a_token(model):
    plan = kvmix_fx.KVPlan.uniform(model, 2)
    for capacity in (0, -1, None):
        with pytest.raises(errors.PlanFieldError, match="max_cache_len must be"):
            KVMixStaticCache(plan, model.config, capacity)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "no-such-backend"}, "names no Dynamo backend"),
        ({"inner": 3}, "backend name or a callable"),
        ({"options": {"no_such_option": 1}}, "unknown option 'no_such_option'"),
        ({"mode": "fastest"}, "mode must be one of"),
        ({"inner": "eager", "mode": "max-autotune"}, "settings of Inductor"),
    ],
)
def test_options_are_checked_at_once(model, options, message):
    before = dict(vars(model))
    with pytest.raises(errors.BackendOptionError, match=message):
        kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 2), **options)
    assert vars(model) == before


def test_training_mode(model):
    model.train()
    with pytest.raises(errors.TrainingError, match=r"model\.eval"):
        kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 2))
    model.eval()
    kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 2), inner="eager")
    model.train()
    with pytest.raises(errors.TrainingError, match=r"model\.eval"):
        model(tokens())


def test_gradients_through_the_cache(ready):
    with pytest.raises(errors.TrainingError, match="gradients cannot flow"):
        ready(tokens(), use_cache=True)
    # without a cache there is nothing to pack, and the plain forward has gradients
    ready(tokens(), use_cache=False).logits.sum().backward()
    assert ready.lm_head.weight.grad is not None


def test_attention_dropout_is_not_dropped():
    """Dropout at inference is stored packed, attended unpacked, and said so."""
    import torch.nn.functional as F

    from kvmix_fx.backend import KVMixBackend
    from kvmix_fx.passes.sites import STORAGE

    plan = kvmix_fx.KVPlan.uniform(1, 2, window=8)
    kf, vf = plan.layers[0].formats(32)
    past = [kvmix_fx.QuantizedKVTensor.from_hp(torch.randn(1, 2, 70, 32), f) for f in (kf, vf)]
    backend = KVMixBackend(plan, "eager")

    def step(q, k, v, past_k, past_v):
        full_k, full_v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return F.scaled_dot_product_attention(q, full_k, full_v, dropout_p=0.5), full_k, full_v

    with torch.no_grad():
        torch.compile(step, backend=backend)(*torch.randn(3, 1, 2, 1, 32), *past)
    (site,) = backend.report.sites
    assert site.action == STORAGE
    assert "dropout" in site.reason


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_inputs_without_tokens(ready, shape):
    with pytest.raises(errors.ModelInputError, match="holds no tokens"):
        forward(ready, torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("as_object", [True, False])
def test_overflow_of_a_fixed_cache(ready, as_object):
    from transformers import StaticCache

    plan = kvmix_fx.compiled(ready).plan
    cache = (
        KVMixStaticCache(plan, ready.config, 72) if as_object else StaticCache(ready.config, max_cache_len=72)
    )
    forward(ready, tokens(), cache)
    forward(ready, tokens(2, 1), cache)
    before = [layer.keys.dequantize() for layer in cache.layers]
    with pytest.raises(errors.CapacityError, match="exceed the capacity of 72"):
        forward(ready, tokens(2, 2), cache)
    assert all(torch.equal(a, b.keys.dequantize()) for a, b in zip(before, cache.layers, strict=True))
    out = forward(ready, tokens(2, 1), cache)  # the last slot can still be used
    assert out.logits.isfinite().all()


def test_a_batch_other_than_the_caches(ready):
    past = forward(ready, tokens()).past_key_values
    before = past.layers[0].keys.dequantize()
    with pytest.raises(errors.CacheShapeError, match="continue with the batch"):
        forward(ready, tokens(3, 1), past)
    assert torch.equal(past.layers[0].keys.dequantize(), before)
    assert forward(ready, tokens(2, 1), past).logits.isfinite().all()


def test_a_cache_of_another_dtype(ready):
    past = forward(ready, tokens()).past_key_values
    ready.to(torch.bfloat16)
    with pytest.raises(errors.CacheShapeError, match="dtype"):
        forward(ready, tokens(2, 1), past)


def test_a_cache_made_for_another_plan(ready):
    other = KVMixCache(kvmix_fx.KVPlan.uniform(ready, 8), ready.config)
    with pytest.raises(errors.PlanMismatchError, match="make the cache from the plan"):
        forward(ready, tokens(), other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_key_stays_with_its_own_row(one_layer, bad):
    """Row 0 holds a bad key; row 1 must not notice, then or later."""
    model = one_layer
    ids = tokens(2, 90)
    plan = kvmix_fx.KVPlan.uniform(model, 2, window=16)
    kvmix_fx.compile(model, plan, inner="eager")

    def run(spoil):
        past = forward(model, ids[:, :70]).past_key_values
        if spoil:
            past.layers[0].keys.residual[0, 0, -1, 3] = bad
        logits = []
        for i in range(70, 90):
            out = forward(model, ids[:, i : i + 1].contiguous(), past)
            past = out.past_key_values
            logits.append(out.logits[1])
        return torch.stack(logits), past

    clean, _ = run(False)
    spoiled, past = run(True)
    assert torch.equal(clean, spoiled)
    for _ in range(60):  # until the bad key has been packed
        forward(model, ids[:, :1].contiguous(), past)
    assert past.layers[0].keys.dequantize()[1].isfinite().all()


def test_without_use_cache_the_model_runs_plain(model):
    want = model(tokens(), use_cache=False).logits
    kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 2), inner="eager")
    with torch.no_grad():
        got = model(tokens(), use_cache=False).logits
    torch.testing.assert_close(got, want)


def test_compiled_state_is_asked_of_a_compiled_model(model):
    with pytest.raises(errors.NoSiteError, match="has not been compiled"):
        kvmix_fx.compiled(model)
