"""What the importance of a prompt's tokens takes beside its attention, by CUDA-graph replay (median).

    python -m benchmarks.kernels.prompt_importance [--case ...] [--search] [--output FOLDER]

First the kernels are compared with PyTorch in float32 on the same inputs; where they are wrong nothing is
timed. Ratios are those of the fastest 16-bit causal attention of the same prompt, which a prefill runs too.

* "importance": of all queries ("rows" and "columns" are its two launches), "importance, last": of 32. Both
  "in PyTorch" too.
* "prompt stored, POLICY": a prompt into both tiers, importance and choosing included; "norm" looks at no
  query, so what it takes less is the price of importance.

`--search` tries launch parameters of both kernels, each by itself.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.rows import Rows
from kvmix_kernels.importance.policy import EVERY_QUERY
from kvmix_kernels.layout import make_format, make_high, with_high
from kvmix_kernels.tokens import ops as token_ops
from kvmix_kernels.tokens import scores
from kvmix_kernels.triton import importance
from kvmix_kernels.triton.importance import Blocks
from kvmix_kernels.triton.timing import Case, Timing, graph_time

CASE = "b1 h8x4 n8192 d128"
BAR = 1200.0
"""Microseconds a layer: 15 % of the prefill of a model of 8B and 32 layers at 8k tokens."""
LIMIT = 1e-3
LAST = 32
POLICIES = ("accumulated", "last", "norm")
TILE, SHARE = 128, 20

ROWS = (
    importance.ROWS,
    Blocks(128, 64, 4, 3),
    *(Blocks(128, 128, *rest) for rest in ((4, 2), (8, 2), (8, 3))),
    *(Blocks(256, 64, 8, stages) for stages in (2, 3)),
    Blocks(256, 128, 8, 2),
    Blocks(64, 128, 4, 2),
)
COLUMNS = (
    importance.COLUMNS,
    Blocks(128, 64, 4, 3),
    *(Blocks(128, 128, 8, 2, limit) for limit in (0, 128)),
    *(Blocks(256, 64, 8, 2, limit) for limit in (0, 128)),
    Blocks(256, 128, 8, 2),
    Blocks(64, 128, 4, 2),
)

Clock = Callable[[Sequence[Callable[[], object]]], Timing]


class Prompt(NamedTuple):
    """Queries [B, Hq, L, D], keys and values [B, Hkv, L, D]."""

    query: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def random(cls, case: Case, device: str, dtype: torch.dtype = torch.bfloat16) -> Prompt:
        """Random tokens, transposed as models have them."""
        heads = case.heads * case.group, case.heads, case.heads
        shapes = [(case.batch, case.tokens, h, case.head_dim) for h in heads]
        return cls(*(torch.randn(s, dtype=dtype, device=device).transpose(1, 2) for s in shapes))

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.query.shape[3] ** -0.5)


def wrong(case: Case, device: str) -> Iterator[str]:
    """What the kernels do otherwise than PyTorch in float32."""
    small = case._replace(tokens=min(1000, case.tokens))
    two = small._replace(batch=2)
    causal = torch.ones(small.tokens, small.tokens, dtype=torch.bool, device=device).tril()
    padded = causal.expand(2, 1, -1, -1).clone()
    padded[0, :, :, : small.tokens // 3] = False
    sinks = torch.randn(case.heads * case.group, device=device)
    tried: list[tuple[str, Case, torch.dtype, tuple[Any, ...]]] = [
        ("short", small, torch.bfloat16, (None, 0.0, EVERY_QUERY, None)),
        ("padded", two, torch.bfloat16, (padded, 0.0, EVERY_QUERY, None)),
        ("capped, with sinks", small, torch.float16, (None, 20.0, EVERY_QUERY, sinks)),
        ("last", case, torch.bfloat16, (None, 0.0, LAST, None)),
        ("full", case, torch.bfloat16, (None, 0.0, EVERY_QUERY, None)),
    ]
    for name, one, dtype, (mask, softcap, queries, logits) in tried:
        prompt = Prompt.random(one, device, dtype)
        rest = mask, prompt.scale, softcap, queries, logits
        found = importance.of_prompt(prompt.query, prompt.keys, *rest)
        want = scores.of_prompt(prompt.query.float(), prompt.keys.float(), *rest)
        error = ((found - want).norm() / want.norm()).item()
        if not error < LIMIT:
            yield f"{name}: off by {error:.3g}"


class _Nothing:
    """In place of a kernel that is not to run."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **__: None


def part(prompt: Prompt, which: str, blocks: Blocks | None = None) -> None:
    """One of the two launches, "rows" or "columns", without the other."""
    other = {"rows": "columns", "columns": "rows"}[which]
    with mock.patch.object(importance, f"{other}_kernel", _Nothing()):
        importance.of_prompt(
            *(prompt.query, prompt.keys, None, prompt.scale, 0.0, EVERY_QUERY), **{which: blocks}
        )


