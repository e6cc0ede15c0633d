"""What each part of a decode step over a cache with a high tier takes, by CUDA-graph replay (median).

    python -m benchmarks.kernels.token_tiers [--case ...] [--provider ...] [--search] [--prompt] [--output ..]

The cache has 2-bit codes, or those of another provider of `decode_attention`, and, of 20 % of its tokens,
16 bits. First the kernels are compared with the plain ops on the same inputs; what is wrong gets no row.
"of copy" is the time that copying as many bytes as attention reads takes, over its own: the bar is 1 / 1.15.
What is beside attention in a step with a high tier (mass, and "store" less "append") should be below 5 %
of it.

* "low alone", "high alone": attention over either as a cache of its own (one launch and a merge).
* "attention without mass": both tiers, under a policy that counts no attention; "attention": under one
  that does.
* "store": append and exchange of a step in which no tile is due; "store, due": of one in which it is;
  "append": of the low tier alone.

`--search` tries launch parameters of the kernel that reads the high tier. `--prompt` measures the importance
of a prompt's tokens instead of steps: `benchmarks.kernels.prompt_importance`.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.kernels import decode_attention, prompt_importance
from benchmarks.kernels.rows import Rows, copy_bandwidth
from kvmix_kernels import layout, ops
from kvmix_kernels.layout import TensorFormat, make_high, with_high
from kvmix_kernels.tokens import append, attend, places
from kvmix_kernels.triton import attention, configs, storage, tiers
from kvmix_kernels.triton.timing import Case, graph_time, input_sets, random_cache

CASES = ("b64 h8x4 n8192 d128", "b1 h8x4 n131072 d128")
TILE, SHARE = 128, 20
PROVIDER = "k2v2 g128"
LIMIT = 2e-2
SEARCHED = tuple(
    configs.AttendConfig(warps=warps, programs=programs, rest_tokens=tokens, rest_stages=stages)
    for warps, tokens, stages in ((4, 64, 5), (4, 64, 3), (4, 32, 5), (2, 32, 5), (2, 32, 3))
    for programs in (264, 528, 1056, 2112)
)


def formats(provider: str, head_dim: int, policy: str) -> tuple[TensorFormat, TensorFormat]:
    """Those of the provider, in tiles of 128 tokens, and 16 bits for the tokens that matter."""
    high = make_high(SHARE, policy=policy)
    keys, values = decode_attention.formats(provider, head_dim)
    return with_high(keys, high), with_high(values, high._replace(scored=0))


class Step:
    """A decode step on a full cache of random tokens."""

    def __init__(
        self,
        case: Case,
        policy: str,
        provider: str = PROVIDER,
        dtype: torch.dtype = torch.bfloat16,
        more: int = 0,
    ) -> None:
        self.case, self.capacity, self.scale = case, case.tokens + more + 1, case.head_dim**-0.5
        both = formats(provider, case.head_dim, policy)
        self.formats = [fmt.encode() for fmt in both]
        self.keys, self.values = (
            random_cache(case._replace(tokens=case.tokens + more), fmt, self.capacity, dtype) for fmt in both
        )
        packed = both[0].packed_end(case.tokens)
        members = both[0].high.limit(packed)
        self.keys.positions.fill_(-1)
        for head in self.keys.positions.view(-1, self.keys.positions.shape[2]):
            head[:members] = torch.randperm(packed, device="cuda")[:members]
        self.values.positions.copy_(self.keys.positions)
        places.skip(self.keys, case.tokens)
        for cached in (self.keys, self.values):
            cached.high.residual.normal_()
        for name in layout.SCORE_NAMES:
            self.keys.named(name).uniform_()
        size = case.batch, case.heads, 1, case.head_dim
        self.new = [torch.randn(size, dtype=dtype, device="cuda") for _ in range(2)]
        self.query = torch.randn(
            case.batch, case.heads * case.group, 1, case.head_dim, dtype=dtype, device="cuda"
        )
        self.start = torch.tensor(case.tokens, device="cuda")
        columns = self.keys.positions.shape[2] + both[0].ring + 1
        self.mass = torch.rand(case.batch, case.heads, columns, device="cuda")

    @property
    def nbytes(self) -> int:
        """Bytes that attention reads."""
        read = [self.keys.positions, self.keys.named(layout.SKIPPED_NAME)]
        return sum(map(_size, read)) + sum(self.nbytes_of(high) for high in (False, True))

    def nbytes_of(self, high: bool) -> int:
        """Of one tier; of the raw slots of the low one those of tokens that are waiting."""
        both = [(c.high if high else c.low) for c in (self.keys, self.values)]
        if high:
            return sum(_size(x) for c in both for x in c.tensors)
        waiting = self.case.tokens - both[0].format.packed_end(self.case.tokens)
        raw = sum(_size(c.residual) // c.residual.shape[2] * waiting for c in both)
        return raw + sum(_size(x) for c in both for x in c.tensors[:3])

    def attend(self, config: configs.AttendConfig | None = None) -> tuple[Tensor, Tensor]:
        """Attention over both tiers."""
        return tiers.attend_tiers(
            *(self.query, *self.new, self.keys.tensors, self.values.tensors, None, self.start, self.capacity),
            *(self.scale, *self.formats),
            config=config,
        )

    def store(self) -> None:
        """Store the step's token; the cache stays as long as it was, so this can be done again."""
        tiers.append_tiers_(
            *(self.keys.tensors, self.values.tensors, *self.new, None, self.start, self.capacity),
            *(*self.formats, None, self.mass, self.scale),
        )

    def alone(self, high: bool) -> Tensor:
        """Attention over one of the tiers as if it were all."""
        both = [(c.high if high else c.low) for c in (self.keys, self.values)]
        length = self.keys.positions.shape[2] if high else self.capacity
        start = None if high else self.start
        return attention.attend(
            *(
                self.query,
                *((None, None) if high else self.new),
                both[0].tensors,
                both[1].tensors,
                None,
                start,
            ),
            *(length, self.scale, both[0].format.encode(), both[1].format.encode()),
            config=(tiers.FEW if self.case.batch * self.case.heads <= tiers.FEW_HEADS else tiers.MANY)
            if high
            else None,
        )

    def append(self) -> None:
        """Store the step's token in the low tier alone."""
        low = [c.low for c in (self.keys, self.values)]
        storage.append_(
            *(low[0].tensors, low[1].tensors, *self.new, None, self.start, self.capacity),
            *(low[0].format.encode(), low[1].format.encode()),
        )


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def plain(step: Step, reference: bool) -> tuple[Tensor, Tensor]:
    """Attention by the plain ops: over the kernels of either tier, or over the reference."""
    called: Any = ops._attend_lse if reference else attention.attend_lse
    with mock.patch.object(ops, "attend_lse", called):
        return attend.attend(
            *(step.query, *step.new, step.keys, step.values, None, step.start, step.capacity, step.scale)
        )


