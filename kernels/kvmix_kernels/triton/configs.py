"""Launch parameters, tuned ahead of time and committed as `configs/*.json`.

Nothing is tuned while a model runs. A file is named after the GPU (`torch.cuda.get_device_name`,
spaces replaced) and lists entries of `match` and `use`; the first entry whose `match` agrees in
every key it names wins, and `default.json` comes last. `kvmix tune` writes such a file into the
user's cache folder, where it is found before the package's.

A GPU that nobody has measured takes the file of one that was, if it is built alike (`ALIKE`), with
programs in proportion to its multiprocessors; a warning says so, once.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvmix_kernels.errors import TuningFileError
from kvmix_kernels.folders import cache_folder
from kvmix_kernels.layout import TensorFormat

FEW_HEADS = 16
"""Up to so many heads, `max_splits` shares of each are fewer programs than a GPU has room for."""
ALIKE = "NVIDIA_H100_80GB_HBM3"
"""Whose parameters GPUs of NVIDIA take from `OLDEST` on: all have as many registers a multiprocessor, and the
kernels' shared memory fits all of them."""
OLDEST = (8, 0)
"""Compute capability."""
DEFAULT = "default"


class Gpu(NamedTuple):
    """What parameters are found by.

    file: stem of the file that has them; multiprocessors, shared: of the GPU, and the bytes of shared memory that a
    program may have, where the file is another one's, else 0.
    """

    file: str = DEFAULT
    multiprocessors: int = 0
    shared: int = 0


class AttendConfig(NamedTuple):
    """Parameters of one attention launch.

    tokens: per step of the bulk (at most the key group, or `spread` of them); warps, stages: of every program;
    programs: how many the launch should have; max_groups: key groups a program may take; max_splits:
    shares a head may be cut into, before merging them takes longer than they save; registers: most that a
    thread may have, so that more programs fit (0: as many as it likes); spread: most key groups of a step,
    if the query rows leave columns for them (then `tokens` may be as many groups); rest_tokens, rest_stages:
    per step of the rest.
    """

    tokens: int = 128
    warps: int = 2
    stages: int = 2
    programs: int = 1024
    max_groups: int = 32
    max_splits: int = 64
    registers: int = 0
    spread: int = 1
    rest_tokens: int = 16
    rest_stages: int = 1


def gpu_of(x: Tensor) -> Gpu:
    """The tensor's GPU; without one, in the interpreter, `Gpu()`."""
    return _gpu_of(x.device.index) if x.is_cuda else Gpu()


@cache
def _gpu_of(index: int | None) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    shared = int(getattr(properties, "shared_memory_per_block_optin", 0))
    name = file_stem(properties.name)
    if any(file.is_file() for file in _files(name)):
        return Gpu(name)
    if torch.version.hip or (properties.major, properties.minor) < OLDEST:
        found, whose = Gpu(), "conservative ones"
    else:
        found, whose = (
            Gpu(ALIKE, properties.multi_processor_count, shared),
            f"those of {ALIKE.replace('_', ' ')}",
        )
    warnings.warn(
        f"launch parameters were never measured on {properties.name}: attention runs with {whose}, which may "
        "be slower than need be. `kvmix tune` measures them once, in a few minutes",
        stacklevel=2,
    )
    return found


def file_stem(name: str) -> str:
    """How files of a GPU of this name are called."""
    return name.replace(" ", "_").replace("/", "_")


LARGEST = 2**16
"""Of any launch parameter."""


def user_file(stem: str) -> Path:
    """Where `kvmix tune` puts what it found."""
    return cache_folder() / "launch" / f"{stem}.json"


def _files(stem: str) -> Iterator[Any]:
    yield user_file(stem)
    yield resources.files("kvmix_kernels.triton") / "configs" / f"{stem}.json"


@cache
def entries(stem: str) -> tuple[dict[str, dict[str, Any]], ...]:
    """Entries for a GPU, most specific source first.

    Raises:
        TuningFileError: a file of the user's cannot be read.
    """
    found: list[dict[str, dict[str, Any]]] = []
    for name in dict.fromkeys((stem, DEFAULT)):
        for file in _files(name):
            if file.is_file():
                found += read(file)["attend"]
    return tuple(found)


def read(file: Any) -> dict[str, Any]:
    """A file of parameters.

    Raises:
        TuningFileError: it is no such file.
    """
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        for entry in content["attend"]:
            known = AttendConfig(**entry["use"])
            wrong = set(entry["match"]) - _KEYS or [
                n for n in known if type(n) is not int or not 0 <= n <= LARGEST
            ]
            if wrong:
                break
        else:
            return content
        problem = f"{wrong} in {entry}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = repr(error)
    raise TuningFileError(f"{file} holds no launch parameters ({problem}): delete it")


@cache
def _multiprocessors(stem: str) -> int:
    """Of the GPU that a file of the package was measured on; 0 where it does not say."""
    file = resources.files("kvmix_kernels.triton") / "configs" / f"{stem}.json"
    return int(json.loads(file.read_text()).get("multiprocessors", 0)) if file.is_file() else 0


def attend_config(
    gpu: Gpu,
    keys: TensorFormat,
    values: TensorFormat,
    head_dim: int,
    group: int,
    columns: int,
    bulk: bool,
    heads: int,
) -> AttendConfig:
    """The committed parameters for a case; `heads` counts the KV heads of all sequences."""
    few = heads <= FEW_HEADS
    bits, tiers = (bits_matched(keys), bits_matched(values)), len(keys.tiers) > 1
    return _attend_config(gpu, *bits, tiers, head_dim, group, columns, bulk, few)


def bits_matched(fmt: TensorFormat) -> int:
    """The bits by which entries are found: of tiers those of most channels, whose digit is most of the work."""
    if len(fmt.tiers) == 1:
        return fmt.bits
    return max(fmt.tiers, key=lambda tier: (tier.bits > 0, tier.channels)).bits


@cache
def _attend_config(
    gpu: Gpu,
    k_bits: int,
    v_bits: int,
    tiers: bool,
    head_dim: int,
    group: int,
    columns: int,
    bulk: bool,
    few_heads: bool,
) -> AttendConfig:
    case = {
        "k_bits": k_bits, "v_bits": v_bits, "tiers": tiers, "bits": max(k_bits, v_bits), "head_dim": head_dim,
        "group": group, "columns": columns, "bulk": bulk, "few_heads": few_heads,
    }  # fmt: skip
    assert set(case) == _KEYS
    for entry in entries(gpu.file):
        if all(case[key] == value for key, value in entry["match"].items()):
            config = AttendConfig(**entry["use"])
            measured = _multiprocessors(gpu.file)
            if gpu.multiprocessors and measured:
                scaled = round(config.programs * gpu.multiprocessors / measured)
                config = config._replace(programs=max(1, scaled))
            return config
    return AttendConfig()


_KEYS = frozenset(("k_bits", "v_bits", "tiers", "bits", "head_dim", "group", "columns", "bulk", "few_heads"))
"""What an entry may match."""
