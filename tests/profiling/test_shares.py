"""Shares of tokens at more bits: measured as a packed model loses them, and the best are taken."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvmix_fx
from benchmarks.planner.evaluate import Evaluator
from kvmix_fx.errors import BudgetError, CalibrationError, FormatError, PlanFieldError, ProfileError
from kvmix_fx.plan import KVPlan, LayerPlan, ModelGeometry, QuantSpec, TokenTier
from kvmix_fx.plan.budget import Budget
from kvmix_fx.plan.schema import NO_TIER_IN_WINDOW
from kvmix_fx.profiling.kl import divergence, log_probabilities, read_in_formats
from kvmix_fx.profiling.observe import Observer, observing
from kvmix_fx.profiling.shares import NO_GAIN, ShareLosses, check_budget, choose_shares, measure_shares
from kvmix_fx.testing.models import MOE, tiny_architecture, tiny_llama

FIRST, LENGTH = 4 + 32 + 32, 4 + 32 + 2 * 32
RAW = LayerPlan(QuantSpec(16), QuantSpec(16))
GEOMETRY = ModelGeometry(3, 2, 32)


def tokens(rows: int = 1, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(1))


def uniform(model: Any) -> KVPlan:
    return KVPlan.uniform(model, 2, 2).for_model(model)


def only(plan: KVPlan, layer: int, tier: TokenTier | None) -> KVPlan:
    """The other layers at 16 bits."""
    layers = [RAW] * len(plan.layers)
    layers[layer] = replace(plan.layers[layer], token_tier=tier)
    return replace(plan, layers=tuple(layers))


def tiers(policy: str, bits: int, recent: float, *shares: float) -> tuple[TokenTier, ...]:
    return tuple(TokenTier(share, None, bits, policy=policy, recent=recent) for share in shares)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", [("accumulated", 16, 0.5), ("last", 4, 0.0), ("mean", 8, 0.0), ("norm", 4, 0.3)], ids=str
)
def test_a_share_costs_what_a_packed_cache_loses(given: tuple[str, int, float]) -> None:
    """A prompt that ends where a tile was packed, and the tokens until the next one is."""
    torch.set_num_threads(1)
    model = tiny_llama()
    ids, plan = tokens(2), uniform(model)
    offered = tiers(*given, 0.1, 0.3)
    found = measure_shares(model, plan, offered, ids)
    evaluate = Evaluator(model, ids, FIRST, LENGTH - FIRST)
    for layer, losses in enumerate(found.losses):
        want = [evaluate(only(plan, layer, tier)).mean_kl for tier in (None, *offered)]
        assert losses == pytest.approx(want, rel=1e-3, abs=1e-7)
        # the control: shares are told apart
        assert max(losses) > 1.1 * min(losses)


@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_a_share_costs_what_a_compiled_model_loses(name: str) -> None:
    """MPT's mask is not causal alone: it has a bias for how far tokens are apart."""
    alibi = "MptConfig", {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}, "eager"
    model = tiny_llama() if name == "llama" else tiny_architecture(*alibi)
    ids = tokens()
    plan = uniform(model)
    (tier,) = tiers("accumulated", 16, 0.5, 0.3)
    found = measure_shares(model, plan, (tier,), ids)
    with torch.no_grad():
        exact = model(ids).logits[0, FIRST:].log_softmax(-1)
        kvmix_fx.compile(model, only(plan, 1, tier), inner="eager")
        cache = model(ids[:, :FIRST], use_cache=True).past_key_values
        packed = model(ids[:, FIRST:], past_key_values=cache).logits[0].log_softmax(-1)
    loss = float((exact.exp() * (exact - packed)).sum(-1).mean())
    # differences of nearly equal numbers in float32
    assert found.losses[1][1] == pytest.approx(loss, rel=1e-3, abs=2e-7)
    assert found.losses[1][0] > 1.1 * loss


def test_no_share_costs_what_the_formats_do_and_padding_nothing() -> None:
    """Several tiles are packed on the way."""
    model, ids = tiny_llama(), tokens(2, 150)
    plan = uniform(model)
    mask = torch.ones_like(ids)
    mask[1, 120:] = 0
    (tier,) = tiers("last", 4, 0.0, 0.2)
    found = measure_shares(model, plan, (tier,), {"input_ids": ids, "attention_mask": mask})
    with observing(model):
        observer = Observer(model, sink_length=4)
        for layer in (0, 1):
            total = 0.0
            for row, length in zip(ids, (150, 120), strict=True):
                read = row[None, :length]
                exact = log_probabilities(observer.read(read), FIRST, length)
                formats = {(layer, "key"): plan.layers[layer].key, (layer, "value"): plan.layers[layer].value}
                moved = log_probabilities(read_in_formats(observer, read, length, formats), FIRST, length)
                total += divergence(exact, moved)
            mean = total / (150 + 120 - 2 * FIRST)
            assert found.losses[layer][0] == pytest.approx(mean, rel=1e-3, abs=1e-7)
    assert all(none > some for none, some in found.losses)


def test_the_layer_that_matters_gets_the_share() -> None:
    model, ids = tiny_llama(), tokens()
    plan = uniform(model)
    (tier,) = tiers("accumulated", 4, 0.0, 0.2)
    one = replace(plan, layers=(replace(plan.layers[0], token_tier=tier), plan.layers[1]))
    for layer, idle in ((0, 1), (1, 0)):
        model = tiny_llama()
        # attention without a say
        model.model.layers[idle].self_attn.o_proj.weight.data.zero_()
        given = {"policy": "accumulated", "shares": (0.2,), "progress": False}
        found = choose_shares(model, plan, Budget(bits=one.bits_per_element()), ids, **given)
        assert found.layers[layer].token_tier == tier
        assert found.layers[idle].token_tier is None
        said = found.provenance["token_tiers"]
        assert said["predicted_loss"] < 0.95 * said["loss_without"]
        assert said["data"]["tokens"] == LENGTH
        assert KVPlan.from_json(found.to_json()) == found


