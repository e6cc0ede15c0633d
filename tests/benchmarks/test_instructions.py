"""The count of instructions agrees with what is known about the loop."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_two_bits_take_one_operation_for_two_codes() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels.instructions", "--provider", "k2v2 g128"],
        capture_output=True, text=True, check=False, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    tokens = int(re.search(r"a step of (\d+) tokens, by each of 1 warps", done.stdout)[1])  # type: ignore[index]
    counted = {name: int(count) for name, count in re.findall(r"'(\w+)': (\d+)", done.stdout)}
    # keys and values of 128 channels, two codes a register, 32 lanes; a product takes 16 x 16 of them
    assert counted["LOP3"] >= tokens * 2 * 128 // 2 // 32
    assert counted["HMMA"] == tokens * 2 * 128 // 256
    assert ", 0 bytes spilled" in done.stdout
