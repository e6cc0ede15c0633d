"""Find launch parameters for this GPU; `kvmix tune` is the command.

Candidates are compiled by several processes first, then timed one after the other on every case.
The winner of each (bits, head size, group, columns, few or many heads) becomes an entry of the file
that `configs.user_file` names.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kvmix_kernels.errors import FormatError, TuningFileError
from kvmix_kernels.layout import WHOLE_HEAD, TensorFormat, make_format
from kvmix_kernels.triton import attention, configs
from kvmix_kernels.triton.timing import Case, decode_inputs, graph_time, input_sets, nbytes

TIERS = "tiers"
"""The setting of the default plan: keys with a quarter of their channels at 4 bits, rotated values."""
SWEEP: dict[str, Sequence[int]] = {
    "warps": (1, 2),
    "stages": (2, 3),
    "tokens": (64, 128),
    "programs": (4, 8),
    "spread": (1, 2),
}
"""Candidates of each parameter; programs for each multiprocessor."""


class Setting(NamedTuple):
    """Formats of one entry: bits of keys and of values, and the group of each."""

    k_bits: int
    v_bits: int
    k_group: int
    v_group: int
    tiers: bool = False

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Of "2,2,128,0" or "tiers".

        Raises:
            FormatError: it is something else, or no cache has such bits or groups.
        """
        if text == TIERS:
            return cls(2, 2, 128, WHOLE_HEAD, True)
        numbers = [int(part) for part in text.split(",") if part.strip().isdigit()]
        if len(numbers) != 4:
            raise FormatError(f'{text!r} is neither {TIERS!r} nor four numbers such as "4,2,32,32"')
        k_bits, v_bits, k_group, v_group = numbers
        setting = cls(k_bits, v_bits, k_group, v_group)
        setting.formats(128)
        return setting

    def formats(self, head_dim: int, window: int = 0) -> tuple[TensorFormat, TensorFormat]:
        """Key and value formats, with tiles of 128 tokens."""
        if self.tiers:
            quarter = head_dim // 4
            keys = make_format(
                4, "channel", self.k_group, 128, 0, window, "byte",
                tiers=((4, quarter), (2, head_dim - quarter)), order="prompt",
            )  # fmt: skip
            return keys, make_format(
                2, "token", WHOLE_HEAD, 128, 0, window, "byte", symmetric=True, rotation=True
            )
        return (
            make_format(self.k_bits, "channel", self.k_group, 128, 0, window),
            make_format(self.v_bits, "token", self.v_group, 128, 0, window),
        )


class Job(NamedTuple):
    """One candidate on one case."""

    case: Case
    setting: Setting
    config: configs.AttendConfig


def candidates(
    setting: Setting, multiprocessors: int, sweep: dict[str, Sequence[int]] = SWEEP
) -> Iterator[configs.AttendConfig]:
    """Combinations of a sweep; unspecified parameters keep their defaults."""
    for values in itertools.product(*sweep.values()):
        chosen = dict(zip(sweep, values, strict=True))
        if "programs" in chosen:
            chosen["programs"] *= multiprocessors
        config = configs.AttendConfig(**chosen)
        # as wide as the group, or as all the groups that a step may take
        if config.tokens <= setting.k_group * config.spread and config.spread <= max(
            1, config.tokens // setting.k_group
        ):
            yield config


def _attempt(job: Job) -> str:
    try:
        # what is compiled does not depend on how many sequences there are
        small = job.case._replace(batch=1, tokens=min(job.case.tokens, 2048))
        formats = job.setting.formats(job.case.head_dim)
        attention.attend(*decode_inputs(small, *formats), config=job.config)
        torch.cuda.synchronize()
    except Exception as error:  # a candidate may need more memory than the GPU has
        return f"{type(error).__name__}: {error}"[:120]
    return ""


def compile_all(jobs: Sequence[Job], processes: int, done: Callable[[], None]) -> list[str]:
    """Compile candidates into Triton's cache; returns an error text per job, empty if it ran."""
    errors = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for error in pool.map(_attempt, jobs):
            errors.append(error)
            done()
    return errors


def time_config(case: Case, setting: Setting) -> Callable[[configs.AttendConfig], float]:
    """A function that times a candidate, in microseconds, on inputs made once."""
    formats = setting.formats(case.head_dim)
    first = decode_inputs(case, *formats)
    sets = [first] + [decode_inputs(case, *formats) for _ in range(input_sets(nbytes(first)) - 1)]

    def timed(config: configs.AttendConfig) -> float:
        calls = [lambda args=args: attention.attend(*args, config=config) for args in sets]
        return graph_time(calls, 10).median

    return timed


def tune(
    cases: Sequence[Case],
    settings: Sequence[Setting],
    multiprocessors: int,
    processes: int,
    done: Callable[[], None] = lambda: None,
    log: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time every candidate and return config entries, one per setting, head size and number of heads.

    Args:
        cases: decode steps to be fast at.
        settings: formats to do so for.
        multiprocessors: of the GPU.
        processes: that compile.
        done: called twice for each of `jobs`.
        log: given a line for every timing.
    """
    every = jobs(cases, settings, multiprocessors)
    failed = {
        job: error for job, error in zip(every, compile_all(every, processes, done), strict=True) if error
    }
    # the winner minimizes the geometric mean over the cases of one head size and group, of few or many heads
    scores: dict[tuple[Setting, int, int, bool], dict[configs.AttendConfig, list[float]]] = {}
    for (case, setting), group in itertools.groupby(every, lambda job: (job.case, job.setting)):
        timed = time_config(case, setting)
        for job in group:
            micros = math.inf if job in failed else timed(job.config)
            few = case.batch * case.heads <= configs.FEW_HEADS
            key = (setting, case.head_dim, max(8, case.group), few)
            scores.setdefault(key, {}).setdefault(job.config, []).append(micros)
            log(" ".join(map(str, (case.name, *setting, *job.config, f"{micros:.1f}", failed.get(job, "")))))
            done()
        del timed
        torch.cuda.empty_cache()
    entries = []
    for (setting, head_dim, columns, few), found in scores.items():
        best = min(found, key=lambda config: math.prod(found[config]))
        if math.isinf(math.prod(found[best])):
            continue  # nothing ran: what was known before stays
        match = {
            "k_bits": setting.k_bits, "v_bits": setting.v_bits, "tiers": setting.tiers, "head_dim": head_dim,
            "group": setting.k_group, "columns": columns, "bulk": True, "few_heads": few,
        }  # fmt: skip
        entries.append({"match": match, "use": best._asdict()})
    return entries


def jobs(cases: Sequence[Case], settings: Sequence[Setting], multiprocessors: int) -> list[Job]:
    """All that `tune` tries, case by case."""
    return [
        Job(case, setting, config)
        for setting in settings
        for case in cases
        for config in candidates(setting, multiprocessors)
    ]


def merge(entries: Sequence[dict[str, Any]], file: Path) -> None:
    """Write entries into a file of parameters, before those that it has of other cases."""
    kept: list[dict[str, Any]] = []
    if file.is_file():
        try:
            kept = configs.read(file)["attend"]
        except TuningFileError:
            kept = []  # what nobody can read is not worth keeping
    matches = [entry["match"] for entry in entries]
    kept = [entry for entry in kept if entry["match"] not in matches]
    lines = ",\n    ".join(json.dumps(entry) for entry in [*entries, *kept])
    file.parent.mkdir(parents=True, exist_ok=True)
    made = file.with_suffix(".new")
    made.write_text(f'{{\n  "attend": [\n    {lines}\n  ]\n}}\n')
    made.replace(file)
