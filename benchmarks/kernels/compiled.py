"""Kernels compiled for GPUs that are not there, and what their machine code says.

Compiling needs no driver, launching does: launches are caught and their arguments compiled for.
Triton's interpreter must be off (no TRITON_INTERPRET in the environment).
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

_POINTERS = {
    torch.float64: "*fp64",
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int16: "*i16",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64",
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
    """Catch launches of a module's kernels instead of starting them."""
    launches: list[Launch] = []
    with contextlib.ExitStack() as patches:
        for name in names:
            recorder = _Recorder(getattr(module, name), launches)
            patches.enter_context(mock.patch.object(module, name, recorder))
        yield launches


def compiled(launch: Launch, capability: int) -> Any:
    """The compiled kernel of a launch; `capability` such as 90 for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(launch.kernel, "jitted", launch.kernel)
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    given = dict(zip(kernel.arg_names, launch.args, strict=False))
    given |= {name: value for name, value in launch.kwargs.items() if name not in _OPTIONS}
    if "PORTABLE" in given:
        given["PORTABLE"] = False
    if "EARLY" in given:
        given["EARLY"] = capability >= 90

    def described(value: Any, place: tuple[int, ...], specialised: bool) -> Any:
        """A parameter's type; at its place, what is known of it."""
        if isinstance(value, tuple):
            return tuple(described(part, (*place, i), specialised) for i, part in enumerate(value))
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, int) and value == 1 and specialised:
            constants[place] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (value % 16 == 0 and specialised):
            attributes[place] = [["tt.divisibility", 16]]
        return _POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"

    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[(index,)] = "constexpr", value
        else:
            signature[name] = described(value, (index,), not parameter.do_not_specialize)
    options = {name: value for name, value in launch.kwargs.items() if name in _OPTIONS}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _dump(binary: Any, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        done = subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def resources(binary: Any) -> dict[str, int]:
    """What the machine code declares: "REG" a thread, "STACK" and "LOCAL" bytes a thread."""
    found = re.findall(r"(REG|STACK|LOCAL):(\d+)", _dump(binary, "--dump-resource-usage"))
    return {name: int(number) for name, number in found}


def spilled_bytes(binary: Any) -> int:
    """Stack and local memory per thread."""
    declared = resources(binary)
    return declared["STACK"] + declared["LOCAL"]


def fits_products(binary: Any) -> bool:
    """Whether four threads side by side have no more of a product's operands than these have to sum up.

    Each has `kWidth` numbers of the TTGIR in a row. Triton 3.6 takes 8 of them for what comes of bytes and a
    join; of 16 channels that is twice as many as there are, and it multiplies others.
    """
    pattern = r"tensor<(\d+)x(\d+)x\w+, #ttg\.dot_op<\{opIdx = (\d), [^}]*kWidth = (\d+)"
    found = set(re.findall(pattern, binary.asm["ttgir"]))
    summed = [(int(rows if index == "1" else columns), int(width)) for rows, columns, index, width in found]
    # what is broadcast to an operand has one
    return all(4 * width <= count for count, width in summed if count > 1)


def turns_products(binary: Any) -> bool:
    """Whether all that `movmatrix` exchanges lies as a product of `mma` leaves it, within one warp."""
    layouts = dict(
        re.findall(r"^#(\w+) = #ttg\.(nvidia_mma<\{versionMajor = 2\b.*)$", binary.asm["ttgir"], re.MULTILINE)
    )
    turned = re.findall(r"movmatrix.*: tensor<\d+x\d+xf16, #(\w+)> ->", binary.asm["ttgir"])
    assert len(turned) == binary.asm["ttgir"].count("movmatrix")
    return all("warpsPerCTA = [1, 1]" in layouts.get(name, "") for name in turned)


def contracted(binary: Any) -> int:
    """Products that are contracted with what another thread sent in exchange, as in sums over threads.

    Threads that add their products to each other's then have sums that differ in the last bit, one rounded
    product less each. Where both hold "the same" number, either may be the one that is kept.
    """
    found, sent = 0, set[str]()
    for text in re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", _dump(binary, "-sass"), re.MULTILINE):
        name, _, rest = re.sub(r"^@!?U?P\w+\s+", "", text).partition(" ")
        registers = re.findall(r"\bR\d+\b", rest)
        if name.startswith("FFMA") and len(registers) > 1:
            found += registers[-1] in sent and rest.rstrip().endswith(
                (registers[-1], registers[-1] + ".reuse")
            )
        if registers:
            # loads and products write up to four
            first, count = int(registers[0][1:]), 4 if name.startswith(("LD", "HMMA")) else 1
            sent -= {f"R{first + i}" for i in range(count)}
        if name.startswith("SHFL.BFLY") and registers:
            sent.add(registers[0])
    return found


def loops(binary: Any) -> list[Counter[str]]:
    """Instructions by name of each innermost loop of the machine code, as a warp executes them in one turn.

    A loop is what lies between a branch back and its target; code that a loop may skip is counted.
    """
    places: dict[int, int] = {}
    code: list[str] = []
    for address, text in re.findall(
        r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", _dump(binary, "-sass"), re.MULTILINE
    ):
        places[int(address, 16)] = len(code)
        code.append(text)
    ranges = []
    for index, text in enumerate(code):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        start = places.get(int(target[1], 16)) if target else None
        # an endless loop of one instruction pads the end
        if start is not None and start < index:
            ranges.append((start, index))
    found = []
    for start, end in ranges:
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in ranges):
            names = (re.sub(r"^@!?U?P\w+\s+", "", line) for line in code[start : end + 1])
            found.append(Counter(name.split()[0].split(".")[0] for name in names))
    return found
