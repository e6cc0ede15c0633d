"""Every kernel compiles for GPUs that are not there, without spilling registers in tuned cases.

Kernels are compiled in fresh processes, where Triton's interpreter is off.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
_POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int16: "*i16",
    torch.uint8: "*u8", torch.int64: "*i64",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")


class Launch(NamedTuple):
    """One recorded kernel launch."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: object) -> Any:
        return lambda *args, **kwargs: self.launches.append(Launch(self.kernel, args, kwargs))


@contextlib.contextmanager
def recorded(module: Any, *names: str) -> Iterator[list[Launch]]:
    """Catch launches instead of starting them: compiling needs no driver, launching does."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(module, name, _Recorder(getattr(module, name), launches))
        yield launches


def compiled(launch: Launch, capability: int) -> Any:
    """The compiled kernel of a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    given |= {name: value for name, value in launch.kwargs.items() if name not in _OPTIONS}
    if "PORTABLE" in given:
        given["PORTABLE"] = False
    if "EARLY" in given:
        given["EARLY"] = capability >= 90
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or (
            isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        ):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in launch.kwargs.items() if name in _OPTIONS}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled_bytes(binary: Any) -> int:
    """Stack and local memory per thread, as the machine code declares them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(found) for found in re.findall(r"(?:STACK|LOCAL):(\d+)", text))


def launches(case: dict[str, Any]) -> list[Launch]:
    """What one case would start, on tensors without data."""
    from kvmix_kernels import layout
    from kvmix_kernels.layout import make_format
    from kvmix_kernels.reference import storage as buffers
    from kvmix_kernels.triton import attention, configs, storage

    D, group = case["head_dim"], case["group"]
    k = make_format(case["bits"], "channel", group, 128, 0, 128)
    v = make_format(case["bits"], "token", group if group < D else 0, 128, 0, 128)
    like = {"dtype": torch.bfloat16, "device": "meta"}
    Lq = case.get("queries", 1)
    new = torch.empty(64, 8, Lq, D, **like)
    query = torch.empty(64, 32, Lq, D, **like)
    mask = torch.empty(64, 1, Lq, 8192, dtype=torch.bool, device="meta") if case.get("mask") else None
    start = torch.empty((), dtype=torch.int64, device="meta")
    cache = [
        part
        for fmt in (k, v)
        for part in buffers.allocate(
            64, 8, D, layout.fixed_tiles(fmt, 8192), layout.fixed_slots(fmt, 8192), fmt, **like
        )
    ]
    if case["op"] == "attend":
        with (
            pytest.MonkeyPatch.context() as patch,
            recorded(attention, "attend_kernel", "combine_kernel") as found,
        ):
            patch.setattr(configs, "device_name", lambda _: case["gpu"])
            columns = min(max(8, 4 * Lq), attention.MAX_BULK_COLUMNS)
            config = configs.attend_config(
                case["gpu"], case["bits"], case["bits"], D, group, columns, True, 512
            )
            limited = config._replace(registers=case.get("registers", config.registers))
            attention.attend(
                query, new, new, *cache, mask, start, 8192, D**-0.5, list(k), list(v),
                limited if case["bits"] < 16 else None,
            )  # fmt: skip
    elif case["op"] == "append_":
        with recorded(storage, "append_kernel") as found:
            storage.append_(*cache, new, new, mask, start, 8192, list(k), list(v))
    else:
        with recorded(storage, "pack_kernel") as found:
            for fmt in (k, v):
                storage.quantize_pack(torch.empty(1, 8, 4096, D, **like), None, list(fmt))
    return found


def case(op: str, capability: int, bits: int, head_dim: int = 128, group: int = 128, **more: object) -> Any:
    """A parameter of the test."""
    values = {"op": op, "capability": capability, "bits": bits, "head_dim": head_dim, "group": group, **more}
    return pytest.param(values, id=" ".join(map(str, values.values())))


HOPPER = "NVIDIA_H100_80GB_HBM3"


@pytest.mark.parametrize(
    "cases",
    [
        case("attend", 80, 2, gpu="default"),
        case("attend", 100, 4, gpu="default"),
        case("attend", 90, 2, gpu=HOPPER),
        case("attend", 90, 2, gpu=HOPPER, registers=232),
        case("attend", 90, 3, gpu=HOPPER),
        case("attend", 90, 3, gpu=HOPPER, mask=True),
        case("attend", 90, 4, gpu=HOPPER, mask=True),
        case("attend", 90, 2, head_dim=64, group=64, gpu=HOPPER),
        case("attend", 90, 2, head_dim=256, gpu=HOPPER, mask=True),
        case("attend", 90, 2, gpu=HOPPER, queries=16, mask=True),
        case("attend", 90, 16, gpu=HOPPER),
        case("append_", 90, 2),
        case("quantize_pack", 90, 4),
    ],
)
def test_kernels_compile_without_spilling(cases: dict[str, Any]) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(cases)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    spills = json.loads(done.stdout.splitlines()[-1])
    assert spills, "nothing was compiled"
    assert not any(spills.values()), spills


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    print(  # noqa: T201  the parent process reads it
        json.dumps(
            {
                f"{index} {launch.kernel.__name__}": spilled_bytes(compiled(launch, chosen["capability"]))
                for index, launch in enumerate(launches(chosen))
            }
        )
    )
