"""What shows on a GPU alone: replays are the same bits, streams are kept apart, launches may be blocking."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvmix_fx
from benchmarks.memory import steps as endurance
from kvmix_fx.plan import TokenTier
from kvmix_fx.testing.models import tiny_llama
from tests.kernels import steps
from tests.kernels.steps import Prompt, same, step_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROOT = Path(__file__).resolve().parents[2]
REPLAYS = 100
NAN_SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 24)
PLANS = {
    "4 and 2 bits": lambda model: kvmix_fx.KVPlan.uniform(model, 4, 2, group_size=16, window=8),
    "channel tiers": lambda model: kvmix_fx.KVPlan.preset("tiers", model, window=8),
    "token tiers": lambda model: kvmix_fx.KVPlan.uniform(model, 2, 2, window=8).with_layers(
        "all", token_tier=TokenTier()
    ),
}


def poison(tensors: list[Tensor]) -> None:
    """Bytes of which floating numbers are NaN: what a replay does not write would be noticed."""
    for x in tensors:
        x.view(torch.uint8).fill_(255) if x.is_contiguous() else x.fill_(float("nan"))


def recorded(run: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """A CUDA graph of a call that was made before, and the tensors that its replays write."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs


@pytest.mark.parametrize("name", steps.ALL)
def test_replays_of_a_step_are_the_same_bits(name: str) -> None:
    step = step_of(name)
    launched = [x.clone() for x in step.run()]
    assert all(x.isfinite().all() for x in launched)
    replay, outputs = recorded(step.run)
    for number in range(REPLAYS):
        # buffers of caches among them: the step puts back what was in them first
        poison(outputs)
        replay()
        assert same(outputs, launched), f"replay {number}"
    assert not same(step_of(name, seed=1).run(), launched)


@pytest.mark.parametrize("name", steps.FORMS)
def test_a_prompt_packed_again_is_the_same_bits(name: str) -> None:
    """Not recorded: prompts never are."""
    prompt = Prompt(name)
    first = [x.clone() for x in prompt.run()]
    for number in range(REPLAYS):
        assert same(prompt.run(), first), f"time {number}"


