"""Decode steps compiled in pieces: one function for all layers that are alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import kvmix_fx
from kvmix_fx import backend
from kvmix_fx.passes.pieces import compile_pieces
from kvmix_fx.plan import KVPlan
from kvmix_fx.progress import say
from kvmix_fx.runtime.pieces import Pieces
from kvmix_fx.testing.models import tiny_llama
from kvmix_kernels import layout, ops


def logits(model: Any, ids: Tensor, cache: str | None) -> Tensor:
    """Of a few steps; no two prompts of one length share a graph by chance."""
    settings = {"cache_implementation": cache, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        return torch.stack(model.generate(ids, max_new_tokens=4, do_sample=False, **settings).logits)


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's place taken by nothing: what the pieces are is tried, not Inductor."""
    monkeypatch.setattr(backend, "_compile", lambda gm, *_: gm.forward)


@pytest.mark.usefixtures("not_compiled")
@pytest.mark.parametrize("cache", ["static", None])
def test_layers_that_are_alike_are_one_form(cache: str | None, subtests: pytest.Subtests) -> None:
    ids = torch.randint(0, 100, (2, 100), generator=torch.Generator().manual_seed(1))
    found = {}
    for pieces, given in ((True, {"pieces": True}), (False, {})):
        model = tiny_llama(num_hidden_layers=4)
        plan = KVPlan.uniform(model, 4, 2)
        kvmix_fx.compile(model, plan, inner="inductor", options=given)
        found[pieces] = logits(model, ids, cache)
        forms = [graph.forms for graph in kvmix_fx.compiled(model).report.graphs]
        with subtests.test(pieces=pieces):
            # before the first attention, between two, and behind the last
            assert forms == ([0, 3] if pieces else [0, 0])
            assert ("compiled in 3 forms" in str(kvmix_fx.compiled(model).report)) is pieces
    assert torch.equal(found[True], found[False])
    control = tiny_llama(num_hidden_layers=4)
    kvmix_fx.compile(control, KVPlan.uniform(control, 2, 2))
    assert not torch.allclose(found[True], logits(control, ids, cache), atol=1e-3)


def test_where_a_token_is_stored_is_read_off_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launch of its own in every layer."""
    parts: list[Any] = []
    monkeypatch.setattr(backend, "_compile", lambda gm, *_: parts.append(gm) or gm.forward)
    model = tiny_llama(num_hidden_layers=4)
    kvmix_fx.compile(model, KVPlan.uniform(model, 4, 2), inner="inductor", options={"pieces": True})
    logits(model, torch.ones(2, 100, dtype=torch.int64), "static")
    repeated = parts[2]
    assert any(node.target is ops.attend for node in repeated.graph.nodes)
    assert not any(node.target is torch.arange for node in repeated.graph.nodes)


@pytest.mark.usefixtures("not_compiled")
def test_layers_of_other_formats_are_other_forms(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMIX_PROGRESS", "1")
    ids = torch.randint(0, 100, (1, 100), generator=torch.Generator().manual_seed(2))
    model = tiny_llama(num_hidden_layers=4)
    plan = KVPlan.uniform(model, 4, 2).with_layers([2], key=kvmix_fx.QuantSpec(8, "channel", 32))
    kvmix_fx.compile(model, plan, inner="inductor", options={"pieces": True})
    logits(model, ids, "static")
    # a piece begins with one layer's attention and ends with the next one's keys, which are appended later
    assert kvmix_fx.compiled(model).report.graphs[1].forms == 4
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kvmix: ")]
    assert said == ["kvmix: compiling a step of 4 layers, once; later processes reuse most of it"]


def test_progress_is_said_on_terminals_unless_it_is_unwanted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for wanted, terminal, told in [(None, False, 0), ("1", False, 1), (None, True, 1), ("0", True, 0)]:
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        if wanted is None:
            monkeypatch.delenv("KVMIX_PROGRESS", raising=False)
        else:
            monkeypatch.setenv("KVMIX_PROGRESS", wanted)
        say("it takes a while")
        assert capsys.readouterr().err.count("kvmix: it takes a while\n") == told


def test_inductor_gives_what_it_gives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 100, (1, 100), generator=torch.Generator().manual_seed(3))
    found = []
    # only decode steps are compiled there
    monkeypatch.setattr(backend, "_on_accelerator", lambda _: True)
    for pieces in (True, False):
        model = tiny_llama(num_hidden_layers=3)
        kvmix_fx.compile(model, KVPlan.uniform(model, 4, 2), options={"pieces": pieces})
        found.append(logits(model, ids, "static"))
        assert kvmix_fx.compiled(model).report.graphs[-1].forms == 3 * pieces
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


FORMAT = layout.make_format(16, "token", 0, 16, 0, 0)


def attend(x: Tensor, buffers: list[Tensor]) -> Tensor:
    """Attention of `x`, [1, 1, 1, 16], over a raw cache of eight tokens."""
    return ops.attend(x, None, None, buffers, buffers, None, None, 8, 0.25, FORMAT.encode(), FORMAT.encode())


def own(x: Tensor, caches: list[list[Tensor]]) -> Tensor:
    """Writes to what the same piece made."""
    for buffers in caches:
        x = attend(x, buffers) * 2
        x += 1
    return x


def others(x: Tensor, caches: list[list[Tensor]]) -> Tensor:
    """Writes to what the piece before made."""
    for buffers in caches:
        y = x * 1
        z = attend(x, buffers)
        y += z
        x = y
    return x


def views(x: Tensor, caches: list[list[Tensor]]) -> Tensor:
    """Writes to a view of an input."""
    for buffers in caches:
        x = attend(x, buffers) + x
        buffers[3].view(-1)[:1].mul_(2)
    return x


def autocast(x: Tensor, caches: list[list[Tensor]]) -> Tensor:
    """Several attentions under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        for buffers in caches:
            x = attend(x.float(), buffers) @ x.new_ones(16, 16)
    return x


