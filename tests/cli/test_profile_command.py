from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
from running import PROMPT, Kvmix

from kvmix_fx.plan import KVPlan
from kvmix_fx.profiling import Profile, run
from kvmix_fx.testing.models import tiny_llama


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(PROMPT * 3)
    return path


def test_a_profile_is_measured_once_and_solved_for_any_budget(
    kvmix: Kvmix, tiny: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "profile.safetensors"
    options = ("--data", text, "--length", 160, "--device", "cpu")
    measured = kvmix("profile", tiny, "--out", out, *options, "--json")
    assert measured.code == 0, measured.stderr
    assert measured.answer["data"]["source"] == "text.txt"
    assert len(measured.answer["signals"]["fisher"]["keys"]) == 2
    profile = Profile.load(out)
    assert list(profile.per_layer("fisher")[1]) == measured.answer["signals"]["fisher"]["values"]

    for bits in (3.0, 5.0):
        plan = tmp_path / f"plan{bits}.json"
        solved = kvmix("plan", "solve", out, "--bits", bits, "--out", plan, "--json")
        assert solved.code == 0, solved.stderr
        assert KVPlan.load(plan) == profile.plan(bits=bits)
        assert solved.answer["bits_per_element"] <= bits
    other = tmp_path / "other.json"
    choice = ("--signal", "weight_gradient", "--allocator", "greedy")
    solved = kvmix("plan", "solve", out, "--bytes-per-token", 100, "--out", other, *choice)
    assert solved.code == 0, solved.stderr
    assert KVPlan.load(other).provenance["signal"] == "weight_gradient"
    assert KVPlan.load(other).bytes_per_token <= 100
    free = tmp_path / "free.json"
    choice = ("--order", "prompt", "--sink", 0, "--window", 64, "--max-drop-kl", 0)
    assert kvmix("plan", "solve", out, "--bits", 2.6, "--out", free, *choice).code == 0
    assert KVPlan.load(free) == profile.plan(
        bits=2.6, order="prompt", sink_length=0, window=64, max_drop_kl=0
    )
    wrong = kvmix("plan", "solve", out, "--bits", 2.6, "--out", tmp_path / "no.json", "--order", "tile")
    assert wrong.code == 1
    assert "--order is plan or prompt" in wrong.stderr
    mine = tmp_path / "rank.json"
    size = ("--total-bytes", 80_000, "--batch", 1, "--length", 1000)
    solved = kvmix("plan", "solve", out, *size, "--tp", 2, "--out", mine)
    assert solved.code == 0, solved.stderr
    plan = KVPlan.load(mine)
    assert plan.nbytes(1, 1000, tp_size=2) <= 80_000 < plan.nbytes(1, 1000)
    assert plan.provenance["budget"]["tp_size"] == 2


def test_profile_tells_the_time_beforehand_and_fits_80_columns(
    kvmix: Kvmix, tiny: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "profile.safetensors"
    outcome = kvmix("profile", tiny, "--out", out, "--data", text, "--length", 160, "--device", "cpu")
    assert outcome.code == 0, outcome.stderr
    assert re.search(r"up to 8 prompts of 160 tokens, \d+ reads: about \d+ (seconds|minutes)", outcome.stderr)
    table = [line for line in outcome.stdout.splitlines() if line.startswith(("┃", "│"))]
    assert len(table) == 3
    assert all(len(line) <= 80 and "…" not in line for line in table)
    keys, values = Profile.load(out).per_layer("fisher_scaled")
    top = max(keys + values)
    for layer, line in enumerate(table[1:]):
        cells = [cell.split() for cell in line.strip("│").split("│")]
        for (rank,), (bar, number), numbers in ((*cells[1:3], keys), (*cells[3:5], values)):
            assert int(rank) == 1 + sum(other > numbers[layer] for other in numbers)
            assert number == f"{numbers[layer]:.2g}"
            assert len(bar) == max(1, round(16 * numbers[layer] / top))


def test_the_bar_counts_what_was_said_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmix_fx.plan import ModelGeometry

    model, counted = tiny_llama(), []

    @contextlib.contextmanager
    def bar(description, total, wanted):
        steps: list[None] = []
        yield lambda: steps.append(None)
        counted.append((total, len(steps)))

    monkeypatch.setattr(run, "bar", bar)
    ids = torch.randint(1, 128, (5, 160))  # one more than are read for every format
    for signals in (("fisher",), ("fisher_scaled", "fisher"), ("kl",)):
        run.profile(model, ids, signals=signals)
        expected = run.reads(signals, ModelGeometry.of(model), len(ids))
        assert counted.pop() == (expected, expected)


def test_what_cannot_be_done_is_said_before_the_work(kvmix: Kvmix, tiny: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"")
    outcome = kvmix("profile", tiny, "--out", taken)
    assert outcome.code == 1
    assert "--force" in outcome.stderr
    outcome = kvmix("profile", tiny, "--out", tmp_path / "none" / "profile.safetensors")
    assert outcome.code == 1
    assert "no folder" in outcome.stderr
    arguments = ("profile", tiny, "--out", tmp_path / "p", "--signal", "guess", "--device", "cpu", "--json")
    outcome = kvmix(*arguments)
    assert outcome.answer["error"]["type"] == "SignalError"
    outcome = kvmix("plan", "solve", taken, "--bits", 3, "--out", tmp_path / "plan.json", "--json")
    assert outcome.answer["error"]["type"] == "ProfileFileError"
