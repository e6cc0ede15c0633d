"""Instructions of attention's inner loop, registers and spills, counted by compiling; needs no GPU.

Triton's versions differ by some per cent.

    python -m benchmarks.kernels.instructions --provider "k2v2 g128" --provider "k3v3 g128 padded"
    python -m benchmarks.kernels.instructions --config '{"tokens": 128, "warps": 1, "stages": 3}'

"a step" is one turn of the loop over packed tokens, `tokens` of them; every warp of the program executes it.
"""

from __future__ import annotations

import argparse
import json
from unittest import mock

import torch

from benchmarks.kernels.compiled import Launch, compiled, loops, recorded, resources
from benchmarks.kernels.decode_attention import MASKS, formats
from kvmix_kernels import layout
from kvmix_kernels.cached import allocate
from kvmix_kernels.triton import attention, configs
from kvmix_kernels.triton.timing import Case

GPU = "NVIDIA_H100_80GB_HBM3"


def launch(case: Case, provider: str, config: configs.AttendConfig | None, gpu: str) -> Launch:
    """The launch of `attend_kernel` for one decode step over a full cache."""
    like = {"dtype": torch.bfloat16, "device": "meta"}
    k, v = formats(provider, case.head_dim)
    new = torch.empty(case.batch, case.heads, 1, case.head_dim, **like)
    query = torch.empty(case.batch, case.heads * case.group, 1, case.head_dim, **like)
    caches = [
        allocate(
            case.batch, case.heads, case.head_dim, layout.fixed_tiles(fmt, case.tokens + 1),
            layout.fixed_slots(fmt, case.tokens + 1), fmt, **like,
        ).tensors
        for fmt in (k, v)
    ]  # fmt: skip
    kind = provider.split()[-1]
    dtype = torch.bfloat16 if kind == "added" else torch.bool
    mask = (
        torch.empty(case.batch, 1, 1, case.tokens + 1, dtype=dtype, device="meta") if kind in MASKS else None
    )
    start = torch.empty((), dtype=torch.int64, device="meta")
    with (
        mock.patch.object(configs, "gpu_of", return_value=configs.Gpu(gpu)),
        recorded(attention, "attend_kernel", "combine_kernel") as found,
    ):
        attention.attend(
            query,
            new,
            new,
            *caches,
            mask,
            start,
            case.tokens + 1,
            case.head_dim**-0.5,
            k.encode(),
            v.encode(),
            config=config,
        )
    return found[0]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", action="append", help='such as "b64 h8x4 n8192 d128" (the default); repeatable'
    )
    parser.add_argument("--provider", action="append", help='such as "k2v2 g128 padded"; repeatable')
    parser.add_argument(
        "--config", action="append", help="JSON of launch parameters; default: the tuned ones"
    )
    parser.add_argument("--gpu", default=GPU, help="whose tuned parameters; default: %(default)s")
    parser.add_argument("--capability", type=int, default=90)
    options = parser.parse_args()
    for name in options.case or ["b64 h8x4 n8192 d128"]:
        for provider in options.provider or ["k2v2 g128", "k3v3 g128", "k4v4 g128"]:
            for text in options.config or [None]:
                config = configs.AttendConfig(**json.loads(text)) if text else None
                start = launch(Case.parse(name), provider, config, options.gpu)
                binary = compiled(start, options.capability)
                declared = resources(binary)
                # of the loops that copy asynchronously, that over packed tokens has the most products
                step = max(loops(binary), key=lambda loop: (loop["LDGSTS"] > 0, loop["HMMA"]))
                spilled = declared["STACK"] + declared["LOCAL"]
                print(
                    f"{name} {provider}: {step.total()} instructions for a step of "
                    f"{start.kwargs['BULK_TOKENS']} tokens, by each of {start.kwargs['num_warps']} warps; "
                    f"{declared['REG']} registers, {spilled} bytes spilled, "
                    f"{binary.metadata.shared} bytes shared\n"
                    f"  {dict(step.most_common(24))}"
                )


if __name__ == "__main__":
    main()
