from __future__ import annotations

from pathlib import Path

import pytest
from running import WORDS, Kvmix, Outcome
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from kvmix_fx.cli import app
from kvmix_fx.testing.models import tiny_llama


@pytest.fixture
def kvmix() -> Kvmix:
    """Run a command line; an exception that is no message fails the test."""

    def run(*arguments: str | Path | float) -> Outcome:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama of four layers, with a tokenizer that knows a few words."""
    folder = tmp_path_factory.mktemp("tiny")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    tiny_llama(num_hidden_layers=4, vocab_size=len(WORDS)).save_pretrained(folder)
    return folder
