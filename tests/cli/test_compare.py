from __future__ import annotations

from pathlib import Path

import pytest
from running import Kvmix

from kvmix_fx.plan import KVPlan, ModelGeometry

GEOMETRY = ModelGeometry(6, 2, 64)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    low = KVPlan.uniform(GEOMETRY, 2)
    mixed = low.with_layers("0-1,4", key=4)
    return low.save(tmp_path / "low.json"), mixed.save(tmp_path / "mixed.json")


def test_compare_tells_costs_and_differing_layers(kvmix: Kvmix, files: tuple[Path, Path]) -> None:
    answer = kvmix("plan", "compare", *files, "--batch", 2, "--length", 1000, "--json").answer
    for row, file in zip(answer["plans"], files, strict=True):
        plan = KVPlan.load(file)
        assert row["digest"] == plan.digest
        assert row["nominal_bits"] == plan.nominal_bits()
        assert row["bits_per_element"] == plan.bits_per_element()
        assert row["nbytes"] == plan.nbytes(2, 1000)
        assert row["nbytes_16bit"] == KVPlan.uniform(GEOMETRY, 16).nbytes(2, 1000)
    assert answer["differing_layers"] == [
        {"layers": "0-1,4", "formats": ["K2 channel g32 V2 token g32", "K4 channel g32 V2 token g32"]}
    ]
    shown = kvmix("plan", "compare", *files).stdout
    assert "0-1,4" in shown
    assert "3.50" in shown


def test_compare_names_windows_where_they_differ(
    kvmix: Kvmix, files: tuple[Path, Path], tmp_path: Path
) -> None:
    wide = KVPlan.load(files[0]).with_layers(5, window=64).save(tmp_path / "wide.json")
    answer = kvmix("plan", "compare", files[0], wide, "--json").answer
    (difference,) = answer["differing_layers"]
    assert difference["layers"] == "5"
    assert [text.split(", ", 1)[1] for text in difference["formats"]] == [
        "window 32, sink 4, tile 32",
        "window 64, sink 4, tile 32",
    ]


def test_compare_of_equal_plans(kvmix: Kvmix, files: tuple[Path, Path]) -> None:
    assert kvmix("plan", "compare", files[0], files[0], "--json").answer["differing_layers"] == []
    assert "all layers are planned alike" in kvmix("plan", "compare", files[0], files[0]).stdout


def test_compare_takes_the_sizes_of_one_plan_for_all(
    kvmix: Kvmix, files: tuple[Path, Path], tmp_path: Path
) -> None:
    bare = KVPlan.uniform(6, 2).save(tmp_path / "bare.json")
    one, other = kvmix("plan", "compare", files[0], bare, "--json").answer["plans"]
    assert one["nbytes"] == other["nbytes"]


def test_compare_refuses_what_cannot_be_compared(
    kvmix: Kvmix, files: tuple[Path, Path], tmp_path: Path
) -> None:
    bare = KVPlan.uniform(6, 2).save(tmp_path / "bare.json")
    longer = KVPlan.uniform(ModelGeometry(7, 2, 64), 2).save(tmp_path / "longer.json")
    wider = KVPlan.uniform(ModelGeometry(6, 2, 128), 2).save(tmp_path / "wider.json")
    for arguments, message in (
        ((files[0],), "two plans or more"),
        ((files[0], longer), "different numbers of layers"),
        ((files[0], wider), "pass --model to choose one"),
        ((bare, bare), "pass --model"),
    ):
        outcome = kvmix("plan", "compare", *arguments)
        assert outcome.code == 1
        assert message in outcome.stderr
