"""`kvmix serve`: an OpenAI-compatible server that batches continuously over packed pages."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
from collections.abc import Iterator
from typing import Annotated

import typer

from kvmix_fx.cli.common import Answer, ModelName, Placement, answers, load_model, note, size
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
    network, tokenizer = load_model(model, placement)
    named = choice.plan is not None or choice.preset is not None or choice.arguments()
    if named:
        plan = choice.build(network).for_model(network)
    else:
        # not the preset tiers: its prompts choose orders of channels, and pages are shared
        plan = choice.changed(KVPlan.uniform(network, 4, 2)).for_model(network)
    manager = start_manager(network, plan, pool, max_batch_tokens=max_batch_tokens)
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
