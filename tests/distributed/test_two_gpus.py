"""Tensor parallelism over two GPUs: decode steps are replayed with their communication, and ranks end."""

from __future__ import annotations

import pytest
import torch

from .running import results, torchrun

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)


def test_replayed_steps_are_those_that_are_launched_and_processes_end(tmp_path):
    torchrun(2, "tests.distributed.gpu_worker", tmp_path)
    first, second = results(tmp_path, 2)
    for one in (first, second):
        assert one["replay"]["graphs"] == ""
        assert one["replay"]["launches"] == "switched off"
    for run in ("graphs", "launches", "2 bits"):
        assert torch.equal(first[run], second[run])
    scale = first["launches"].square().mean().sqrt()
    assert (first["graphs"] - first["launches"]).abs().max() < 1e-4 * scale
    assert (first["2 bits"] - first["launches"]).square().mean().sqrt() > 0.02 * scale
