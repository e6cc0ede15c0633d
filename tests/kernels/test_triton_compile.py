"""Every kernel compiles for GPUs that are not there, without spilling registers in tuned cases.

Kernels are compiled in fresh processes, where Triton's interpreter is off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.kernels.compiled import (
    Launch,
    compiled,
    contracted,
    fits_products,
    recorded,
    spilled_bytes,
    turns_products,
)

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ("mixkvq", "kitty")
"""Providers of the benchmark that say everything."""


def launches(case: dict[str, Any]) -> list[Launch]:
    """What one case would start, on tensors without data."""
    from benchmarks.kernels.decode_attention import formats
    from kvmix_kernels import layout
    from kvmix_kernels.cached import allocate
    from kvmix_kernels.layout import make_format
    from kvmix_kernels.triton import attention, configs, launch_plan, reading, storage

    D, group = case["head_dim"], case["group"]
    gpu = case.get("gpu", "default")
    gpu = (gpu,) if isinstance(gpu, str) else gpu
    if isinstance(case["bits"], str):
        text = case["bits"] if case["bits"] in PRESETS else f"{case['bits']} g{group} w128"
        k, v = (fmt._replace(tile=case.get("tile", fmt.tile)) for fmt in formats(text, D))
        group = launch_plan.bulk_unit(k)
    else:
        k = make_format(case["bits"], "channel", group, 128, 0, 128)
        v = make_format(case["bits"], "token", group if group < D else 0, 128, 0, 128)
    like = {"dtype": torch.bfloat16, "device": "meta"}
    Lq = case.get("queries", 1)
    rows = case.get("rows", 64)
    new = torch.empty(rows, 8, Lq, D, **like)
    query = torch.empty(rows, 32, Lq, D, **like)
    heads = 32 if case.get("mask") == "heads" else 1
    mask = torch.empty(rows, heads, Lq, 8192, dtype=torch.bool, device="meta") if case.get("mask") else None
    start = torch.empty((), dtype=torch.int64, device="meta")
    cache = [
        allocate(
            rows, 8, D, layout.fixed_tiles(fmt, 8192), layout.fixed_slots(fmt, 8192), fmt, **like
        ).tensors
        for fmt in (k, v)
    ]
    if case["op"] == "importance":
        return _of_a_prompt(case)
    if case["op"] == "tiers":
        return _steps_of_tiers(case, (k, v), query, new, mask, start)
    if case["op"] == "attend":
        with (
            pytest.MonkeyPatch.context() as patch,
            recorded(attention, "attend_kernel", "combine_kernel") as found,
        ):
            patch.setattr(configs, "gpu_of", lambda _: configs.Gpu(*gpu))
            columns = min(max(8, 4 * Lq), launch_plan.MAX_BULK_COLUMNS)
            config = configs.attend_config(configs.Gpu(*gpu), k, v, D, group, columns, True, 8 * rows)
            limited = config._replace(registers=case.get("registers", config.registers))
            attention.attend(
                query, new, new, *cache, mask, start, 8192, D**-0.5, k.encode(), v.encode(),
                softcap=case.get("softcap", 0.0), config=None if k.is_raw else limited,
                sink_logits=new.new_empty(32) if case.get("sinks") else None,
            )  # fmt: skip
    elif case["op"] == "append_":
        with recorded(storage, "append_kernel", "see_kernel", "order_kernel") as found:
            storage.append_(*cache, new, new, mask, start, 8192, k.encode(), v.encode(), query)
    elif case["op"] == "dequantize":
        with recorded(reading, "dequantize_kernel") as found:
            for part, fmt in zip(cache, (k, v), strict=True):
                reading.dequantize(part, start, 8192, fmt.encode())
    else:
        with recorded(storage, "pack_kernel", "see_kernel", "order_kernel") as found:
            for fmt in (k, v):
                storage.quantize_pack(torch.empty(1, 8, 4096, D, **like), None, fmt.encode())
    return found


def _steps_of_tiers(
    case: dict[str, Any],
    both: tuple[Any, Any],
    query: torch.Tensor,
    new: torch.Tensor,
    mask: torch.Tensor | None,
    start: torch.Tensor,
) -> list[Launch]:
    """Of a step over a cache with a high tier the kernels of its own; with "low" that of the low tier too."""
    from kvmix_kernels import layout
    from kvmix_kernels.cached import allocate
    from kvmix_kernels.tokens import places
    from kvmix_kernels.triton import attention, configs, storage, tiers

    high = layout.make_high(20, bits=case["high"], balanced=case["capability"] == 90)
    k, v = (
        layout.with_high(f, h) for f, h in zip(both, (high, high._replace(scored=0, balanced=0)), strict=True)
    )
    D = case["head_dim"]
    size = layout.fixed_tiles(k, 8192), layout.fixed_slots(k, 8192)
    caches = [allocate(64, 8, D, *size, f, torch.bfloat16, "meta").tensors for f in (k, v)]
    formats = k.encode(), v.encode()
    with (
        pytest.MonkeyPatch.context() as patch,
        recorded(attention, "attend_kernel") as found,
        recorded(tiers, "balance_kernel", "high_kernel", "finish_kernel", "exchange_kernel") as own,
        recorded(storage, "append_kernel"),
    ):
        patch.setattr(configs, "gpu_of", lambda _: configs.Gpu(case["gpu"]))
        patch.setattr(places, "count_of", lambda start, length: start)
        _, mass = tiers.attend_tiers(query, new, new, *caches, mask, start, 8192, D**-0.5, *formats)
        if case["high"] == layout.RAW_BITS:
            tiers.append_tiers_(*caches, new, new, mask, start, 8192, *formats, None, mass, D**-0.5)
    return [*found, *own] if case.get("low") else own


def _of_a_prompt(case: dict[str, Any]) -> list[Launch]:
    """The importance of a prompt's tokens."""
    from kvmix_kernels.importance.policy import EVERY_QUERY
    from kvmix_kernels.triton import importance

    D, like = case["head_dim"], {"dtype": torch.bfloat16, "device": "meta"}
    mask, sinks = case.get("mask"), torch.empty(32, **like) if case.get("sinks") else None
    if mask is not None:
        mask = torch.empty(4, 1, 8192, 8192, dtype=getattr(torch, mask), device="meta")
    query, keys = torch.empty(4, 32, 8192, D, **like), torch.empty(4, 8, 8192, D, **like)
    with recorded(importance, "rows_kernel", "columns_kernel") as found:
        importance.of_prompt(query, keys, mask, D**-0.5, case.get("softcap", 0.0), EVERY_QUERY, sinks)
    return found


