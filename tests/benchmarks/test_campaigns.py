"""Rounds of property tests: what is counted, and that a failure is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import campaigns

TESTS = """
from hypothesis import given, settings, strategies as st

@settings(max_examples=37, database=None)
@given(st.integers())
def test_holds(number):
    pass

@settings(max_examples=37, database=None)
@given(st.integers())
def test_may_not_hold(number):
    assert number < {bound}
"""


@pytest.mark.parametrize(("bound", "failed"), [("float('inf')", []), ("100", ["test_may_not_hold"])])
def test_a_round_counts_examples_and_says_what_failed(tmp_path, monkeypatch, bound, failed):
    path = tmp_path / "test_numbers.py"
    path.write_text(TESTS.format(bound=bound))
    monkeypatch.setitem(campaigns.CAMPAIGNS, "layers", ((str(path),), "holds or may", 1))
    found = campaigns.run("layers", 1, ["-p", "no:cacheprovider"])
    assert [name.split("::")[-1] for name in found["failed"]] == failed
    assert found["examples"] == 74 if not failed else found["examples"] > 37


def test_a_campaign_adds_to_its_line(tmp_path):
    path = tmp_path / "rounds.jsonl"
    for name in ("layers", "tiers", "layers"):
        campaigns.record(name, {"examples": 10, "seconds": 1.4, "failed": ["a"]}, path)
    lines = campaigns.read(path)
    assert [(x["campaign"], x["rounds"], x["examples"], x["failed"]) for x in lines] == [
        ("layers", 2, 20, ["a"]),
        ("tiers", 1, 10, ["a"]),
    ]


def test_the_tests_of_a_campaign_are_there():
    for files, _, _ in campaigns.CAMPAIGNS.values():
        assert all((campaigns.rows.ROOT / file).exists() for file in files)


def test_no_test_says_how_many_examples_it_tries_whatever_the_profile():
    """Else it would not go deeper with the others."""
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        if path != Path(__file__):
            assert not re.search(r"max_examples=\d", path.read_text()), path
