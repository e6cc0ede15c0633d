"""The pass, as an explicit list of steps over one of Dynamo's graphs.

drop causal masks -> normalize products -> find -> assign layers -> apply the plan -> rewrite -> verify ->
report.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from kvmix_fx import dynamo
from kvmix_fx.cache.orders import key_order
from kvmix_fx.dynamo import example
from kvmix_fx.errors import HeadSizeError, PlanGeometryError, PlanLayerError
from kvmix_fx.parallel import process_group_size
from kvmix_fx.passes.assign import assign_layers
from kvmix_fx.passes.causal import drop_causal_masks
from kvmix_fx.passes.find.updates import packed_inputs
from kvmix_fx.passes.match import NEW_BUFFER, SLIDING, Missed, match
from kvmix_fx.passes.products import normalize_products
from kvmix_fx.passes.report import GraphReport, SiteReport
from kvmix_fx.passes.rewrite import Rewritten, rewrite
from kvmix_fx.passes.sites import ADOPT, LEAVE, NOT_RECOGNIZED, STORAGE, STORE, Site
from kvmix_fx.passes.verify import verify
from kvmix_fx.plan import KVPlan, LayerPlan
from kvmix_fx.plan.schema import NO_TIER_IN_WINDOW
from kvmix_fx.plan.text import pair_label
from kvmix_kernels import layout
from kvmix_kernels.layout import TensorFormat

log = logging.getLogger(__name__)

BY_PLAN = "the plan keeps this layer at 16 bits"
FIXED_WINDOW = (
    "a window in a cache of fixed capacity stays at 16 bits where that takes less than all the capacity "
    "packed, or where only windows tell the capacity: growing caches pack it, and where that takes less "
    "KVMixStaticCache(plan, config, capacity)"
)
UNKNOWN_LAYER = (
    "nothing tells which layer of the plan this is, and the plan's layers differ: keep the cache in a list "
    "or a cache object with one entry per layer, trace the whole model as one graph, or give all layers the "
    "same bits"
)
NOT_COUNTED = "which tokens matter is not counted by this step, as its attention is not replaced"
NO_PROMPT = (
    "the model's own buffers are packed without the queries that filled them, which a token tier needs: use "
    "a cache of transformers, or a plan without token_tier"
)
CAME_PLAIN = (
    "a plain cache that came in stays so in a layer with a token tier, which neither windows of fixed "
    "capacity nor attention across can have"
)
NO_TIER_UNREAD = (
    "which tokens matter is told by attention, and none that reads this cache is known: take it away "
    'with plan.with_layers(LAYER, token_tier="none")'
)
NO_TIER_ACROSS = (
    "a token tier is chosen by a prompt that attends to itself, and these keys are not those of the tokens "
    "that ask: take it away with "
    'plan.with_layers(LAYER, token_tier="none")'
)
Ranged = tuple[int | None, int]
"""A cached tensor: its layer, and 0 for keys or 1 for values."""
_RAW = pair_label(str(layout.RAW_BITS), str(layout.RAW_BITS))


@dataclass(frozen=True)
class PassResult:
    """The rewritten graph (None: nothing matched, use the original) and the report."""

    rewritten: Rewritten | None
    report: GraphReport


def run(
    gm: fx.GraphModule,
    plan: KVPlan,
    own_buffers: bool = False,
    windows: bool = False,
    wide: Collection[Ranged] = (),
) -> PassResult:
    """Rewrite a copy of `gm` by `plan`; `gm` itself stays as it is.

    own_buffers: whether plain buffers can be exchanged for packed ones after the step. windows: whether
    packed tokens of which a graph keeps the last ones are gone on with as a sliding window. wide: tensors
    whose scales are float32 whatever the plan says.
    """
    copied, _ = dynamo.copy_module(gm)
    drop_causal_masks(copied.graph)
    normalize_products(copied)
    matched = match(copied.graph)
    sites = matched.sites
    assign_layers(copied.graph, sites, matched.missed, len(plan.layers))
    if not own_buffers:
        _check_heads(sites, plan)
    for site in sites:
        if not own_buffers:
            site.buffers = None
        if windows and plan.geometry is not None and _is_fixed_window(site):
            layer = _layer_plan(site, plan)
            tiered = layer is not None and layer.token_tier is not None
            site.buffers, site.reason = None, CAME_PLAIN if tiered else FIXED_WINDOW
        if site.tail is not None and not windows:
            site.action, site.reason = LEAVE, SLIDING
        if site.reason in (FIXED_WINDOW, NEW_BUFFER):
            site.reason = _whole_window(site, plan) or site.reason
        _apply_plan(site, plan)
    report = GraphReport(
        [_report(site, plan, wide) for site in sites] + [_missed(one) for one in matched.missed]
    )
    nothing = not report.changed and not any(site.buffers for site in sites)
    if nothing and not packed_inputs(copied.graph):
        return PassResult(None, report)
    result = rewrite(
        copied,
        sites,
        matched.leftover,
        lambda site: _formats(site, plan, wide),
        lambda site: _order(site, plan),
    )
    verify(result, sites)
    for site in report.sites:
        log.debug("%s", site)
    log.info("kvmix: %d of %d attention sites rewritten", sum(s.rewritten for s in report.sites), len(sites))
    return PassResult(result, report)


def _whole_window(site: Site, plan: KVPlan) -> str:
    """Why growing caches do not pack the window of a site's layer either; '' if they do, or it has none."""
    if plan.geometry is None:
        return ""
    # buffers that are made in the graph do not tell their layer
    layers = range(len(plan.layers)) if site.layer is None else (site.layer,)
    windows = [plan.geometry.layer(i).window if i < len(plan.layers) else 0 for i in layers]
    whole = [w and plan.layers[i].whole_window(w) for i, w in zip(layers, windows, strict=True)]
    return str(whole[0]) if all(whole) else ""


