"""Decode steps as CUDA graphs.

A decode step launches hundreds of small kernels, and launching them takes the host longer than running
them takes the GPU. A fixed cache lives at the same addresses in every step and counts its tokens on the
device, so the work of a step can be recorded once and replayed.
"""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvmix_fx.runtime.same import same_form

Run = Callable[..., Sequence[Any]]

REPLAY_DEVICES = ("cuda",)
"""Types of devices on which steps can be recorded."""

MAX_ENTRIES = 4
"""Caches (batch sizes, say) whose recordings one graph keeps."""


class Recording(NamedTuple):
    """Recorded work: running `replay` does it again, on the recorded inputs, into `outputs`.

    `release` gives up what the device keeps for it; it cannot be replayed any more.
    """

    outputs: Sequence[Any]
    replay: Callable[[], None]
    release: Callable[[], None] = lambda: None


Record = Callable[[Run, Sequence[Any]], Recording]


def record_cuda(run: Run, inputs: Sequence[Any]) -> Recording:
    """Capture `run(*inputs)` without executing it."""
    graph = torch.cuda.CUDAGraph()
    device = next(x.device for x in inputs if isinstance(x, Tensor) and x.is_cuda)
    # other threads (tokenizers, streamers) may use the GPU meanwhile
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = run(*inputs)
    return Recording(outputs, graph.replay, graph.reset)


class Replayed:
    """Calls `run`, or replays a recording of it where that does the same work.

    Two calls in a row on the same cache lead to a recording. Inputs that were the same objects in both
    (weights, cache buffers) are used where they lie; the others are copied into inputs that the recording
    owns. A recording serves only calls whose inputs are those very objects at those very addresses, with
    all others of equal shape; any other call runs as usual. Outputs are copies: they outlive the next step.
    """

    def __init__(
        self,
        run: Run,
        pinned: Callable[[int], bool],
        record: Record = record_cuda,
        unread: Collection[int] = (),
    ) -> None:
        """Start without recordings.

        Args:
            run: a step; does its work on the current stream without waiting for the device.
            pinned: whether an input index belongs to the cache, which is never copied.
            record: how to record; tests on machines without a GPU give their own.
            unread: input indices of numbers that `run` does not read, so that any will do.
        """
        self._run = run
        self._pinned = pinned
        self._record = record
        self._unread = unread
        self._entries: list[_Entry] = []
        self._last: Sequence[Any] | None = None
        # weak: entries are dropped when their cache is
        self._served: weakref.ref[_Entry] | None = None
        self._given_up = False

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """One step."""
        for entry in self._entries:
            if entry.matches(inputs):
                self._served = weakref.ref(entry)
                return entry.replay(inputs)
        self._served = None
        if self._given_up:
            return self._run(*inputs)
        last, self._last = self._last, None
        if last is None or not self._repeats(last, inputs):
            # kept alive until the next call, or a new tensor could get the identity of a freed one; a
            # cache is not, so that dropping it frees its memory
            self._last = [weakref.ref(x) if self._pinned(i) else x for i, x in enumerate(inputs)]
            return self._run(*inputs)
        fixed = [
            isinstance(b, Tensor) and (self._pinned(i) or a is b)
            for i, (a, b) in enumerate(zip(last, inputs, strict=True))
        ]
        own = [
            x.clone() if isinstance(x, Tensor) and not same else x
            for same, x in zip(fixed, inputs, strict=True)
        ]
        results = self._run(*inputs)
        written = [
            i
            for i, (mine, theirs) in enumerate(zip(own, inputs, strict=True))
            if mine is not theirs and isinstance(mine, Tensor) and not torch.equal(mine, theirs)
        ]
        try:
            recording = self._record(self._run, own)
        except RuntimeError as problem:
            # the step itself is done; only the shorter way to the next ones is missing
            warnings.warn(f"decode steps are not replayed as CUDA graphs: {problem}", stacklevel=2)
            self._given_up = True
            return results
        self._entries = [entry for entry in self._entries if entry.alive()][: MAX_ENTRIES - 1]
        self._entries.insert(0, _Entry(recording, own, fixed, written, self._unread))
        return results

    def again(self, *inputs: Any) -> Sequence[Any]:
        """A step for the very objects of an earlier call, but for tensors that are copied.

        They are not compared one by one: two tensors that exist are not in one place. Where they lie is,
        since what a tensor refers to may have been exchanged.
        """
        entry = None if self._served is None else self._served()
        if entry is not None and entry.lies_at(inputs):
            return entry.replay(inputs)
        return self(*inputs)

    def _repeats(self, last: Sequence[Any], inputs: Sequence[Any]) -> bool:
        """Whether both calls used the same cache in the same way."""
        return len(last) == len(inputs) and all(
            a() is b if self._pinned(i) else i in self._unread or same_form(a, b)
            for i, (a, b) in enumerate(zip(last, inputs, strict=True))
        )


