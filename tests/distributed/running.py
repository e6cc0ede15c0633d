"""Start ranks once for all tests that look at what they did."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
SECONDS = 540
"""After which ranks that wait for each other are ended."""


def start(module, *arguments):
    """Run `python -m module arguments`, which starts ranks; what they print comes with a failure."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = dict(os.environ, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {SECONDS} s:\n{output[-4000:]}") from None
    assert process.returncode == 0, output[-8000:]


def torchrun(ranks, module, *arguments):
    """Run `python -m module arguments` in so many processes."""
    start("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", module, *arguments)


def once(tmp_path_factory, name, make):
    """The folder that `make(folder)` filled: made by the first test that asks, also of other workers."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / name
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "done").touch()
    return folder


def results(folder, ranks):
    """What every rank has saved."""
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]
