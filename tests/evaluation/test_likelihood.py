"""log_likelihoods(): continuations against packed contexts, with the controls that must fail."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

import kvmix_fx
from kvmix_fx.errors import EvaluationError, MissingPackageError
from kvmix_fx.evaluation import Continuation, log_likelihoods
from kvmix_fx.plan import KVPlan
from kvmix_fx.testing.models import tiny_llama
from kvmix_fx.testing.simulate import SimulatedCache, teacher_forced


def lively_llama():
    """Weights large enough for predictions to depend on the cache."""
    return tiny_llama(num_hidden_layers=1, initializer_range=0.06)


def questions() -> list[Continuation]:
    """Contexts of several lengths, with answers of several; choices of one token, and a text on its own."""
    ids = torch.randint(1, 128, (4, 300), generator=torch.Generator().manual_seed(1)).tolist()
    return [
        *(Continuation(ids[0][:150], [choice]) for choice in (3, 5, 8)),
        Continuation(ids[1][:150], ids[1][150:171]),
        Continuation(ids[1][:150], ids[2][150:160]),
        Continuation(ids[2][:131], ids[2][131:180]),
        Continuation(ids[3][:1], ids[3][1:200]),
    ]


def in_one_forward(model, one: Continuation) -> tuple[float, bool]:
    ids = torch.tensor([[*one.context, *one.tokens]])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0, len(one.context) - 1 :]
    following = ids[0, len(one.context) :]
    found = logits.log_softmax(-1).gather(1, following[:, None])
    return float(found.sum()), bool((logits.argmax(-1) == following).all())


@pytest.fixture(scope="module")
def exact() -> list[tuple[float, bool]]:
    model = lively_llama()
    return [in_one_forward(model, one) for one in questions()]


def values(found) -> list[float]:
    return [one.log_probability for one in found]


def test_an_unquantized_cache_gives_what_one_forward_gives(exact) -> None:
    model, asked = lively_llama(), questions()
    best = in_one_forward(model, asked[0])
    top = Continuation(
        asked[0].context, [int(model(torch.tensor([asked[0].context])).logits[0, -1].argmax())]
    )
    for batch in (1, 4):
        found = log_likelihoods(model, [*asked, top], batch=batch)
        assert values(found[:-1]) == pytest.approx([value for value, _ in exact], abs=1e-3)
        assert [one.is_greedy for one in found] == [greedy for _, greedy in exact] + [True]
        assert found[-1].log_probability >= best[0] - 1e-4


@pytest.mark.parametrize("bits", [2, 8])
def test_two_bits_differ_eight_hardly_and_one_forward_not_at_all(exact, bits, subtests) -> None:
    wanted = torch.tensor([value for value, _ in exact])
    model, asked = lively_llama(), questions()
    kvmix_fx.compile(model, KVPlan.uniform(model, bits, window=32), inner="eager")
    counted: list[None] = []
    found = values(log_likelihoods(model, asked, batch=4, advance=lambda: counted.append(None)))
    lengths = torch.tensor([len(one.tokens) for one in asked])
    change = (torch.tensor(found) - wanted).abs() / lengths
    assert len(counted) == len(asked)
    if bits == 8:
        assert float(change.max()) < 0.01
        return
    assert float(change.max()) > 0.3
    assert float(change.min()) > 0.02
    with subtests.test("who scores in one forward finds every plan perfect"):
        whole = torch.tensor([in_one_forward(model, one)[0] for one in asked[5:]])
        assert float((whole - wanted[5:]).abs().max()) < 1e-3
    with subtests.test("neither the batch nor the order changes what is packed"):
        alone = values(log_likelihoods(model, asked[::-1], batch=1))
        assert alone[::-1] == pytest.approx(found, abs=1e-3)


def test_single_steps_are_what_decoding_reads() -> None:
    """An independent path: plain tensors, rounded where the plan says, read one token at a time."""
    model, one = lively_llama(), questions()[5]
    plan = KVPlan.uniform(model, 2, window=32, sink_length=0)
    ids = torch.tensor([[*one.context, *one.tokens]])
    read = teacher_forced(model, ids[:, :-1], len(one.context) - 1, SimulatedCache(plan))
    logits = torch.cat([step for _, step in read], 1)[0, len(one.context) - 1 :]
    simulated = float(logits.log_softmax(-1).gather(1, ids[0, len(one.context) :, None]).sum())
    kvmix_fx.compile(model, plan, inner="eager")
    found = log_likelihoods(model, [one], step=1)[0].log_probability
    assert found == pytest.approx(simulated, abs=0.1)
    assert abs(found - in_one_forward(model, one)[0]) > 0.5


@pytest.mark.parametrize(
    ("one", "options", "message"),
    [
        (Continuation([1], [2]), {"batch": 0}, "batch must be"),
        (Continuation([1], [2]), {"step": 0}, "step must be"),
        (Continuation([], [2]), {}, "at least one token"),
        (Continuation([1], []), {}, "at least one token"),
    ],
)
def test_what_cannot_be_scored_is_told(one, options, message) -> None:
    with pytest.raises(EvaluationError, match=message):
        log_likelihoods(tiny_llama(num_hidden_layers=1), [one], **options)


def test_the_model_type_of_the_harness_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.delitem(sys.modules, "kvmix_fx.integrations.lm_eval", raising=False)
    with pytest.raises(MissingPackageError, match=r'pip install "kvmix-fx\[lm-eval\]"'):
        importlib.import_module("kvmix_fx.integrations.lm_eval")
