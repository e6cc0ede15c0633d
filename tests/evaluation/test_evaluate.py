"""evaluate(): what packed caches cost, with the controls that must fail."""

from __future__ import annotations

import math

import pytest
import torch

import kvmix_fx
from kvmix_fx.errors import EvaluationError
from kvmix_fx.evaluation import Evaluation
from kvmix_fx.plan import KVPlan
from kvmix_fx.testing.models import tiny_llama
from kvmix_fx.testing.simulate import SimulatedCache, teacher_forced

SIZES = {"prompt": 128, "steps": 40}


def tokens(rows: int = 3, length: int = 169) -> torch.Tensor:
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(1))


def lively_llama():
    """Weights large enough for predictions to depend on the cache."""
    return tiny_llama(initializer_range=0.06)


def two_bits(model) -> KVPlan:
    return KVPlan.uniform(model, 2, window=32)


@pytest.fixture(scope="module")
def measured() -> Evaluation:
    model = lively_llama()
    return kvmix_fx.evaluate(model, two_bits(model), tokens(), **SIZES)


def test_two_bits_differ_and_sixteen_do_not(measured: Evaluation) -> None:
    model = lively_llama()
    exact = kvmix_fx.evaluate(model, KVPlan.uniform(model, 16), tokens(), **SIZES)
    assert exact.kl_quantile(1).value < 1e-6
    assert exact.perplexity_ratio.value == pytest.approx(1, abs=1e-5)
    assert exact.rms_probability_change.value < 1e-6
    assert exact.same_top_share.value == 1
    assert exact.cache_bytes == exact.cache_bytes_16bit
    assert measured.kl_mean.value > 1e-3
    assert measured.same_top_share.value < 1
    assert measured.rms_probability_change.value > 1e-3


def test_one_forward_shows_nothing_of_what_two_bits_cost(measured: Evaluation) -> None:
    """Whoever asks a compiled model for the log-likelihood of a whole text finds any plan perfect."""
    model, ids = lively_llama(), tokens()
    with torch.no_grad():
        exact = model(ids).logits.log_softmax(-1)
        kvmix_fx.compile(model, two_bits(model), inner="eager")
        whole = model(ids).logits.log_softmax(-1)
    kl = (exact.exp() * (exact - whole)).sum(-1)[:, SIZES["prompt"] : -1]
    assert len(kvmix_fx.compiled(model).report.rewritten_layers()) == 2
    assert float(kl.max()) < 1e-6 < 1e-3 < measured.kl_mean.value


def test_figures_are_those_of_a_cache_simulated_without_packing(measured: Evaluation) -> None:
    """An independent path: plain tensors, rounded where the plan says, read one token at a time."""
    model, ids = lively_llama(), tokens()
    plan = two_bits(model)

    def logits(cache: object | None) -> torch.Tensor:
        read = teacher_forced(model, ids[:, :-1], SIZES["prompt"], cache)
        return torch.cat([step for _, step in read], 1)[:, SIZES["prompt"] :].log_softmax(-1)

    p, q = logits(None), logits(SimulatedCache(plan))
    following = ids[:, SIZES["prompt"] + 1 :, None]
    p_next, q_next = (x.gather(2, following)[..., 0] for x in (p, q))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    rms = float((q_next.exp() - p_next.exp()).square().mean().sqrt())
    ratio = math.exp(float((p_next - q_next).mean()))
    # a code that tips over in one of two float32 computations moves single positions, hardly the means
    assert measured.kl_mean.value == pytest.approx(kl, rel=0.1)
    assert measured.rms_probability_change.value == pytest.approx(rms, rel=0.1)
    assert measured.perplexity_ratio.value == pytest.approx(ratio, abs=0.01)
    assert measured.perplexity_16bit.value == pytest.approx(math.exp(-float(p_next.mean())), rel=1e-4)


def test_bytes_are_what_the_plan_says(measured: Evaluation) -> None:
    model = lively_llama()
    plan = two_bits(model).for_model(model)
    assert measured.cache_bytes == plan.nbytes(1, 168, itemsize=4)
    assert measured.cache_bytes_16bit == 168 * 2 * 2 * 2 * 32 * 4
    assert measured.effective_bits == pytest.approx(32 * measured.cache_bytes / measured.cache_bytes_16bit)
    assert measured.tokens_per_second > 0


def test_the_model_is_left_as_it_was() -> None:
    model, ids = lively_llama(), tokens(1)
    before, names = model(ids).logits, set(vars(model))
    kvmix_fx.evaluate(model, two_bits(model), ids, **SIZES)
    assert set(vars(model)) == names
    assert torch.equal(model(ids).logits, before)


def test_steps_of_several_tokens_and_an_uneven_end() -> None:
    model = lively_llama()
    found = kvmix_fx.evaluate(model, two_bits(model), tokens(4), prompt=128, steps=40, step=16, batch=3)
    assert found.kl.shape == (4, 40)
    assert found.settings["batch"] == 2  # the largest that divides 4 chunks
    assert found.kl_mean.value > 1e-3


def known(kl: torch.Tensor) -> Evaluation:
    same = torch.ones_like(kl, dtype=torch.bool)
    return Evaluation(kl, kl, kl, kl, same, 1, 2, 3.0, 4.0, 5.0)


def test_summaries_of_known_numbers() -> None:
    kl = torch.arange(12, dtype=torch.float64).view(3, 4)
    found = known(kl)
    assert found.kl_mean.value == 5.5
    assert found.kl_worst_chunk.value == found.to_dict()["kl_worst_chunk"]["value"] == 9.5
    # of means, the jackknife is what everybody knows: of 1.5, 5.5 and 9.5 here
    assert found.kl_mean.standard_error == pytest.approx(4 / math.sqrt(3))
    assert found.perplexity_ratio.value == pytest.approx(math.exp(5.5))
    assert found.rms_probability_change.value == pytest.approx(float(kl.square().mean().sqrt()))
    assert found.kl_quantile(0.5).value == 5.5
    assert found.kl_quantile(1).value == 11
    assert [(part.first, part.last, part.kl.value) for part in found.kl_by_step(2)] == [
        (1, 2, 4.5),
        (3, 4, 6.5),
    ]
    assert known(kl[:1]).kl_mean.standard_error is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"data": tokens(length=100)},
            r"evaluation prompts need .* 100 tokens is too short: each of chunks=",
        ),
        (
            {"data": tokens(length=168)},
            r"takes 169 \(prompt=128, steps=40 and one to predict\); pass a longer",
        ),
        ({"data": "the cat"}, "tokenizer"),
        ({"steps": 0}, "steps must be"),
        ({"prompt": 0}, "prompt must be"),
    ],
)
def test_what_cannot_be_evaluated_is_told(given, message) -> None:
    model = lively_llama()
    arguments = {"data": tokens(), **SIZES} | given
    with pytest.raises(EvaluationError, match=message):
        kvmix_fx.evaluate(model, two_bits(model), **arguments)


def test_a_compiled_model_has_nothing_to_compare_with() -> None:
    model = lively_llama()
    kvmix_fx.compile(model, two_bits(model))
    with pytest.raises(EvaluationError, match="restore"):
        kvmix_fx.evaluate(model, two_bits(model), tokens(), **SIZES)