@pytest.mark.parametrize(("step", "cut"), [(own, True), (others, False), (views, False), (autocast, False)])
def test_only_what_is_safe_is_cut(step: Callable[..., Tensor], cut: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 1, 1, 16, generator=generator)
    made: list[Pieces | None] = []

    def compiler(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        made.append(compile_pieces(gm, lambda part, inputs: part.forward))
        whole: Callable[..., Any] = gm.forward
        return made[0] or whole

    def caches() -> list[list[Tensor]]:
        fixed = torch.Generator().manual_seed(5)
        return [allocated(torch.randn(1, 1, 8, 16, generator=fixed)) for _ in range(4)]

    with torch.no_grad():
        got = torch.compile(step, backend=compiler, fullgraph=True)(x.clone(), caches())
        assert torch.equal(got, step(x.clone(), caches()))
    assert (made[0] is not None) is cut
    assert made[0] is None or made[0].forms == 1


def allocated(tokens: Tensor) -> list[Tensor]:
    """The buffers of a raw cache."""
    return ops.quantize_pack(tokens, None, FORMAT.encode())


@pytest.mark.parametrize("cache", ["static", None])
def test_kernels_are_compiled_ahead_for_the_calls_that_come(
    cache: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of each form, with the sizes that it is called with."""
    ahead: list[tuple[Any, Any]] = []
    called: set[tuple[Any, Any]] = set()

    def described(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return tuple(map(described, x))
        return (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else (type(x), x)

    class Noted(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is ops.attend:
                called.add((target, described(args)))
            return super().call_function(target, args, kwargs)

    monkeypatch.setattr(backend, "_compile", lambda gm, *_: Noted(gm).run)
    monkeypatch.setattr(ops, "compile_ahead", lambda op, args: ahead.append((op, described(args))))
    model = tiny_llama(num_hidden_layers=4)
    plan = KVPlan.uniform(model, 4, 2, window=8).with_layers([2], key=2)
    kvmix_fx.compile(model, plan, inner="inductor")
    ids = torch.randint(0, 100, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.generate(ids, max_new_tokens=2, do_sample=False, cache_implementation=cache)
    assert len(ahead) == len(set(ahead)) == 4
    assert {call for call in ahead if call[0] is ops.attend} == called
