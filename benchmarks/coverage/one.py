"""One model of the sweep: what `generate()` over a packed cache does to it, beside the plain model.

The prompt is a batch that is padded on the left.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from transformers import cache_utils

from kvmix_fx.plan import QuantSpec
from kvmix_fx.testing.simulate import round_trip

PROMPT, PADDING, NEW = 72, 11, 4
WINDOW, GROUP, TILE = 8, 16, 32
PACKED, PARTLY, LEFT, REFUSED, CRASHED, WRONG = "packed", "partly", "left", "refused", "crashed", "wrong"
NO_CACHE, NOT_OFFERED, NOT_BUILT, NOT_RUN = "no cache", "not offered", "not built", "does not run"
BLIND, UNFINISHED, NO_WINDOW = "no difference", "not finished", "no window"
"""Outcomes. Those of the last two lines are about transformers, the random weights or the time."""


WINDOWS, TIERS = "windows", "tiers"
"""Variants. The sweep itself has uniform plans, and prompts within every window; others have
windows shorter than the prompt, or the preset `tiers`, whose orders of channels come from the prompt."""
SHORT = 48
"""Tokens of a short window: more than a recent window and a tile, less than the prompt."""


def run(kind: str, class_name: str, attention: str, cache: str, variant: str = "") -> dict[str, Any]:
    """What becomes of one model: its outcome, layers, reasons, differences of logits."""
    from benchmarks.coverage import tiny

    window = SHORT if variant == WINDOWS else None
    try:
        model = tiny.build(kind, class_name, attention, window)
    except Exception as error:
        offered = "does not support an attention implementation" not in str(error)
        return {"outcome": NOT_BUILT if offered else NOT_OFFERED, "why": _told(error)}
    if window and not tiny.shorten_windows(model.config, window):
        return {"outcome": NO_WINDOW}
    settings = _settings(model, cache)
    try:
        plain = _generate(model, settings)
    except Exception as error:
        return {"outcome": NOT_RUN, "why": _told(error)}
    if len(plain.logits or ()) < 2 or not all(bool(x.isfinite().all()) for x in plain.logits):
        return {"outcome": NOT_RUN, "why": "the plain model computes no finite logits of several steps"}
    least = window - 1 if window else PROMPT - PADDING
    growing = [layer for layer in _layers(plain) if _growing(layer, least)]
    if not growing:
        return {"outcome": NO_CACHE, "why": _what_instead(plain)}
    return _packed(model, settings, plain, least, TIERS if variant == TIERS else "8")


def _plan(model: torch.nn.Module, name: str) -> Any:
    """Uniform at so many bits, or `tiers`; tiles that the prompt fills."""
    import kvmix_fx

    if name == TIERS:
        plan = kvmix_fx.KVPlan.preset(TIERS, model, window=WINDOW)
        # heads may differ between layers, and tiers with them
        own = [replace(one, key=replace(one.key, group_size=TILE), tile=TILE) for one in plan.layers]
        return replace(plan, layers=tuple(own))
    return kvmix_fx.KVPlan.uniform(model, int(name), int(name), group_size=GROUP, window=WINDOW)


def _packed(
    model: torch.nn.Module, settings: dict[str, Any], plain: Any, least: int, tried: str
) -> dict[str, Any]:
    """`least`: tokens of a layer of the plain cache that is counted; `tried`: the plan that is judged."""
    import kvmix_fx
    from kvmix_fx.errors import KVMixError
    from kvmix_fx.passes.sites import ATTEND

    growing = [_growing(layer, least) for layer in _layers(plain)]
    found: dict[str, Any] = {"layers": sum(map(bool, growing))}
    outs = {}
    for name in (tried, "2"):
        try:
            kvmix_fx.compile(model, _plan(model, name), inner="eager")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                out = _generate(model, settings)
        except KVMixError as error:
            return found | {"outcome": REFUSED, "why": _told(error)}
        except Exception as error:
            return found | {"outcome": CRASHED, "why": _told(error)}
        outs[name] = out
        found[f"difference{name}"] = _difference(out, plain)
        if name == tried:
            report = kvmix_fx.compiled(model).report
            # a cache may have more layers than the model fills
            both = zip(_layers(out), growing, strict=True)
            found["packed"] = sum(_is_packed(layer, was) for layer, was in both if was)
            found["actions"] = sorted({site.action for site in report.sites})
            found["reasons"] = sorted({site.reason for site in report.sites if site.reason})
            found["attended"] = max(
                (sum(s.action == ATTEND for s in g.sites) for g in report.graphs), default=0
            )
            found["graphs"] = len(report.graphs)
            found["warnings"] = sorted(
                {type(w.message).__name__ for w in caught if "kvmix" in str(w.category)}
            )
    judged = _judged(found)
    if judged["outcome"] == WRONG and tried == "8" and found["difference8"] < found["difference2"]:
        # a model that magnifies what 8 bits round: so does the plain one then, with a cache rounded like this
        found["rounded8"] = _difference(_generate_rounded(model, settings), plain)
        judged = _judged(found)
    if judged["outcome"] == WRONG:
        kvmix_fx.restore(model)
        uncached = {k: v for k, v in settings.items() if k != "cache_implementation"} | {"use_cache": False}
        right = _generate(model, uncached)
        if _difference(plain, right) > 1e-2:
            # the model's own cache is not what the model computes without one
            found |= {"plain_cache": _difference(plain, right)}
            found |= {f"difference{name}": _difference(out, right) for name, out in outs.items()}
            judged = _judged(found)
    return found | judged


def _generate_rounded(model: torch.nn.Module, settings: dict[str, Any]) -> Any:
    """The plain model, with a growing cache whose first tokens are rounded to 8 bits once they are stored."""
    import kvmix_fx

    kvmix_fx.restore(model)
    with contextlib.ExitStack() as patches:
        for layer in (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer):
            patches.enter_context(mock.patch.object(layer, "update", _rounding(layer.update)))
        return _generate(model, {k: v for k, v in settings.items() if k != "cache_implementation"})


def _rounding(update: Callable[..., Any]) -> Callable[..., Any]:
    def rounded(layer: Any, *args: Any, **kwargs: Any) -> Any:
        first = not layer.is_initialized
        result = update(layer, *args, **kwargs)
        whole = (layer.keys.shape[2] - WINDOW) // GROUP * GROUP
        for name, axis in (("keys", "channel"), ("values", "token")) if first and whole > 0 else ():
            stored = getattr(layer, name)
            old = round_trip(stored[:, :, :whole], QuantSpec(8, axis, GROUP))  # type: ignore[arg-type]
            setattr(layer, name, torch.cat([old, stored[:, :, whole:]], 2))
        return result

    return rounded


def _judged(found: dict[str, Any]) -> dict[str, Any]:
    """8 bits have to say what the plain model says, 2 bits must not.

    Where the plain model was tried with a cache rounded to 8 bits, they may say what that says. The bits of
    `tiers`, 2 and a few, may say other things than 2 bits, but no more of them.
    """
    rough = found["difference2"]
    if f"difference{TIERS}" in found:
        exact = found[f"difference{TIERS}"]
        if found["packed"] and exact <= 2 * rough + 1e-3:
            return {"outcome": PACKED if found["packed"] >= found["layers"] else PARTLY}
        return {"outcome": WRONG if found["packed"] or exact >= 1e-3 else LEFT}
    exact = found["difference8"]
    if found["packed"] == 0:
        outcome = LEFT if exact < 1e-3 else WRONG
    elif rough < 1e-3:
        outcome = BLIND if exact < 1e-3 else WRONG
    elif exact > max(rough / 8, 1e-3, min(1.25 * found.get("rounded8", 0), rough / 2)):
        outcome = WRONG
    else:
        outcome = PACKED if found["packed"] >= found["layers"] else PARTLY
    return {"outcome": outcome}


def _settings(model: Any, cache: str) -> dict[str, Any]:
    ids = torch.randint(5, 75, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :PADDING], mask[0, :PADDING] = 0, 0
    settings: dict[str, Any] = {
        "attention_mask": mask, "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False,
        "num_beams": 1, "use_cache": True, "pad_token_id": 0, "eos_token_id": None,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    settings["input_ids"] = ids
    if model.config.is_encoder_decoder:
        settings |= {"decoder_input_ids": ids[:, PADDING:].clone(), "decoder_start_token_id": 2}
    if cache == "static":
        settings["cache_implementation"] = "static"
    return settings


def _generate(model: Any, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        return model.generate(**{k: v.clone() if torch.is_tensor(v) else v for k, v in settings.items()})


def _difference(out: Any, plain: Any) -> float:
    """Of logits, in their standard deviations, over the steps whose tokens before are the same."""
    worst, spread = 0.0, float(plain.logits[0].std())
    same = torch.ones(len(plain.logits[0]), dtype=torch.bool)
    for got, want in zip(out.logits, plain.logits, strict=False):
        if not bool(same.any()):
            break
        worst = max(worst, float((got[same] - want[same]).abs().nan_to_num(1e9).max()))
        same = same & (got.argmax(-1) == want.argmax(-1))
    return float(f"{worst / max(spread, 1e-9):.4g}")


def _layers(out: Any) -> list[Any]:
    """The layers of all caches that a result holds."""
    past = getattr(out, "past_key_values", None)
    parts = [getattr(past, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    caches = [part for part in parts if part is not None] or [past]
    return [layer for one in caches for layer in getattr(one, "layers", ())]


def _growing(layer: Any, least: int) -> list[tuple[str, str]]:
    """Where a layer of a plain cache has keys and values of at least so many tokens."""
    names = [name for name in sorted(getattr(layer, "__dict__", ())) if name.endswith("keys")]
    both = [(name, name.removesuffix("keys") + "values") for name in names]
    return [pair for pair in both if all(_is_long(getattr(layer, name, None), least) for name in pair)]


def _is_long(x: Any, least: int) -> bool:
    return torch.is_tensor(x) and x.dim() == 4 and x.shape[2] >= least


def _is_packed(layer: Any, growing: list[tuple[str, str]]) -> bool:
    from kvmix_fx.cache import QuantizedKVTensor

    return all(isinstance(getattr(layer, name, None), QuantizedKVTensor) for pair in growing for name in pair)


def _what_instead(out: Any) -> str:
    past = getattr(out, "past_key_values", None)
    kinds = sorted({type(layer).__name__ for layer in _layers(out)})
    return f"{type(past).__name__} of {', '.join(kinds) or 'nothing'}"


def _told(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = "/".join(where.filename.split("/")[-2:])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]} [{place}:{where.lineno}]"
