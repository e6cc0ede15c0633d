"""Launch parameters, tuned ahead of time and committed as `configs/*.json`.

Nothing is tuned while a model runs. A file is named after the GPU (`torch.cuda.get_device_name`,
spaces replaced) and lists entries of `match` and `use`; the first entry whose `match` agrees in
every key it names wins. A GPU without a file, and a case without an entry, get `default.json`.
`python -m kvmix_kernels.triton.tune` writes such a file.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvmix_kernels.layout import TensorFormat

FEW_HEADS = 16
"""Up to so many heads, `max_splits` shares of each are fewer programs than a GPU has room for."""


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


def device_name(x: Tensor) -> str:
    """File stem for the tensor's GPU; "default" in the interpreter."""
    return _device_name(x.device.index) if x.is_cuda else "default"


@cache
def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index).replace(" ", "_").replace("/", "_")


@cache
def entries(name: str) -> tuple[dict[str, dict[str, Any]], ...]:
    """Entries for a GPU, most specific source first."""
    found: list[dict[str, dict[str, Any]]] = []
    folder = resources.files("kvmix_kernels.triton") / "configs"
    for stem in dict.fromkeys((name, "default")):
        file = folder / f"{stem}.json"
        if file.is_file():
            found += json.loads(file.read_text())["attend"]
    return tuple(found)


def attend_config(
    name: str,
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
    return _attend_config(name, *bits, tiers, head_dim, group, columns, bulk, few)


def bits_matched(fmt: TensorFormat) -> int:
    """The bits by which entries are found: of tiers those of most channels, whose digit is most of the work."""
    if len(fmt.tiers) == 1:
        return fmt.bits
    return max(fmt.tiers, key=lambda tier: (tier.bits > 0, tier.channels)).bits


@cache
def _attend_config(
    name: str,
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
    for entry in entries(name):
        if all(case[key] == value for key, value in entry["match"].items()):
            return AttendConfig(**entry["use"])
    return AttendConfig()
