"""compile() and explain(): check, assemble, hand to torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kvmix_fx.backend import Inner, KVMixBackend
from kvmix_fx.contracts import cache_argument, returned_cache
from kvmix_fx.errors import (
    BackendOptionError,
    DequantizeWarning,
    NoSiteError,
    PlanGeometryError,
    TrainingError,
)
from kvmix_fx.parallel import check_placement, process_group_size
from kvmix_fx.passes.find.written_out import READS_WEIGHTS
from kvmix_fx.passes.manager import BY_PLAN
from kvmix_fx.passes.report import CompileReport
from kvmix_fx.passes.sites import STORE
from kvmix_fx.plan import KVPlan, default_plan
from kvmix_fx.runtime.shortcut import Shortcut
from kvmix_fx.runtime.step import CompiledStep, Delegating

_ATTRIBUTE = "_kvmix"


def _fitted(plan: KVPlan | None, model: nn.Module) -> KVPlan:
    from kvmix_fx.integrations import called_models

    if plan is None:
        # of a module around a model, the model tells its sizes
        return default_plan(next(iter(called_models(model)), model))
    if not isinstance(plan, KVPlan):
        raise BackendOptionError(
            f"kvmix_fx.compile needs a plan, got {type(plan).__name__}: make one with "
            "KVPlan.uniform(model, 4, 2), KVPlan.preset(...) or KVPlan.from_pretrained(file)"
        )
    if not hasattr(getattr(model, "config", None), "to_dict"):
        return plan
    try:
        return plan.for_model(model)
    except PlanGeometryError:
        # head sizes that differ between layers: sites are checked one by one when they are traced
        return plan


_ADVICE = 'load the model with attn_implementation="sdpa", or '


class Compiled:
    """What `compile` keeps on a model: plan, report, and the way back.

    Reach it with `kvmix_fx.compiled(model)`.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: KVPlan,
        backend: KVMixBackend,
        on_nothing: str,
        names: Iterable[str],
        inside: nn.Module | None = None,
    ) -> None:
        """Remember the attributes `names` of the model, which are about to be replaced.

        `inside`: what is compiled instead, where the model is a wrapper around it.
        """
        self.inside = inside
        self.plan = plan
        self.backend = backend
        self.on_nothing = on_nothing
        self.advice = _other_attention(inside or model)
        self._warned = False
        self.names = list(names)
        self.replaced = {name: vars(model)[name] for name in self.names if name in vars(model)}

    @property
    def report(self) -> CompileReport:
        """Sites of all graphs traced so far."""
        return self.backend.report

    def check(self, result: Any) -> None:
        """After a graph was traced: something must be packed, or the user must know."""
        self._warn_of_storage()
        if self.on_nothing == "raise":
            _check_rewritten(self.report, result, self.advice)

    def _warn_of_storage(self) -> None:
        """Say once that steps unpack what no known attention reads, and how to have it read packed."""
        stored = sorted({str(site.layer) for site in self.report.sites if site.action == STORE})
        if not stored or self._warned or not self.advice:
            return
        self._warned = True
        missed = dict.fromkeys(site.reason for site in self.report.sites if not site.recognized)
        warnings.warn(
            f"the caches of layers {', '.join(stored)} are packed, but every step unpacks them one layer at "
            f"a time, for what reads them is no known attention ({'; '.join(missed)}): {self.advice}accept "
            "slower steps",
            DequantizeWarning,
            stacklevel=5,
        )


