"""Products of one tensor that a recorded step does side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn.functional import linear

import kvmix_fx
from kvmix_fx.passes.branches import branch_products
from kvmix_fx.plan import KVPlan
from kvmix_fx.runtime import branches, recording
from kvmix_fx.testing.models import tiny_llama

Step = Callable[..., Tensor]
WEIGHTS = [torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (16, 4, 4)]
BIAS = torch.randn(4, generator=torch.Generator().manual_seed(1))


def several(x: Tensor, a: Tensor, b: Tensor, c: Tensor, bias: Tensor) -> Tensor:
    """What is between them does not read the input alone."""
    q = linear(x, a).relu()
    k = linear(x, b, bias) * q.sum()
    return torch.cat([q, k, linear(input=x, weight=c, bias=bias)], -1)


def chained(x: Tensor, a: Tensor, b: Tensor, c: Tensor, bias: Tensor) -> Tensor:
    """No two of the same input."""
    return linear(linear(x, a)[..., :8], b) + linear(x * 2, c, bias)


def writes(x: Tensor, a: Tensor, b: Tensor, c: Tensor, bias: Tensor) -> Tensor:
    """The input is another one in between."""
    x = x * 1
    q = linear(x, a)
    x.view(-1)[:8].mul_(2)
    return torch.cat([q, linear(x, b, bias)], -1) + c.sum()


def makes_weights(x: Tensor, a: Tensor, b: Tensor, c: Tensor, bias: Tensor) -> Tensor:
    """One of them is made by the step, and only later."""
    q = linear(x, a)
    return torch.cat([q, linear(x, b * q.sum(), bias)], -1) + c.sum()


def narrow(x: Tensor, a: Tensor, b: Tensor, c: Tensor, bias: Tensor) -> Tensor:
    """Under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([linear(x, a), linear(x, b, bias)], -1) + c.sum()


CASES = [(several, 1), (chained, 0), (writes, 0), (makes_weights, 0), (narrow, 0)]


@pytest.mark.parametrize(("step", "groups"), CASES, ids=[step.__name__ for step, _ in CASES])
def test_products_of_one_tensor_are_one_op(step: Step, groups: int) -> None:
    found: list[tuple[int, fx.GraphModule]] = []

    def compiler(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        found.append((branch_products(gm), gm))
        return gm.forward

    x = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(9))
    given = (x, *WEIGHTS, BIAS)
    with torch.no_grad():
        got = torch.compile(step, backend=compiler, fullgraph=True)(*given)
        assert torch.equal(got, step(*given))
    [(count, gm)] = found
    assert count == groups
    products = [node for node in gm.graph.nodes if node.target is branches.products]
    left = [node for node in gm.graph.nodes if node.target is torch._C._nn.linear]
    assert len(products) == groups
    if groups:
        assert len(products[0].args[1]) == 3
        assert not left


def test_weights_that_are_no_plain_tensors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    found: list[int] = []

    def compiler(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        found.append(branch_products(gm))
        return gm.forward

    def step(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([linear(x, a), linear(x, b)], -1)

    a, b = WEIGHTS[1:]
    x = torch.randn(2, 8)
    with torch.no_grad():
        got = torch.compile(step, backend=compiler, fullgraph=True)(x, a, TwoTensor(b, b))
    assert found == [0]
    torch.testing.assert_close(getattr(got, "a", got), step(x, a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_op_is_its_products(dtype: torch.dtype) -> None:
    x = torch.randn(3, 2, 8, dtype=dtype)
    weights, biases = [w.to(dtype) for w in WEIGHTS], [None, BIAS.to(dtype), None]
    got = branches.products(x, weights, biases)
    for one, weight, bias in zip(got, weights, biases, strict=True):
        torch.testing.assert_close(one, linear(x, weight, bias))
    torch.library.opcheck(
        branches.products, (x, weights, biases), test_utils=("test_schema", "test_faketensor")
    )


class Streams:
    """What CUDA would be told, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, recording: bool) -> None:
        self.said: list[str] = []
        self.now = "main"
        main = self.stream("main")
        main.device_index = 0
        sides = [self.stream(name) for name in "abc"]
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
        monkeypatch.setattr(torch.cuda, "stream", self.entered)
        monkeypatch.setattr(branches, "_streams", lambda device: sides)

    def stream(self, name: str) -> Any:
        said = self.said

        class Stream:
            def __init__(self) -> None:
                self.name = name

            def wait_stream(self, other: Any) -> None:
                said.append(f"{name} waits for {other.name}")

        return Stream()

    def entered(self, stream: Any) -> Any:
        outer = self

        class Entered:
            def __enter__(self) -> None:
                self.before, outer.now = outer.now, stream.name

            def __exit__(self, *_: object) -> None:
                outer.now = self.before

        return Entered()

    def task(self, i: int) -> Callable[[], None]:
        return lambda: self.said.append(f"{i} on {self.now}")


def test_what_is_recorded_forks_and_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch, recording=True)
    branches.side_by_side([streams.task(i) for i in range(3)])
    forked = ["a waits for main", "b waits for main"]
    joined = ["main waits for a", "main waits for b"]
    assert streams.said == [*forked, "0 on main", "1 on a", "2 on b", *joined]
    streams.said.clear()
    branches.side_by_side([streams.task(i) for i in range(6)])
    done = [f"{i} on {name}" for i, name in enumerate(["main", "a", "b", "c", "main", "a"])]
    assert streams.said[3:-3] == done


@pytest.mark.parametrize(
    ("recording", "count", "forks"), [(False, 3, True), (True, 1, True), (True, 3, False)]
)
def test_else_tasks_are_done_in_their_order(
    recording: bool, count: int, forks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch, recording)
    branches.side_by_side([streams.task(i) for i in range(count)], forks)
    assert streams.said == [f"{i} on main" for i in range(count)]


def test_steps_that_are_recorded_have_them_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmix_fx import backend

    monkeypatch.setattr(recording, "REPLAY_DEVICES", ("cpu",))
    monkeypatch.setattr(recording, "record_cuda", lambda run, inputs: recording.Recording([], lambda: None))
    monkeypatch.setattr(backend, "_compile", lambda gm, *_: gm.forward)
    settings = {"cache_implementation": "static", "output_logits": True, "return_dict_in_generate": True}
    ids = torch.randint(0, 100, (2, 60), generator=torch.Generator().manual_seed(1))
    found = []
    for options in ({}, {"cuda_graphs": False}):
        model = tiny_llama()
        kvmix_fx.compile(model, KVPlan.uniform(model, 2, 2), inner="inductor", options=options)
        with torch.no_grad():
            found.append(
                torch.stack(model.generate(ids, max_new_tokens=3, do_sample=False, **settings).logits)
            )
        report = kvmix_fx.compiled(model).report
        # queries, keys and values, and the two of the gate
        expected = 0 if options else 4
        assert report.graphs[-1].branches == expected
        assert (f"{expected} groups of products side by side" in str(report)) is (expected > 0)
    torch.testing.assert_close(*found)