def off(a: Tensor, b: Tensor) -> float:
    """Relative error."""
    found = ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-20)).item()
    return found if found == found else float("inf")


def wrong(case: Case, provider: str) -> Iterator[str]:
    """What the kernels do otherwise than the plain ops, on a batch of one or two."""
    small = case._replace(batch=min(2, case.batch))
    step = Step(small, "accumulated", provider)
    for reference in (False, True):
        for name, a, b in zip(("output", "mass"), step.attend(), plain(step, reference), strict=True):
            if not (found := off(a, b)) < LIMIT:
                yield f"{name} is off by {found:.3g} (reference: {reference})"
    # around a tile that is due
    few = small._replace(tokens=min(small.tokens, 4096) + TILE - 4)
    step = Step(few, "accumulated", provider, more=TILE)
    other = [c.map(torch.clone) for c in (step.keys, step.values)]
    for _ in range(6):
        step.new = [torch.randn_like(x) for x in step.new]
        step.mass.uniform_()
        step.store()
        append.append(
            *(
                other[0],
                other[1],
                *step.new,
                None,
                step.start,
                step.capacity,
                None,
                step.mass,
                step.scale,
                0.0,
            )
        )
        step.start += 1
    for kept, cached in zip((step.keys, step.values), other, strict=True):
        for name, a, b in zip(kept.format.buffer_names, kept.tensors, cached.tensors, strict=True):
            if not torch.equal(a, b):
                yield f"{name} differs in {(a != b).sum()} numbers after a tile was packed"


def timed(case: Case, provider: str, search: bool, rows: Rows, bandwidth: float) -> None:
    """Print the parts of a step."""
    counts = {"attention": "accumulated", "attention without mass": "norm"}
    of = "" if provider == PROVIDER else f", {provider}"
    for name, policy in counts.items():
        first = Step(case, policy, provider)
        steps = [first, *(Step(case, policy, provider) for _ in range(input_sets(first.nbytes) - 1))]
        timing = graph_time([step.attend for step in steps])
        size = first.nbytes
        rows.add(case.name, name + of, timing, nbytes=size, copy_share=size / timing.median / bandwidth)
        if name != "attention":
            continue
        for part, high in (("low alone", False), ("high alone", True)):
            size = first.nbytes_of(high)
            found = graph_time([functools.partial(step.alone, high) for step in steps])
            rows.add(case.name, part + of, found, nbytes=size, copy_share=size / found.median / bandwidth)
        beside = {"append": "append", "store": "store", "store, due": "store"}
        for part, method in beside.items():
            for step in steps:
                step.start.fill_(case.tokens - (1 if part == "store, due" else 0))
            found = graph_time([getattr(step, method) for step in steps])
            rows.add(case.name, part + of, found, step_share=found.median / (timing.median + found.median))
        for step in steps:
            step.start.fill_(case.tokens)
        if search:
            for config in SEARCHED:
                try:
                    found = graph_time([functools.partial(step.attend, config) for step in steps])
                except Exception as problem:
                    print(f"  {config}: {str(problem)[:60]}")
                    continue
                told = f"warps {config.warps} tokens {config.rest_tokens} stages {config.rest_stages}"
                print(f"  {told} programs {config.programs}: {found.median:.1f} us", flush=True)
        del first, steps, step
        torch.cuda.empty_cache()


def main() -> int:
    """Run the chosen cases; 1 if the kernels were wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append")
    parser.add_argument("--provider", default=PROVIDER, help='such as "k2v2 per token g64"')
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--prompt", action="store_true")
    parser.add_argument("--output", type=Path, help="folder of the rows")
    options = parser.parse_args()
    if options.prompt:
        return prompt_importance.run(options.case or [prompt_importance.CASE], options.search, options.output)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"device copy {bandwidth / 1e6:.2f} TB/s")
    rows, failed = Rows("token_tiers_step", options.output), 0
    for case in map(Case.parse, options.case or CASES):
        problems = list(wrong(case, options.provider))
        print(
            "\n".join(f"{case.name} WRONG: {text}" for text in problems) or f"{case.name}: right", flush=True
        )
        failed |= bool(problems)
        if not problems:
            timed(case, options.provider, options.search, rows, bandwidth)
    return failed


if __name__ == "__main__":
    sys.exit(main())
