"""Decide which layer of the plan each site is."""

from __future__ import annotations

import re

from kvmix_fx.passes.sites import Site


def assign_layers(sites: list[Site]) -> None:
    """Set `site.layer` from the module path; by order of appearance where paths do not tell.

    Module paths of one model differ in exactly one number ("layers.0.self_attn"): that is the
    layer. Only sites with a cache count when order decides.
    """
    numbers = [tuple(int(n) for n in re.findall(r"\d+", site.module)) for site in sites]
    if not sites:
        return
    if all(numbers) and len({len(n) for n in numbers}) == 1:
        varying = [i for i in range(len(numbers[0])) if len({n[i] for n in numbers}) > 1]
        if len(varying) <= 1:
            column = varying[0] if varying else len(numbers[0]) - 1
            for site, n in zip(sites, numbers, strict=True):
                site.layer = n[column]
            return
    for order, site in enumerate(sites):
        site.layer = order
