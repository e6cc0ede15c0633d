"""Decide which layer of the plan each site is."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kvmix_fx.passes.match import Missed
from kvmix_fx.passes.sites import Site


def assign_layers(sites: list[Site], missed: Sequence[Missed] = ()) -> None:
    """Set `site.layer` from the module path; by order of appearance where paths do not tell.

    Module paths of one model differ in exactly one number ("layers.0.self_attn"): that is the
    layer. Only sites with a cache count when order decides; what was missed then has no layer.
    """
    layers = _by_paths([site.module for site in sites])
    for order, site in enumerate(sites):
        site.layer = order if layers is None else layers[order]
    layers = _by_paths([one.module for one in (*sites, *missed)])
    if layers is not None:
        for one, layer in zip(missed, layers[len(sites) :], strict=True):
            one.layer = layer


def _by_paths(modules: list[str]) -> list[int] | None:
    """The one number in each path that differs between them."""
    numbers = [tuple(int(n) for n in re.findall(r"\d+", module)) for module in modules]
    if not modules or not all(numbers) or len({len(n) for n in numbers}) > 1:
        return None
    varying = [i for i in range(len(numbers[0])) if len({n[i] for n in numbers}) > 1]
    if len(varying) > 1:
        return None
    column = varying[0] if varying else len(numbers[0]) - 1
    return [n[column] for n in numbers]
