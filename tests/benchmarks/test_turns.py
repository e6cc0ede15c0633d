"""Steps of two processes in turns."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.e2e.turns import SKIPPED, STEPS, Turns, compared


def test_two_take_turns_and_each_has_as_many_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    order = []

    class Noted(Turns):
        def mark(self, name):
            order.append((self._place, name))
            super().mark(name)

    both = [Noted(place, tmp_path, 3) for place in (0, 1)]

    def run(turns):
        if turns._place:
            turns.wait(0)
        return [bool(turns(torch.ones(2, 1), None).any()) for _ in range(3 * STEPS)]

    with ThreadPoolExecutor(2) as pool:
        stops = [stop for found in pool.map(run, both) for stop in found]
    assert not any(stops)
    assert order == [(place, turn) for turn in range(3) for place in (0, 1)]
    assert [len(turns.medians) for turns in both] == [3, 3]
    assert SKIPPED < STEPS


def test_a_drift_that_slows_both_is_not_in_the_ratio():
    drift = [1 + 0.1 * i for i in range(40)]
    low, ratio, high = compared(drift, [1.02 * (x + 0.05) for x in drift])
    assert low <= ratio <= high
    assert abs(ratio - 1.02) < 1e-6
