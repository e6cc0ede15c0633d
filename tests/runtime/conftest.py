"""A recorder for machines without a GPU: it runs a step anew, on the recorded inputs."""

from __future__ import annotations

import pytest
import torch

from kvmix_fx.runtime import recording
from kvmix_fx.runtime.recording import Recording


class Recorder:
    """What a CUDA graph does: nothing while recording; a replay reads and writes the recorded tensors."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, run, inputs):
        self.recorded += 1
        saved = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        outputs = list(run(*inputs))
        for x, before in zip(inputs, saved, strict=True):
            if isinstance(x, torch.Tensor):
                x.copy_(before)

        def again():
            self.replayed += 1
            for old, new in zip(outputs, run(*inputs), strict=True):
                if isinstance(old, torch.Tensor) and old is not new:
                    old.copy_(new)

        return Recording(outputs, again)


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def on_cpu(monkeypatch, recorder):
    """Let machines without a GPU do what CUDA does."""
    monkeypatch.setattr(recording, "REPLAY_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(recording, "record_cuda", recorder)
    return recorder
