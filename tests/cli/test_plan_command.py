from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from running import Kvmix

from kvmix_fx.cli.plan import LENGTHS, PlanChoice
from kvmix_fx.errors import PlanError
from kvmix_fx.plan import PRESETS, KVPlan, ModelGeometry, default_plan

SIZES = ("--layers", 6, "--kv-heads", 2, "--head-dim", 64)
GEOMETRY = ModelGeometry(6, 2, 64)
REQUIRED = {
    "uniform": ("--key-bits", 4),
    "kvmix": ("--option", "high_key_layers=first:2", "--option", "high-value-layers=5"),
}


def test_new_writes_the_plan_that_the_api_makes(kvmix: Kvmix, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    outcome = kvmix(
        *("plan", "new", out, *SIZES, "--preset", "uniform", "--key-bits", 4, "--value-bits", 2),
        *("--group-size", 64, "--window", 16, "--sink", 4, "--set", "0-1,-1:k8v4", "--set", "3:v3", "--json"),
    )
    expected = KVPlan.uniform(GEOMETRY, 4, 2, 64, window=16, sink_length=4)
    expected = expected.with_layers("0-1,-1", key=8, value=4).with_layers(3, value=3)
    written = KVPlan.load(out)
    assert outcome.code == 0
    assert written.layers == expected.layers
    assert written.geometry == GEOMETRY
    assert written.provenance["changes"] == ["0-1,-1:k8v4", "3:v3"]
    assert outcome.answer["plan"] == written.to_dict()


def test_new_without_plan_options_makes_tiers(kvmix: Kvmix, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    assert kvmix("plan", "new", out, *SIZES).code == 0
    assert KVPlan.load(out) == KVPlan.preset("tiers", GEOMETRY) == default_plan(GEOMETRY)


def test_new_takes_options_that_are_no_whole_numbers(kvmix: Kvmix, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    options = ("--preset", "tiers", "--option", "bits=2.15", "--option", "drop_layers=1-2")
    assert kvmix("plan", "new", out, *SIZES, *options).code == 0
    assert KVPlan.load(out) == KVPlan.preset("tiers", GEOMETRY, bits=2.15, drop_layers="1-2")


def test_new_takes_options_that_are_true_or_false(kvmix: Kvmix, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    options = ("--preset", "mikv", "--option", "balancer=false", "--option", "channel_tiers=True")
    assert kvmix("plan", "new", out, *SIZES, *options).code == 0
    assert KVPlan.load(out) == KVPlan.preset("mikv", GEOMETRY, balancer=False, channel_tiers=True)


def test_new_refuses_what_no_model_could_follow(kvmix: Kvmix, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    refused = kvmix("plan", "new", out, *SIZES, "--preset", "mikv", "--option", "policy=oracle")
    assert refused.code != 0
    assert "a model gives none" in refused.stderr
    assert not out.exists()


@pytest.mark.parametrize("head_dim", [16, 48, 80, 128])
def test_the_plan_of_who_names_none_fits_heads_of_any_size(head_dim: int) -> None:
    plan = default_plan(ModelGeometry(3, 2, head_dim))
    assert 2 < plan.bits_per_element() < 3
    assert all(layer.formats(head_dim) for layer in plan.layers)


def test_other_bits_for_keys_in_tiers_replace_the_tiers() -> None:
    plan = PlanChoice(change=["0:k16v16", "1:k2", "2:k4v4"]).make(GEOMETRY)
    assert [layer.label for layer in plan.layers[:3]] == ["K16V16", "K2V2", "K4/2 of 16/48V4"]
    assert plan.layers[3:] == default_plan(GEOMETRY).layers[3:]


@pytest.mark.parametrize("name", PRESETS)
def test_new_makes_every_preset(kvmix: Kvmix, tmp_path: Path, name: str) -> None:
    out = tmp_path / "plan.json"
    outcome = kvmix("plan", "new", out, *SIZES, "--preset", name, *REQUIRED.get(name, ()))
    assert outcome.code == 0, outcome.stderr
    assert KVPlan.load(out).provenance["preset"] == name


def test_new_takes_the_sizes_of_a_model(kvmix: Kvmix, tmp_path: Path, tiny: Path) -> None:
    out = tmp_path / "plan.json"
    assert kvmix("plan", "new", out, "--model", tiny, "--key-bits", 2).code == 0
    assert KVPlan.load(out).geometry == ModelGeometry(2, 2, 32)


def test_new_names_the_model_but_no_folder(kvmix: Kvmix, tmp_path: Path, tiny: Path) -> None:
    for model, expected in (("smollm2", "smollm2"), (tiny, None)):
        out = tmp_path / "plan.json"
        assert kvmix("plan", "new", out, "--model", model, "--force").code == 0
        assert KVPlan.load(out).base_model == expected


def test_show_prints_the_table_and_the_content(kvmix: Kvmix, tmp_path: Path) -> None:
    plan = default_plan(GEOMETRY)
    file = plan.save(tmp_path / "plan.json")
    assert plan.describe() in kvmix("plan", "show", file).stdout
    answer = kvmix("plan", "show", file, "--json").answer
    assert answer["plan"] == plan.to_dict()
    assert answer["bits_per_element"] == plan.bits_per_element()


def test_show_reads_a_folder(kvmix: Kvmix, tmp_path: Path) -> None:
    default_plan(GEOMETRY).save_pretrained(tmp_path)
    assert kvmix("plan", "show", tmp_path).code == 0


def test_show_leaves_unknown_what_depends_on_the_head_size(kvmix: Kvmix, tmp_path: Path) -> None:
    file = KVPlan.preset("kv-adaquant", 4).save(tmp_path / "plan.json")
    assert kvmix("plan", "show", file, "--json").answer["bits_per_element"] is None


def test_estimate_gives_the_bytes_of_the_plan(kvmix: Kvmix, tmp_path: Path) -> None:
    plan = default_plan(GEOMETRY)
    file = plan.save(tmp_path / "plan.json")
    arguments = ("--batch", 3, "--length", 100, "--length", 5000, "--itemsize", 4, "--json")
    rows = kvmix("plan", "estimate", file, *arguments).answer["estimates"]
    assert [row["length"] for row in rows] == [100, 5000]
    for row in rows:
        elements = 3 * row["length"] * 2 * 6 * 2 * 64
        assert row["nbytes"] == plan.nbytes(3, row["length"], itemsize=4)
        assert row["nbytes_16bit"] == 4 * elements
        assert row["ratio"] == pytest.approx(row["nbytes_16bit"] / row["nbytes"])
        assert row["bits_per_element"] == pytest.approx(8 * row["nbytes"] / elements)


def test_estimate_counts_what_one_rank_allocates(kvmix: Kvmix, tmp_path: Path) -> None:
    plan = default_plan(GEOMETRY)  # 2 KV heads
    file = plan.save(tmp_path / "plan.json")
    whole, mine = (
        kvmix("plan", "estimate", file, "--length", 5000, "--tp", ranks, "--json").answer for ranks in (1, 2)
    )
    (all_ranks,), (rank,) = whole["estimates"], mine["estimates"]
    assert (whole["tp_size"], mine["tp_size"]) == (1, 2)
    assert rank["nbytes"] == plan.nbytes(1, 5000, tp_size=2)
    for field in ("nbytes", "nbytes_16bit"):
        assert 2 * rank[field] == all_ranks[field]
    assert rank["bits_per_element"] == all_ranks["bits_per_element"]
    assert "one rank of 2" in kvmix("plan", "estimate", file, "--tp", 2).stdout
    refused = kvmix("plan", "estimate", file, "--tp", 4, "--json")
    assert refused.answer["error"]["type"] == "HeadSplitError"


def test_estimate_shows_several_lengths_by_default(kvmix: Kvmix, tmp_path: Path) -> None:
    file = default_plan(GEOMETRY).save(tmp_path / "plan.json")
    rows = kvmix("plan", "estimate", file, "--json").answer["estimates"]
    assert tuple(row["length"] for row in rows) == LENGTHS
    table = kvmix("plan", "estimate", file).stdout
    assert all(f"{length:,}" in table for length in LENGTHS)


def test_estimate_takes_the_sizes_of_a_model(kvmix: Kvmix, tmp_path: Path, tiny: Path) -> None:
    file = KVPlan.uniform(2, 2).save(tmp_path / "plan.json")
    without = kvmix("plan", "estimate", file)
    assert without.code == 1
    assert "--model" in without.stderr
    rows = kvmix("plan", "estimate", file, "--model", tiny, "--length", 64, "--json").answer["estimates"]
    assert rows[0]["nbytes"] == KVPlan.uniform(ModelGeometry(2, 2, 32), 2).nbytes(1, 64)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("--preset", "unifrom"), "PresetError", "did you mean 'uniform'"),
        (("--preset", "kvmix"), "PresetError", "--option NAME=VALUE"),
        (("--preset", "kivi", "--value-bits", 2), "PresetError", "value_bits"),
        (("--key-bits", 5), "PlanFieldError", "bits must be one of"),
        (("--key-bits", 4, "--group-size", 24), "FormatError", "multiple of 16"),
        (("--set", "0-3"), "CommandError", "LAYERS:BITS"),
        (("--set", ":k4"), "CommandError", "LAYERS:BITS"),
        (("--set", "0:"), "CommandError", "LAYERS:BITS"),
        (("--set", "0:4"), "CommandError", "LAYERS:BITS"),
        (("--set", "9:k4"), "PlanLayerError", "no layer 9"),
        (("--option", "tile"), "CommandError", "NAME=VALUE"),
        (("--model", "smollm2"), "CommandError", "not both"),
    ],
)
def test_new_refuses(
    kvmix: Kvmix, tmp_path: Path, arguments: tuple[str | int, ...], kind: str, message: str
) -> None:
    out = tmp_path / "plan.json"
    outcome = kvmix("plan", "new", out, *SIZES, *arguments, "--json")
    error = outcome.answer["error"]
    assert outcome.code == 1
    assert error["type"] == kind
    assert message in error["message"]
    assert outcome.stderr == f"error: {error['message']}\n"
    assert not out.exists()


@pytest.mark.parametrize("name", PRESETS)
def test_new_names_heads_that_no_preset_packs(kvmix: Kvmix, tmp_path: Path, name: str) -> None:
    sizes = ("--layers", 6, "--kv-heads", 2, "--head-dim", 100)
    outcome = kvmix("plan", "new", tmp_path / "plan.json", *sizes, "--preset", name, *REQUIRED.get(name, ()))
    assert outcome.code == 1
    assert "100" in outcome.stderr
    assert "multiple of 16" in outcome.stderr


def test_new_takes_a_window_without_bits_and_names_a_wrong_one(kvmix: Kvmix, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    assert kvmix("plan", "new", out, *SIZES, "--window", 64).code == 0
    assert KVPlan.load(out) == KVPlan.preset("tiers", GEOMETRY, window=64)
    refused = kvmix("plan", "new", out, *SIZES, "--window", -5, "--force")
    assert "window must be at least 0, got -5" in refused.stderr


def test_show_is_for_people(kvmix: Kvmix, tmp_path: Path) -> None:
    plan = KVPlan.uniform(GEOMETRY, 4)
    facts = {"changes": ["0:k4", "1:v2"], "predicted_loss": 0.012414672142, "version": "0.1.0"}
    file = replace(plan, provenance=facts, name="a name that is long " * 3).save(tmp_path / "plan.json")
    lines = kvmix("plan", "show", file).stdout.splitlines()
    assert lines[-3:] == ["changes: 0:k4; 1:v2", "predicted loss: 0.01241", "version of kvmix_fx: 0.1.0"]
    assert all(len(line) <= 80 for line in lines)


def test_new_wants_a_model_or_all_sizes(kvmix: Kvmix, tmp_path: Path) -> None:
    outcome = kvmix("plan", "new", tmp_path / "plan.json", "--layers", 3, "--kv-heads", 2)
    assert outcome.code == 1
    assert "--head-dim" in outcome.stderr


def test_new_replaces_a_file_only_by_force(kvmix: Kvmix, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    out.write_text("mine")
    refused = kvmix("plan", "new", out, *SIZES)
    assert refused.code == 1
    assert "--force" in refused.stderr
    assert out.read_text() == "mine"
    assert kvmix("plan", "new", out, *SIZES, "--force").code == 0


def test_new_into_a_missing_folder_is_a_message(kvmix: Kvmix, tmp_path: Path) -> None:
    outcome = kvmix("plan", "new", tmp_path / "none" / "plan.json", *SIZES)
    assert outcome.code == 1
    assert "cannot be written" in outcome.stderr


@pytest.mark.parametrize("command", ["show", "estimate"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "is empty"),
        ('{"format": "kvmix_plan", "layers": [', "truncated"),
        ('{"format": "kvmix_plan", "version": 99, "layers": []}', "version"),
        ('{"format": "kvmix_plan", "version": 1, "layers": [{"key": {"bits": 5}}]}', "layers[0]"),
    ],
)
def test_a_file_that_is_no_plan_is_a_message(
    kvmix: Kvmix, tmp_path: Path, command: str, content: str | None, message: str
) -> None:
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_text(content)
    outcome = kvmix("plan", command, file, "--json")
    assert outcome.code == 1
    assert outcome.answer["error"]["type"].startswith("Plan")
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_a_plan_file_takes_changes_but_no_preset(tmp_path: Path) -> None:
    file = str(KVPlan.uniform(GEOMETRY, 2).save(tmp_path / "plan.json"))
    changed = PlanChoice(plan=file, change=["last:1:k8"]).build(GEOMETRY)
    assert [layer.key.bits for layer in changed.layers] == [2, 2, 2, 2, 2, 8]
    for choice in (PlanChoice(plan=file, preset="kivi"), PlanChoice(plan=file, key_bits=4)):
        with pytest.raises(ValueError, match="leave out --preset"):
            choice.build(GEOMETRY)


def test_a_plan_file_for_another_model_is_refused(tmp_path: Path) -> None:
    file = str(KVPlan.uniform(3, 2).save(tmp_path / "plan.json"))
    with pytest.raises(PlanError, match="3 layers"):
        PlanChoice(plan=file).build(GEOMETRY)
