"""The sweep over models of transformers: what is said of a row, and one row."""

from __future__ import annotations

import pytest

from benchmarks.coverage import one, tables, tiny
from benchmarks.coverage.records import load


@pytest.mark.parametrize(
    ("packed", "exact", "rough", "outcome"),
    [
        (2, 0.01, 1.0, one.PACKED),
        (1, 0.01, 1.0, one.PARTLY),
        (0, 0.0, 0.0, one.LEFT),
        (0, 0.5, 0.5, one.WRONG),
        (2, 0.5, 1.0, one.WRONG),  # 8 bits are no better than a few
        (2, 0.5, 0.0, one.WRONG),
        (2, 0.0, 0.0, one.BLIND),  # a damaged cache would not show
    ],
)
def test_a_row_is_judged_with_its_control(packed, exact, rough, outcome):
    found = {"packed": packed, "layers": 2, "difference8": exact, "difference2": rough}
    assert one._judged(found) == {"outcome": outcome}


@pytest.mark.parametrize(
    ("rounded", "outcome"), [(0.45, one.PACKED), (0.2, one.WRONG), (2.0, one.PACKED), (0.0, one.WRONG)]
)
def test_a_model_that_magnifies_is_compared_with_itself(rounded, outcome):
    """What the plain model says of a cache rounded to 8 bits; half of what 2 bits do is always wrong."""
    found = {"packed": 2, "layers": 2, "difference8": 0.5, "difference2": 3.4, "rounded8": rounded}
    assert one._judged(found) == {"outcome": outcome}
    assert one._judged(found | {"difference8": 1.8}) == {"outcome": one.WRONG}


@pytest.mark.parametrize(
    ("packed", "tiers", "outcome"),
    [
        (2, 1.9, one.PACKED),
        (1, 0.1, one.PARTLY),
        (2, 2.5, one.WRONG),
        (0, 0.0, one.LEFT),
        (0, 0.5, one.WRONG),
    ],
)
def test_tiers_may_say_other_things_than_2_bits_but_no_more(packed, tiers, outcome):
    found = {"packed": packed, "layers": 2, "differencetiers": tiers, "difference2": 1.0}
    assert one._judged(found) == {"outcome": outcome}


def test_rows_of_short_windows():
    """The prompt is longer than the window, of which the plain cache keeps 47 tokens."""
    row = one.run("mistral", "MistralForCausalLM", "sdpa", "growing", one.WINDOWS)
    assert (row["outcome"], row["packed"], row["layers"]) == (one.PACKED, 2, 2)
    assert one.run("llama", "LlamaForCausalLM", "sdpa", "growing", one.WINDOWS) == {"outcome": one.NO_WINDOW}


def test_one_row():
    """A model whose layers are windows, in a static cache."""
    row = one.run("mistral", "MistralForCausalLM", "sdpa", "static")
    assert row["outcome"] == one.PACKED, row
    assert row["packed"] == row["layers"] == 2
    assert row["graphs"] == 2


def test_models_are_those_that_transformers_lists():
    listed = tiny.causal_and_other_models()
    assert {"causal", "sequence to sequence", "image and text"} == {task for task, _, _ in listed}
    assert ("causal", "llama", "LlamaForCausalLM") in listed


def test_committed_rows_are_complete_enough_for_their_tables():
    assert all(row["transformers"] and row["commit"] for row in load().values())
    head, body = tables.summary()
    total = next(row for row in (dict(zip(head, line, strict=True)) for line in body) if row["cache"] == "")
    assert int(total["tried"]) == len(load())
    assert int(total[one.WRONG]) == 0