@given(
    losses=st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=3, max_size=3),
    room=st.floats(0, 1.2),
    unit=st.sampled_from(["bits", "bytes_per_token", "total_bytes"]),
)
def test_the_least_loss_within_the_budget_is_chosen(
    losses: list[tuple[float, ...]], room: float, unit: str
) -> None:
    plan = KVPlan.uniform(GEOMETRY, 2).with_layers(1, key=3, value=4)
    offered = tiers("last", 4, 0.0, 0.1, 0.3)
    known = ShareLosses(plan, offered, tuple(losses))

    def budget(amount: float) -> Budget:
        sized: dict[str, Any] = {"batch": 2, "length": 300} if unit == "total_bytes" else {}
        return Budget(**{unit: amount}, **sized)

    def shared(places: tuple[int, ...]) -> KVPlan:
        layers = zip(plan.layers, places, strict=True)
        return replace(plan, layers=tuple(replace(one, token_tier=(None, *offered)[n]) for one, n in layers))

    cost = budget(1).cost
    least, most = cost(plan), cost(shared((2, 2, 2)))
    limit = budget(least + room * (most - least))
    found = known.choose(limit)
    assert limit.allows(cost(found))
    possible = [p for p in itertools.product(range(3), repeat=3) if limit.allows(cost(shared(p)))]
    best = min(sum(losses[layer][n] for layer, n in enumerate(places)) for places in possible)
    assert found.provenance["token_tiers"]["predicted_loss"] == pytest.approx(best, abs=1e-8)
    places = [0 if one.token_tier is None else 1 + offered.index(one.token_tier) for one in found.layers]
    assert sum(losses[layer][n] for layer, n in enumerate(places)) == pytest.approx(best, abs=1e-8)
    assert found == known.choose(limit)
    with pytest.raises(BudgetError, match="below"):
        known.choose(budget(0.9 * least))


def test_layers_with_a_window_have_no_share() -> None:
    """gpt-oss: a layer with a window, one without; both have a learned sink."""
    model = tiny_architecture("GptOssConfig", {"sliding_window": 96} | MOE, "eager")
    ids = tokens()
    plan = KVPlan.uniform(model, 2, 2)
    found = choose_shares(model, plan, Budget(bits=12.0), ids, shares=[0.1, 0.4], policy="mean", bits=16)
    assert found.layers[0].token_tier is None
    assert found.layers[1].token_tier == TokenTier(0.4, None, 16, policy="mean", recent=0.0)
    assert found.provenance["token_tiers"]["unavailable"] == {"0": NO_TIER_IN_WINDOW}


def test_layers_that_have_as_many_bits_as_the_tier_have_no_share() -> None:
    model = tiny_llama()
    plan = KVPlan.uniform(model, 2, 2).with_layers([0], key=4, value=4)
    found = choose_shares(model, plan, Budget(bits=9.0), tokens(), shares=[0.4], policy="norm")
    assert [layer.token_tier for layer in found.layers] == [
        None,
        TokenTier(0.4, None, 4, policy="norm", recent=0.0),
    ]
    assert found.provenance["token_tiers"]["unavailable"] == {"0": NO_GAIN}
    with pytest.raises(ProfileError, match=NO_GAIN):
        choose_shares(model, KVPlan.uniform(model, 4, 4), Budget(bits=9.0), tokens(), policy="norm")


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (PlanFieldError, "cannot be measured ahead", {"policy": "oracle"}),
        (PlanFieldError, "cannot be measured ahead", {"policy": "random"}),
        (PlanFieldError, "policy must be", {"policy": "newest"}),
        (PlanFieldError, "above 0", {"shares": (0,)}),
        (PlanFieldError, "shares must be numbers", {"shares": 0.1}),
        (PlanFieldError, "whole percents", {"shares": (0.125,)}),
        (FormatError, "less than one token", {"shares": (0.01, 0.1)}),
        (PlanFieldError, "bits", {"bits": 3}),
        (BudgetError, "below", {"budget": Budget(bits=2.5)}),
        (CalibrationError, "at least 100 tokens", {"data": tokens(1, 99)}),
        (PlanFieldError, "a tier of tokens already", {"plan": ("token_tier", TokenTier())}),
        (ProfileError, "stays at 16 bits", {"plan": ("key", 16)}),
    ],
    ids=lambda value: "" if isinstance(value, type) else str(value)[:30],
)
def test_what_cannot_be_measured_is_refused(
    error: type[Exception], match: str, changes: dict[str, Any]
) -> None:
    model = tiny_llama()
    plan = KVPlan.uniform(model, 2, 2)
    given: dict[str, Any] = {"plan": plan, "budget": Budget(bits=4.0), "data": tokens()} | changes
    if "plan" in changes:
        name, value = changes["plan"]
        given |= {"plan": plan.with_layers("all", **{name: value}), "budget": Budget(bits=15.9)}
    with pytest.raises(error, match=match):
        choose_shares(model, **given)


def test_a_plan_with_tiers_is_told_from_one_that_takes_too_much() -> None:
    """No budget is large enough for it."""
    model = tiny_llama(num_hidden_layers=1)
    for plan, error in (
        (KVPlan.preset("mikv", model), PlanFieldError),
        (KVPlan.uniform(model, 4), BudgetError),
    ):
        with pytest.raises(
            error, match=r"a tier of tokens already|takes without any tier of tokens: raise it"
        ):
            check_budget(plan, Budget(bits=3.0))
