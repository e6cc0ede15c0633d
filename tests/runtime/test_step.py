"""The forward of a compiled model: its lanes, and copies of the model."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch

import kvmix_fx
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.errors import TrainingError
from kvmix_fx.runtime.same import same_form, same_object
from kvmix_fx.runtime.shortcut import Noted, Shortcut
from kvmix_fx.testing.models import tiny_llama
from kvmix_kernels import layout

PLAN = kvmix_fx.KVPlan.uniform(1, 4, 2, group_size=16, window=4)
IDS = torch.randint(1, 60, (1, 50), generator=torch.Generator().manual_seed(3))


def llama():
    return tiny_llama(num_hidden_layers=1)


def logits(model, steps=4):
    """Of a prompt and `steps - 1` more tokens, by generate()."""
    out = model.generate(
        IDS, do_sample=False, max_new_tokens=steps, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(out.logits)


def deep_copied(model):
    return copy.deepcopy(model)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def changed(model):
    model.model.layers[0].mlp.down_proj.weight.data.mul_(-3)
    return model


@pytest.fixture(scope="module")
def answers():
    """Logits of a compiled model that is no copy, before and after its weights were changed."""
    model = kvmix_fx.compile(llama(), PLAN)
    return logits(model), logits(changed(model))


@pytest.mark.parametrize("duplicate", [deep_copied, saved_and_loaded])
def test_a_copy_of_a_compiled_model_is_a_model_of_its_own(duplicate, answers):
    """It computes with its own weights, is packed, reports and is restored for itself."""
    untouched, want = answers
    assert (want - untouched).abs().max() > 0.1
    model = kvmix_fx.compile(llama(), PLAN)
    twin = changed(duplicate(model))
    out = twin.generate(IDS, do_sample=False, max_new_tokens=3, return_dict_in_generate=True)
    assert isinstance(out.past_key_values.layers[0].keys, QuantizedKVTensor)
    assert len(kvmix_fx.compiled(twin).report.graphs) == 1
    assert not kvmix_fx.compiled(model).report.graphs
    torch.testing.assert_close(logits(twin), want)
    kvmix_fx.restore(twin)
    assert not {"forward", "generate", "_kvmix"} & vars(twin).keys()
    assert "_kvmix" in vars(model)
    plain = logits(changed(llama()))
    torch.testing.assert_close(logits(twin), plain)
    assert not torch.allclose(want, plain)
    torch.testing.assert_close(logits(model), untouched)
    # a copy of a model that has been used
    torch.testing.assert_close(logits(changed(duplicate(model))), want)
    torch.testing.assert_close(logits(model), untouched)


def test_the_signatures_that_generate_looks_at_are_the_models_own():
    plain, model = llama(), kvmix_fx.compile(llama(), PLAN)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert inspect.signature(model.generate) == inspect.signature(plain.generate)


def test_a_model_put_into_training_mode_is_refused():
    model = kvmix_fx.compile(llama(), PLAN)
    model.train()
    with pytest.raises(TrainingError, match=r"model\.eval"):
        model(IDS)


@pytest.fixture
def asked(monkeypatch, on_cpu):
    """The answers to whether a step is like the last one."""
    answers = []
    serves = Shortcut.serves

    def noting(self, arguments):
        answers.append(serves(self, arguments))
        return answers[-1]

    monkeypatch.setattr(Shortcut, "serves", noting)
    return answers


@pytest.mark.parametrize("padded", [False, True])
def test_each_step_of_generate_asks_once_and_is_short_from_the_third_token_on(asked, padded):
    ids = IDS.expand(2, -1).contiguous()
    mask = torch.ones_like(ids)
    mask[0, :5] = not padded
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6, "output_logits": True}
    model = kvmix_fx.compile(llama(), PLAN, options={"cuda_graphs": False})
    want = model.generate(ids, return_dict_in_generate=True, **settings)
    assert asked == [False] * 6
    asked.clear()
    kvmix_fx.compile(model, PLAN)
    got = model.generate(ids, return_dict_in_generate=True, **settings)
    # prefill, and two decode steps to learn from
    assert asked == [False] * 3 + [True] * 3
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits))


def test_no_step_asks_again_whether_windows_are_packed(on_cpu, monkeypatch):
    """That asks every layer of the plan for its bytes, while the GPU waits."""
    looked = []
    whole = kvmix_fx.KVPlan.packs_fixed_windows
    monkeypatch.setattr(kvmix_fx.KVPlan, "packs_fixed_windows", lambda *a: looked.append(1) or whole(*a))
    model = kvmix_fx.compile(llama(), PLAN)
    model.generate(IDS, do_sample=False, max_new_tokens=6)
    assert len(looked) <= 2


def test_a_masked_step_handed_a_cache_of_the_users_is_short_too(asked):
    """Its mask [B, tokens] grows; the lane is chosen when it has been brought to one shape."""
    from kvmix_fx.integrations.transformers import KVMixStaticCache

    class Uncompilable(KVMixStaticCache):
        is_compileable = False

    ids = IDS.expand(2, -1).contiguous()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    model = kvmix_fx.compile(llama(), PLAN)
    results = []
    for kind in (Uncompilable, KVMixStaticCache):
        asked.clear()
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=6, output_logits=True,
            return_dict_in_generate=True, past_key_values=kind(PLAN, model.config, 64),
        )  # fmt: skip
        assert asked == [False] * 3 + [True] * 3
        results.append(torch.stack(out.logits))
    torch.testing.assert_close(results[0], results[1])


def test_a_packed_tensor_among_the_arguments_is_never_taken_for_that_of_the_last_step():
    """Of one that is exchanged for another of the same shape, the buffers would still be the old ones."""
    fmt = layout.make_format(4, group_size=16, window=4)

    def learned(argument):
        shortcut = Shortcut()
        for _ in range(2):
            x, y = torch.zeros(1), torch.ones(1)
            noted = Noted(print, [x, argument], [y])
            shortcut.listen()
            shortcut.note(noted)
            shortcut.learn({"x": x, "cache": argument}, {"y": y}, generating=True)
        return shortcut.serves({"x": torch.zeros(1), "cache": argument})

    plain = torch.zeros(1, 1, 64, 16)
    assert learned(plain)
    assert not learned(QuantizedKVTensor.from_hp(plain, fmt))


def test_the_same_object_and_the_same_form_differ_in_what_is_no_tensor():
    a, b = [1, 2], [1, 2]
    assert same_form(a, b)
    assert not same_object(a, b)
    for same in (same_object, same_form):
        assert same(torch.zeros(2), torch.ones(2))
        assert same(a, a)
        assert not same(torch.zeros(2), torch.zeros(3))
        assert not same(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
        assert not same(torch.zeros(2), torch.zeros(2, device="meta"))
        assert not same(torch.zeros(1), 0.0)
