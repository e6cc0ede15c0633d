"""Ranks: each loads its share of the models, runs the cases it is named, saves what came out.

    python -m tests.distributed.worker MODELS OUT '{"2": [CASE, ...], "3": [...]}'

runs the cases on so many ranks, one number after the other. All of them are forked from one process that has
imported what they need, which takes longer than most cases; they find the variables that torchrun sets.
torchrun itself starts the ranks of tests/benchmarks/test_ranks.py.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from pathlib import Path

import torch
import torch._dynamo
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import kvmix_fx
from kvmix_fx.errors import KVMixError
from kvmix_fx.parallel import process_group_size
from kvmix_fx.profiling import profile
from tests.distributed import cases


def load(folder):
    """This rank's share."""
    ranks = int(os.environ["WORLD_SIZE"])
    config = DistributedConfig(tp_size=ranks)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval()


def refusals(model):
    """What compile and profile say; they must say it before any forward."""
    said = []
    model.forward = None
    plan = cases.PLANS["2 bits"](kvmix_fx.plan.ModelGeometry.of(model))
    for attempt in (lambda: kvmix_fx.compile(model, plan), lambda: profile(model, torch.ones(1, 99).long())):
        try:
            attempt()
            said.append("nothing")
        except KVMixError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def main():
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "cases", type=json.loads, help="MODEL/CACHE/PLAN, perhaps with beams; MODEL/refused; MODEL/profile"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    for count, names in options.cases.items():
        folder = options.out / count
        folder.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        # the others are ended when one fails
        given = (int(count), port, options.models, folder, names)
        start_processes(rank, given, int(count), start_method="fork")


def rank(number, count, port, folder, out, names):
    """What one process does."""
    variables = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    found, models = {}, {}
    for case in names:
        name, what, *plan = case.removesuffix(" and beams").split("/")
        if name not in models:
            models[name] = load(folder / name)
        model = models[name]
        if what == "refused":
            found[case] = refusals(model)
        elif what == "profile":
            found[case] = profiled(model)
        else:
            made = cases.PLANS[plan[0]](model)
            found[case.removesuffix(" and beams")] = cases.run(model, made, what, case.endswith("beams"))
            kvmix_fx.restore(model)
        torch._dynamo.reset()
    found["processes"] = process_group_size()
    torch.save(found, out / f"rank{number}.pt")
    torch.distributed.destroy_process_group()


def profiled(model):
    """Every signal, and the plan that follows."""
    measured = cases.profiled(model)
    return {
        "numbers": cases.numbers(measured),
        "heads": measured.geometry.num_kv_heads,
        "architecture": measured.model.architecture,
        "unavailable": dict(measured.unavailable),
        "plan": measured.plan(bits=4.0).digest,
    }


if __name__ == "__main__":
    main()