def logits_of(model: Any, ids: Tensor, new: int) -> Tensor:
    out = model.generate(
        ids, do_sample=False, max_new_tokens=new, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(out.logits)


def prompt_ids() -> Tensor:
    ids = torch.randint(1, 120, (2, 300), generator=torch.Generator().manual_seed(3))
    return ids.to(steps.DEVICE)


@contextlib.contextmanager
def compiled(plan: str, **options: bool) -> Iterator[Callable[[int], Tensor]]:
    """Logits of a compiled model, by how many tokens it is to add; it records steps unless told not to."""
    model = tiny_llama().to(steps.DEVICE, torch.bfloat16)
    ids = prompt_ids()
    kvmix_fx.compile(model, PLANS[plan](model), inner="eager", options=options)
    yield lambda new: logits_of(model, ids, new)
    replays = [graph.replay for graph in kvmix_fx.compiled(model).report.graphs]
    assert options or "" in replays, replays
    kvmix_fx.restore(model)


@pytest.mark.parametrize("plan", PLANS)
def test_a_hundred_replays_of_a_models_steps_are_the_same_bits(plan: str) -> None:
    with compiled(plan) as answer:
        # a first step is launched, a second recorded
        answer(4)
        first = answer(26)
        assert first.isfinite().all()
        for time in range(REPLAYS // 25):
            assert torch.equal(answer(26), first), time
    plain = logits_of(tiny_llama().to(steps.DEVICE, torch.bfloat16), prompt_ids(), 26)
    assert (plain - first).abs().max() > 1e-3


@pytest.mark.parametrize("plan", PLANS)
def test_a_model_in_memory_full_of_nan_gives_the_same_bits(plan: str) -> None:
    with compiled(plan) as answer:
        clean = answer(12)
    gc.collect()
    torch.cuda.empty_cache()
    # blocks of all sizes that the allocator keeps, and hands out again
    held = [torch.full((n,), float("nan"), device=steps.DEVICE) for n in NAN_SIZES for _ in range(32)]
    torch.cuda.synchronize()
    del held
    with compiled(plan) as answer:
        found = answer(12)
    assert found.isfinite().all()
    assert torch.equal(found, clean)


@pytest.fixture
def side() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def busy(cycles: int = 400_000_000) -> torch.cuda.Event:
    """Keep the current stream at work for a fifth of a second; over when the event is."""
    torch.cuda._sleep(cycles)
    over = torch.cuda.Event()
    over.record()
    return over


@pytest.mark.parametrize("name", steps.ALL)
def test_a_step_on_another_stream_does_not_wait_for_the_default_one(
    name: str, side: torch.cuda.Stream
) -> None:
    """It writes the caches there first, and what it launched elsewhere would be late."""
    expected = [x.clone() for x in step_of(name).run()]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        step = step_of(name)
        # memory of the stream, which is not made while the other one is at work
        poison([x.clone() for x in step.run()])
    torch.cuda.synchronize()
    over = busy()
    with torch.cuda.stream(side):
        found = [x.clone() for x in step.run()]
    side.synchronize()
    early = not over.query()
    with torch.cuda.stream(side):
        right = same(found, expected)
    assert right
    assert early, "it waited for the default stream"


@pytest.mark.parametrize("name", steps.ALL)
def test_steps_on_two_streams_at_once_are_those_done_in_turn(name: str) -> None:
    both = [step_of(name, seed) for seed in (0, 1)]
    expected = [[x.clone() for x in step.run()] for step in both]
    streams = [torch.cuda.Stream() for _ in both]
    torch.cuda.synchronize()
    found: list[list[list[Tensor]]] = [[], []]
    for stream in streams:
        with torch.cuda.stream(stream):
            busy(20_000_000)
    for _ in range(10):
        for stream, step, kept in zip(streams, both, found, strict=True):
            with torch.cuda.stream(stream):
                kept.append([x.clone() for x in step.run()])
    torch.cuda.synchronize()
    for results, right, other in zip(found, expected, reversed(expected), strict=True):
        assert all(same(result, right) for result in results)
        assert not same(results[0], other)


def test_a_model_on_another_stream(side: torch.cuda.Stream) -> None:
    with compiled("4 and 2 bits", cuda_graphs=False) as answer:
        expected = answer(12)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            assert torch.equal(answer(12), expected)


def test_a_model_that_records_on_another_stream(side: torch.cuda.Stream) -> None:
    """Recorded on the default stream and replayed there, and the other way round."""
    for order in ((None, side), (side, None)):
        found = []
        with compiled("4 and 2 bits") as answer:
            for stream in order:
                torch.cuda.synchronize()
                with torch.cuda.stream(stream):
                    found.append(answer(12))
            torch.cuda.synchronize()
        assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_many_steps_take_no_memory_of_the_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches are filled, cut back, emptied and exchanged; `benchmarks.memory.steps` does 100,000."""
    monkeypatch.setattr(endurance, "ROUNDS", 4)
    run, found = endurance.Steps(kind, steps.DEVICE), []
    # up to a new cache, and up to the next one
    for _ in range(2):
        rounds = run.rounds + endurance.ROUNDS
        while run.rounds < rounds:
            run.step()
        gc.collect()
        torch.cuda.synchronize()
        found.append(torch.cuda.memory_allocated())
    assert found[1] <= found[0] + (1 << 20), found


def blocking(*selection: str) -> None:
    """Run tests in a process whose launches wait for their kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *selection],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env=os.environ | {"CUDA_LAUNCH_BLOCKING": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


KERNEL_TESTS = (
    "tests/kernels/test_memory.py::test_a_step_reads_no_memory_that_it_did_not_write",
    "tests/kernels/test_memory.py::test_what_another_prompt_left_in_a_cache_is_not_read",
)


@pytest.mark.parametrize("selection", KERNEL_TESTS)
def test_kernels_with_blocking_launches(selection: str) -> None:
    blocking(selection)


def test_recorded_steps_with_blocking_launches() -> None:
    blocking("tests/e2e/test_gpu.py::test_replayed_steps_equal_launched_ones[eager]")
