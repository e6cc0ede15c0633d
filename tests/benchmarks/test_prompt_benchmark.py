"""The benchmark of a prompt's importance at small sizes: what it compares, times and searches."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks.kernels import prompt_importance as benchmark
from benchmarks.kernels.rows import Rows
from benchmarks.rows import load
from kvmix_kernels.triton.timing import Case, Timing

CASE = Case(1, 1, 2, 40, 32)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_a_wrong_kernel_gets_no_rows(monkeypatch):
    assert list(benchmark.wrong(CASE, DEVICE)) == []
    real = benchmark.importance.of_prompt
    monkeypatch.setattr(benchmark.importance, "of_prompt", lambda *args: real(*args) * 1.01)
    assert len(list(benchmark.wrong(CASE, DEVICE))) == 5


def test_every_part_is_timed_and_searched(tmp_path, capsys):
    ran = []

    def clock(calls):
        for call in calls:
            call()
        ran.append(len(calls))
        return Timing(float(len(ran)), 1.0, 1.0)

    benchmark.timed(CASE, Rows("token_tiers_step", tmp_path), DEVICE, clock)
    found = {row.provider: row for row in load("token_tiers_step", folder=tmp_path)}
    assert len(found) == 10
    assert all(row.ratio for name, row in found.items() if not name.startswith("sdpa"))
    best = benchmark.search(CASE, DEVICE, clock)
    # this clock says that each takes longer than the one before
    assert best == {"rows": benchmark.ROWS[0], "columns": benchmark.COLUMNS[0]}
    assert capsys.readouterr().out.count(" us\n") >= len(benchmark.ROWS) + len(benchmark.COLUMNS)


@pytest.mark.parametrize("which", ["rows", "columns"])
def test_a_part_is_one_launch(which, monkeypatch):
    started = []
    other = {"rows": "columns", "columns": "rows"}[which]

    class Noted:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: started.append(self.name)

    for name in (which, other):
        monkeypatch.setattr(benchmark.importance, f"{name}_kernel", Noted(name))
    benchmark.part(benchmark.Prompt.random(CASE, DEVICE), which)
    assert started == [which]
