"""Benchmark rows: what a measurement is called, where it is kept, and what it was measured with.

One JSON object a line in `benchmarks/results/<suite>-<machine>.jsonl`. A row is known by its suite, case,
provider, metric and machine; writing it again replaces it. Run benchmarks as modules from the repository's
root (`python -m benchmarks.quality.run`), so that `from benchmarks.rows import make_row, save` works.

    row = make_row("pack", "b64 h8x4 n8192 d128", "kvmix k2v2 g128", "time", 12.3, "us", p20=12.1, p80=12.8)
    save([row])
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

SUITES = (
    "decode_attention",
    "append",
    "pack",
    "generate",
    "context_slope",
    "memory",
    "quality",
    "profile_cost",
    "token_tiers",
    "token_tiers_step",
    "first_call",
    "serving",
    "endurance",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured figure.

    Attributes:
        suite: one of SUITES.
        case: what was measured, in a form that stays the same, such as "b64 h8x4 n8192 d128" (batch, KV
            heads x query heads per KV head, tokens, head size).
        provider: who did it, such as "kvmix k2v2 g128" or "sdpa-cudnn".
        metric: name of the figure.
        value: the figure; a median where several were taken.
        unit: of value, p20, p80.
        p20: 20th percentile, None where one figure was taken.
        p80: 80th percentile.
        baseline: provider compared with.
        ratio: against the baseline, above 1 is better than it.
        effective_bits: bits per cached element with scales, offsets and raw tokens.
        bytes: what the case occupies, for example of the cache.
        machine: where, such as "cpu-2core".
        torch: version.
        triton: version, None if not installed.
        transformers: version, None if not installed.
        commit: of this repository, with "+" if files differed from it.
        date: UTC day, ISO format.
        command: what to type to measure it again.
    """

    suite: str
    case: str
    provider: str
    metric: str
    value: float
    unit: str
    p20: float | None = None
    p80: float | None = None
    baseline: str | None = None
    ratio: float | None = None
    effective_bits: float | None = None
    bytes: int | None = None
    machine: str
    torch: str
    triton: str | None
    transformers: str | None
    commit: str
    date: str
    command: str

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise ValueError(f"suite must be one of {SUITES}, got {self.suite!r}")
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.machine):
            raise ValueError(f"machine names a file: lower case words joined by '-', got {self.machine!r}")

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What a row is known by."""
        return (self.suite, self.case, self.provider, self.metric, self.machine)


def make_row(
    suite: str,
    case: str,
    provider: str,
    metric: str,
    value: float,
    unit: str,
    *,
    machine: str | None = None,
    **rest: Any,
) -> Row:
    """A row stamped with this machine, its versions, the commit, the day and this process's command.

    Args:
        suite, case, provider, metric, value, unit: see `Row`.
        machine: None for `machine_name()`.
        rest: p20, p80, baseline, ratio, effective_bits, bytes; or a stamp to override.
    """
    stamped = stamps() | {"machine": machine or machine_name()} | rest
    return Row(
        suite=suite,
        case=case,
        provider=provider,
        metric=metric,
        value=_short(value),
        unit=unit,
        **{name: _short(item) for name, item in stamped.items()},
    )


def save(rows: Iterable[Row], folder: Path = RESULTS) -> list[Path]:
    """Write rows into their files; a row with the same key is replaced where it stands.

    Returns:
        The files written.
    """
    by_file: dict[Path, list[Row]] = {}
    for row in rows:
        by_file.setdefault(folder / f"{row.suite}-{row.machine}.jsonl", []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        for path, new in by_file.items():
            kept = {row.key: row for row in read(path)} if path.exists() else {}
            kept.update({row.key: row for row in new})
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_text("".join(json.dumps(asdict(row)) + "\n" for row in kept.values()))
            draft.replace(path)
    return list(by_file)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Two benchmarks that run side by side must not lose each other's rows."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def read(path: Path) -> list[Row]:
    """The rows of one file."""
    names = {field.name for field in fields(Row)}
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        content = json.loads(line)
        if content.keys() != names:
            wrong = sorted(content.keys() ^ names)
            raise ValueError(f"{path.name}, line {number}: fields {wrong} are missing or unknown")
        rows.append(Row(**content))
    return rows


def load(suite: str, machine: str | None = None, folder: Path = RESULTS) -> list[Row]:
    """Rows of a suite, from one machine or all of them."""
    rows = [row for path in sorted(folder.glob(f"{suite}-*.jsonl")) for row in read(path)]
    return [row for row in rows if row.suite == suite and machine in (None, row.machine)]


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(p20, median, p80) of the samples, interpolated."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return at(0.2), at(0.5), at(0.8)


@functools.cache
def machine_name() -> str:
    """`KVMIX_MACHINE` if set; else the accelerator's name; else "cpu-<n>core"."""
    if given := os.environ.get("KVMIX_MACHINE"):
        return given
    import torch

    if torch.cuda.is_available():
        words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name().lower())
        return "-".join(words)
    affinity = getattr(os, "sched_getaffinity", None)
    return f"cpu-{len(affinity(0)) if affinity else os.cpu_count()}core"


@functools.cache
def stamps() -> dict[str, Any]:
    """What a row is measured with: versions, commit, day, command."""
    return {
        "torch": _version("torch") or "unknown",
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": _command(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """Short hash, with "+" when code differs from it; `KVMIX_COMMIT` speaks for copies without history."""
    if given := os.environ.get("KVMIX_COMMIT"):
        return given
    head = git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    changed = git("status", "--porcelain", "--", ":/", ":!/benchmarks/results")
    return head + ("+" if changed else "")


def git(*arguments: str) -> str:
    """What git answers about this repository; nothing if it cannot."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


_LOCAL = ("--output", "--turns", "--progress")
"""Options whose value is a file of one machine: where rows go and who waits, not what is measured."""


def _command() -> str:
    """This process's command line, the same on every machine."""
    words: list[str] = []
    given = sys.orig_argv[1:]
    for before, word in zip(["", *given], given, strict=False):
        if before in _LOCAL or word.split("=")[0] in _LOCAL:
            continue
        path = Path(word)
        inside = path.is_absolute() and path.is_relative_to(ROOT)
        words.append(str(path.relative_to(ROOT)) if inside else word)
    return shlex.join(["python", *words])


def _short(value: Any) -> Any:
    """Six significant digits: more is noise and makes differences unreadable."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
