"""The Dynamo backend "kvmix" and its options.

`torch.compile(f, backend="kvmix", options={"plan": plan})` finds it by entry point. Options besides
the plan: "inner" (the compiler that gets the rewritten graph: a Dynamo backend name or callable),
"mode" and any Inductor setting (both for inner="inductor"), "cuda_graphs" (False: launch every kernel
of every step; True: record steps also under a process group), "pieces" (whether to compile decode steps
layer by layer), "report" (a CompileReport to fill).
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from kvmix_fx import dynamo
from kvmix_fx.errors import BackendOptionError, TrainingError
from kvmix_fx.parallel import before_groups_end, process_group_size, tells_of_end
from kvmix_fx.passes import manager
from kvmix_fx.passes.ahead import compile_ahead
from kvmix_fx.passes.branches import branch_products
from kvmix_fx.passes.defer import defer_appends
from kvmix_fx.passes.pieces import compile_pieces
from kvmix_fx.passes.report import CompileReport
from kvmix_fx.plan import KVPlan
from kvmix_fx.progress import say
from kvmix_fx.runtime import recording
from kvmix_fx.runtime.boundary import Boundary
from kvmix_fx.runtime.shortcut import Note

log = logging.getLogger(__name__)

SHORT_STEP = 16
"""Tokens of a decode step at most. Longer steps keep the GPU busy without being compiled or recorded."""

_OWN = {"plan", "inner", "mode", "report", "model", "cuda_graphs", "pieces", "trace_prompts"}
Inner = str | Callable[..., Any] | None


class KVMixBackend:
    """A Dynamo backend for one plan.

    Instances compare by identity, and Dynamo guards compiled code by its backend: a second
    compile with another plan never reuses the first one's code.
    """

    def __init__(
        self,
        plan: KVPlan,
        inner: Inner = None,
        mode: str | None = None,
        report: CompileReport | None = None,
        model: torch.nn.Module | None = None,
        cuda_graphs: bool | None = None,
        note: Note | None = None,
        pieces: bool | None = None,
        trace_prompts: bool | None = None,
        **inductor_options: Any,
    ) -> None:
        """Check the options now: an error inside a backend surfaces wrapped and late.

        Args:
            plan: bits per layer.
            inner: compiler of the rewritten graph; None means "inductor" for decode steps on accelerators
                and "eager" for prefill, which gains little, and on CPU, where compiling a decode step
                takes longer than most generations.
            mode: a torch.compile mode, for Inductor.
            report: filled as graphs are compiled; a new one by default.
            model: whose own plain cache buffers may be exchanged for packed ones.
            cuda_graphs: whether decode steps over a fixed cache on CUDA are recorded and replayed. None
                does so, in one of several processes only if the recordings can be released before their
                process group is destroyed. The report says which graphs are.
            note: told of calls of recorded graphs. Whoever is told must let go of them after every step, or
                they hold every cache that was ever used.
            pieces: whether Inductor compiles what the layers of a decode step have in common once, or the
                whole step. None does so where one process records steps: in plain launches each piece takes
                its host 70 microseconds more (two CPU cores), and no group of GPUs has run them yet.
            trace_prompts: whether a prompt that fills an empty cache is traced, or read by the model as it is
                and packed layer by layer, where that gives the same. None traces it where `inner`, a mode or
                settings of Inductor are given.
            inductor_options: settings of torch._inductor.config for these graphs only.

        Raises:
            BackendOptionError: an option is missing, unknown or of a wrong type.
            PlanFieldError: the plan has a policy that calls of a model cannot follow.
        """
        if not isinstance(plan, KVPlan):
            raise BackendOptionError(
                f'the kvmix backend needs a plan: options={{"plan": KVPlan...}}, got {type(plan).__name__}'
            )
        plan.check_policies()
        if inner is not None and not isinstance(inner, str) and not callable(inner):
            raise BackendOptionError(f'"inner" must be a backend name or a callable, got {inner!r}')
        if isinstance(inner, str) and not dynamo.is_backend(inner):
            raise BackendOptionError(f'"inner" names no Dynamo backend: {inner!r}')
        if (mode or inductor_options) and inner not in (None, "inductor"):
            raise BackendOptionError(
                f'mode and {sorted(inductor_options)} are settings of Inductor, but "inner" is {inner!r}'
            )
        if not isinstance(cuda_graphs, bool | None):
            raise BackendOptionError(f'"cuda_graphs" must be True, False or None, got {cuda_graphs!r}')
        self.patches = _inductor_patches(mode, inductor_options)
        self.cuda_graphs = False if mode == "max-autotune-no-cudagraphs" else cuda_graphs
        self.pieces = pieces
        if not isinstance(trace_prompts, bool | None):
            raise BackendOptionError(f'"trace_prompts" must be True, False or None, got {trace_prompts!r}')
        compiles = inner is not None or bool(self.patches)
        self.traces_prompts = compiles if trace_prompts is None else trace_prompts
        self.told = self.ready = False
        self.plan = plan
        self.model = model
        self.inner = inner
        self.report = report if report is not None else CompileReport()
        self.note = note
        # whether somebody goes on with a slice of packed tokens as with a sliding window
        self.windows = False
        # whether somebody calls `widened` when scales have too small a range, and the tensors whose have
        self.widens = False
        self.wide: frozenset[manager.Ranged] = frozenset()
        self.__name__ = "kvmix"

    @property
    def traced(self) -> int:
        """Graphs compiled so far."""
        return len(self.report.graphs)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Compile one graph; Dynamo's calling convention."""
        dynamo.guard_once()
        result = manager.run(
            gm, self.plan, own_buffers=self.model is not None, windows=self.windows, wide=self.wide
        )
        self.report.graphs.append(result.report)
        if result.rewritten is None:
            return _compile(gm, example_inputs, *self._choose(example_inputs, False))
        if torch.is_grad_enabled() and any(_requires_grad(v) for v in result.rewritten.values):
            raise TrainingError(
                "gradients cannot flow through a packed KV cache: run the model under torch.no_grad() or "
                "torch.inference_mode() (generate() does)"
            )
        module = result.rewritten.module
        result.report.replay = self._no_replay(result, dynamo.example_inputs(module))
        inner, patches = self._choose(dynamo.example_inputs(module), _is_short(result))
        compiled, deferred = None, None
        alone = not result.report.replay and process_group_size() == 1
        pieces = alone if self.pieces is None else self.pieces
        pieces = pieces and inner == "inductor" and _is_short(result)
        if inner == "inductor" and _is_short(result):
            compile_ahead(module)
            if alone and not patches:
                # settings of Inductor may make something else of them, and no group of GPUs has run this yet
                result.report.branches = branch_products(module)
            deferred = defer_appends(module, counters=pieces)
        if inner == "inductor" and not self.told:
            self.told = True
            layers = sum(site.recognized for site in result.report.sites)
            say(f"compiling a step of {layers} layers, once; later processes reuse most of it")
        if pieces:
            compiled = compile_pieces(module, lambda part, inputs: _compile(part, inputs, inner, patches))
            result.report.forms = 0 if compiled is None else compiled.forms
        if compiled is None:
            compiled = _compile(module, dynamo.example_inputs(module), inner, patches)
        if deferred is not None:
            compiled = deferred.wrap(compiled, forks=alone)
        record = None if result.report.replay else recording.record_cuda
        note = None if record is None else self.note
        if record is not None and process_group_size() > 1:
            before_groups_end(recording.release_all)
        return Boundary(result.rewritten.recipe, compiled, self.model, record, note, self.widens)

    def get_ready(self, inputs: list[Any]) -> None:
        """While a device reads a prompt: begin what compiling the steps after it begins with."""
        if not self.ready and self._choose(inputs, True)[0] == "inductor":
            # what fails here does so again, and is told, when a step is compiled
            with contextlib.suppress(Exception):
                dynamo.load_inductor()
        self.ready = True

    def widened(self, found: Iterable[manager.Ranged]) -> KVMixBackend:
        """A backend with the same report that gives the scales of these tensors single precision."""
        other = copy.copy(self)
        other.wide = self.wide | frozenset(found)
        return other

    def _no_replay(self, result: manager.PassResult, inputs: list[Any]) -> str:
        """Why steps of a rewritten graph cannot be recorded as CUDA graphs; empty if they can."""
        assert result.rewritten is not None
        recipe = result.rewritten.recipe
        # a CPU tensor would be read once, while recording
        devices = {x.device for x in inputs if isinstance(x, torch.Tensor)}
        if self.cuda_graphs is False:
            return "switched off"
        if len(devices) != 1 or devices.pop().type not in recording.REPLAY_DEVICES:
            return "not on one CUDA device"
        if self.cuda_graphs is None and process_group_size() > 1 and not tells_of_end():
            return (
                "this torch does not say before it destroys a process group, which waits for ever while "
                'recordings use it: with options={"cuda_graphs": True} steps are recorded, and '
                "processes must end without destroy_process_group()"
            )
        if recipe.counted - {*recipe.fixed}:
            return "it reads a cache of fixed capacity that it does not write"
        if not recipe.packed or len(recipe.fixed) != len(recipe.packed):
            return "the cache grows: use a fixed one"
        return "" if _is_short(result) else f"more than {SHORT_STEP} tokens a step"

    def _choose(self, example_inputs: list[Any], short: bool) -> tuple[Any, dict[str, Any]]:
        """The inner compiler of a graph, and settings of Inductor."""
        if self.inner is not None:
            return self.inner, self.patches
        if self.patches:
            return "inductor", self.patches
        if not short or not _on_accelerator(example_inputs):
            return "eager", {}
        # products of a matrix and one vector become reductions, fused with what surrounds them
        return "inductor", {"coordinate_descent_tuning": True} if _one_token(example_inputs) else {}


