"""examples/ as a user runs them, on a tiny model in one process."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

import kvmix_fx
from kvmix_fx.cache import QuantizedKVTensor
from tests import documents

pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = "a robot may obey the three laws of robotics " * 100


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    documents.answer_for_every_name(monkeypatch, layers=1)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)


def run(name, *arguments):
    importlib.import_module(f"examples.{name}").main(["--model", "anything", *arguments])


def test_generate_says_what_it_took(capsys):
    run("generate", "--new-tokens", "8")
    shown = capsys.readouterr().out
    assert "The three laws of robotics are" in shown
    assert "13 tokens take" in shown
    assert "8192 tokens take" in shown


def test_a_chat_goes_on_in_one_cache(capsys):
    run("chat", "--new-tokens", "5", "--say", "What is a robot", "--say", "Name a robot")
    length = int(capsys.readouterr().out.rsplit("\n", 2)[-2].split()[0])
    # two turns and their answers, less the last token
    assert length > 2 * 5 + 8


def test_a_document_is_read_once_and_asked_twice(capsys):
    question = ("--ask", "What is it")
    run("long_document", "--document", "text.txt", *question, *question, "--new-tokens", "6")
    shown = capsys.readouterr().out
    read, packed, plain = re.match(r"(\d+) tokens read, ([\d,]+) bytes instead of ([\d,]+)\n", shown).groups()
    assert int(read) == 900
    assert int(packed.replace(",", "")) < int(plain.replace(",", "")) / 3
    first, second = shown.split("> What is it")[1:]
    assert first.strip() == second.strip()


def test_a_saved_prompt_continues_as_the_one_that_was_read(capsys):
    run("prompt_cache", "--prompt", TEXT, "--new-tokens", "6")
    made = capsys.readouterr().out.split("\n", 1)
    run("prompt_cache", "--prompt", TEXT, "--new-tokens", "6")
    loaded = capsys.readouterr().out.split("\n", 1)
    assert "bytes for" in made[0]
    assert "not read again" in loaded[0]
    assert loaded[1] == made[1]


def test_a_profile_makes_a_plan(capsys):
    texts = ("--calibration", "text.txt", "--held-out", "text.txt")
    sizes = ("--prompts", "1", "--length", "136", "--chunks", "1", "--prompt", "96", "--steps", "2")
    run("plan_from_profile", *texts, *sizes)
    shown = capsys.readouterr().out
    assert "planned: " in shown
    assert "uniform K2V2: 3.00 bits" in shown
    assert json.loads(Path("my-plan", "kvmix_plan.json").read_text())


def test_the_tour_runs_from_its_first_cell_to_its_last(monkeypatch, capsys):
    pytest.importorskip("matplotlib").use("Agg")
    pair = documents.model(1), documents.tokenizer()
    monkeypatch.setattr("kvmix_fx.testing.smollm2.load_smollm2", lambda: pair)
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = {}
    for number, source in enumerate(code, 1):
        exec(compile(source, f"tour.ipynb, code cell {number}", "exec"), names)
    assert all(result.kl_mean.value > 0 for result in names["found"].values())
    assert isinstance(kvmix_fx.returned_cache(names["out"]).layers[0].keys, QuantizedKVTensor)
    # what readers see was made by these very cells, in this order
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(code) + 1))
