"""How many tokens of each layer are worth more bits: measured, and chosen under a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.cache.orders import key_order
from kvmix_fx.errors import BudgetError, PlanFieldError, ProfileError
from kvmix_fx.parallel import check_placement
from kvmix_fx.plan import KVPlan, LayerPlan, TokenTier
from kvmix_fx.plan.allocators.exact import exact
from kvmix_fx.plan.allocators.problem import Ladders, Offer
from kvmix_fx.plan.budget import Budget
from kvmix_fx.plan.token_tier import Policy
from kvmix_fx.profiling.calibration import (
    Calibration,
    check_vocabulary,
    is_text,
    load_calibration,
    tokenizer_of,
)
from kvmix_fx.profiling.kl import divergence, log_probabilities
from kvmix_fx.profiling.observe import Listeners, Observer, Scoring, observing
from kvmix_fx.progress import progress as bar
from kvmix_kernels.importance import policy_of
from kvmix_kernels.layout import RAW_BITS, TensorFormat
from kvmix_kernels.tokens.scores import of_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARES = (0.05, 0.1, 0.2, 0.3)
"""Of the packed tokens, tried beside none."""
PROMPTS = 4
"""Pieces of text, unless told."""
CONTROLS: Mapping[str, str] = {
    "oracle": "its scores come from queries that nobody has asked yet",
    "random": "it is a control, whose tokens differ from row to row of a batch",
}
"""Policies that text read once says nothing about."""
NOT_PACKED = "a tensor of it stays at 16 bits by the plan"
NO_GAIN = "it has as many bits as the tier would have"
NO_SITE = "no attention of it was found"


def choose_shares(
    model: nn.Module,
    plan: KVPlan,
    budget: Budget,
    data: object = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    policy: Policy = "last",
    bits: int = 4,
    group_size: int | Literal["head"] = "head",
    recent: float = 0.0,
    shares: Sequence[float] = SHARES,
    prompts: int | None = None,
    length: int | None = None,
    progress: bool = True,
) -> KVPlan:
    """Give each layer of a plan the share of tokens at more bits that buys most, under a budget.

    For each layer and share the divergence of the predictions is measured, with that layer's keys and values
    as the plan and the tier keep them and all other layers exact: one forward from the layer on, per layer,
    share and prompt. The least sum of these is then chosen exactly. No tier costs nothing, so by what was
    measured the result is never worse than `plan`.

    Args:
        model: a causal language model, as for `kvmix_fx.profile`.
        plan: without tiers of tokens; its formats stay.
        budget: what the cache may cost, tiers included.
        data: calibration text, as for `kvmix_fx.profile`. Use none that the plan will be judged on.
        tokenizer: of the model, for data that is text; None loads it by the model's name.
        policy: how importance is counted, see `TokenTier`.
        bits: of the tokens in the tier, likewise.
        group_size: likewise.
        recent: likewise.
        shares: of the packed tokens, to choose from, besides none; whole percents.
        prompts: pieces of text, at most (4).
        length: tokens of each (512).
        progress: show a bar, if stderr is a terminal.

    Returns:
        `plan` with a `TokenTier` in the layers that get a share. Its provenance has an entry "token_tiers":
        policy and bits, the shares offered, the divergence predicted with them and without (sums over the
        layers, nats per prediction), the budget and the text.

    Raises:
        PlanFieldError: the plan has tiers of tokens, no share is offered, or a field of the tier is none.
        FormatError: a share of some layer's tile is less than one token.
        BudgetError: the budget is below what `plan` costs, or above an unquantized cache.
        PlanLayerError, HeadSizeError, PlanGeometryError: the plan does not fit the model.
        ProfileError: no layer can have a tier.
        CalibrationError, NoSiteError, HeadSplitError, PlacementError: as `kvmix_fx.profile`.
    """
    tiers = tiers_of(policy, bits, group_size, recent, shares)
    plan = plan.for_model(model)
    _check_plan(plan, tiers)
    check_budget(plan, budget)
    found = measure_shares(
        model, plan, tiers, data, tokenizer=tokenizer, prompts=prompts, length=length, progress=progress
    )
    return found.choose(budget)


@dataclass(frozen=True)
class ShareLosses:
    """What each share of tokens at more bits leaves of each layer's loss.

    Attributes:
        plan: without tiers of tokens, for the model that was measured.
        tiers: that were tried.
        losses: KL in nats per prediction, one row per layer: without a tier, then with each. Zeros in layers
            that cannot have one.
        unavailable: those layers, with the reason.
        data: the text, as `Calibration.describe` has it.
    """

    plan: KVPlan
    tiers: tuple[TokenTier, ...]
    losses: tuple[tuple[float, ...], ...]
    unavailable: Mapping[int, str] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    def choose(self, budget: Budget) -> KVPlan:
        """The shares of least loss in all; see `choose_shares`.

        Raises:
            BudgetError: the budget is below what the plan costs, or above an unquantized cache.
        """
        base = check_budget(self.plan, budget)
        costs: dict[object, tuple[float, ...]] = {}
        offered: list[tuple[Offer, ...]] = []
        for index, (layer, losses) in enumerate(zip(self.plan.layers, self.losses, strict=True)):
            if index in self.unavailable:
                offered.append((Offer(0.0, 0.0, (0, 0)),))
                continue
            assert self.plan.geometry is not None
            # layers that are alike cost the same to the last bit
            alike = layer, self.plan.geometry.layer(index)
            if alike not in costs:
                more = (budget.cost(self._with({index: tier})) - base for tier in self.tiers)
                costs[alike] = (0.0, *more)
            pairs = enumerate(zip(costs[alike], losses, strict=True))
            offered.append(tuple(Offer(cost, loss, (n, 0)) for n, (cost, loss) in pairs))
        limit = budget.amount - base + 1e-9 * budget.amount
        choice = [place for place, _ in exact(Ladders(tuple(offered), max(0.0, limit)))]
        chosen = {index: self.tiers[place - 1] for index, place in enumerate(choice) if place}
        tier = self.tiers[0]
        said = {
            "signal": "kl",
            **{name: getattr(tier, name) for name in ("policy", "bits", "group_size", "recent")},
            "offered": [0.0, *(one.share for one in self.tiers)],
            "predicted_loss": sum(row[place] for row, place in zip(self.losses, choice, strict=True)),
            "loss_without": sum(row[0] for row in self.losses),
            "budget": budget.to_dict(),
            "data": dict(self.data),
        }
        if self.unavailable:
            said["unavailable"] = {str(index): why for index, why in self.unavailable.items()}
        provenance = dict(self.plan.provenance) | {"token_tiers": said}
        name = f"{self.plan.name}, shares of tokens, {budget}"
        return replace(self._with(chosen), name=name, provenance=provenance)

    def _with(self, chosen: Mapping[int, TokenTier]) -> KVPlan:
        layers = (replace(layer, token_tier=chosen.get(n)) for n, layer in enumerate(self.plan.layers))
        return replace(self.plan, layers=tuple(layers))


def measure_shares(
    model: nn.Module,
    plan: KVPlan,
    tiers: Sequence[TokenTier],
    data: object = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: int | None = None,
    length: int | None = None,
    progress: bool = True,
) -> ShareLosses:
    """Measure what `choose_shares` chooses by; for several budgets from one measurement.

    Every query reads a layer as it would after a prompt that ended where the last tile was packed: of the
    tokens packed by then, those that matter most by the queries so far are in the tier. Importance is counted
    in the exact model. Tokens that have not left the window are exact, as is the sink.

    Args:
        model: as for `choose_shares`.
        plan: likewise.
        tiers: to try, alike but for their shares.
        data: likewise.
        tokenizer: likewise.
        prompts: likewise.
        length: likewise.
        progress: likewise.

    Raises as `choose_shares`, but for budgets.
    """
    tiers = tuple(tiers)
    plan = plan.for_model(model)
    _check_plan(plan, tiers)
    check_placement(model)
    packable = [layer for layer in plan.layers if not _forbids(layer, tiers[0])]
    if not packable:
        whys = "; ".join(dict.fromkeys(_forbids(layer, tiers[0]) for layer in plan.layers))
        raise ProfileError(f"no layer of the plan can have a tier of tokens: {whys}")
    observer = Observer(model, max(layer.window.length for layer in packable))
    if tokenizer is None and is_text(data):
        tokenizer = tokenizer_of(model)
    second = max(_flush(_formats(layer, tiers[0])[0], 2) for layer in packable)
    calibration = load_calibration(
        data, tokenizer, prompts=prompts or PROMPTS, length=length, shortest=second
    )
    check_vocabulary(model, calibration)
    with observing(model):
        observer.look(calibration.ids[:1].to(next(model.parameters()).device))
        unavailable = {
            index: why
            for index, layer in enumerate(plan.layers)
            if (why := _forbids(layer, tiers[0]) or _why_not(observer, index))
        }
        if len(unavailable) == len(plan.layers):
            whys = "; ".join(dict.fromkeys(unavailable.values()))
            raise ProfileError(f"no layer of the plan can have a tier of tokens: {whys}")
        layers = [n for n in range(len(plan.layers)) if n not in unavailable]
        total = len(calibration.lengths) * (1 + len(layers) * (1 + len(tiers)))
        with bar("measuring shares", total, progress and observer.ranks.rank == 0) as step:
            found = _measure(observer, calibration, plan, tiers, layers, step)
    nothing = (0.0,) * (1 + len(tiers))
    losses = tuple(found.get(n, nothing) for n in range(len(plan.layers)))
    return ShareLosses(plan, tiers, losses, unavailable, calibration.describe())


@torch.no_grad()
def _measure(
    observer: Observer,
    calibration: Calibration,
    plan: KVPlan,
    tiers: tuple[TokenTier, ...],
    layers: list[int],
    step: Callable[[], None],
) -> dict[int, tuple[float, ...]]:
    device = next(observer.model.parameters()).device
    first = min(_flush(_formats(plan.layers[n], tiers[0])[0], 1) for n in layers)
    sums = {n: torch.zeros(1 + len(tiers), dtype=torch.float64) for n in layers}
    for row, length in zip(calibration.ids, calibration.lengths, strict=True):
        ids = row[None].to(device)
        asked: dict[int, tuple[Tensor, Tensor, Scoring]] = {}
        values: dict[int, Tensor] = {}

        def hear_cached(layer: int, role: str, x: Tensor, into: dict[int, Tensor] = values) -> None:
            if role == "value":
                into[layer] = x

        def hear_asked(layer: int, query: Tensor, keys: Tensor, scoring: Scoring, into: Any = asked) -> None:
            into[layer] = query, keys, scoring

        observer.listeners = Listeners(cached=hear_cached, asked=hear_asked)
        reference = log_probabilities(observer.read(ids, keep=True), first, length)
        observer.listeners = Listeners()
        step()
        try:
            for n in layers:
                seen = _Layer(plan.layers[n], tiers[0], *asked.pop(n), values.pop(n), length)
                for place, tier in enumerate((None, *tiers)):
                    observer.readers = {n: seen.readers(tier)}
                    observer.replacements = {(n, role): x for role, x in seen.copies.items()}
                    moved = log_probabilities(observer.read_from(n, ids), first, length)
                    sums[n][place] += divergence(reference, moved)
                    step()
        finally:
            observer.readers.clear()
            observer.replacements.clear()
            observer.forget()
    total = sum(calibration.lengths) - first * len(calibration.lengths)
    # the mean of a divergence is not negative; its floating-point sum may be, by a rounding error
    return {n: tuple((one / total).clamp(min=0).tolist()) for n, one in sums.items()}


class _Layer:
    """A prompt's keys and values as a layer keeps them with tiers of several shares.

    copies: by role what is read of the low tier and, where it is not exact, behind it of the high one,
    [1, Hkv, n * L, D].
    """

    def __init__(
        self,
        layer: LayerPlan,
        tier: TokenTier,
        query: Tensor,
        keys: Tensor,
        scoring: Scoring,
        values: Tensor,
        length: int,
    ) -> None:
        self._layer = layer
        self._format, value_format = _formats(layer, tier, keys.shape[3], values.shape[3])
        order = key_order(layer, keys.shape[1], keys.shape[3], keys.device)
        hint = query[:, :, :length] if order is None else order
        self.copies = {
            "key": _copies(keys, self._format, length, hint),
            "value": _copies(values, value_format, length, None),
        }
        # importance at each length at which a tile is packed
        policy, L = policy_of(self._format), keys.shape[2]
        self._scores = []
        for end in range(_flush(self._format, 1), L, self._format.tile):
            if policy.of_keys is not None:
                scores = policy.of_keys(keys[:, :, :end], torch.arange(end, device=keys.device))
            else:
                mask = None if scoring.mask is None else scoring.mask[..., :end, :end]
                scores = of_prompt(
                    *(query[:, :, :end], keys[:, :, :end], mask, scoring.scale, scoring.softcap),
                    *(policy.queries, scoring.sinks),
                )
            self._scores.append(scores[0])
        self._shape = keys.shape[1], L
        self._device = keys.device

    def readers(self, tier: TokenTier | None) -> Tensor:
        """Which copy each query reads, as `Observer.readers`; None puts no token into the high tier."""
        heads, L = self._shape
        fmt = self._format
        held = torch.zeros(1 + len(self._scores), heads, L, dtype=torch.bool, device=self._device)
        if tier is not None:
            scored = _formats(self._layer, tier)[0]
            for n, scores in enumerate(self._scores, 1):
                held[n].scatter_(1, _chosen(scored, scores), True)
        queries = torch.arange(L, device=self._device)
        flushes = (queries - fmt.sink - fmt.window).clamp(min=0) // fmt.tile
        packed = (queries >= fmt.sink) & (queries < (fmt.sink + flushes * fmt.tile)[:, None])
        high = held[flushes].transpose(0, 1)
        low = packed & ~high
        return low if fmt.high is None or fmt.high.bits == RAW_BITS else torch.cat((low, packed & high), -1)


def _chosen(fmt: TensorFormat, scores: Tensor) -> Tensor:
    """Positions of the tokens in the tier, int64 [Hkv, m], by the scores [Hkv, n] of all that are stored."""
    assert fmt.high is not None
    stored = scores.shape[1]
    end = fmt.packed_end(stored)
    limit = fmt.high.limit(end - fmt.sink)
    positions = torch.arange(fmt.sink, end, device=scores.device)
    ranks = policy_of(fmt).rank(scores[None, :, fmt.sink : end], positions, stored)[0]
    newest = end - limit * fmt.high.recent // 100
    ranks = ranks.masked_fill(positions >= newest, torch.inf)
    return fmt.sink + ranks.argsort(dim=1, descending=True, stable=True)[:, :limit]


def _copies(x: Tensor, fmt: TensorFormat, length: int, hint: Tensor | None) -> Tensor:
    """What the tiers of a format leave of x [1, H, L, D], one behind the other; of padding, what it was."""
    kept = [fmt.low._replace(window=0)]
    if fmt.high is not None and fmt.high.bits != RAW_BITS:
        kept.append(fmt.high_format)
    real, padding = x[:, :, :length], x[:, :, length:]
    parts: list[Tensor] = []
    for n, one in enumerate(kept):
        packed = QuantizedKVTensor.from_hp(real, one, hint=None if n else hint)
        parts += [packed.dequantize(), padding]
    return torch.cat(parts, 2)


def _flush(fmt: TensorFormat, tiles: int) -> int:
    """Tokens stored when so many tiles have been packed."""
    return fmt.sink + fmt.window + tiles * fmt.tile


def _formats(
    layer: LayerPlan, tier: TokenTier, head_dim: int | None = None, value_dim: int | None = None
) -> tuple[TensorFormat, TensorFormat]:
    tiered = replace(layer, token_tier=tier)
    return tiered._formats() if head_dim is None else tiered.formats(head_dim, value_dim)


def tiers_of(
    policy: Policy = "last",
    bits: int = 4,
    group_size: int | Literal["head"] = "head",
    recent: float = 0.0,
    shares: Sequence[float] = SHARES,
) -> tuple[TokenTier, ...]:
    """One for each share above 0, ascending. Arguments and errors as of `choose_shares`."""
    if isinstance(shares, str) or not isinstance(shares, Sequence):
        raise PlanFieldError(f"shares must be numbers such as (.05, .1, .2), got {shares!r}", "shares")
    made = [TokenTier(s, None, bits, group_size, policy, recent) for s in shares if s != 0]
    if not made:
        raise PlanFieldError("shares must have one above 0 to choose from, such as (.05, .1, .2)", "shares")
    _check_policy(policy)
    by_share = {tier.share or 0.0: tier for tier in made}
    return tuple(by_share[share] for share in sorted(by_share))


def _check_policy(policy: str) -> None:
    if policy in CONTROLS:
        raise PlanFieldError(
            f"importance by policy {policy!r} cannot be measured ahead: {CONTROLS[policy]}. Take "
            "accumulated, mean, last or norm",
            "policy",
        )


def _check_plan(plan: KVPlan, tiers: tuple[TokenTier, ...]) -> None:
    if not tiers:
        raise PlanFieldError("there has to be a tier to try", "tiers")
    if len({replace(tier, share=0.5, tokens=None) for tier in tiers}) > 1 or any(t.tokens for t in tiers):
        raise PlanFieldError("tiers to choose from have a share, and differ in nothing else", "tiers")
    first = tiers[0]
    _check_policy(first.policy)
    if first.balancer or first.evict:
        raise PlanFieldError("shares are measured without a balancer and without eviction", "tiers")
    _check_without(plan)
    for layer in plan.layers:
        if not _forbids(layer, first):
            for tier in tiers:
                _formats(layer, tier)


def _check_without(plan: KVPlan) -> None:
    for index, layer in enumerate(plan.layers):
        if layer.token_tier is not None:
            raise PlanFieldError(
                f"layer {index} of the plan has a tier of tokens already: pass the plan without; "
                "dataclasses.replace(layer, token_tier=None) makes such layers",
                "token_tier",
            )


def check_budget(plan: KVPlan, budget: Budget) -> float:
    """What the plan costs, in the budget's unit.

    Raises:
        PlanFieldError: the plan has tiers of tokens.
        BudgetError: the budget is below that, or above an unquantized cache.
    """
    _check_without(plan)
    base = budget.cost(plan)
    if not budget.allows(base):
        raise BudgetError(
            f"a budget of {budget} is below the {base:,.6g} that the plan takes without any tier of tokens: "
            "raise it, or take a plan of fewer bits"
        )
    assert plan.geometry is not None
    budget.check(base, plan.geometry)
    return base


def _forbids(layer: LayerPlan, tier: TokenTier) -> str:
    """Why by its plan a layer has no use for a tier of tokens; '' if it has."""
    if layer.key.is_raw or layer.value.is_raw:
        return NOT_PACKED
    return "" if layer.gains(tier) else NO_GAIN


def _why_not(observer: Observer, index: int) -> str:
    """Why in this model a layer cannot have a tier of tokens; '' if it can."""
    for reasons in (observer.skipped, observer.no_tiers):
        if index in reasons:
            return reasons[index]
    return "" if index in observer.layers else NO_SITE


__all__ = ["ShareLosses", "check_budget", "choose_shares", "measure_shares", "tiers_of"]