def compile(
    model: nn.Module,
    plan: KVPlan | None = None,
    *,
    inner: Inner = None,
    on_nothing: str = "raise",
    **torch_compile_options: Any,
) -> nn.Module:
    """Make `model` keep its KV cache packed as `plan` says. In place; returns the model.

    The model's forward (and so `model(...)` and `generate()`) is compiled with the kvmix pass.
    Nothing outside this model is patched; `kvmix_fx.restore(model)` undoes it. If an error is
    raised here, the model is as it was.

    Args:
        model: any module whose forward calls scaled_dot_product_attention on cached keys and
            values; transformers models work with generate(). Of a module around one (peft, your own) the
            model inside is compiled; calls that go past that one raise NoSiteError.
        plan: bits per layer; checked against the model's config if it has one. None for the preset "tiers",
            about 2.4 bits without calibration.
        inner: compiler of the rewritten graph, a Dynamo backend name or callable. None is Inductor
            for decode steps on accelerators, else eager.
        on_nothing: "raise" (NoSiteError if the first graph has nothing to rewrite) or "ignore".
        torch_compile_options: `dynamic`, `fullgraph`, `mode`, `options` as for torch.compile;
            `fullgraph` defaults to True. On CUDA, decode steps over a fixed cache are replayed as CUDA
            graphs in every mode, unless options={"cuda_graphs": False}.

    Raises:
        PlanLayerError, HeadSizeError: the plan does not fit the model.
        PlanFieldError: it has a policy that calls of a model cannot follow.
        PlanGeometryError: no plan is given and the model does not tell its sizes.
        BackendOptionError: an option is unknown.
        TrainingError: the model is in training mode.
        HeadSplitError: its KV heads cannot be shared out among the ranks of tensor parallelism.
        PlacementError: its layers lie on several devices, or are offloaded.
    """
    from kvmix_fx.integrations import called_models, hooks_for

    if on_nothing not in ("raise", "ignore"):
        raise BackendOptionError(f'on_nothing must be "raise" or "ignore", got {on_nothing!r}')
    if not isinstance(model, nn.Module):
        inner_model = getattr(model, "model", None)
        hint = (
            f": pass its .model, a {type(inner_model).__name__}" if isinstance(inner_model, nn.Module) else ""
        )
        raise BackendOptionError(f"kvmix_fx.compile takes a module, got {type(model).__name__}{hint}")
    if model.training:
        raise TrainingError("kvmix_fx.compile is for inference: call model.eval() first")
    check_placement(model)
    plan = _fitted(plan, model)
    options = dict(torch_compile_options.pop("options", None) or {})
    mode = torch_compile_options.pop("mode", None)
    shortcut = Shortcut()
    backend = KVMixBackend(plan, inner, mode, model=model, note=shortcut.note, **options)

    restore(model)
    inside = called_models(model)
    if len(inside) > 1:
        names = " and ".join(type(one).__name__ for one in inside)
        raise BackendOptionError(
            f"{type(model).__name__} holds {len(inside)} models, {names}: compile those whose cache is to be "
            "packed, each with its own plan"
        )
    if inside:
        return _compile_inside(
            model, inside[0], plan, inner, on_nothing, torch_compile_options, options, mode
        )
    prepare, attributes, backend.windows = hooks_for(model, plan, shortcut)
    # a step done again communicates again, and ranks, whose heads have their own ranges, would not agree
    backend.widens = process_group_size() == 1
    state = Compiled(model, plan, backend, on_nothing, ["forward", *attributes])
    step = CompiledStep(model, model.forward, backend, torch_compile_options, prepare, shortcut, state.check)
    step.compile()
    vars(model).update(attributes, forward=step)
    vars(model)[_ATTRIBUTE] = state
    return model


def _compile_inside(
    wrapper: nn.Module,
    model: nn.Module,
    plan: KVPlan,
    inner: Inner,
    on_nothing: str,
    torch_compile_options: dict[str, Any],
    options: dict[str, Any],
    mode: str | None,
) -> nn.Module:
    """Compile what a wrapper calls, and have the wrapper find out whether it does."""
    compile(
        model, plan, inner=inner, on_nothing=on_nothing, options=options, mode=mode, **torch_compile_options
    )
    state = compiled(model)
    names = [name for name in ("forward", "generate") if callable(getattr(wrapper, name, None))]
    mine = Compiled(wrapper, plan, state.backend, on_nothing, names, model)
    if on_nothing == "raise":
        vars(wrapper).update({name: Delegating(getattr(wrapper, name), model) for name in names})
    vars(wrapper)[_ATTRIBUTE] = mine
    return wrapper


