"""generate() under tensor parallelism: N ranks, one GPU each, with and without CUDA graphs.

    python -m benchmarks.e2e.generate --tp 2 --machine h200-x2 --case "b16 n8192 +40" --case "b1 n32768 +40"
    python -m benchmarks.e2e.generate --tp 2 --machine h200-x2 --shape llama-3.1-70b --case "b8 n8192 +40"

Every rank makes its share of the random weights on its own device. Each trial, one case of one provider, is
a torchrun of its own, so that one that dies or hangs takes no other along: a trial whose ranks make no
progress for 60 s between two steps is ended and becomes a row of the metric `hang`. Reading the prompt
and the first two tokens, which compile, may take ten minutes.

Providers are transformers' static cache and plans of kvmix, with CUDA graphs (as in the rows of one GPU)
and without (", no graphs"). `peak_bytes` and `cache_bytes` are those of one rank, the largest; times are
the first rank's. `rank_difference` is how far the logits of the first call's tokens differ between ranks,
at most: greedy and sampled tokens are the same everywhere only if it is 0.

The provider "check" compares logits instead, in float32, on the first four layers of the shape, which fit on
one GPU: of the same teacher-forced tokens, between ranks and one process (`8_bits_against_one_process`,
`2_bits_against_one_process`), with the control of 2 bits against 8 (`2_bits_against_8`) and what 8 bits
change (`8_bits_against_16`); each is the root mean square of the difference over that of the logits.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kvmix_fx
from benchmarks.e2e import generate
from benchmarks.e2e.models import build
from benchmarks.rows import ROOT, Row, make_row, save
from kvmix_fx import KVPlan
from kvmix_fx.integrations.transformers import KVMixStaticCache
from kvmix_fx.parallel import Ranks

HANG = 60.0
"""Seconds between two steps after which a trial is ended."""
COMPILING = 600.0
"""The same while the ranks start, read the first prompt and compile."""
COMPILED = 2
"""Tokens after which nothing is compiled any more."""
CHECK = "check"
CHECKED_LAYERS, CHECKED_ROWS, CHECKED_PROMPT, CHECKED_TOKENS = 4, 2, 200, 32
PROVIDERS = (CHECK, "transformers static", "kvmix k2.2v2.4 g128 w32")


def main(options: argparse.Namespace) -> int:
    """As a rank, run the trials named; else start ranks for each of them. Returns an exit status."""
    if "LOCAL_RANK" in os.environ:
        run_rank(options)
        return 0
    failed = 0
    for case, provider, graphs in trials(options):
        with tempfile.TemporaryDirectory() as folder:
            progress = Path(folder) / "progress"
            command = rank_command(options, case, provider, graphs, progress)
            seconds = watch(command, progress)
        name = named(provider, graphs)
        if seconds is None:
            continue
        failed += 1
        if seconds:
            print(f"{options.shape} {case}: {name} made no step in {seconds:.0f} s and was ended", flush=True)
            text = case_name(options, case)
            save([make_row("generate", text, name, "hang", seconds, "s")], options.output)
        else:
            print(f"{options.shape} {case}: {name} failed", flush=True)
    return min(failed, 1)


def trials(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(case, provider, whether graphs are on) of every trial."""
    found: dict[tuple[str, str, str], None] = {}
    graphs = options.graphs or ["off", "on"]
    for case, provider, way in itertools.product(options.case, options.provider or PROVIDERS, graphs):
        if provider == CHECK:
            # once for the shape, whatever the cases
            case = options.case[0]
        found[case, provider, way] = None
    return list(found)


