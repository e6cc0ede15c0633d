"""compile() and explain(): check, assemble, hand to torch."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kvmix_fx.backend import Inner, KVMixBackend
from kvmix_fx.errors import BackendOptionError, NoSiteError, PlanGeometryError, TrainingError
from kvmix_fx.parallel import check_placement
from kvmix_fx.passes.manager import BY_PLAN
from kvmix_fx.passes.report import CompileReport
from kvmix_fx.passes.shortcut import Noted, Shortcut
from kvmix_fx.plan import KVPlan

_ATTRIBUTE = "_kvmix"
_MISSING = object()

RECOMPILE_LIMIT = 64
"""Graphs one model may be traced into: two per kind of cache, gradient mode and way of calling it, each for
one row and for more. PyTorch's 8 are soon used up, and then `fullgraph` makes it an error."""


def _fitted(plan: KVPlan, model: nn.Module) -> KVPlan:
    if not isinstance(plan, KVPlan):
        raise BackendOptionError(
            f"kvmix_fx.compile needs a plan, got {type(plan).__name__}: make one with "
            "KVPlan.uniform(model, 4, 2), KVPlan.preset(...) or KVPlan.load(file)"
        )
    if not hasattr(getattr(model, "config", None), "to_dict"):
        return plan
    try:
        return plan.for_model(model)
    except PlanGeometryError:
        # head sizes that differ between layers: sites are checked one by one when they are traced
        return plan


class Compiled:
    """What `compile` keeps on a model: plan, report, and the way back.

    Reach it with `kvmix_fx.compiled(model)`.
    """

    def __init__(
        self, model: nn.Module, plan: KVPlan, backend: KVMixBackend, on_nothing: str, names: Iterable[str]
    ) -> None:
        """Remember the attributes `names` of the model, which are about to be replaced."""
        self.plan = plan
        self.backend = backend
        self.on_nothing = on_nothing
        self.replaced = {name: vars(model).get(name, _MISSING) for name in names}

    @property
    def report(self) -> CompileReport:
        """Sites of all graphs traced so far."""
        return self.backend.report


