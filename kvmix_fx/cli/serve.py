"""`kvmix serve`: an OpenAI-compatible server that batches continuously over packed pages."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer

from kvmix_fx.cli.common import (
    SMOLLM2,
    Answer,
    ModelName,
    Placement,
    answers,
    load_config,
    load_errors,
    load_model,
    note,
    size,
)
from kvmix_fx.cli.plan import PlanChoice
from kvmix_fx.errors import CommandError, MissingPackageError
from kvmix_fx.plan import KVPlan

UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def bytes_of(text: str) -> int:
    """Bytes from a text such as "8GiB".

    Raises:
        CommandError: it says no size.
    """
    found = re.fullmatch(r"([0-9.]+) ?(KiB|MiB|GiB|)", text)
    try:
        return int(float(found[1]) * UNITS[found[2]]) if found else int(text)
    except ValueError:
        raise CommandError(
            f"--memory takes bytes, or a number with KiB, MiB or GiB such as 8GiB, got {text!r}"
        ) from None


@contextlib.contextmanager
def _outliving_signals() -> Iterator[None]:
    """Let the command end as others do: uvicorn raises the signal that stopped it once more at its end."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_ranks(ranks: int) -> bool:
    """Whether this process is one of several ranks; if it is to start them, it ends with them.

    Raises:
        CommandError: it is one of another number.
    """
    found = int(os.environ.get("WORLD_SIZE", "1"))
    if found == 1 and ranks > 1:
        raise typer.Exit(_run_ranks(ranks))
    if found != ranks:
        raise CommandError(f"--tp {ranks} in a process that is one of {found} ranks: leave torchrun to --tp")
    return ranks > 1


def _run_ranks(ranks: int) -> int:
    """Run this command once for each rank, and hand on what stops it; the largest of their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # what torchrun tells its processes
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", "kvmix_fx", *sys.argv[1:]]
    started = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]

    def stop(*_: object) -> None:
        for process in started:
            process.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        while any(process.poll() is None for process in started):
            if any(process.poll() for process in started):
                # the others would wait for it
                stop()
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(0.2)
    finally:
        signal.signal(signal.SIGTERM, before)
    return max(abs(process.returncode) for process in started)


def _load_share(name: str, placement: Placement, ranks: int) -> Any:
    """This rank's share of a model, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.distributed import DistributedConfig

    if name.lower() == SMOLLM2 or placement.device is not None:
        raise CommandError(
            "--tp takes a Hugging Face id or folder, and places ranks by itself: leave out --device"
        )
    with load_errors(name):
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=placement.torch_dtype(),
            attn_implementation="sdpa",
            distributed_config=DistributedConfig(tp_size=ranks),
        )
        return model.eval(), AutoTokenizer.from_pretrained(name)


def _follow(manager: Any) -> NoReturn:
    """Be a rank without a server, until the first one stops."""
    with _outliving_signals():
        while manager.is_running():
            time.sleep(0.2)
    manager.close()
    raise typer.Exit


@answers
def serve(
    model: ModelName,
    choice: PlanChoice,
    placement: Placement,
    memory: Annotated[
        str | None,
        typer.Option(help="Of the pool, such as 8GiB; most of what is free by default.", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen.")] = 8000,
    queue_limit: Annotated[
        int, typer.Option(min=1, help="Requests that may wait; one more is answered 429.")
    ] = 256,
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a step; longer prompts take several.")
    ] = 2048,
    grace: Annotated[int, typer.Option(min=0, help="Seconds that running requests get at the end.")] = 30,
    tp: Annotated[
        int, typer.Option(min=1, help="Ranks of tensor parallelism; --memory is that of each.")
    ] = 1,
) -> Answer:
    """Serve a model at /v1/chat/completions and /v1/completions; 4-bit keys and 2-bit values unless told."""
    pool = None if memory is None else bytes_of(memory)
    from kvmix_fx.integrations.transformers.batching import require_engine

    require_engine("kvmix serve")
    try:
        import uvicorn

        from kvmix_fx.integrations.transformers.batching.server import build_app, start_manager
    except ImportError as error:
        raise MissingPackageError.for_extra(str(error.name), "server", "kvmix serve") from error
    shared = _in_ranks(tp)
    # what does not fit is found before the model is loaded
    config = load_config(model)
    if choice.plan is not None or choice.preset is not None or choice.arguments():
        plan = choice.build(config, model)
    else:
        # not the preset tiers: its prompts choose orders of channels, and pages are shared
        plan = choice.changed(KVPlan.uniform(config, 4, 2))
    network, tokenizer = _load_share(model, placement, tp) if shared else load_model(model, placement)
    plan = plan.for_model(network)
    manager = start_manager(network, plan, pool, max_batch_tokens=max_batch_tokens)
    if not manager.is_tp_driver:
        _follow(manager)
    try:
        note(
            f"{model} on http://{host}:{port}/v1: {plan.name}, {size(manager.cache.nbytes)} of pages, "
            f"requests of up to {manager.capacity:,} tokens"
        )
        app = build_app(model, tokenizer, manager, queue_limit)
        # transformers warns of every request that it has come
        logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)
        with _outliving_signals():
            uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=grace)
    finally:
        manager.close()
    counts = manager.counts
    return Answer(
        {"model": model, "requests": counts.finished, "failed": counts.failed, "new_tokens": counts.new},
        f"{counts.finished} requests, {counts.failed} of them failed, {counts.new} new tokens",
    )
