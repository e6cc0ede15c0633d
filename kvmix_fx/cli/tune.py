"""`kvmix tune`: measure launch parameters on this machine's GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvmix_fx.cli.common import Answer, answers, note
from kvmix_fx.errors import CommandError
from kvmix_fx.progress import progress

CASES = ("b64 h8x4 n8192 d128", "b1 h8x4 n131072 d128")
BITS = ("tiers", "2,2,128,0", "4,4,128,0", "4,2,32,32")
PROCESSES = 8


@answers
def tune(
    case: Annotated[
        list[str],
        typer.Option(
            help="A decode step to be fast at: sequences, KV heads x query heads each, tokens, head size; "
            "repeatable."
        ),
    ] = list(CASES),  # noqa: B006  typer copies it
    bits: Annotated[
        list[str],
        typer.Option(
            help='Bits of keys and values and the group of each, or "tiers" for the default plan; repeatable.'
        ),
    ] = list(BITS),  # noqa: B006
    processes: Annotated[int, typer.Option(help="Processes that compile.", min=1)] = PROCESSES,
    output: Annotated[
        Path | None, typer.Option(help="Another file than the one that this GPU takes from now on.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="Write every timing here, one a line.")] = None,
) -> Answer:
    """Measure launch parameters of attention on this GPU, for all models, and keep them for this user."""
    import torch

    if not torch.cuda.is_available():
        raise CommandError("launch parameters are measured on a GPU, and torch sees none on this machine")
    from kvmix_kernels.triton import configs
    from kvmix_kernels.triton import tune as tuning
    from kvmix_kernels.triton.timing import Case

    try:
        cases = [Case.parse(text) for text in case]
    except ValueError:
        raise CommandError(f"of the cases {case} one cannot be read: they are such as {CASES[0]!r}") from None
    settings = [tuning.Setting.parse(text) for text in bits]
    gpu = torch.cuda.get_device_properties(0)
    file = output or configs.user_file(configs.file_stem(gpu.name))
    count = len(tuning.jobs(cases, settings, gpu.multi_processor_count))
    note(f"{count} candidates are compiled by {processes} processes, then timed one by one")
    with (log or Path(os.devnull)).open("w") as lines, progress("measuring", 2 * count) as done:
        entries = tuning.tune(
            cases, settings, gpu.multi_processor_count, processes, done,
            lambda line: print(line, file=lines, flush=True),
        )  # fmt: skip
    tuning.merge(entries, file)
    table = Table("keys and values", "head", "tokens", "warps", "stages", "programs", box=None)
    for entry in entries:
        match, use = entry["match"], entry["use"]
        name = f"K{match['k_bits']}V{match['v_bits']} g{match['group']}"
        table.add_row(
            f"{'tiers' if match['tiers'] else name}{', few heads' if match['few_heads'] else ''}",
            *(str(number) for number in (match["head_dim"], *(use[key] for key in (
                "tokens", "warps", "stages", "programs")))),
        )  # fmt: skip
    table.caption = f"kept in {file}"
    return Answer({"gpu": gpu.name, "file": str(file), "entries": entries}, table)