def case(
    op: str, capability: int, bits: int | str, head_dim: int = 128, group: int = 128, **more: object
) -> dict[str, Any]:
    """What to compile; `bits` of keys and values, or a provider of the benchmark with tiers.

    `spills_36`: bytes that a thread may spill with Triton 3.6, which needs more registers than later ones. Of
    attention these are pointers to its output and numbers that a later loop needs: stored before a loop over
    tokens, read behind it (3 bits and 256 channels read three in a turn). Of `dequantize`, which has
    no loop, they take 32 of 960 instructions. Packing tiers spills on 10.0 alone, where products go through a
    memory of their own. Less work a program would cost more, and pointers that are made later spill elsewhere
    (`kernels/NOTES.md`). `spills`: with any version, numbers that a second try and the output need. `long`:
    takes 6 to 30 s, and other cases have the same parts of the kernel, if not all together (`CHOSEN`).
    """
    return {"op": op, "capability": capability, "bits": bits, "head_dim": head_dim, "group": group, **more}


HOPPER = "NVIDIA_H100_80GB_HBM3"
SMALL = (HOPPER, 58, 101376)
"""How a GPU without a file is known that gives a program 99 KiB of shared memory (8.6, 8.9, 12.0)."""


CASES = [
    *(case("attend", gpu, bits, gpu="default") for gpu in (80, 100) for bits in (2, 3, 4, 16)),
    *(case("attend", gpu, 2, group=32, gpu="default", mask=True, long=gpu == 100) for gpu in (80, 100)),
    case("attend", 90, 2, gpu=HOPPER),
    case("attend", 90, 2, gpu=HOPPER, registers=232, spills_36=32),
    case("attend", 90, 2, gpu=HOPPER, mask="heads"),
    case("attend", 90, 4, head_dim=96, group=32, gpu=HOPPER, rows=6),
    case("attend", 90, 3, gpu=HOPPER),
    case("attend", 90, 3, gpu=HOPPER, mask=True),
    case("attend", 90, 4, gpu=HOPPER, mask=True),
    case("attend", 90, 2, head_dim=64, group=64, gpu=HOPPER),
    case("attend", 90, 2, group=32, gpu=HOPPER, spills=40),
    case("attend", 90, 2, group=32, gpu=HOPPER, mask=True, long=True),
    case("attend", 90, 3, group=32, gpu=HOPPER, mask=True, long=True),
    case("attend", 90, 4, group=32, gpu=HOPPER, mask=True, long=True),
    case("attend", 90, 4, head_dim=64, group=32, gpu=HOPPER, mask=True),
    case("attend", 90, 2, group=64, gpu=HOPPER, mask=True, long=True),
    case("attend", 90, 4, group=64, gpu=HOPPER, mask=True, long=True),
    case("attend", 90, 3, head_dim=256, gpu=HOPPER, mask=True, spills_36=64, long=True),
    case("attend", 90, 4, head_dim=256, group=32, gpu=HOPPER, mask=True),
    case("attend", 90, 4, head_dim=96, group=32, gpu=HOPPER, mask=True, long=True),
    case("attend", 90, 2, head_dim=256, gpu=HOPPER, mask=True, long=True),
    case("attend", 90, 4, head_dim=256, gpu=HOPPER, mask=True, long=True),
    case("attend", 90, 8, gpu=HOPPER, mask=True),
    case("attend", 90, 3, head_dim=64, gpu=HOPPER, mask=True, long=True),
    case("attend", 90, 2, gpu=HOPPER, queries=16, mask=True, spills_36=8),
    case("attend", 90, 2, group=32, gpu=HOPPER, mask=True, softcap=50.0, long=True),
    case("attend", 90, 4, head_dim=256, gpu=HOPPER, mask=True, softcap=50.0, spills_36=48),
    *(
        case("attend", gpu, "k2v2 per token", group=64, gpu="default", mask=gpu == 80, long=gpu == 80)
        for gpu in (80, 100)
    ),
    case("attend", 90, "k4v4 per token", group=64, gpu=HOPPER, mask=True),
    case("attend", 90, 16, gpu=HOPPER),
    case("attend", 90, 4, head_dim=64, group=64, gpu=HOPPER, sinks=True),
    *(case("attend", gpu, bits, gpu=SMALL) for gpu in (89, 120) for bits in (2, 16)),
    *(case("attend", gpu, "tiers 25/75", gpu=SMALL, long=gpu == 120) for gpu in (89, 120)),
    case("attend", 89, 4, group=32, gpu=SMALL, mask=True, long=True),
    case("attend", 89, 16, head_dim=256, gpu=SMALL),
    case("attend", 86, 4, head_dim=256, gpu=SMALL, mask=True),
    case("append_", 89, 2),
    case("quantize_pack", 89, 3),
    *(case("append_", gpu, bits) for gpu in (80, 90, 100) for bits in (2, 3, 4)),
    *(case("append_", 90, 2, queries=64, mask=mask) for mask in (False, True)),
    *(case("quantize_pack", gpu, bits) for gpu in (80, 90, 100) for bits in (2, 3, 4)),
    case("dequantize", 80, 3, spills_36=64),
    *(case("dequantize", gpu, 3) for gpu in (90, 100)),
    *(case("attend", gpu, "tiers 25/75", gpu="default", long=gpu == 100) for gpu in (80, 100)),
    *(
        case("attend", 90, "tiers 25/75", head_dim=size, gpu=HOPPER, mask=size == 128)
        for size in (64, 128, 256)
    ),
    case("attend", 90, "tiers 25/75", group=32, gpu=HOPPER, mask=True, long=True),
    case("attend", 90, "tiers 25/75", group=16, gpu=HOPPER, mask=True),
    case("attend", 90, "tiers 50/50", gpu=HOPPER, mask=True),
    case("attend", 90, "tiers 25/50/25", gpu=HOPPER),
    *(
        case("append_", gpu, "tiers 25/75", head_dim=size)
        for gpu, size in ((80, 128), (90, 64), (90, 128), (90, 256), (100, 128))
    ),
    case("append_", 90, "tiers 25/75", queries=64, mask=True, long=True),
    *(
        case("quantize_pack", gpu, "tiers 25/75", head_dim=size)
        for gpu, size in ((80, 128), (90, 64), (90, 128), (90, 256))
    ),
    case("quantize_pack", 100, "tiers 25/75", spills_36=504),
    case("quantize_pack", 90, "tiers 25/50/25"),
    case("dequantize", 90, "tiers 25/75"),
    case("attend", 90, "tiers 25/75 tile", gpu=HOPPER),
    case("attend", 90, "mixkvq", gpu=HOPPER, spills_36=8),
    *(case(op, 90, "mixkvq") for op in ("append_", "quantize_pack")),
    case("append_", 90, "kitty"),
    *(case("tiers", gpu, 2, gpu="default", high=16) for gpu in (80, 100)),
    case("tiers", 90, 2, gpu=HOPPER, high=16, mask=True, low=True),
    case(
        "tiers", 90, "k2v2 per token", group=64, gpu=HOPPER, high=16, mask=True, low=True, tile=32, long=True
    ),
    *(case("importance", gpu, 16) for gpu in (80, 90, 100)),
    case("importance", 89, 16, head_dim=256),
    case("importance", 90, 16, head_dim=80, softcap=50.0, sinks=True),
    case("importance", 90, 16, mask="bool"),
    case("importance", 90, 16, mask="bfloat16", softcap=50.0, sinks=True),
]
CHOSEN = [
    one
    for one in CASES
    if not one.get("long") or os.environ.get("KVMIX_COMPILE") == "all" or (os.cpu_count() or 1) >= 8
]
"""What is compiled here: all where cores are idle or where asked for, as by `make oldest-triton`."""
PROCESSES = max(6, os.cpu_count() or 1)
"""A process that imports torch costs as much as what one case compiles: more only where cores are idle."""


