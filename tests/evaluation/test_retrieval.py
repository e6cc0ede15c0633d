"""Tasks made from a seed, and a cache that has to answer them."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import kvmix_fx.evaluation.retrieval as retrieval
from kvmix_fx.errors import EvaluationError
from kvmix_fx.evaluation import TASKS, Retrieval, Score, make_sample, plot_retrieval, retrieve
from kvmix_fx.evaluation.tasks import SPREAD
from kvmix_fx.plan import KVPlan
from kvmix_fx.testing.models import tiny_llama


def count(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [200, 1000])
def test_a_sample_holds_its_answers_fits_and_repeats_itself(task: str, length: int) -> None:
    sample = make_sample(task, count, length, 0.5, seed=3)
    assert 0.9 * length <= count(sample.context + sample.question) <= length
    assert all(answer in sample.context for answer in sample.answers)
    assert not any(answer in sample.question for answer in sample.answers)
    assert sample == make_sample(task, count, length, 0.5, seed=3)
    assert sample != make_sample(task, count, length, 0.5, seed=4)
    assert sample.score(" and ".join(sample.answers)) == 1
    assert sample.score("nothing of it") == 0


@pytest.mark.parametrize("task", [task for task in TASKS if task not in SPREAD])
def test_depth_is_where_the_needle_lies(task: str) -> None:
    for depth in (0.0, 0.5, 1.0):
        sample = make_sample(task, count, 600, depth)
        place = sample.context.index(sample.answers[0]) / len(sample.context)
        assert place == pytest.approx(depth, abs=0.06), depth


@pytest.mark.parametrize("task", ["common_words", "frequent_words"])
def test_the_words_asked_for_are_the_most_frequent(task: str) -> None:
    sample = make_sample(task, count, 400)
    listed = sample.context.split(". ", 1)[1] if task == "common_words" else sample.context.split("text. ")[1]
    words = Counter(re.split(r", " if task == "common_words" else " ", listed.rstrip(".")))
    (_, least), (_, next_one) = words.most_common(len(sample.answers) + 1)[-2:]
    assert {word for word, _ in words.most_common(len(sample.answers))} == set(sample.answers)
    assert least > next_one


def test_multi_key_needles_hide_others_and_ask_for_one() -> None:
    sample = make_sample("niah_multikey", count, 300)
    assert len(re.findall(r"\d{6}", sample.context)) == 4
    assert len(sample.answers) == 1
    assert len(make_sample("niah_multivalue", count, 300).answers) == 4
    several = make_sample("niah_multiquery", count, 300)
    assert several.score(f"{several.answers[0]} {several.answers[1]}") == 0.5


def test_a_chain_of_variables_leads_to_every_answer() -> None:
    sample = make_sample("variable_tracking", count, 300, seed=1)
    found = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", sample.context))
    for name in sample.answers:
        while name in found:
            name = found[name]
        assert name in sample.question


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("passkeys", count, 300), "no task"),
        (("passkey", count, 20), "too few"),
        (("passkey", count, 300, 1.5), "depth"),
    ],
)
def test_what_cannot_be_made_is_told(arguments, message) -> None:
    with pytest.raises(EvaluationError, match=message):
        make_sample(*arguments)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    letters = {chr(n): n - 31 for n in range(32, 127)}
    characters = Tokenizer(models.WordLevel({"<unk>": 0, **letters}, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="<unk>")


def test_the_question_is_read_against_the_packed_text(monkeypatch, tokenizer) -> None:
    """Two bits change what is answered, sixteen do not: in one forward with the question, neither would."""
    model = tiny_llama(initializer_range=0.12)
    said: list[str] = []
    answer = retrieval._answer
    monkeypatch.setattr(retrieval, "_answer", lambda *given: said.append(answer(*given)) or said[-1])
    options = {"lengths": [700], "depths": [0.0, 1.0], "samples": 1, "progress": False}
    for plan in (None, KVPlan.uniform(model, 16), KVPlan.uniform(model, 1)):
        found = retrieve(model, plan, tokenizer, **options)
        assert [(s.task, s.length, s.depth, s.samples) for s in found.scores] == [
            ("passkey", 700, 0.0, 1),
            ("passkey", 700, 1.0, 1),
        ]
    assert said[:2] == said[2:4] != said[4:]
    assert "_kvmix" not in vars(model)


def test_scores_are_averaged_and_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    table = ((512, 0.0, 1.0), (512, 1.0, 0.5), (1024, 0.0, 0.0), (1024, 1.0, 0.5))
    scores = [Score("passkey", length, depth, value, 2) for length, depth, value in table]
    found = Retrieval((*scores, Score("common_words", 512, None, 0.25, 2)))
    assert found.mean("passkey") == 0.5
    assert found.mean("passkey", 512) == 0.75
    path = plot_retrieval({"16 bits": found, "2 bits": found}, tmp_path / "heat.png")
    assert path.stat().st_size > 1000


def test_a_length_beyond_the_model_is_refused(tokenizer) -> None:
    with pytest.raises(EvaluationError, match="2048 positions"):
        retrieve(tiny_llama(), None, tokenizer, lengths=[4096])
