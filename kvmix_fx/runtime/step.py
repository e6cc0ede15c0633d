"""The forward of a compiled model: which way a step goes, and what surrounds it. README.md has the table."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Protocol

import torch
from torch import fx, nn

from kvmix_fx import dynamo
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.contracts import given_cache, returned_cache
from kvmix_fx.errors import (
    CacheShapeError,
    GraphBreakWarning,
    KVMixError,
    NarrowScalesError,
    NarrowScalesWarning,
    NoSiteError,
    PlainCacheWarning,
    TrainingError,
)
from kvmix_fx.runtime.shortcut import Shortcut

RECOMPILE_LIMIT = 64
"""Graphs one model may be traced into: two per kind of cache, gradient mode and way of calling it, each for
one row, for more, and for more of which some have padding. PyTorch's 8 are soon used up, and then `fullgraph`
makes it an error."""


class Lane(Enum):
    """Which way a step goes."""

    TRACED = "through the guards of compiled code"
    PLAIN = "a prompt by the model as it is, packed layer by layer"
    SHORT = "as the step before it, past the guards"


class Call:
    """One call of a model.

    args, kwargs: what the model gets. lane: which way it goes. generating: whether it is a step of a
    library's own loop, in which nothing but the arguments changes. counts: numbers of the cache that grow
    with each step on the host, and that `finish` counts itself after a short one; -1 if none may be short.
    changing: a pattern of where such numbers come from, see `dynamo.changing_numbers`.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], generating: bool = False) -> None:
        """A call that goes the long way."""
        self.args, self.kwargs, self.generating = args, kwargs, generating
        self.lane = Lane.TRACED
        self.counts = 0
        self.changing = ""

    def finish(self) -> None:
        """What to do after the call has succeeded."""

    def failed(self) -> None:
        """What to do after something was raised in the middle of it."""

    def in_pieces(self) -> None:
        """Before a model is run in several graphs: each layer counts its own tokens.

        Else a graph that only reads a layer could not tell whether this step has written it.
        """

    def explained(self) -> KVMixError | None:
        """Why it could not succeed, where that can be told once it has failed; None where not."""
        return None

    def reads_prompt(self) -> bool:
        """Whether nothing is lost if it is not traced: it fills a cache that is packed beside the model."""
        return False

    def plain(self, forward: Callable[..., Any], meanwhile: Callable[[], None]) -> Any:
        """Do such a call by the model's own forward. `meanwhile`: called while a device is at it."""
        raise NotImplementedError

    def widen(self, found: Sequence[tuple[int | None, int]]) -> None:
        """Before the call is done again: give the scales of these empty tensors single precision.

        Each is a layer, and 0 for its keys or 1 for its values.
        """


Prepare = Callable[[tuple[Any, ...], dict[str, Any]], Call]