def compiled(model: nn.Module) -> Compiled:
    """The plan and report of a model compiled with `kvmix_fx.compile`.

    Raises:
        NoSiteError: the model has not been compiled.
    """
    state = vars(model).get(_ATTRIBUTE)
    if state is None:
        raise NoSiteError("this model has not been compiled with kvmix_fx.compile")
    assert isinstance(state, Compiled)
    return state


def restore(model: nn.Module) -> nn.Module:
    """Undo `compile`: the model runs unquantized again. No effect on other models."""
    state = vars(model).pop(_ATTRIBUTE, None)
    if state is not None:
        for name in state.names:
            vars(model).pop(name, None)
        vars(model).update(state.replaced)
        if state.inside is not None:
            restore(state.inside)
    return model


def explain(
    model: nn.Module, inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor, plan: KVPlan
) -> CompileReport:
    """Trace `model` on `inputs` (a prefill) and one decode step; say what `plan` would do to each site.

    Args:
        model: left as it is.
        inputs: keyword arguments, positional arguments, or one tensor of token ids [B, L].
        plan: bits per layer.

    Returns:
        A report with, per attention site: layer, idiom, K and V bits, bytes per token, or why not.
        `print` it.
    """
    was = dict(vars(model))
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    args = () if isinstance(inputs, Mapping) else tuple(inputs)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    try:
        compile(model, plan, inner="eager", on_nothing="ignore", fullgraph=False)
        report = compiled(model).report
        with torch.no_grad():
            result = model(*args, **kwargs)
            past = returned_cache(result)
            if past is not None:
                step = result.logits[:, -1:].argmax(-1)
                mask = kwargs.get("attention_mask")
                extra: dict[str, Any] = (
                    {} if mask is None else {"attention_mask": torch.cat([mask, mask[:, -1:]], 1)}
                )
                model(step, **cache_argument(model, past), **extra)
    finally:
        restore(model)
        assert vars(model).keys() == was.keys()
    return report


def _other_attention(model: nn.Module) -> str:
    """How to have attention that is recognized; empty if the model has no other, or has it already."""
    used = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return "" if used == "sdpa" or not getattr(model, "_supports_sdpa", True) else _ADVICE


def _check_rewritten(report: CompileReport, result: Any, advice: str) -> None:
    if any(g.changed for g in report.graphs):
        return
    sites = [site for site in report.sites if site.recognized]
    reasons = sorted({site.reason for site in sites if site.reason})
    missed = list(dict.fromkeys(site.reason for site in report.sites if not site.recognized))
    if reasons == [BY_PLAN]:
        return
    if not sites:
        nearly = f" ({'; '.join(missed)})" if missed else ""
        if any(READS_WEIGHTS in reason for reason in missed):
            raise NoSiteError(
                f"attention whose weights are asked for is not packed{nearly}: call the first step without "
                'output_attentions=True, or pass on_nothing="ignore" to run the model unquantized'
            )
        raise NoSiteError(
            "no attention was found, neither a call of scaled_dot_product_attention nor one written out as "
            f"matmul, softmax, matmul{nearly}: {advice}"
            'pass on_nothing="ignore" to run the model unquantized'
        )
    if any(site.idiom == "in place" for site in sites):
        return  # plain buffers are packed after this step; should they not be, the report says so
    if returned_cache(result, True) is None:
        return  # use_cache=False: nothing to pack in this call
    raise NoSiteError(
        f"{len(sites)} attention sites were found and none could be packed: {'; '.join(reasons + missed)}. "
        'Pass on_nothing="ignore" to run the model unquantized.'
    )


__all__ = ["Compiled", "compile", "compiled", "explain", "restore"]
