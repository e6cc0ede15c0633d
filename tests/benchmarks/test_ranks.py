"""generate() under tensor parallelism as a benchmark: tiny, on CPUs."""

from __future__ import annotations

import argparse
import os
import sys
import time

import pytest
import torch

from benchmarks.e2e import ranks
from benchmarks.e2e.models import build
from benchmarks.rows import load

KVMIX = "kvmix k2.2v2.4 g128 w32"


def options(output, **changes):
    settings = {
        "shape": "tiny", "layers": 1, "tp": 2, "case": ["b2 n70 +12"], "provider": None, "graphs": ["off"],
        "device": "cpu", "machine": "cpu-test", "inner": None, "output": output,
    }  # fmt: skip
    return argparse.Namespace(**settings | changes)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no ranks")
def test_two_ranks_leave_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    progress = tmp_path / "progress"
    command = ranks.rank_command(options(tmp_path), "b2 n70 +12", ranks.CHECK, "off", progress)
    assert ranks.watch([*command, "--provider", KVMIX], progress) is None
    assert int(progress.read_text()) > 12
    rows = {(row.provider, row.metric): row for row in load("generate", "cpu-test", tmp_path)}

    def value(metric, provider="check"):
        return rows[f"{provider}, no graphs", metric].value

    assert value("rank_difference") == value("rank_difference", KVMIX) == 0
    assert value("8_bits_against_one_process") < 1e-3
    assert value("2_bits_against_one_process") < 1e-2
    # the controls
    assert value("2_bits_against_8") > 0.1
    assert value("8_bits_against_16") > 1e-3
    assert value("tokens_per_second", KVMIX) > 0
    case = rows[f"{KVMIX}, no graphs", "cache_bytes"]
    assert case.case == "tiny 1 layers tp2 b2 n70 +12"
    plan = ranks.generate.KVMIX[KVMIX](build("tiny", "cpu", 1))
    assert case.value == plan.nbytes(2, 82, cache="fixed", tp_size=2)
    assert "--progress" not in case.command
    assert "--tp 2 --case 'b2 n70 +12' --provider check --graphs off" in case.command


def test_trials_that_hang_or_fail_are_ended_and_reported(tmp_path, monkeypatch, capsys):
    progress = tmp_path / "progress"
    hangs = [sys.executable, "-c", "import time; time.sleep(600)"]
    started = time.perf_counter()
    progress.write_text("2")
    assert ranks.watch(hangs, progress, hang=0.5) >= 0.5
    progress.write_text("1")
    assert ranks.watch(hangs, progress, hang=600, compiling=0.5) >= 0.5
    assert ranks.watch([sys.executable, "-c", "raise SystemExit(3)"], progress) == 0
    assert time.perf_counter() - started < 60

    ends = iter([None, 61.0, 0.0])
    monkeypatch.setattr(ranks, "watch", lambda *_: next(ends))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    asked = options(tmp_path, provider=["check", KVMIX, "transformers static"], machine=None)
    assert ranks.main(asked) == 1
    (row,) = load("generate", folder=tmp_path)
    assert (row.provider, row.metric, row.value) == (f"{KVMIX}, no graphs", "hang", 61.0)
    said = capsys.readouterr().out
    assert "made no step in 61 s" in said
    assert "transformers static, no graphs failed" in said


def test_every_case_is_a_trial_and_the_check_is_one_for_all():
    asked = options(None, case=["b1 n9 +9", "b2 n9 +9"], graphs=None)
    found = ranks.trials(asked)
    assert len(found) == 2 + 2 * 2 * 2
    assert found[:2] == [("b1 n9 +9", "check", "off"), ("b1 n9 +9", "check", "on")]