class Backend(Protocol):
    """A Dynamo backend that counts."""

    @property
    def traced(self) -> int:
        """Graphs compiled so far."""
        ...

    @property
    def traces_prompts(self) -> bool:
        """Whether calls that need not be traced are."""
        ...

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Compile one graph."""
        ...

    def get_ready(self, inputs: list[Any]) -> None:
        """Called while a device is busy with a prompt that is not traced."""
        ...

    def widened(self, found: Sequence[tuple[int | None, int]]) -> Backend:
        """A backend that packs these tensors with scales of single precision."""
        ...


class CompiledStep:
    """What a compiled model's `forward` is.

    It may be copied and pickled together with the model: a copy runs the copied model, and compiles anew.

    Attributes:
        calls: how often it has been called.
    """

    def __init__(
        self,
        model: nn.Module,
        original: Callable[..., Any],
        backend: Backend,
        options: dict[str, Any],
        prepare: Prepare,
        shortcut: Shortcut,
        check: Callable[[Any], None],
    ) -> None:
        """Keep what a step needs. Nothing is asked of the model, of which a copy may not be complete yet.

        Args:
            model: whose forward this is.
            original: that forward as it was.
            backend: compiles it.
            options: for torch.compile.
            prepare: makes the call that is done of the call that was asked for, and chooses its lane.
            shortcut: the short lane.
            check: gets the result of a step in which something was traced; raises if that must not be.
        """
        # generate() inspects the signature to decide what to pass
        functools.update_wrapper(self, original)
        self._model, self._original = model, original
        self._backend, self._options = backend, options
        self._prepare, self._shortcut, self._check = prepare, shortcut, check
        self._compiled: Callable[..., Any] | None = None
        self._limit: int | None = None
        self._refused = False
        self.calls = 0
        self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        parts = (self._model, self._original, self._backend, self._options, self._prepare, self._shortcut)
        return CompiledStep, (*parts, self._check)

    def compile(self) -> Callable[..., Any]:
        """Hand the original forward to torch, which traces it when it is called."""
        options: dict[str, Any] = {"fullgraph": True, **self._options}
        known = inspect.signature(torch.compile).parameters
        # an argument in newer releases, else a setting that holds during our own calls only
        if "recompile_limit" in known:
            options.setdefault("recompile_limit", RECOMPILE_LIMIT)
        else:
            self._limit = RECOMPILE_LIMIT
        if "isolate_recompiles" in known:
            # else graphs of other plans, of other models of the class and of anybody's own torch.compile
            # count against one limit
            options.setdefault("isolate_recompiles", True)
        self._compiled = torch.compile(self._original, backend=self._backend, **options)
        return self._compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the model.

        Raises:
            TrainingError: the model is in training mode, or gradients are asked for.
            NoSiteError: the first graph had nothing to rewrite.
        """
        if torch.compiler.is_dynamo_compiling():
            # somebody's torch.compile around this; a graph break, and compiled code of ours inside
            return _outside_other_graphs(self, args, kwargs)
        return self._call(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls += 1
        if self._model.training:
            raise TrainingError("this model was compiled for inference: call model.eval()")
        if torch.is_grad_enabled():
            return self._with_gradients(args, kwargs)
        call = self._prepare(args, kwargs)
        if call.lane is Lane.TRACED and not self._backend.traces_prompts and call.reads_prompt():
            call.lane = Lane.PLAIN
        try:
            result = self._shortcut.run(call.kwargs) if call.lane is Lane.SHORT else self._in_range(call)
        except BaseException as error:
            call.failed()
            unclear = not isinstance(error, KVMixError) or isinstance(error, CacheShapeError)
            reason = call.explained() if unclear and isinstance(error, Exception) else None
            if reason is not None:
                raise reason from error
            raise
        call.finish()
        return result

    def _in_range(self, call: Call) -> Any:
        """A long step; if what it packs does not fit the planned scales, once more with wider ones."""
        run = self._traced if call.lane is Lane.TRACED else self._plain
        try:
            return run(call)
        except NarrowScalesError as error:
            found = [(layer, role) for layer, role, _ in error.found]
            warnings.warn(
                f"{error}; until then they get it here, and take more bytes than the plan says",
                NarrowScalesWarning,
                stacklevel=4,
            )
        # nothing of the step has been kept
        self._backend = self._backend.widened(found)
        self._compiled = None
        call.widen(found)
        return run(call)

    def _plain(self, call: Call) -> Any:
        """A prompt without a graph."""
        self._shortcut.forget()
        return call.plain(
            self._original, lambda: self._backend.get_ready([*call.args, *call.kwargs.values()])
        )

    def _traced(self, call: Call) -> Any:
        """A step through compiled code, which is traced first if it has to be."""
        compiled = self._compiled or self.compile()
        traced = self._backend.traced
        self._shortcut.listen()
        if not self._options.get("fullgraph", True):
            call.in_pieces()
        with (
            dynamo.recompile_limit(self._limit),
            dynamo.changing_numbers(call.changing),
            dynamo.one_collection(lambda: self._backend.traced != traced),
        ):
            try:
                result = dynamo.unwrapped(compiled, *call.args, **call.kwargs)
            except dynamo.graph_break_errors() as error:
                if "fullgraph" in self._options:
                    raise
                warnings.warn(
                    f"the model cannot be traced as one graph ({dynamo.break_place(error)}), so it is "
                    "traced in pieces from now on: decode steps are slower. fullgraph=False says that you "
                    "know, fullgraph=True makes it an error",
                    GraphBreakWarning,
                    stacklevel=3,
                )
                self._options = {**self._options, "fullgraph": False}
                call.in_pieces()
                result = dynamo.unwrapped(self.compile(), *call.args, **call.kwargs)
        new = self._backend.traced != traced
        if new or self._refused:
            # as long as nothing is packed every call says so, not the first one alone
            self._refused = True
            self._check(result)
            self._refused = False
        self._shortcut.learn(call.kwargs, result, call.generating, call.counts)
        return result

    def _with_gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gradient mode is on: fine for models without trainable weights, else plain or refused."""
        if not any(p.requires_grad for p in self._model.parameters()):
            with torch.no_grad():
                return self._call(args, kwargs)
        given = _by_name(self._original, args, kwargs)
        past = given_cache(given)
        if given.get("use_cache") or _is_packed(past):
            raise TrainingError(
                "gradients cannot flow through a packed KV cache: call the model under torch.no_grad(), or "
                "with use_cache=False for the plain, unquantized forward"
            )
        result = self._original(*args, **kwargs)
        if not self._warned and returned_cache(result) is not None:
            self._warned = True
            warnings.warn(
                "gradients are on, so the cache of this call is plain and exact: call the model under "
                "torch.no_grad() to have it packed, or with use_cache=False to have none",
                PlainCacheWarning,
                stacklevel=3,
            )
        return result


class Delegating:
    """A method of a wrapper around a compiled model, which must lead to that model's forward."""

    def __init__(self, original: Callable[..., Any], model: nn.Module) -> None:
        """`original`: the wrapper's method. `model`: whose forward is a `CompiledStep`."""
        functools.update_wrapper(self, original)
        self._original, self._model = original, model

    def __reduce__(self) -> tuple[Any, ...]:
        return Delegating, (self._original, self._model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original.

        Raises:
            NoSiteError: it went past the compiled forward, so nothing of it was packed.
        """
        step = vars(self._model).get("forward")
        before = step.calls if isinstance(step, CompiledStep) else -1
        result = self._original(*args, **kwargs)
        if isinstance(step, CompiledStep) and step.calls == before:
            kind = type(self._model).__name__
            raise NoSiteError(
                f"this call did not go through the forward of the {kind} that is compiled, so its cache is "
                "not packed: compile the module that it does call, or call that one's forward"
            )
        return result


@torch.compiler.disable(reason="kvmix_fx.compile has compiled this model: leave out the outer torch.compile")  # type: ignore[untyped-decorator]
def _outside_other_graphs(step: CompiledStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return step(*args, **kwargs)


def _by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call that have a name, however they were passed."""
    try:
        bound = inspect.signature(function).bind_partial(*args, **kwargs)
    except TypeError:
        return kwargs
    return {**bound.arguments, **kwargs}


def _is_packed(cache: Any) -> bool:
    """Whether a cache, of whatever kind, holds packed tensors or is going to."""
    if isinstance(cache, (list, tuple)):
        return any(_is_packed(part) for part in cache)
    parts = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    parts += [(layer.keys, layer.values) for layer in getattr(cache, "layers", ()) if hasattr(layer, "keys")]
    held = isinstance(cache, QuantizedKVTensor) or getattr(cache, "plan", None) is not None
    return held or any(_is_packed(part) for part in parts if part is not None)