def compile(
    model: nn.Module,
    plan: KVPlan,
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
            values; transformers models work with generate().
        plan: bits per layer; checked against the model's config if it has one.
        inner: compiler of the rewritten graph, a Dynamo backend name or callable. None is Inductor
            for decode steps on accelerators, else eager.
        on_nothing: "raise" (NoSiteError if the first call finds nothing to rewrite) or "ignore".
        torch_compile_options: `dynamic`, `fullgraph`, `mode`, `options` as for torch.compile;
            `fullgraph` defaults to True. On CUDA, decode steps over a fixed cache are replayed as CUDA
            graphs in every mode, unless options={"cuda_graphs": False}; in one of several processes
            of a process group only with options={"cuda_graphs": True}.

    Raises:
        PlanLayerError, HeadSizeError: the plan does not fit the model.
        BackendOptionError: an option is unknown.
        TrainingError: the model is in training mode.
        HeadSplitError: its KV heads cannot be shared out among the ranks of tensor parallelism.
        PlacementError: its layers lie on several devices, or are offloaded.
    """
    from kvmix_fx.integrations import hooks_for

    if on_nothing not in ("raise", "ignore"):
        raise ValueError(f'on_nothing must be "raise" or "ignore", got {on_nothing!r}')
    if model.training:
        raise TrainingError("kvmix_fx.compile is for inference: call model.eval() first")
    check_placement(model)
    plan = _fitted(plan, model)
    options = dict(torch_compile_options.pop("options", None) or {})
    backend = KVMixBackend(plan, inner, torch_compile_options.pop("mode", None), model=model, **options)
    torch_compile_options.setdefault("fullgraph", True)
    # an argument in newer releases, else a setting that holds during our own calls only
    by_argument = "recompile_limit" in inspect.signature(torch.compile).parameters
    if by_argument:
        torch_compile_options.setdefault("recompile_limit", RECOMPILE_LIMIT)
    limit: dict[str, int] = {} if by_argument else {"recompile_limit": RECOMPILE_LIMIT}

    restore(model)
    original = model.forward
    compiled = torch.compile(original, backend=backend, **torch_compile_options)
    shortcut = Shortcut()
    noted: list[Noted] = []
    backend.noted = noted
    prepare, attributes, generating = hooks_for(model, plan, shortcut)
    state = Compiled(model, plan, backend, on_nothing, ["forward", *attributes])

    # generate() inspects the signature to decide what to pass
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if model.training:
            raise TrainingError("this model was compiled for inference: call model.eval()")
        if torch.is_grad_enabled():
            return _without_gradients(model, original, args, kwargs)
        args, kwargs, finish = prepare(args, kwargs)
        if not args and generating() and shortcut.serves(kwargs):
            result = shortcut.run(kwargs)
            noted.clear()
            finish()
            return result
        graphs = len(backend.report.graphs)
        noted.clear()  # an interrupted step may have left something
        with torch._dynamo.config.patch(limit) if limit else contextlib.nullcontext():
            result = _unwrapped(compiled, args, kwargs)
        if len(backend.report.graphs) != graphs:
            _check_rewritten(state, result)
            # tracing leaves reference cycles that would keep the cache's memory
            gc.collect()
        shortcut.learn(kwargs, result, noted[0] if generating() and len(noted) == 1 else None)
        noted.clear()
        finish()
        return result

    vars(model).update(attributes, forward=forward)
    vars(model)[_ATTRIBUTE] = state
    return model


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
        for name, value in state.replaced.items():
            if value is _MISSING:
                vars(model).pop(name, None)
            else:
                vars(model)[name] = value
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
            past = getattr(result, "past_key_values", None)
            if past is not None:
                step = result.logits[:, -1:].argmax(-1)
                mask = kwargs.get("attention_mask")
                extra: dict[str, Any] = (
                    {} if mask is None else {"attention_mask": torch.cat([mask, mask[:, -1:]], 1)}
                )
                model(step, past_key_values=past, **extra)
    finally:
        restore(model)
        assert vars(model).keys() == was.keys()
    return report


def _unwrapped(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call compiled code; errors of ours come out as themselves, not as a backend failure."""
    from torch._dynamo.exc import BackendCompilerFailed

    from kvmix_fx.errors import KVMixError

    try:
        return function(*args, **kwargs)
    except BackendCompilerFailed as error:
        cause = error.inner_exception
        if isinstance(cause, KVMixError):
            raise cause from None
        raise


def _check_rewritten(state: Compiled, result: Any) -> None:
    """After a graph was traced: something must be packed, or the user must know."""
    report = state.report
    if state.on_nothing == "ignore" or any(g.changed for g in report.graphs):
        return
    reasons = sorted({site.reason for site in report.sites if site.reason})
    if reasons == [BY_PLAN]:
        return
    if not report.sites:
        raise NoSiteError(
            "no attention was found, neither a call of scaled_dot_product_attention nor one written out as "
            "matmul, softmax, matmul: load the model with "
            'attn_implementation="sdpa", or pass on_nothing="ignore" to run it unquantized'
        )
    if any(site.idiom == "in place" for site in report.sites):
        return  # plain buffers are packed after this step; should they not be, the report says so
    if getattr(result, "past_key_values", True) is None:
        return  # use_cache=False: nothing to pack in this call
    raise NoSiteError(
        f"{len(report.sites)} attention sites were found and none could be packed: {'; '.join(reasons)}. "
        'Pass on_nothing="ignore" to run the model unquantized.'
    )


def _without_gradients(
    model: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Gradient mode is on: fine for models without trainable weights, else plain or refused."""
    if not any(p.requires_grad for p in model.parameters()):
        with torch.no_grad():
            return model.forward(*args, **kwargs)
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        raise TrainingError(
            "gradients cannot flow through a packed KV cache: call the model under torch.no_grad(), or "
            "with use_cache=False for the plain, unquantized forward"
        )
    # no cache is asked for, so there is nothing to pack: the model's own forward, with gradients
    kwargs["use_cache"] = False
    try:
        return original(*args, **kwargs)
    except TypeError:
        kwargs.pop("use_cache")
        return original(*args, **kwargs)


__all__ = ["Compiled", "compile", "compiled", "explain", "restore"]
