"""One model of the sweep: what `generate()` over a packed cache does to it, beside the plain model.

The prompt is a batch that is padded on the left.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from transformers import cache_utils

from kvmix_fx.plan import QuantSpec
from kvmix_fx.testing.simulate import round_trip

PROMPT, PADDING, NEW = 72, 11, 4
WINDOW, GROUP = 8, 16
PACKED, PARTLY, LEFT, REFUSED, CRASHED, WRONG = "packed", "partly", "left", "refused", "crashed", "wrong"
NO_CACHE, NOT_OFFERED, NOT_BUILT, NOT_RUN = "no cache", "not offered", "not built", "does not run"
BLIND, UNFINISHED = "no difference", "not finished"
"""Outcomes. Those of the last two lines are about transformers, the random weights or the time."""


def run(kind: str, class_name: str, attention: str, cache: str) -> dict[str, Any]:
    """What becomes of one model: its outcome, layers, reasons, differences of logits."""
    from benchmarks.coverage import tiny

    try:
        model = tiny.build(kind, class_name, attention)
    except Exception as error:
        offered = "does not support an attention implementation" not in str(error)
        return {"outcome": NOT_BUILT if offered else NOT_OFFERED, "why": _told(error)}
    settings = _settings(model, cache)
    try:
        plain = _generate(model, settings)
    except Exception as error:
        return {"outcome": NOT_RUN, "why": _told(error)}
    if len(plain.logits or ()) < 2 or not all(bool(x.isfinite().all()) for x in plain.logits):
        return {"outcome": NOT_RUN, "why": "the plain model computes no finite logits of several steps"}
    growing = [layer for layer in _layers(plain) if _growing(layer)]
    if not growing:
        return {"outcome": NO_CACHE, "why": _what_instead(plain)}
    return _packed(model, settings, plain, len(growing))


def _packed(model: torch.nn.Module, settings: dict[str, Any], plain: Any, layers: int) -> dict[str, Any]:
    import kvmix_fx
    from kvmix_fx.errors import KVMixError
    from kvmix_fx.passes.sites import ATTEND

    found: dict[str, Any] = {"layers": layers}
    for bits in (8, 2):
        try:
            plan = kvmix_fx.KVPlan.uniform(model, bits, bits, group_size=GROUP, window=WINDOW)
            kvmix_fx.compile(model, plan, inner="eager")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                out = _generate(model, settings)
        except KVMixError as error:
            return found | {"outcome": REFUSED, "why": _told(error)}
        except Exception as error:
            return found | {"outcome": CRASHED, "why": _told(error)}
        found[f"difference{bits}"] = _difference(out, plain)
        if bits == 8:
            report = kvmix_fx.compiled(model).report
            # a cache may have more layers than the model fills
            both = zip(_layers(out), _layers(plain), strict=True)
            found["packed"] = sum(_is_packed(layer, _growing(was)) for layer, was in both if _growing(was))
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
    if judged["outcome"] == WRONG and found["difference8"] < found["difference2"]:
        # a model that magnifies what 8 bits round: so does the plain one then, with a cache rounded like this
        found["rounded8"] = _difference(_generate_rounded(model, settings), plain)
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

    Where the plain model was tried with a cache rounded to 8 bits, they may say what that says.
    """
    exact, rough = found["difference8"], found["difference2"]
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


def _growing(layer: Any) -> list[tuple[str, str]]:
    """Where a layer of a plain cache has keys and values of every token, or of those of the prompt."""
    names = [name for name in sorted(getattr(layer, "__dict__", ())) if name.endswith("keys")]
    both = [(name, name.removesuffix("keys") + "values") for name in names]
    return [pair for pair in both if all(_is_long(getattr(layer, name, None)) for name in pair)]


def _is_long(x: Any) -> bool:
    return torch.is_tensor(x) and x.dim() == 4 and x.shape[2] >= PROMPT - PADDING


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
