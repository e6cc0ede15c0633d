"""`kvmix plan auto`: profile, plan and evaluation in one go, and again from where it was left."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from running import PROMPT, Kvmix

import kvmix_fx
from kvmix_fx.plan import KVPlan
from kvmix_fx.profiling import Profile

SIZES = ("--prompt", 96, "--steps", 8, "--chunks", 2)


def test_auto_profiles_plans_judges_and_keeps_the_profile(kvmix: Kvmix, tiny: Path, tmp_path: Path) -> None:
    texts = {name: tmp_path / f"{name}.txt" for name in ("calibration", "other")}
    texts["calibration"].write_text(PROMPT * 3)
    texts["other"].write_text("then it slept on the mat " * 90)
    out, kept = tmp_path / "plan.json", tmp_path / "plan.profile.safetensors"
    given = ("--data", texts["calibration"], "--eval-data", texts["other"], *SIZES)

    first = kvmix("plan", "auto", tiny, "--bits", 3, "--out", out, *given)
    assert first.code == 0, first.stderr
    assert re.search(r"1 of 3, profile\nup to 8 prompts .* about \d+ (seconds|minutes)", first.stderr)
    assert re.search(r"3 of 3, evaluation: 2 pieces .* about \d+ (seconds|minutes)", first.stderr)
    assert all(len(line) <= 80 for line in first.stdout.splitlines() if line.startswith(("┃", "│")))
    plan = KVPlan.load(out)
    assert plan.layers == Profile.load(kept).plan(bits=3).layers
    assert plan.bits_per_element() <= 3
    (told,) = plan.provenance["evaluation"]
    assert told["data"]["source"] == "other.txt" != plan.provenance["data"]["source"]
    assert f"cost {told['kl_mean']['value']:.4f} nats a token" in first.stdout
    shown = " ".join(kvmix("plan", "show", out).stdout.split())
    assert f"cost: KL {told['kl_mean']['value']:.4f} ± " in shown
    assert "on 16 predictions of other.txt" in shown

    other = tmp_path / "more.json"
    second = kvmix("plan", "auto", tiny, "--bits", 5, "--out", other, "--profile", kept, *given, "--json")
    assert second.code == 0, second.stderr
    assert f"taken from {kept}" in second.stderr
    assert "--data is not read" in second.stderr
    assert "up to 8 prompts" not in second.stderr
    assert 3 < second.answer["bits_per_element"] <= 5
    assert second.answer["evaluation"]["kl_mean"]["value"] < told["kl_mean"]["value"]


def test_auto_says_what_cannot_be_done_before_the_work(kvmix: Kvmix, tiny: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "plan.json", tmp_path / "plan.profile.safetensors"
    for arguments, message in (
        (("--bits", -1), "bits"),
        (("--bits", 3, "--data", "a.txt", "--eval-data", "a.txt"), "give --eval-data another one"),
        (("--bits", 3, "--profile", tmp_path / "none" / "profile"), "no folder"),
    ):
        outcome = kvmix("plan", "auto", tiny, "--out", out, *arguments)
        assert outcome.code == 1
        assert message in outcome.stderr
        assert "loading" not in outcome.stderr
    kept.write_bytes(b"no profile")
    outcome = kvmix("plan", "auto", tiny, "--out", out, "--bits", 3)
    assert "cannot be read as a profile" in outcome.stderr
    out.write_text("{}")
    outcome = kvmix("plan", "auto", tiny, "--out", out, "--bits", 3)
    assert "pass --force" in outcome.stderr


def test_auto_refuses_the_profile_of_another_model(kvmix: Kvmix, tiny: Path, tmp_path: Path) -> None:
    from kvmix_fx.testing.models import tiny_llama

    kept = tmp_path / "plan.profile.safetensors"
    ids = torch.randint(1, 128, (1, 160))
    kvmix_fx.profile(tiny_llama(num_hidden_layers=1), ids, signals="weight_gradient").save(kept)
    outcome = kvmix("plan", "auto", tiny, "--bits", 3, "--out", tmp_path / "plan.json")
    assert outcome.code == 1
    assert "profile this model" in outcome.stderr
