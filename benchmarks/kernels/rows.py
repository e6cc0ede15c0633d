"""Benchmark rows: one JSON object a line in benchmarks/results/<suite>-<machine>.jsonl."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from kvmix_kernels.triton.timing import Timing, graph_time

RESULTS = Path(__file__).resolve().parent.parent / "results"


def version(package: str) -> str | None:
    """Installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Commit of the working tree, with a mark if it differs."""
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def machine() -> str:
    """Short name of the GPU: "h100"."""
    words = torch.cuda.get_device_name().lower().split()
    return next((word for word in words if any(c.isdigit() for c in word)), words[-1])


def copy_bandwidth() -> float:
    """Bytes per microsecond of a large device copy, counting bytes read and written."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / graph_time([lambda: target.copy_(source)]).median


class Rows:
    """Appends rows of one suite and prints each in short."""

    def __init__(self, suite: str, output: Path | None = None) -> None:
        self.suite = suite
        self.path = output or RESULTS / f"{suite}-{machine()}.jsonl"
        self.common = {
            "machine": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": version("triton"),
            "transformers": version("transformers"), "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": shlex.join(["python", *sys.argv]),
        }  # fmt: skip

    def add(
        self,
        case: str,
        provider: str,
        timing: Timing,
        baseline: tuple[str, float] | None = None,
        **extra: Any,
    ) -> None:
        """Record a time in microseconds; `baseline` is (provider, its median)."""
        row = {
            "suite": self.suite, "case": case, "provider": provider, "metric": "time",
            "value": round(timing.median, 3), "unit": "us",
            "p20": round(timing.p20, 3), "p80": round(timing.p80, 3),
            "baseline": baseline[0] if baseline else None,
            "ratio": round(baseline[1] / timing.median, 3) if baseline else None,
            "effective_bits": None, "bytes": None,
        }  # fmt: skip
        row |= extra | self.common
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        ratio = f"{row['ratio']:.2f}x" if baseline else ""
        share = f"{extra['copy_share']:.0%} of copy" if "copy_share" in extra else ""
        print(f"{case:24} {provider:28} {timing.median:9.1f} us {ratio:7} {share}", flush=True)
