"""Sweep over every generating model of transformers: python -m benchmarks.coverage [--only KIND ...].

Architecture x attention x cache, each a tiny model with random weights in a process of its own. Rows are kept
in `benchmarks/results/coverage/`; what has a row is not run again, so a sweep that was stopped goes on. With
--again OUTCOME rows of that outcome are renewed. --variant windows has windows that are shorter than the
prompt, --variant tiers the preset of that name; their rows are in files of their own.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.coverage import one
from benchmarks.coverage.records import Key, load, save
from benchmarks.rows import stamps

ATTENTIONS, CACHES = ("sdpa", "eager"), ("growing", "static")


def main() -> int:
    """Run what has no row yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", metavar="KIND", help="model types, such as llama; all by default"
    )
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--cache", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--again", nargs="+", metavar="OUTCOME", default=[], help='such as crashed; "any"')
    parser.add_argument("--variant", choices=[one.WINDOWS, one.TIERS], default="")
    parser.add_argument("--limit", type=float, default=180, help="seconds a model may take")
    options = parser.parse_args()
    _quietly()
    for key in _wanted(options):
        started = time.monotonic()
        row = _in_a_process(key, options.limit, options.variant)
        save(key, row | {"seconds": round(time.monotonic() - started, 1)}, options.variant)
        told = f"{row.get('packed', '-')} of {row.get('layers', '-')}"
        print(*key, row["outcome"], told, row.get("why", ""), flush=True)
    return 0


def _wanted(options: argparse.Namespace) -> Iterator[Key]:
    """Cases without a row: first each model with the first attention that it has, then with the others."""
    from benchmarks.coverage.tiny import causal_and_other_models

    # a class that several mappings list is one model
    models = {(kind, name): task for task, kind, name in reversed(causal_and_other_models())}
    named = {kind for kind, _ in models}
    for kind in options.only or ():
        if kind not in named:
            raise SystemExit(f"no mapping lists a model type {kind!r}")
    chosen = [
        (task, *model)
        for model, task in reversed(models.items())
        if not options.only or model[0] in options.only
    ]
    first, *others = options.attention
    for cache in options.cache:
        for model in chosen:
            key = Key(*model, first, cache)
            yield from _unless_done(key, options)
            if load(options.variant)[key]["outcome"] == one.NOT_OFFERED:
                for other in others:
                    yield from _unless_done(Key(*model, other, cache), options)
    for cache in options.cache:
        for attention in others:
            for model in chosen:
                yield from _unless_done(Key(*model, attention, cache), options)


def _unless_done(key: Key, options: argparse.Namespace) -> Iterator[Key]:
    row = load(options.variant).get(key)
    if row is None or (row["commit"] != stamps()["commit"] and {row["outcome"], "any"} & {*options.again}):
        yield key


def _in_a_process(key: Key, limit: float, variant: str) -> dict[str, Any]:
    """The row of a case; its process has what all need imported already."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, key, variant), daemon=True)
    process.start()
    theirs.close()
    row: dict[str, Any]
    try:
        if mine.poll(limit):
            row = mine.recv()
        else:
            process.kill()
            row = {"outcome": one.UNFINISHED, "why": f"not done after {limit:.0f} seconds"}
    except EOFError:
        process.join()
        row = {"outcome": "crashed", "why": f"the process ended with {process.exitcode}"}
    process.join()
    return row


def _child(pipe: Any, key: Key, variant: str) -> None:
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    pipe.send(one.run(key.kind, key.model, key.attention, key.cache, variant))


def _quietly() -> None:
    """Imports of all cases, on one thread: a process with others can not be forked."""
    import torch._dynamo
    import transformers.generation
    import transformers.modeling_utils  # noqa: F401

    import kvmix_fx.integrations.transformers  # noqa: F401

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
