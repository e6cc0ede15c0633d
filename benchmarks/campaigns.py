"""Long runs of the property tests in rounds that are counted: what was tried, for how long, what failed.

    python -m benchmarks.campaigns models --minutes 40
    python -m benchmarks.campaigns fuzz --minutes 60 --examples 400

Each round is a process of pytest that draws anew, so a campaign goes on where it was ended: hypothesis keeps
what failed in `.hypothesis` and tries it first. Counts are those of hypothesis's own statistics. Ends with
the first round in which a test fails, with exit status 1, or when the time is over; a round that was begun
is finished.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import rows

ROUNDS = rows.RESULTS / "campaigns" / "rounds.jsonl"

FUZZED = (
    "tests/kernels/test_layout.py",
    "tests/kernels/test_reference.py",
    "tests/kernels/test_cpu_attention.py",
    "tests/kernels/test_tiers.py",
    "tests/kernels/test_token_tiers.py",
    "tests/plan",
    "tests/cache/test_saved.py",
)

FILES = ("tests/test_hostile_files.py", "tests/cache/test_saved.py", "tests/plan/test_plan_io.py")

CAMPAIGNS: dict[str, tuple[tuple[str, ...], str, int]] = {
    "models": (("tests/passes/test_drawn_models.py",), "a_drawn_model", 500),
    "tensors": (("tests/cache/test_machine.py",), "TestMachine", 1000),
    "tiers": (("tests/cache/test_tier_machine.py",), "TestTiers", 1000),
    "layers": (("tests/cache/test_layer_machine.py",), "TestLayers", 2000),
    "files": (FILES, "damaged or arbitrary or hostile", 10000),
    "kernels": (("tests/kernels/test_triton_attention.py",), "equals_the_reference", 100),
    "fuzz": (FUZZED, "", 400),
}
"""Files, which tests of them (an expression of pytest's -k), `max_examples` of the profile in a round."""


def run(name: str, examples: int, more: list[str]) -> dict[str, Any]:
    """One round, in a process of its own: what it tried."""
    files, chosen, _ = CAMPAIGNS[name]
    command = [sys.executable, "-m", "pytest", "-n", "0", "--timeout=0", "--hypothesis-show-statistics"]
    command += ["-k", chosen] if chosen else []
    environment = os.environ | {"KVMIX_HYPOTHESIS_PROFILE": "fuzz", "KVMIX_EXAMPLES": str(examples)}
    began = time.monotonic()
    done = subprocess.run(
        [*command, *more, *files], cwd=rows.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - began
    failed = sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)))
    if done.returncode and not failed:
        raise SystemExit(f"pytest ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    if failed:
        print(done.stdout, flush=True)
    return {"examples": tried(done.stdout), "seconds": seconds, "failed": failed}


def tried(output: str) -> int:
    """Examples that ran to their end in hypothesis's statistics, those that were rejected not counted."""
    found = re.findall(r"(\d+) passing(?: examples?)?, (\d+) failing", output)
    return sum(int(passing) + int(failing) for passing, failing in found)


def record(name: str, round_: dict[str, Any], path: Path = ROUNDS) -> None:
    """Adds to the line of this campaign, commit and day."""
    stamps = rows.stamps()
    known = {
        "campaign": name,
        "commit": stamps["commit"],
        "date": stamps["date"],
        "machine": rows.machine_name(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with rows.alone_in(path.parent):
        lines = read(path)
        line = next((at for at in lines if known.items() <= at.items()), None)
        if line is None:
            line = known | {"rounds": 0, "examples": 0, "seconds": 0, "failed": []}
            lines.append(line)
        line["rounds"] += 1
        line["examples"] += round_["examples"]
        line["seconds"] = round(line["seconds"] + round_["seconds"])
        line["failed"] = sorted({*line["failed"], *round_["failed"]})
        path.write_text("".join(json.dumps(at) + "\n" for at in lines))


def read(path: Path = ROUNDS) -> list[dict[str, Any]]:
    """Lines of all campaigns, oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> int:
    """Rounds until the time is over."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--examples", type=int, help="`max_examples` of the profile, in a round")
    parser.add_argument("pytest", nargs="*", help="passed on to pytest, behind `--`")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    while time.monotonic() < end:
        round_ = run(options.campaign, options.examples or CAMPAIGNS[options.campaign][2], options.pytest)
        record(options.campaign, round_)
        print(options.campaign, json.dumps(round_), flush=True)
        if round_["failed"]:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