@pytest.mark.parametrize("first", range(PROCESSES))
def test_kernels_compile_without_spilling(first: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(CHOSEN[first::PROCESSES])],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    version, spills = json.loads(done.stdout.splitlines()[-1])
    assert len(spills) == len(CHOSEN[first::PROCESSES])
    assert all(spills), f"nothing was compiled for some of {spills}"
    for chosen, found in zip(CHOSEN[first::PROCESSES], spills, strict=True):
        allowed = chosen.get("spills", 0)
        if version.startswith("3.6."):
            allowed = max(allowed, chosen.get("spills_36", 0))
        assert sum(found.values()) <= allowed, f"{chosen} with Triton {version}: {found}"


def test_what_is_exchanged_in_another_layout_is_found() -> None:
    """A `movmatrix` on numbers that do not lie as a product leaves them exchanges others."""
    numbers = "tensor<64x8xf16, #mma>"
    asm = f'tt.elementwise_inline_asm "movmatrix.sync" {{pure = true}} %a : {numbers} -> {numbers}'
    product = "#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [1, 1]}>"
    others = (
        product.replace("versionMajor = 2", "versionMajor = 3"),
        product.replace("[1, 1]", "[2, 1]"),
        "#mma = #ttg.blocked<{sizePerThread = [1, 1], warpsPerCTA = [1, 1], order = [1, 0]}>",
    )
    assert turns_products(SimpleNamespace(asm={"ttgir": f"{product}\n{asm}"}))
    for other in others:
        assert not turns_products(SimpleNamespace(asm={"ttgir": f"{other}\n{asm}"}))


SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory that a program may have, by compute capability."""


def spills_of(chosen: dict[str, Any]) -> dict[str, int]:
    """Bytes by which each kernel of a case spills or has too much shared memory."""
    found = {}
    for index, launch in enumerate(launches(chosen)):
        binary = compiled(launch, chosen["capability"])
        assert fits_products(binary), f"{launch.kernel.__name__} of {chosen} multiplies other numbers"
        assert turns_products(binary), f"{launch.kernel.__name__} of {chosen} exchanges other numbers"
        # rotations multiply by one or minus one, which is exact
        if chosen["op"] in ("attend", "tiers") and not launch.kwargs.get("ROTATED"):
            assert contracted(binary) == 0, f"{launch.kernel.__name__} of {chosen} may differ from run to run"
        if chosen["op"] == "importance" and chosen["capability"] == 90:
            assert "wgmma.mma_async" in binary.asm["ptx"], f"{launch.kernel.__name__} has slow products"
        over = max(0, binary.metadata.shared - SHARED[chosen["capability"]])
        found[f"{index} {launch.kernel.__name__}"] = spilled_bytes(binary) + over
    return found


if __name__ == "__main__":
    from triton import __version__

    found = [spills_of(one) for one in json.loads(sys.argv[1])]
    print(json.dumps([__version__, found]))  # noqa: T201  the parent process reads it
