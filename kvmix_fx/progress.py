"""The progress bar of everything that takes longer than a breath."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def progress(description: str, total: int | None, wanted: bool = True) -> Iterator[Callable[[], None]]:
    """A bar on stderr while the block runs; call what is given after each of `total` steps.

    The bar is redrawn at those calls only, never by a thread that would disturb what is measured. Nothing is
    shown where stderr is no terminal, or if not `wanted`.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = not (wanted and console.is_terminal)
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=hidden) as bar:
        task = bar.add_task(description, total=total)
        bar.refresh()
        yield lambda: bar.update(task, advance=1, refresh=True)


def say(text: str) -> None:
    """A line on stderr about what takes long. KVMIX_PROGRESS=1 or 0 overrides that terminals alone get it."""
    wanted = os.environ.get("KVMIX_PROGRESS", "")
    if wanted == "1" or (wanted != "0" and sys.stderr.isatty()):
        sys.stderr.write(f"kvmix: {text}\n")


__all__ = ["progress", "say"]