def attention(prompt: Prompt, clock: Clock) -> tuple[str, Timing]:
    """The fastest causal attention in 16 bits, with KV heads as they are or repeated."""
    group = prompt.query.shape[1] // prompt.keys.shape[1]
    repeated = [x.repeat_interleave(group, 1) for x in prompt[1:]]

    def call(backend: SDPBackend, both: Sequence[Tensor]) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(prompt.query, *both, is_causal=True, enable_gqa=True)

    found: list[tuple[str, Timing]] = []
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        for how, both in (("", prompt[1:]), (", repeated", repeated)):
            provider = f"sdpa-{name} causal{how}"
            try:
                found.append((provider, clock([functools.partial(call, backend, both)])))
            except RuntimeError as problem:
                print(f"  {provider}: {str(problem)[:80]}")
    return min(found, key=lambda one: one[1].median)


def stored(prompt: Prompt, policy: str) -> list[Tensor]:
    """A prompt in both tiers."""
    high = make_high(SHARE, policy=policy)
    group = min(TILE, prompt.keys.shape[3])
    keys, values = (make_format(2, *one, TILE, 0, 0) for one in (("channel", TILE), ("token", group)))
    found: list[Tensor] = token_ops.pack_tiers(
        *(prompt.keys, prompt.values, prompt.query, None, prompt.scale, 0.0),
        with_high(keys, high).encode(),
        with_high(values, high._replace(scored=0)).encode(),
    )
    return found


def timed(case: Case, rows: Rows, device: str, clock: Clock = graph_time) -> None:
    """Print what is beside a prompt's attention."""
    prompt = Prompt.random(case, device)
    name, base = attention(prompt, clock)
    rows.add(case.name, name, base)
    against = name, base.median
    arguments = prompt.query, prompt.keys, None, prompt.scale, 0.0
    calls: dict[str, Callable[[], object]] = {
        "importance": functools.partial(importance.of_prompt, *arguments, EVERY_QUERY),
        "importance: rows": functools.partial(part, prompt, "rows"),
        "importance: columns": functools.partial(part, prompt, "columns"),
        "importance, last": functools.partial(importance.of_prompt, *arguments, LAST),
        "importance, last, in PyTorch": functools.partial(scores.of_prompt, *arguments, LAST),
        "importance in PyTorch": functools.partial(scores.of_prompt, *arguments, EVERY_QUERY),
        **{f"prompt stored, {policy}": functools.partial(stored, prompt, policy) for policy in POLICIES},
    }
    for provider, call in calls.items():
        try:
            timing = clock([call])
        except RuntimeError as problem:
            # what waits for the device can not be recorded
            print(f"  {provider}: {str(problem)[:120]}")
            continue
        rows.add(case.name, provider, timing, against)
        if provider == "importance":
            print(f"  {timing.median / BAR:.0%} of the bar of {BAR:.0f} us")


def search(case: Case, device: str, clock: Clock = graph_time) -> dict[str, Blocks]:
    """Print what each shape takes, and answer with the best of either launch."""
    prompt, best = Prompt.random(case, device), {}
    for which, candidates in (("rows", ROWS), ("columns", COLUMNS)):
        found = []
        for blocks in candidates:
            try:
                timing = clock([functools.partial(part, prompt, which, blocks)])
            except Exception as problem:
                # too much shared memory, for one
                print(f"  {which} {tuple(blocks)}: {str(problem)[:80]}")
                continue
            found.append((timing.median, blocks))
            print(f"  {which} {tuple(blocks)}: {timing.median:.1f} us", flush=True)
        best[which] = min(found)[1]
        print(f"  best {which}: {best[which]}")
    return best


def main() -> int:
    """Run the chosen cases; 1 if the kernels were wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--output", type=Path, help="folder of the rows")
    options = parser.parse_args()
    return run(options.case or [CASE], options.search, options.output)


def run(cases: Sequence[str], searched: bool, output: Path | None) -> int:
    """Check, time and search; 1 if the kernels were wrong."""
    torch.manual_seed(0)
    rows, failed = Rows("token_tiers_step", output), 0
    for case in map(Case.parse, cases):
        problems = list(wrong(case, "cuda"))
        print(
            "\n".join(f"{case.name} WRONG: {text}" for text in problems) or f"{case.name}: right", flush=True
        )
        failed |= bool(problems)
        if not problems:
            timed(case, rows, "cuda")
            if searched:
                search(case, "cuda")
    return failed


if __name__ == "__main__":
    sys.exit(main())
