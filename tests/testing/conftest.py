"""Fixtures that hold the one real model for a whole test session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmix_fx.errors import MissingPackageError
from kvmix_fx.testing.smollm2 import load_smollm2

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def smollm2() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2 in float32 on the CPU with its tokenizer; skips with the install commands if it is not here."""
    try:
        return load_smollm2()
    except MissingPackageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def model(smollm2) -> LlamaForCausalLM:
    return smollm2[0]


@pytest.fixture(scope="session")
def tokenizer(smollm2) -> PreTrainedTokenizerFast:
    return smollm2[1]