def release_all() -> None:
    """Release every recording there is; steps are recorded anew when they come again.

    What communicates through NCCL has to be, before the process group goes: destroying a communicator
    waits, for ever, for the CUDA graphs that use it.
    """
    for entry in list(_entries):
        entry.release()


class _Entry:
    """One recording, and which inputs it serves."""

    def __init__(
        self,
        recording: Recording,
        own: Sequence[Any],
        fixed: Sequence[bool],
        written: Sequence[int],
        unread: Collection[int],
    ) -> None:
        self._recording: Recording | None = recording
        places = list(enumerate(zip(own, fixed, strict=True)))
        self._places = [i for i, same in enumerate(fixed) if same]
        self._pick = _picked(self._places)
        # weak: a recording must not keep a cache alive that its user has dropped
        self._fixed = [weakref.ref(own[i]) for i in self._places]
        self._addresses = [own[i].data_ptr() for i in self._places]
        self._moving = [(i, x) for i, (x, same) in places if isinstance(x, Tensor) and not same]
        self._constants = [(i, x) for i, x in enumerate(own) if not isinstance(x, Tensor) and i not in unread]
        self._written = [(i, own[i]) for i in written]
        self._count = len(own)
        inputs = {id(x): i for i, x in enumerate(own) if isinstance(x, Tensor)}
        # an output that is an input must be the caller's own
        self._outputs = [(out, inputs.get(id(out))) for out in recording.outputs]
        _entries.add(self)

    def release(self) -> None:
        """Serve no call any more, and keep nothing."""
        if self._recording is not None:
            self._recording.release()
        self._recording = None
        self._outputs.clear()

    def alive(self) -> bool:
        """Whether it can be replayed, and all tensors it works on still exist."""
        return self._recording is not None and all(ref() is not None for ref in self._fixed)

    def matches(self, inputs: Sequence[Any]) -> bool:
        """Whether a replay would do what a call with `inputs` does."""
        if self._recording is None or len(inputs) != self._count:
            return False
        # hundreds of them, in every step, while the GPU waits: loops in C take half the time
        recorded = [ref() for ref in self._fixed]
        return all(map(operator.is_, recorded, self._pick(inputs))) and self.lies_at(inputs)

    def lies_at(self, inputs: Sequence[Any]) -> bool:
        """The same, for inputs of which those that are not copied are known to be the recorded ones."""
        return (
            self._recording is not None
            and len(inputs) == self._count
            and list(map(Tensor.data_ptr, self._pick(inputs))) == self._addresses
            and all(inputs[i] == value for i, value in self._constants)
            and all(same_form(inputs[i], mine) for i, mine in self._moving)
        )

    def replay(self, inputs: Sequence[Any]) -> list[Any]:
        """Do the recorded step for `inputs`, which match."""
        assert self._recording is not None
        for i, mine in self._moving:
            mine.copy_(inputs[i])
        self._recording.replay()
        for i, mine in self._written:
            inputs[i].copy_(mine)
        return [
            inputs[place] if place is not None else out.clone() if isinstance(out, Tensor) else out
            for out, place in self._outputs
        ]


def _picked(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function from inputs to those at these places."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda inputs: [inputs[i] for i in places]


_entries: weakref.WeakSet[_Entry] = weakref.WeakSet()
"""All that are kept by someone."""
