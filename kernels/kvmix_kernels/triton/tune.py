"""Find launch parameters for this GPU: `python -m kvmix_kernels.triton.tune --help`.

Candidates are compiled by several processes first, then timed one after the other on every case.
The winner of each (bits, head size, group, columns, few or many heads) is written to `configs/<GPU name>.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TextIO

import torch

from kvmix_kernels.layout import TensorFormat, make_format
from kvmix_kernels.triton import attention, configs
from kvmix_kernels.triton.timing import Case, decode_inputs, graph_time, input_sets, nbytes

Setting = tuple[int, int, int, int]
"""Key bits, value bits, key group, value group."""


def formats(setting: Setting, window: int = 0) -> tuple[TensorFormat, TensorFormat]:
    """Key and value formats of a setting, with tiles of 128 tokens."""
    k_bits, v_bits, k_group, v_group = setting
    return (
        make_format(k_bits, "channel", k_group, 128, 0, window),
        make_format(v_bits, "token", v_group, 128, 0, window),
    )


def candidates(setting: Setting, sweep: dict[str, list[int]]) -> Iterator[configs.AttendConfig]:
    """Combinations of a sweep; unspecified parameters keep their defaults."""
    for values in itertools.product(*sweep.values()):
        config = configs.AttendConfig(**dict(zip(sweep, values, strict=True)))
        if config.tokens <= setting[2] * config.spread:
            yield config


def _attempt(case: Case, setting: Setting, config: configs.AttendConfig) -> str:
    try:
        attention.attend(*decode_inputs(case, *formats(setting)), config=config)
        torch.cuda.synchronize()
    except Exception as error:  # a candidate may need more memory than the GPU has
        return f"{type(error).__name__}: {error}"[:120]
    return ""


def compile_all(jobs: list[tuple[Case, Setting, configs.AttendConfig]], processes: int) -> list[str]:
    """Compile candidates into Triton's cache; returns an error text per job, empty if it ran."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_attempt, *zip(*jobs, strict=True)))


def time_config(case: Case, setting: Setting) -> Callable[[configs.AttendConfig], float]:
    """A function that times a candidate on inputs made once."""
    first = decode_inputs(case, *formats(setting))
    sets = [first] + [decode_inputs(case, *formats(setting)) for _ in range(input_sets(nbytes(first)) - 1)]

    def timed(config: configs.AttendConfig) -> float:
        return graph_time(
            [lambda args=args: attention.attend(*args, config=config) for args in sets], 10
        ).median

    return timed


def tune(
    cases: list[Case], settings: list[Setting], sweep: dict[str, list[int]], processes: int, log: TextIO
) -> list[dict[str, Any]]:
    """Time every candidate and return config entries, one per setting and head size."""
    jobs = [
        (case, setting, config)
        for setting in settings
        for case in cases
        for config in candidates(setting, sweep)
    ]
    failed = {job: error for job, error in zip(jobs, compile_all(jobs, processes), strict=True) if error}
    # the winner minimizes the geometric mean over the cases of one head size and group, and of few or many heads
    scores: dict[tuple[Setting, int, int, bool], dict[configs.AttendConfig, list[float]]] = {}
    for setting in settings:
        for case in cases:
            timed = time_config(case, setting)
            for config in candidates(setting, sweep):
                job = (case, setting, config)
                micros = math.inf if job in failed else timed(config)
                few = case.batch * case.heads <= configs.FEW_HEADS
                key = (setting, case.head_dim, max(8, case.group), few)
                scores.setdefault(key, {}).setdefault(config, []).append(micros)
                print(
                    case.name, *setting, *config, f"{micros:.1f}", failed.get(job, ""), file=log, flush=True
                )
            del timed
            torch.cuda.empty_cache()
    entries = []
    for (setting, head_dim, columns, few), found in scores.items():
        best = min(found, key=lambda config: math.prod(found[config]))
        match = {
            "k_bits": setting[0], "v_bits": setting[1], "head_dim": head_dim, "group": setting[2], "columns": columns,
            "bulk": True, "few_heads": few,
        }  # fmt: skip
        entries.append({"match": match, "use": best._asdict()})
    return entries


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", help='such as "b64 h8x4 n8192 d128"; repeatable')
    parser.add_argument("--bits", action="append", help='K,V bits and groups such as "2,2,128,0"; repeatable')
    parser.add_argument("--sweep", default="warps=1,2;stages=2,3;tokens=64,128;programs=528,1056")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--output", type=Path, help="default: the package's own file for this GPU")
    parser.add_argument("--log", type=Path, help="every timing, one a line; default: standard output")
    options = parser.parse_args()
    cases = [Case.parse(name) for name in options.case or ["b64 h8x4 n8192 d128", "b1 h8x4 n131072 d128"]]
    named = [text.split(",") for text in options.bits or ["2,2,128,0", "4,4,128,0"]]
    settings = [(int(kb), int(vb), int(kg), int(vg)) for kb, vb, kg, vg in named]
    sweep = {name: list(map(int, values.split(","))) for name, values in
             (part.split("=") for part in options.sweep.split(";"))}  # fmt: skip
    log = options.log.open("w") if options.log else sys.stdout
    entries = tune(cases, settings, sweep, options.processes, log)
    name = configs.device_name(torch.empty(0, device="cuda"))
    output = options.output or Path(__file__).parent / "configs" / f"{name}.json"
    kept = json.loads(output.read_text())["attend"] if output.is_file() else []
    matches = [entry["match"] for entry in entries]
    kept = [entry for entry in kept if entry["match"] not in matches]
    lines = ",\n    ".join(json.dumps(entry) for entry in entries + kept)
    output.write_text(f'{{\n  "attend": [\n    {lines}\n  ]\n}}\n')


if __name__ == "__main__":
    main()
