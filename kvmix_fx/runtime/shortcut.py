"""The next step of one generate() call without asking Dynamo's guards again.

Guards find out whether the model, its settings and its inputs are still what a graph was compiled for. With
32 layers that takes over a millisecond, in which the GPU waits. Within one generate() call only the inputs
change, so from the third decode step on they are all that is compared: every argument must be the very object
of the step before, or a tensor of the same shape, dtype and device, which is handed on, or a dict of such.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.contracts import given_cache
from kvmix_fx.runtime.same import same_object


class Noted(NamedTuple):
    """What a graph was called with and gave back, and the way to call it again.

    unread: places of inputs that are numbers and do not matter. counts: outputs that count tokens for
    somebody; `again` has none of them.
    """

    again: Callable[[Sequence[Any]], Sequence[Any]]
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    unread: Collection[int] = ()
    counts: int = 0


Note = Callable[[Noted], None]


class Shortcut(threading.local):
    """Learns from two steps in a row how arguments become graph inputs, and outputs the result.

    Steps in a row are those of one thread.
    """

    def __init__(self) -> None:
        """Start without knowledge."""
        self._noted: list[Noted] = []
        self.forget()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model has caches of its own to learn about."""
        return Shortcut, ()

    def forget(self) -> None:
        """Forget everything, and let go of the cache."""
        self._last: Noted | None = None
        self._arguments: dict[str, Any] = {}
        self._sources: list[tuple[int, tuple[str, ...]]] = []
        self._result: Any = None
        self._fields: list[tuple[str, int]] = []
        self._held: list[tuple[Any, Any, Any]] = []
        self._ready = False

    def listen(self) -> None:
        """Before a step goes the long way."""
        self._noted.clear()  # an interrupted step may have left something

    def note(self, noted: Noted) -> None:
        """Hear of a graph call of this step."""
        self._noted.append(noted)

    def learn(self, arguments: Mapping[str, Any], result: Any, generating: bool, counts: int = 0) -> None:
        """After a step that went the long way; only steps of one call of generate() teach anything.

        `counts`: numbers of the cache that whoever takes the short way goes on counting himself.
        """
        last = self._last
        noted = self._noted[0] if generating and len(self._noted) == 1 else None
        self._noted.clear()
        self.forget()
        if noted is None or noted.counts != counts or not isinstance(result, dict):
            return
        if any(isinstance(value, QuantizedKVTensor) for value in arguments.values()):
            return  # among the inputs there are its buffers, and who brings another one could not tell
        names = {id(value): path for path, value in _tensors(arguments)}
        places = {id(value): i for i, value in enumerate(noted.outputs) if isinstance(value, Tensor)}
        for name, value in result.items():
            if isinstance(value, Tensor):
                if id(value) not in places:
                    return
                self._fields.append((name, places[id(value)]))
            elif value is not arguments.get(name):
                return
        self._last, self._result, self._arguments = noted, result, dict(arguments)
        self._sources = [(i, names[id(x)]) for i, x in enumerate(noted.inputs) if id(x) in names]
        layers = getattr(given_cache(arguments), "layers", [])
        self._held = [(layer, layer.keys, layer.values) for layer in layers]
        moving = {i for i, _ in self._sources} | set(noted.unread)
        self._ready = (
            last is not None
            and last.again == noted.again
            and len(last.inputs) == len(noted.inputs)
            and all(
                i in moving or a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
                for i, (a, b) in enumerate(zip(last.inputs, noted.inputs, strict=True))
            )
        )

    def serves(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a step with these arguments is like the last one."""
        return (
            self._ready
            and arguments.keys() == self._arguments.keys()
            and all(same_object(arguments[name], value) for name, value in self._arguments.items())
            and all(layer.keys is keys and layer.values is values for layer, keys, values in self._held)
        )

    def run(self, arguments: Mapping[str, Any]) -> Any:
        """The step, for arguments that it serves."""
        assert self._last is not None
        inputs = list(self._last.inputs)
        for i, path in self._sources:
            found: Any = arguments
            for name in path:
                found = found[name]
            inputs[i] = _laid_out(found, inputs[i])
        outputs = self._last.again(inputs)
        changed = {name: outputs[place] for name, place in self._fields}
        return type(self._result)(**{name: changed.get(name, value) for name, value in self._result.items()})


def _tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The tensors among arguments, and in dicts among them, with the names that lead there."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield (name,), value
        elif type(value) is dict:
            for path, inner in _tensors(value):
                yield (name, *path), inner


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """`x` with the strides of `like`, which the graph may have been compiled for."""
    if x.stride() == like.stride():
        return x
    return like.new_empty_strided(like.shape, like.stride()).copy_(x)