def _is_fixed_window(site: Site) -> bool:
    """Whether a site reads plain buffers of a layer: where others are exchanged, those of a window."""
    root = site.key_root
    return (
        site.action == LEAVE
        and root is not None
        and root.op == "placeholder"
        and dynamo.place(root).endswith("].keys")
    )


def _layer_plan(site: Site, plan: KVPlan) -> LayerPlan | None:
    """The part of the plan that is about a site; None if it is not known which that is."""
    if site.layer is not None:
        return plan.layers[site.layer] if site.layer < len(plan.layers) else None
    # where all layers are alike it does not matter which one this is
    return plan.layers[0] if all(layer == plan.layers[0] for layer in plan.layers) else None


def _check_heads(sites: Sequence[Site], plan: KVPlan) -> None:
    """Refuse a plan that was made for other heads; `kvmix_fx.compile` gives plans its model's sizes."""
    for site in sites:
        if plan.geometry is None or site.action != ADOPT or site.stored or site.layer is None:
            continue
        if site.layer >= plan.geometry.num_layers:
            continue
        sizes, (_, heads, _, head_dim) = plan.geometry.layer(site.layer), example(site.key_root).shape
        ranks, rest = divmod(sizes.num_kv_heads, heads)
        if head_dim != sizes.head_dim or rest or not 1 <= ranks <= process_group_size():
            raise PlanGeometryError(
                f"the plan is for {sizes.num_kv_heads} KV heads of {sizes.head_dim}, layer {site.layer} of "
                f"this model has {heads} of {head_dim}: make it from this model, or hand in "
                "plan.for_model(model)"
            )


def _formats(site: Site, plan: KVPlan, wide: Collection[Ranged] = ()) -> tuple[TensorFormat, TensorFormat]:
    layer = _layer_plan(site, plan)
    assert layer is not None
    if site.tail is not None:
        layer = layer.in_window()
    plain = site.buffers
    both = (plain.key, plain.value) if plain is not None else (site.key_root, site.value_root)
    key_dim, value_dim = (int(example(x).shape[3]) for x in both)
    key, value = layer.formats(key_dim, value_dim)
    return (
        layout.widened(key) if (site.layer, 0) in wide and not key.is_raw else key,
        layout.widened(value) if (site.layer, 1) in wide and not value.is_raw else value,
    )


def _order(site: Site, plan: KVPlan) -> Tensor | None:
    layer = _layer_plan(site, plan)
    assert layer is not None
    key = example(site.buffers.key if site.buffers is not None else site.key_root)
    return key_order(layer, int(key.shape[1]), int(key.shape[3]), key.device)


