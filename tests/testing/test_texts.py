"""Chunks are consecutive, and no token of calibration is ever used for evaluation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvmix_fx.testing import texts


def numbered(text: str, **_: object) -> dict[str, list[int]]:
    """A tokenizer whose ids are positions: one token per character."""
    return {"input_ids": list(range(len(text)))}


TEXT = "x" * 1000
"""400 tokens for calibration, 600 for evaluation."""


def test_texts_are_long_enough_for_long_chunks():
    assert len(texts.prose()) > 300_000
    assert len(texts.code()) > 300_000


def test_texts_are_what_they_are_called():
    assert "expression" in texts.prose()
    assert "class ArgumentParser" in texts.code()


def test_chunks_follow_one_another():
    ids = texts.chunks(numbered, TEXT, length=50, count=3, skip=2, part="calibration")
    assert ids.dtype == torch.int64
    assert ids.tolist() == [list(range(start, start + 50)) for start in (100, 150, 200)]


def test_skipped_chunks_are_the_ones_taken_before():
    together = texts.chunks(numbered, TEXT, length=40, count=4)
    apart = [texts.chunks(numbered, TEXT, length=40, count=2, skip=skip) for skip in (0, 2)]
    assert torch.equal(torch.cat(apart), together)


@given(st.data(), st.integers(1, 200), st.integers(1, 200))
def test_calibration_and_evaluation_never_share_a_token(data, calibration_length, evaluation_length):
    seen = {}
    lengths = {"calibration": calibration_length, "evaluation": evaluation_length}
    for part, tokens in (("calibration", 400), ("evaluation", 600)):
        length = lengths[part]
        count = data.draw(st.integers(1, tokens // length))
        skip = data.draw(st.integers(0, tokens // length - count))
        seen[part] = set(texts.chunks(numbered, TEXT, length, count, skip, part).flatten().tolist())
    assert not seen["calibration"] & seen["evaluation"]


def test_too_few_tokens_are_reported_with_what_would_fit():
    with pytest.raises(ValueError, match=r"has 400 tokens.*at most 4 fit"):
        texts.chunks(numbered, TEXT, length=100, count=4, skip=1, part="calibration")


def test_unknown_part_is_refused():
    with pytest.raises(ValueError, match='"calibration" or "evaluation"'):
        texts.chunks(numbered, TEXT, length=10, count=1, part="validation")


def test_real_chunks_decode_to_the_text(tokenizer):
    text = texts.prose()
    ids = texts.chunks(tokenizer, text, length=512, count=2, part="calibration")
    assert text.startswith(tokenizer.decode(ids.flatten()))
