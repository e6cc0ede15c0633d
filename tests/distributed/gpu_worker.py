"""One rank of two, a GPU each: decodes with and without CUDA graphs, saves logits, and ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import kvmix_fx
from benchmarks.e2e.models import build


def main():
    """Command line: the folder for what was found."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl", device_id=device)
    model = build("tiny", "cuda", tp_size=2, dtype=torch.float32)
    ids = torch.randint(1, 3000, (2, 300), generator=torch.Generator().manual_seed(1)).to(device)
    found = {"replay": {}}
    for name, bits, options in (
        ("launches", 8, {"cuda_graphs": False}),
        ("2 bits", 2, {"cuda_graphs": False}),
        # last, and not restored: its recordings are there when the process group goes
        ("graphs", 8, {}),
    ):
        kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, bits, bits), inner="eager", options=options)
        logits = []
        for _ in range(2):  # the second call replays from its first step on
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            logits.append(torch.stack(out.logits))
        found[name] = torch.cat(logits).float().cpu()
        found["replay"][name] = kvmix_fx.compiled(model).report.graphs[-1].replay
    torch.save(found, Path(sys.argv[1]) / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
