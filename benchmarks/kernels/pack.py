"""Quantize and pack a prefilled cache: share of the copy bandwidth, bytes read plus written.

    python -m benchmarks.kernels.pack

The buffers are compared with the reference on the same tokens first. Kernels of another revision are timed
where PYTHONPATH names that revision's `kernels` folder.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch

from benchmarks.kernels.decode_attention import BY_TILE, formats
from benchmarks.kernels.rows import Rows, copy_bandwidth
from kvmix_kernels import layout, ops
from kvmix_kernels.triton import storage
from kvmix_kernels.triton.timing import graph_time

SHAPES = ((16, 8, 8192, 128), (1, 8, 131072, 128), (64, 8, 2048, 64), (16, 4, 8192, 256))
CASES = {f"b{B} h{H} n{L} d{D}": (B, H, L, D) for B, H, L, D in SHAPES}
PROVIDERS = (
    "k2v2 g128", "k3v3 g128", "k4v4 g128", "k2v2 g32", "tiers 25/75", "tiers 25/50/25", "tiers 25/75 tile",
)  # fmt: skip


def main() -> int:
    """Run all cases; 1 if any provider was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of the rows")
    parser.add_argument("--provider", action="append", choices=PROVIDERS, help="repeatable; default: all")
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable; default: all")
    options = parser.parse_args()
    folder = options.output
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"device copy {bandwidth / 1e6:.2f} TB/s")
    rows = Rows("pack", folder)
    wrong = 0
    for name in options.case or CASES:
        B, H, L, D = CASES[name]
        # heads behind tokens, as models make them
        x = torch.randn(B, L, H, D, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        for provider in options.provider or PROVIDERS:
            for part, fmt in zip("KV", formats(provider, D), strict=True):
                label = f"kvmix {provider} {part}"
                order = None
                if fmt.order and BY_TILE in provider.split():
                    # chosen in the time that is taken
                    fmt = fmt._replace(order=layout.ORDER_TILE_KEYS)
                elif fmt.order:
                    # some order, not the time to choose one
                    fmt = fmt._replace(order=layout.ORDER_PLAN)
                    order = torch.rand(H, D, device="cuda").argsort(1).to(torch.int32)
                got = storage.quantize_pack(x[:1, :, :4096], None, fmt.encode(), order)
                expected = ops._quantize_pack(x[:1, :, :4096], None, fmt.encode(), order)
                if not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
                    print(f"{name:24} {label:28} WRONG", flush=True)
                    wrong = 1
                    continue
                pack = functools.partial(storage.quantize_pack, x, None, fmt.encode(), order)
                out = pack()
                moved = x.numel() * 2 + sum(t.numel() * t.element_size() for t in out)
                del out
                timing = graph_time([pack])
                share = moved / timing.median / bandwidth
                rows.add(name, label, timing, nbytes=moved, copy_share=share)
        torch.cuda.empty_cache()
    return wrong


if __name__ == "__main__":
    sys.exit(main())
