"""The forward of a compiled model: which way a step goes, and what surrounds it. README.md has the table."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol

import torch
from torch import fx, nn

from kvmix_fx import dynamo
from kvmix_fx.errors import TrainingError
from kvmix_fx.runtime.shortcut import Shortcut

RECOMPILE_LIMIT = 64
"""Graphs one model may be traced into: two per kind of cache, gradient mode and way of calling it, each for
one row and for more. PyTorch's 8 are soon used up, and then `fullgraph` makes it an error."""


class Lane(Enum):
    """Which way a step goes."""

    TRACED = "through the guards of compiled code"
    SHORT = "as the step before it, past the guards"


class Call:
    """One call of a model.

    args, kwargs: what the model gets. lane: which way it goes. generating: whether it is a step of a
    library's own loop, in which nothing but the arguments changes.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], generating: bool = False) -> None:
        """A call that goes the long way."""
        self.args, self.kwargs, self.generating = args, kwargs, generating
        self.lane = Lane.TRACED

    def finish(self) -> None:
        """What to do after the call has succeeded."""


Prepare = Callable[[tuple[Any, ...], dict[str, Any]], Call]


class Backend(Protocol):
    """A Dynamo backend that counts."""

    @property
    def traced(self) -> int:
        """Graphs compiled so far."""
        ...

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Compile one graph."""
        ...


class CompiledStep:
    """What a compiled model's `forward` is.

    It may be copied and pickled together with the model: a copy runs the copied model, and compiles anew.
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

    def __reduce__(self) -> tuple[Any, ...]:
        parts = (self._model, self._original, self._backend, self._options, self._prepare, self._shortcut)
        return CompiledStep, (*parts, self._check)

    def compile(self) -> Callable[..., Any]:
        """Hand the original forward to torch, which traces it when it is called."""
        options: dict[str, Any] = {"fullgraph": True, **self._options}
        # an argument in newer releases, else a setting that holds during our own calls only
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            options.setdefault("recompile_limit", RECOMPILE_LIMIT)
        else:
            self._limit = RECOMPILE_LIMIT
        self._compiled = torch.compile(self._original, backend=self._backend, **options)
        return self._compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the model.

        Raises:
            TrainingError: the model is in training mode, or gradients are asked for.
            NoSiteError: the first call found nothing to rewrite.
        """
        if self._model.training:
            raise TrainingError("this model was compiled for inference: call model.eval()")
        if torch.is_grad_enabled():
            return self._without_gradients(args, kwargs)
        call = self._prepare(args, kwargs)
        result = self._shortcut.run(call.kwargs) if call.lane is Lane.SHORT else self._traced(call)
        call.finish()
        return result

    def _traced(self, call: Call) -> Any:
        """A step through compiled code, which is traced first if it has to be."""
        compiled = self._compiled or self.compile()
        traced = self._backend.traced
        self._shortcut.listen()
        with dynamo.recompile_limit(self._limit):
            result = dynamo.unwrapped(compiled, *call.args, **call.kwargs)
        if self._backend.traced != traced:
            self._check(result)
            # tracing leaves reference cycles that would keep the cache's memory
            gc.collect()
        self._shortcut.learn(call.kwargs, result, call.generating)
        return result

    def _without_gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gradient mode is on: fine for models without trainable weights, else plain or refused."""
        if not any(p.requires_grad for p in self._model.parameters()):
            with torch.no_grad():
                return self._model.forward(*args, **kwargs)
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            raise TrainingError(
                "gradients cannot flow through a packed KV cache: call the model under torch.no_grad(), or "
                "with use_cache=False for the plain, unquantized forward"
            )
        # no cache is asked for, so there is nothing to pack: the model's own forward, with gradients
        kwargs["use_cache"] = False
        try:
            return self._original(*args, **kwargs)
        except TypeError:
            kwargs.pop("use_cache")
            return self._original(*args, **kwargs)
