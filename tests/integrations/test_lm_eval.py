"""The model type `kvmix` of lm-evaluation-harness, on local tasks over local data; needs `make lm-eval`."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

WHY = 'lm-evaluation-harness is not installed: pip install "kvmix-fx[lm-eval]", or run `make lm-eval`'
lm_eval = pytest.importorskip("lm_eval", reason=WHY)
pytest.importorskip("accelerate", reason=WHY)

from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kvmix_fx.errors import EvaluationError, PlanLayerError
from kvmix_fx.integrations.lm_eval import KVMixLM
from kvmix_fx.plan import KVPlan
from kvmix_fx.testing.models import tiny_llama
from tests import documents
from tests.documents import WORDS

TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    },
    "roll": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "it",
        "generation_kwargs": {"until": ["<end>"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
}
KINDS = {"choose": 9, "roll": 3, "write": 3}
"""Answers of each task on the three documents."""


def sentence(chance: random.Random, words: int) -> str:
    return " ".join(chance.choice(WORDS[3:]) for _ in range(words))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """Task files of the three kinds, over documents of different lengths."""
    folder = tmp_path_factory.mktemp("tasks")
    chance = random.Random(0)
    documents = [
        {
            "text": sentence(chance, words),
            # one token, several, and two texts that start alike
            "choices": ["it", sentence(chance, 12), "robot may"],
            "gold": 0,
        }
        for words in (150, 131, 150)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, task in TASKS.items():
        whole = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            **task,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML
    return TaskManager(include_path=str(folder), include_defaults=False)


def tokenizer() -> Any:
    made = documents.tokenizer()
    made.eos_token = "<end>"
    return made


def model() -> Any:
    """Weights large enough for predictions to depend on the cache."""
    return tiny_llama(num_hidden_layers=1, vocab_size=len(WORDS), initializer_range=0.06)


def answers(tasks: TaskManager, wrapped: Any, names: tuple[str, ...] = tuple(TASKS)) -> dict[str, list[Any]]:
    """What the harness got for every request of each task, in order."""
    found = lm_eval.simple_evaluate(
        model=wrapped, tasks=list(names), task_manager=tasks, bootstrap_iters=0, log_samples=True
    )
    return {
        name: [one[0] for document in samples for one in document["resps"]]
        for name, samples in found["samples"].items()
    }


def distance(one: list[Any], other: list[Any]) -> list[float]:
    def values(found: list[Any]) -> list[float]:
        return [float(x[0] if isinstance(x, (tuple, list)) else x) for x in found]

    return [abs(a - b) for a, b in zip(values(one), values(other), strict=True)]


@pytest.fixture(scope="module")
def plain(tasks: TaskManager) -> dict[str, list[Any]]:
    """What the harness's own model type says."""
    return answers(tasks, HFLM(model(), tokenizer=tokenizer(), batch_size=2, max_length=300))


def test_the_type_is_registered() -> None:
    assert lm_eval.api.registry.get_model("kvmix") is KVMixLM


def test_sixteen_bits_give_what_hf_gives(tasks, plain) -> None:
    assert {name: len(found) for name, found in plain.items()} == KINDS
    wrapped = KVMixLM(model(), KVPlan.uniform(1, 16), tokenizer=tokenizer(), batch_size=2, max_length=300)
    found = answers(tasks, wrapped)
    for name in ("choose", "roll"):
        assert max(distance(found[name], plain[name])) < 1e-3
        assert [x[1] for x in found["choose"]] == [x[1] for x in plain["choose"]]
    assert found["write"] == plain["write"]


def test_two_bits_differ_and_eight_hardly(tasks, plain) -> None:
    change = {}
    for bits in (2, 8):
        wrapped = KVMixLM(model(), key_bits=bits, tokenizer=tokenizer(), batch_size=4, max_length=300)
        change[bits] = answers(tasks, wrapped)
    for name in ("choose", "roll"):
        few, many = (distance(change[bits][name], plain[name]) for bits in (2, 8))
        assert max(many) < 0.1
        assert min(few) > 0.05
    assert len(change[2]["write"]) == 3
    assert change[2]["write"] != plain["write"]


def test_the_command_line_reads_a_folder_and_passes_options_on(tasks, tmp_path, caplog) -> None:
    model().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    KVPlan.uniform(1, 4, 2).save_pretrained(tmp_path / "plan")
    wrapped = KVMixLM.create_from_arg_string(
        f"pretrained={tmp_path},plan={tmp_path / 'plan'},step=8,"
        "dtype=bfloat16,max_length=160,prefix_token_id=3",
        {"batch_size": 3, "device": "cpu"},
    )
    assert str(wrapped.model.dtype) == "torch.bfloat16"
    assert (wrapped.batch_size, wrapped.step, wrapped.max_length) == (3, 8, 160)
    assert wrapped.prefix_token_id == 3
    assert (wrapped.plan.key_bits, wrapped.plan.value_bits) == (4, 2)
    told = wrapped.get_model_info()
    assert told["kvmix_plan_digest"] == wrapped.plan.digest
    assert told["kvmix_bits_per_element"] == 4.0
    short = [(None, [3] * 20, [4]), (None, [3] * 170, [4])]
    with caplog.at_level("WARNING"):
        wrapped._loglikelihood_tokens(short, disable_tqdm=True)
    assert "1 of 2 requests read a cache in which nothing is packed" in caplog.text
    assert "cutting 10 tokens from the left" in caplog.text


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"batch_size": "auto"}, EvaluationError, "pass a number"),
        ({"plan": KVPlan.uniform(1, 4), "key_bits": 2}, EvaluationError, "leave out the preset"),
        ({"plan": KVPlan.uniform(7, 4)}, PlanLayerError, "7 layers"),
        ({"step": 0}, EvaluationError, "step must be"),
    ],
)
def test_what_cannot_be_evaluated_is_told(options, kind, message) -> None:
    with pytest.raises(kind, match=message):
        KVMixLM(model(), tokenizer=tokenizer(), **options)


def test_encoder_decoders_are_refused() -> None:
    with pytest.raises(EvaluationError, match="causal"):
        KVMixLM(model(), tokenizer=tokenizer(), backend="seq2seq")
