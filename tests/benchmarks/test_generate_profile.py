"""What a profile of a step says of the time in which the GPU works and waits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.e2e.generate import LONGEST_WAIT, occupied

CUDA, CPU = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU


def profiled(*events: tuple[float, float], device: object = CUDA) -> SimpleNamespace:
    made = [
        SimpleNamespace(time_range=SimpleNamespace(start=start, end=end), device_type=device)
        for start, end in events
    ]
    return SimpleNamespace(events=lambda: made)


@pytest.mark.parametrize(
    ("events", "busy", "waited"),
    [
        ([], 0, 0),
        ([(10, 14), (16, 20)], 8, 2),
        # side by side, one within another, and one that begins early; in any order
        ([(16, 20), (10, 14), (11, 13), (13, 18)], 10, 0),
        # a wait for the host
        ([(0, 5), (5 + LONGEST_WAIT, 30)], 10, 0),
    ],
)
def test_time_is_counted_once(events, busy, waited):
    assert occupied(profiled(*events)) == (busy, waited)
    assert occupied(profiled(*events, device=CPU)) == (0, 0)
