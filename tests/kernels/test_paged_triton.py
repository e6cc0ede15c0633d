"""The Triton kernel over pages: what the reference reads, and compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvmix_kernels import layout
from kvmix_kernels.paged.pages import LayerShape, PagePool, page_layout

ROOT = Path(__file__).resolve().parents[2]
HEADS, D, SINK = 2, 32, 4
FORMATS = {
    "rotated 2": (
        layout.make_format(4, "channel", 16, 32, SINK, 8),
        layout.make_format(2, "token", 0, 32, SINK, 8, "byte", rotation=True, symmetric=True),
    ),
    "3 and raw": (layout.make_format(3, "channel", 32, 32, SINK, 0), layout.make_format(16)),
    "orders of tiles": (
        layout.make_format(4, "channel", 32, 32, SINK, 0, "byte", tiers=((4, 8), (2, 24)), order="tile_keys"),
        layout.make_format(6, "token", 16, 32, SINK, 0),
    ),
    "the plan's order": (
        layout.make_format(4, "channel", 32, 32, SINK, 0, tiers=((4, 8), (2, 16), (0, 8)), order="plan"),
        layout.make_format(8, "token", 16, 32, SINK, 0, "bfloat16"),
    ),
}
ORDER = torch.stack([torch.arange(D).flip(0), torch.arange(D).roll(5)]).int()


def filled(name: str) -> PagePool:
    """Six pages of random tokens, in blocks that are not side by side."""
    from kvmix_kernels.paged import attend
    from kvmix_kernels.paged.step import Request, Step

    laid = page_layout({0: LayerShape(*FORMATS[name], HEADS, D, D)}, torch.float32, 64)
    pool = PagePool(laid, torch.zeros(16 * laid.tail_nbytes, dtype=torch.uint8), {0: ORDER})
    tokens = [torch.randn(128, HEADS, D) for _ in range(6)]
    for number, (pages, sinks) in enumerate((([9, 4], 20), ([6, 13], 21), ([7, 5], 22))):
        step = Step(laid, [Request(0, 128, 0, 0, pages, 15 - number % 2, sinks)], "cpu")
        attend.store(pool, 0, step, *tokens[2 * number : 2 * number + 2])
    return pool


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_pages_are_read_through_the_table_as_the_reference_reads_them(name, softcap):
    from kvmix_kernels.reference.storage import read
    from kvmix_kernels.triton.paged import attend_pages

    torch.manual_seed(0)
    pool = filled(name)
    query = torch.randn(4, 3 * HEADS, D)
    sequences = [[9, 4, 13], [], [6], [5, 7]]
    pages = torch.tensor([page for some in sequences for page in some])
    starts = torch.tensor([0, 3, 3, 4, 6])
    out, lse = attend_pages(query, *pool.pages(0), pages, starts, SINK, 64, 0.3, softcap)
    for number, some in enumerate(sequences):
        if not some:
            assert lse[number].eq(-torch.inf).all()
            assert out[number].eq(0).all()
            continue
        k, v = (
            read(cached, 0, 64, 64).transpose(0, 1).flatten(1, 2)[:, SINK:].repeat_interleave(3, 0)
            for cached in pool.gathered(0, torch.tensor(some))
        )
        scores = 0.3 * query[number].unsqueeze(1) @ k.mT
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        torch.testing.assert_close(out[number], (scores.softmax(2) @ v)[:, 0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(lse[number], scores.logsumexp(2)[:, 0], atol=1e-5, rtol=1e-5)


CASES = (("k4v2", 80), ("tiers", 90), ("k2v2 d64", 90), ("k8v8", 100))


def spills(name: str, capability: int) -> int:
    """Bytes that the kernel spills for one kind of pages of a model with heads of 128 channels."""
    from benchmarks.kernels.compiled import compiled, recorded, spilled_bytes
    from kvmix_kernels.triton import paged

    head = 64 if name.endswith("d64") else 128
    if name == "tiers":
        pair = (
            layout.make_format(
                4, "channel", 128, 128, 4, 32, "byte", tiers=((4, 32), (2, 96)), order="tile_keys"
            ),
            layout.make_format(2, "token", 0, 128, 4, 32, "byte", rotation=True, symmetric=True),
        )
    else:
        pair = (
            layout.make_format(int(name[1]), "channel", 32, 32, 4, 32),
            layout.make_format(int(name[3]), "token", 32, 32, 4, 32),
        )
    laid = page_layout({0: LayerShape(*pair, 8, head, head)}, torch.bfloat16)
    pool = PagePool(laid, torch.empty(64 * laid.tail_nbytes, dtype=torch.uint8, device="meta"))
    query = torch.empty(64, 32, head, dtype=torch.bfloat16, device="meta")
    numbers = torch.empty(4096, dtype=torch.int64, device="meta")
    with recorded(paged, "paged_kernel") as found:
        paged.attend_pages(query, *pool.pages(0), numbers, numbers[:65], 4, laid.tokens, 0.1)
    return spilled_bytes(compiled(found[0], capability))


def test_the_kernel_compiles_without_spilling():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found == {f"{name} {capability}": 0 for name, capability in CASES}


if __name__ == "__main__":
    print(json.dumps({f"{name} {gpu}": spills(name, gpu) for name, gpu in CASES}))  # noqa: T201