def _apply_plan(site: Site, plan: KVPlan) -> None:
    """Take back the packing of layers that the plan leaves alone or that cannot be packed."""
    layer = _layer_plan(site, plan)
    if site.action == LEAVE and site.buffers is None:
        if layer is not None and layer.is_raw:
            site.reason = BY_PLAN
        return
    update = site.key_update
    if site.action == STORAGE and update is not None and update.tensor.format.high is not None:
        site.reason += "; " + NOT_COUNTED
    if site.action not in (ADOPT, LEAVE):
        return
    if layer is None and site.layer is not None:
        raise PlanLayerError(
            f"the model has an attention layer {site.layer} ({site.module}), but the plan has only "
            f"{len(plan.layers)} layers: build the plan from this model"
        )
    if layer is None:
        site.action, site.reason, site.buffers = LEAVE, UNKNOWN_LAYER, None
        return
    if layer.is_raw:
        site.action, site.reason, site.buffers = LEAVE, BY_PLAN, None
        return
    if site.buffers is not None and layer.token_tier is not None:
        site.buffers, site.reason = None, NO_PROMPT
    if site.action == LEAVE:
        return
    why_not = no_tier(site) if layer.token_tier is not None else ""
    if why_not:
        site.action, site.reason = LEAVE, why_not
        return
    if isinstance(site.tail, int) and site.tail < 0 and (whole := layer.whole_window(1 - site.tail)):
        site.action, site.reason = LEAVE, whole
        return
    try:
        for root, fmt in zip((site.key_root, site.value_root), _formats(site, plan), strict=True):
            layout.check_head_size(fmt, int(example(root).shape[3]))
    except HeadSizeError as error:
        site.action, site.reason = LEAVE, str(error)


def no_tier(site: Site) -> str:
    """Why the plain keys and values of a site cannot have a high tier; '' if they can."""
    if site.tail is not None:
        return NO_TIER_IN_WINDOW
    if site.stored:
        return NO_TIER_UNREAD
    call = site.call
    sizes = [example(x).shape[2] for x in (call.query, site.key_root)]
    # symbols are compared as such: to ask whether they are equal would make a guard
    asking, asked = (dynamo.expression(n) if dynamo.is_symbolic(n) else n for n in sizes)
    # one query sees all that came before it; more of them need a mask to say the same
    known = call.is_masked or call.is_causal is True or asking == 1
    return "" if known and asking == asked else NO_TIER_ACROSS


def _report(site: Site, plan: KVPlan, wide: Collection[Ranged]) -> SiteReport:
    formats: tuple[TensorFormat, TensorFormat] | None = None
    shape: Any = None
    if site.key_update is not None and site.value_update is not None:
        formats = (site.key_update.tensor.format, site.value_update.tensor.format)
        shape = site.key_update.tensor.shape
    elif site.action == ADOPT:
        formats = _formats(site, plan, wide)
        shape = example(site.key_root).shape
    bytes_per_token = None
    if formats is not None:
        head_dim = int(shape[3])
        bits = sum(layout.bits_per_packed_element(f, head_dim) for f in formats)
        bytes_per_token = int(shape[1]) * head_dim * bits / 8
    return SiteReport(
        layer=site.layer,
        module=site.module,
        idiom=site.idiom,
        action=STORE if site.stored and site.action == ADOPT else site.action,
        reason=site.reason,
        key_bits=formats[0].bits if formats else layout.RAW_BITS,
        value_bits=formats[1].bits if formats else layout.RAW_BITS,
        bytes_per_token=bytes_per_token,
        query_length=str(example(site.call.query).shape[2]),
        label=_label(formats),
    )


def _label(formats: tuple[TensorFormat, TensorFormat] | None) -> str:
    """Of keys and values, and of their high tier: "K2V2, 20 % of tokens at 16"."""
    if formats is None:
        return _RAW
    label, high = pair_label(*(fmt.label for fmt in formats)), formats[0].high
    if high is None:
        return label
    others = ", others ignored" if high.evicting else ""
    return f"{label}, {high.count or f'{high.share} % of'} tokens at {high.bits}{others}"


def _missed(one: Missed) -> SiteReport:
    """Its cache is packed where it came in packed: then it is unpacked for whoever reads it."""
    formats = [update.tensor.format for update in one.updates][:2]
    uncounted = any(fmt.high is not None for fmt in formats)
    keys, values = (formats[0], formats[-1]) if formats else (None, None)
    return SiteReport(
        layer=one.layer,
        module=one.module,
        idiom=one.updates[0].idiom.name if one.updates else "none",
        action=NOT_RECOGNIZED,
        reason="; ".join((one.miss.reason, *((NOT_COUNTED,) if uncounted else ()))),
        key_bits=keys.bits if keys else layout.RAW_BITS,
        value_bits=values.bits if values else layout.RAW_BITS,
        bytes_per_token=None,
        query_length=one.query_length,
        label=pair_label(keys.label, values.label) if keys and values else _RAW,
    )
