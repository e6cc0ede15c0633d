"""Plans that come with the package, by names such as "kvmix:smollm2-135m/2.5".

They lie in `kvmix_fx/plans`, as MODEL/BITS.json. `benchmarks/planner/shipped.py` made them; each says in its
provenance what it was made from, and what it cost on text that it was not made from.
"""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable

from kvmix_fx.errors import PlanFileError

PREFIX = "kvmix:"
"""What the names begin with. No folder is meant by it, and no Hub repository can have it."""


def shipped_plans() -> tuple[str, ...]:
    """The names of all plans that come along, models in order and fewest bits first."""
    found = [
        f"{PREFIX}{model.name}/{file.name.removesuffix('.json')}"
        for model in _folder().iterdir()
        if model.is_dir()
        for file in model.iterdir()
        if file.name.endswith(".json")
    ]
    return tuple(sorted(found, key=_place))


def shipped_text(name: str) -> bytes:
    """The plan file called `name`, prefix and all.

    Raises:
        PlanFileError: there is none; the message lists those that there are.
    """
    known = shipped_plans()
    if name not in known:
        raise PlanFileError(
            f"no plan {name!r} comes with this package; there are {', '.join(known)}. For another model, "
            '`kvmix plan auto MODEL --bits 2.5` makes one; KVPlan.preset("tiers", model) needs no calibration'
        )
    model, _, bits = name.removeprefix(PREFIX).partition("/")
    return (_folder() / model / f"{bits}.json").read_bytes()


def _folder() -> Traversable:
    return resources.files("kvmix_fx") / "plans"


def _place(name: str) -> tuple[str, float]:
    model, _, bits = name.partition("/")
    return model, float(bits)


__all__ = ["PREFIX", "shipped_plans", "shipped_text"]
