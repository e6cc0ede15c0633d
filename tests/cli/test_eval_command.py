from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from running import PROMPT, Kvmix

from kvmix_fx.cli.evaluate import _curve
from kvmix_fx.evaluation.figures import Figure, StepRange

SIZES = ("--prompt", 96, "--steps", 24, "--chunks", 2)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(PROMPT * 3)
    return path


def test_eval_tells_two_bits_from_sixteen(kvmix: Kvmix, tiny: Path, text: Path) -> None:
    few = kvmix("eval", tiny, "--data", text, "--key-bits", 2, *SIZES, "--json").answer
    all_bits = kvmix("eval", tiny, "--data", text, "--key-bits", 16, *SIZES, "--json").answer
    assert all_bits["kl_max"]["value"] < 1e-6 < 1e-4 < few["kl_mean"]["value"]
    assert few["predictions"] == 48
    assert few["data"]["source"] == "text.txt"
    assert few["kl_mean"]["standard_error"] > 0
    assert [part["last"] for part in few["kl_by_step"]][-1] == 24
    assert few["cache_bytes"] < few["cache_bytes_16bit"]


def test_eval_shows_figures_and_draws(kvmix: Kvmix, tiny: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "eval.png"
    outcome = kvmix("eval", tiny, "--data", text, "--key-bits", 2, *SIZES, "--plot", picture)
    assert outcome.code == 0, outcome.stderr
    for part in ("perplexity ratio", "KL 99.9 %", "same top token", "RMS probability change", "1 to 3"):
        assert part in outcome.stdout
    assert all(len(line) <= 80 for line in outcome.stdout.splitlines()[:-3])
    assert picture.stat().st_size > 1000
    again = kvmix("eval", tiny, "--plot", picture)
    assert again.code == 1
    assert "--force" in again.stderr


def test_eval_of_too_short_a_text_says_so(kvmix: Kvmix, tiny: Path, text: Path) -> None:
    outcome = kvmix("eval", tiny, "--data", text, "--prompt", 5000, "--json")
    assert outcome.code == 1
    assert outcome.answer["error"]["type"] == "EvaluationError"
    assert "too short" in outcome.stderr
    assert "each of --chunks 8 takes 5129 (--prompt 5000, --steps 128 and one to predict)" in outcome.stderr
    assert "calibration" not in outcome.stderr


def test_eval_names_a_single_step_by_its_number() -> None:
    kl = Figure(0.5, None)
    found = SimpleNamespace(kl_by_step=lambda: [StepRange(1, 1, kl), StepRange(2, 3, kl)])
    assert list(_curve(found).columns[0].cells) == ["1", "2 to 3"]


def test_eval_refuses_tasks_it_does_not_know_before_the_model_is_loaded(kvmix: Kvmix, tiny: Path) -> None:
    for arguments, message in (
        (("--tasks", "passkeys"), "no task"),
        (("--tasks", "passkey", "--lengths", "many"), "numbers separated by commas"),
    ):
        outcome = kvmix("eval", tiny, *arguments)
        assert outcome.code == 1
        assert message in outcome.stderr
        assert "loading" not in outcome.stderr


def test_eval_of_tasks_scores_both_caches(kvmix: Kvmix, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "heat.png"
    options = ("--tasks", "passkey,common_words", "--lengths", 200, "--depths", "0,1", "--samples", 1)
    outcome = kvmix("eval", tiny, *options, "--key-bits", 2, "--plot", picture, "--json")
    assert outcome.code == 0, outcome.stderr
    for scores in (outcome.answer["retrieval"], outcome.answer["retrieval_16bit"]):
        assert [(s["task"], s["depth"]) for s in scores] == [
            ("passkey", 0.0),
            ("passkey", 1.0),
            ("common_words", None),
        ]
    assert picture.stat().st_size > 1000
    one = ("--tasks", "passkey", "--lengths", 200, "--depths", "0", "--samples", 1)
    assert "share of the answers found" in kvmix("eval", tiny, *one, "--key-bits", 2).stdout