def rank_command(
    options: argparse.Namespace, case: str, provider: str, graphs: str, progress: Path
) -> list[str]:
    """What starts the ranks of one trial."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={options.tp}", "-m", "benchmarks.e2e.generate"]
    command += ["--shape", options.shape, "--tp", str(options.tp), "--case", case, "--provider", provider]
    command += ["--graphs", graphs, "--device", options.device]
    command += ["--progress", str(progress), "--output", str(options.output)]
    for name in ("layers", "machine", "inner"):
        value = getattr(options, name)
        command += [f"--{name}", str(value)] if value is not None else []
    return command


def watch(
    command: list[str], progress: Path, hang: float = HANG, compiling: float = COMPILING
) -> float | None:
    """Run `command` while it makes progress; None if it succeeded, 0 if it failed, else how long it hung.

    progress: a file into which it writes the number of tokens; how old that is tells how long ago.
    """
    process = subprocess.Popen(command, cwd=ROOT)
    started = time.time()
    try:
        while process.poll() is None:
            time.sleep(0.2)
            beat, tokens = started, 0
            if progress.exists():
                beat, text = progress.stat().st_mtime, progress.read_text()
                tokens = int(text or 0)
            waited = time.time() - beat
            if waited > (hang if tokens >= COMPILED else compiling):
                return waited
        return None if process.returncode == 0 else 0.0
    finally:
        if process.poll() is None:
            # torchrun ends its ranks, which are in sessions of their own, itself
            process.terminate()
            process.wait()


def run_rank(options: argparse.Namespace) -> None:
    """The trials of one rank, one after another."""
    cuda = options.device == "cuda"
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl", device_id=device)
    else:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo")
    for case, provider, graphs in trials(options):
        text = case_name(options, case)
        with Trial(options, text, named(provider, graphs), graphs == "on") as trial:
            rows = trial.check() if provider == CHECK else trial.measure(case, provider)
        if torch.distributed.get_rank() == 0:
            save(rows, options.output)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def case_name(options: argparse.Namespace, case: str) -> str:
    """Name of a case in the rows."""
    layers = f" {options.layers} layers" if options.layers else ""
    return f"{options.shape}{layers} tp{options.tp} {case}"


def named(provider: str, graphs: str) -> str:
    """Name of a provider in the rows."""
    return provider if graphs == "on" else f"{provider}, no graphs"


class Trial:
    """One case of one provider on this rank."""

    def __init__(self, options: argparse.Namespace, case: str, provider: str, graphs: bool) -> None:
        """Name it."""
        self.options, self.case, self.provider, self.graphs = options, case, provider, graphs
        self.first = torch.distributed.get_rank() == 0
        self.ranks = Ranks(options.tp, torch.distributed.get_rank(), torch.distributed.group.WORLD)

    def __enter__(self) -> Trial:
        """Start."""
        self.beat(0)
        return self

    def __exit__(self, *_: object) -> None:
        """Give memory back."""
        torch._dynamo.reset()
        generate.free()

    def beat(self, tokens: int) -> None:
        """Tell that there is progress."""
        if self.first and self.options.progress:
            self.options.progress.write_text(str(tokens))

    def compiled(self, model: nn.Module, plan: KVPlan) -> None:
        """Compile in place."""
        options = {"cuda_graphs": self.graphs}
        kvmix_fx.compile(model, plan, inner=self.options.inner, options=options)

    def measure(self, text: str, provider: str) -> list[Row]:
        """Rows of a case."""
        options = self.options
        batch, context, new = (int(part[1:]) for part in text.split())
        model: Any = build(options.shape, options.device, options.layers, options.tp)
        ids = torch.randint(1, 30000, (batch, context), generator=torch.Generator().manual_seed(1))
        ids = ids.to(options.device)
        plan, settings = None, dict(generate.TRANSFORMERS.get(provider, {}))
        if provider in generate.KVMIX:
            plan = generate.KVMIX[provider](model)
            self.compiled(model, plan)
            if options.device != "cuda":
                # what generate() chooses by itself on a GPU
                settings["cache_implementation"] = "static"
        else:
            from transformers import CompileConfig

            model._previous_max_cache_length = context + new
            mode = "reduce-overhead" if self.graphs else "default"
            settings["compile_config"] = CompileConfig(mode=mode)
        clock, out = generate.clocked(
            model, ids, generate.COLD_TOKENS, settings | {"output_logits": True}, generate.Clock(self.beat)
        )
        rows = self._rows(
            ("first_call", clock.times[-1] - clock.times[0], "s"),
            ("rank_difference", self.differs_between_ranks(torch.stack(out.logits)), "logits"),
        )
        self.beat(COMPILED)
        del out
        generate.free()
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock, out = generate.clocked(
            model, ids, new, settings, generate.Clock(lambda tokens: self.beat(COMPILED + tokens))
        )
        peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else 0
        peak, size = self.largest(peak, generate.cache_bytes(out.past_key_values))
        bits = plan.bits_per_element(context) if plan is not None else None
        best = None if plan is None else generate.best_of_transformers(self.case, options.output)
        if self.first:
            found = generate.measured(self.case, self.provider, batch, (clock, peak, size), bits, best)
            rows += [row for row in found if row.value or row.metric != "peak_bytes"]
            print(f"{self.case} {self.provider}: {rows[1].metric} {rows[1].value}", flush=True)
            if plan is not None:
                replays = [graph.replay or "replayed" for graph in kvmix_fx.compiled(model).report.graphs]
                print(f"{self.case} {self.provider}: graphs {replays}", flush=True)
        return rows

    def check(self) -> list[Row]:
        """Rows of the comparison with one process, which is the first rank."""
        options, tp = self.options, self.options.tp
        layers = min(CHECKED_LAYERS, options.layers or CHECKED_LAYERS)
        size = f"b{CHECKED_ROWS} n{CHECKED_PROMPT} +{CHECKED_TOKENS}"
        self.case = f"{options.shape} {layers} layers tp{tp} {size}"
        shared = self._forced(layers, tp, (8, 2))
        scale = shared[8].square().mean().sqrt()
        figures = {"rank_difference": self.differs_between_ranks(shared[8] / scale)}
        if self.first:
            whole = self._forced(layers, 1, (8, 2, 16))
            figures |= {
                "8_bits_against_one_process": distance(shared[8], whole[8]),
                "2_bits_against_one_process": distance(shared[2], whole[2]),
                "2_bits_against_8": distance(shared[2], shared[8]),
                "8_bits_against_16": distance(whole[8], whole[16]),
            }
            for name, value in figures.items():
                print(f"{self.case} {self.provider}: {name} {value:.3g}", flush=True)
        return self._rows(*((name, value, "relative") for name, value in figures.items()))

    def _forced(self, layers: int, ranks: int, widths: tuple[int, ...]) -> dict[int, torch.Tensor]:
        """Logits [tokens, rows, vocabulary] of teacher-forced steps over a fixed cache, by its bits."""
        device = self.options.device
        model = build(self.options.shape, device, layers, ranks, torch.float32)
        tokens = torch.randint(
            1, 30000, (CHECKED_ROWS, CHECKED_PROMPT + CHECKED_TOKENS),
            generator=torch.Generator().manual_seed(2),
        ).to(device)  # fmt: skip
        found = {}
        for bits in widths:
            self.beat(0)
            plan = KVPlan.uniform(model, bits, bits)
            self.compiled(model, plan)
            past = KVMixStaticCache(plan, model.config, tokens.shape[1])
            logits = []
            with torch.no_grad():
                for step in range(CHECKED_TOKENS):
                    end = CHECKED_PROMPT + step
                    new = tokens[:, end - 1 : end] if step else tokens[:, :end]
                    answer = model(input_ids=new, past_key_values=past, logits_to_keep=1)
                    logits.append(answer.logits[:, -1].float())
                    self.beat(step)
            found[bits] = torch.stack(logits)
            kvmix_fx.restore(model)
            torch._dynamo.reset()
        del model
        generate.free()
        return found

    def differs_between_ranks(self, x: torch.Tensor) -> float:
        """Largest difference of an element between two ranks."""
        every = self.ranks.cat(x.float()[None], 0)
        return float((every - every[:1]).abs().max())

    def largest(self, *numbers: int) -> list[int]:
        """Each number's maximum over ranks."""
        every = self.ranks.cat(torch.tensor([numbers], device=self.options.device), 0)
        return [int(x) for x in every.amax(0)]

    def _rows(self, *figures: tuple[str, float, str]) -> list[Row]:
        return [make_row("generate", self.case, self.provider, *figure) for figure in figures]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of the difference over that of `b`."""
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
