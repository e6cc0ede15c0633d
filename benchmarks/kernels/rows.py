"""Rows of kernel timings."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.rows import RESULTS, make_row, save
from kvmix_kernels.triton.timing import Timing, graph_time


def copy_bandwidth() -> float:
    """Bytes per microsecond of a large device copy, counting bytes read and written."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / graph_time([lambda: target.copy_(source)]).median


class Rows:
    """Saves rows of one suite as they come and prints each in short."""

    def __init__(self, suite: str, folder: Path | None = None) -> None:
        self.suite, self.folder = suite, folder or RESULTS

    def add(
        self,
        case: str,
        provider: str,
        timing: Timing,
        baseline: tuple[str, float] | None = None,
        *,
        copy_share: float | None = None,
        step_share: float | None = None,
        effective_bits: float | None = None,
        nbytes: int | None = None,
    ) -> None:
        """Record a time in microseconds, and shares of other figures as rows of their own.

        Args:
            case: name of the case.
            provider: what was timed.
            timing: its time.
            baseline: (provider compared with, its median).
            copy_share: of the bandwidth of `copy_bandwidth`.
            step_share: of the time of a decode step's append and attention.
            effective_bits: per cached element.
            nbytes: bytes moved.
        """
        facts = {"effective_bits": effective_bits, "bytes": nbytes}
        name, median = baseline or (None, None)
        rows = [
            make_row(
                self.suite, case, provider, "time", timing.median, "us", p20=timing.p20, p80=timing.p80,
                baseline=name, ratio=median and median / timing.median, **facts,
            )
        ]  # fmt: skip
        for metric, share in (("copy_share", copy_share), ("step_share", step_share)):
            if share is not None:
                rows.append(make_row(self.suite, case, provider, metric, share, "of 1", **facts))
        save(rows, self.folder)
        ratio = f"{rows[0].ratio:.2f}x" if rows[0].ratio else ""
        share = f"{copy_share:.0%} of copy" if copy_share else ""
        print(f"{case:24} {provider:28} {timing.median:9.1f} us {ratio:7} {share}", flush=True)
