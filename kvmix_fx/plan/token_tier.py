"""The part of a plan that says which tokens of a layer are kept at more bits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from kvmix_fx.errors import PlanFieldError
from kvmix_fx.plan.checks import check_choice, check_integer, check_type
from kvmix_kernels import layout
from kvmix_kernels.layout import HighTier

Policy: TypeAlias = Literal["accumulated", "mean", "last", "norm", "random", "oracle"]


@dataclass(frozen=True)
class TokenTier:
    """Tokens that matter, kept at more bits than the others: a high tier over the packed tokens of a layer.

    Every row and KV head has tokens of its own in it. All others stay in the layer's own bits, none is
    evicted (MiKV, arXiv 2402.18096). A token that leaves the tier for a more important one is read from codes
    that were made of it when it was packed.

    Attributes:
        share: of the packed tokens, from .01 to .99; whole percents, and at least one token of a tile (4 %
            of 32). None where `tokens` says how many.
        tokens: a fixed number instead, whatever the context; with share=None.
        bits: of the tokens in it; 16 (as they are), 8 or 4.
        group_size: consecutive channels that share a scale at 8 or 4 bits, or "head".
        policy: how importance is counted, a file of `kvmix_kernels.importance`. "accumulated": attention so
            far (H2O, MiKV); "mean": the same for each query (ZipCache); "last": of the last queries (SnapKV);
            "norm": small keys; "random" and "oracle" (scores that the caller gives) are controls.
        recent: part of the tier that its newest tokens have whatever their scores.
        balancer: whether keys are multiplied by a factor for each channel, from the prompt, and queries
            divided by it.
        evict: whether packed tokens outside the tier are ignored, as eviction would have it. A control:
            their codes are still stored.

    Raises:
        PlanFieldError: a field has a wrong type or a value outside its choices.
        FormatError: the parts do not fit together.
    """

    share: float | None = 0.2
    tokens: int | None = None
    bits: int = layout.RAW_BITS
    group_size: int | Literal["head"] = "head"
    policy: Policy = "accumulated"
    recent: float = 0.5
    balancer: bool = False
    evict: bool = False

    def __post_init__(self) -> None:
        if (self.share is None) == (self.tokens is None):
            raise PlanFieldError(
                "a high tier has either a share of the tokens (.2 where none is given) or a number of them: "
                + ("give one of share and tokens" if self.tokens is None else "with tokens, set share=None"),
                "share",
            )
        if self.tokens is not None:
            check_integer("tokens", self.tokens, 2)
        if self.share is not None:
            _check_percent("share", self.share, 1, 99)
        _check_percent("recent", self.recent, 0, 100)
        check_choice("bits", self.bits, layout.HIGH_BITS)
        check_choice("policy", self.policy, layout.POLICIES)
        check_type("balancer", self.balancer, bool)
        check_type("evict", self.evict, bool)
        if isinstance(self.group_size, str) and self.group_size != "head":
            raise PlanFieldError(
                f'group_size must be a number of channels or "head", got {self.group_size!r}', "group_size"
            )
        if self.group_size != "head":
            check_integer("group_size", self.group_size, 16)
        self.format(scored=True)

    def format(self, scored: bool) -> HighTier:
        """As formats have it. `scored`: of keys, which keep the scores and are balanced."""
        high = layout.make_high(
            0 if self.share is None else round(self.share * 100),
            self.tokens or 0,
            self.bits,
            layout.WHOLE_HEAD if self.group_size == "head" else self.group_size,
            self.policy,
            round(self.recent * 100),
            self.balancer,
            self.evict,
        )
        return high if scored else high._replace(scored=0, balanced=0)

    def to_dict(self) -> dict[str, Any]:
        """As a plan file has it."""
        return asdict(self)


def _check_percent(name: str, value: float, low: int, high: int) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and low / 100 <= value <= high / 100):
        raise PlanFieldError(
            f"{name} must be a number from {low / 100:g} to {high / 100:g}, got {value!r}", name
        )
    if abs(value * 100 - round(value * 100)) > 1e-9:
        raise PlanFieldError(f"{name} must be whole percents, such as .2 or .05, got {value!r}", name)
