"""What some tests need of the machine they run on."""

from __future__ import annotations

import pytest
import torch

needs_installed = pytest.mark.skipif(
    "kvmix" not in torch._dynamo.list_backends(exclude_tags=None),
    reason="run from a source tree that is not installed, where torch finds no backend by this name",
)