def _compile(
    gm: fx.GraphModule, example_inputs: list[Any], inner: Any, patches: dict[str, Any]
) -> Callable[..., Any]:
    if inner == "eager":
        return dynamo.forward(gm)
    if inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        compiled: Any = compile_fx(gm, example_inputs, config_patches=patches or None)
        return compiled
    return dynamo.find_backend(inner)(gm, example_inputs)


def _inductor_patches(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    patches: dict[str, Any] = {}
    if not mode and not options:
        return patches
    import torch._inductor
    from torch._inductor import config

    if mode and mode != "default":
        known = torch._inductor.list_mode_options()
        if mode not in known:
            raise BackendOptionError(f"mode must be one of {sorted(known)}, got {mode!r}")
        patches.update(known[mode])
        # recorded here instead (see runtime/recording.py), where the cache stays in place
        patches.pop("triton.cudagraphs", None)
    settings = config.get_config_copy()
    for name, value in options.items():
        if name.replace("-", "_") not in settings:
            raise BackendOptionError(
                f"unknown option {name!r}: the kvmix backend takes {sorted(_OWN)} and settings of "
                "torch._inductor.config"
            )
        patches[name.replace("-", "_")] = value
    return patches


def _requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _is_short(result: manager.PassResult) -> bool:
    """Whether a graph is a decode step: every site has a small fixed number of queries."""
    lengths = {site.query_length for site in result.report.sites if site.recognized}
    return bool(lengths) and all(length.isdigit() and int(length) <= SHORT_STEP for length in lengths)


def _one_token(example_inputs: list[Any]) -> bool:
    """Whether the token ids among the inputs are a single one."""
    ids = [
        x for x in example_inputs if isinstance(x, torch.Tensor) and x.dtype == torch.int64 and x.dim() == 2
    ]
    return bool(ids) and all(tuple(x.shape) == (1, 1) for x in ids)


def _on_accelerator(example_inputs: list[Any]) -> bool:
    return any(isinstance(v, torch.Tensor) and v.device.type not in ("cpu", "meta") for v in example_inputs)


def kvmix(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Entry point "kvmix" of the group torch_dynamo_backends."""
    settings = dict(options or {})
    if "plan" not in settings:
        raise BackendOptionError('the kvmix backend needs a plan: torch.compile(..., options={"plan": plan})')
    settings.setdefault("mode", mode)
    return KVMixBackend(**settings)(gm, example_inputs)
