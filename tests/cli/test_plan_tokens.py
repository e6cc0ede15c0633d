"""`kvmix plan tokens`: shares of tokens for each layer of a plan."""

from __future__ import annotations

from pathlib import Path

from running import PROMPT, Kvmix

from kvmix_fx.plan import KVPlan


def test_a_plan_gets_shares_of_tokens(kvmix: Kvmix, tiny: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "calibration.txt", tmp_path / "plan.json"
    text.write_text(PROMPT * 3)
    given = ("--key-bits", 2, "--share", 0.1, "--share", 0.3, "--prompts", 1, "--data", text, "--out", out)
    for arguments, message in (
        (("--bits", 2), "below"),
        (("--bits", 4, "--policy", "oracle"), "cannot be measured ahead"),
        (("--bits", 4, "--tier-bits", 5), "bits"),
        (("--bits", 4, "--data", "none.txt"), "--data: none.txt"),
    ):
        outcome = kvmix("plan", "tokens", tiny, *given, *arguments)
        assert outcome.code == 1
        assert message in outcome.stderr
        assert "loading" not in outcome.stderr
    outcome = kvmix("plan", "tokens", tiny, *given, "--bits", 4, "--json")
    assert outcome.code == 0, outcome.stderr
    plan = KVPlan.load(out)
    assert 3 < plan.bits_per_element() == outcome.answer["bits_per_element"] <= 4
    tiers = [layer.token_tier for layer in plan.layers if layer.token_tier is not None]
    assert tiers
    assert {(tier.bits, tier.policy) for tier in tiers} == {(4, "last")}
