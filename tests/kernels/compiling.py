"""Compile the kernels a launcher would start, for a GPU that is not there.

Triton needs a driver to launch but none to compile. `recorded` catches a launcher's calls, and
`compiled` turns one into machine code and its resource use.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int16: "*i16",
    torch.uint8: "*u8", torch.int64: "*i64",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Launch(NamedTuple):
    """One recorded kernel launch."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Resources(NamedTuple):
    """What a compiled kernel takes per thread and per program."""

    registers: int
    spills: int
    shared: int


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches.append(Launch(self.kernel, grid, args, kwargs))

        return launch


@contextlib.contextmanager
def recorded(module: Any, *names: str) -> Iterator[list[Launch]]:
    """Replace the kernels `names` of `module` by recorders."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(module, name, _Recorder(getattr(module, name), launches))
        yield launches


def compiled(launch: Launch, capability: int) -> Any:
    """The compiled kernel of a recorded launch for a compute capability."""
    kernel = launch.kernel
    signature, constants, attributes = {}, {}, {}
    given = dict(zip(kernel.arg_names, launch.args, strict=False)) | {
        k: v for k, v in launch.kwargs.items() if k not in _OPTIONS
    }
    if "PORTABLE" in given:
        given["PORTABLE"] = False
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = 1
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={k: v for k, v in launch.kwargs.items() if k in _OPTIONS},
    )


def resources(binary: Any) -> Resources:
    """Registers, spilled bytes and shared memory, read from the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers = int(re.search(r"REG:(\d+)", text)[1])
    spills = int(re.search(r"STACK:(\d+)", text)[1]) + int(re.search(r"LOCAL:(\d+)", text)[1])
    return Resources(registers, spills, binary.metadata.shared)
