"""An OpenAI-compatible server of one model: transformers' own routes over packed pages.

transformers' server gets a model that is loaded and a manager that runs already. Added is what it does
not have: a queue with a limit (429), sampling per request, /metrics for Prometheus, and that a request whose
client has gone is cancelled although it does not stream. What it would ignore is refused (400).
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from transformers import GenerationConfig, PreTrainedModel
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import CBGenerateManager, GenerationState

from kvmix_fx.errors import RequestLengthError
from kvmix_fx.integrations.transformers.batching import serve
from kvmix_fx.integrations.transformers.batching.manager import PackedBatchingManager
from kvmix_fx.plan import KVPlan

REQUEST_ID = "x-request-id"
ASKS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class OneModel(ModelManager):
    """The models of transformers' server: one, which is there already."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: Any) -> None:
        """`name`: what clients call it."""
        super().__init__()
        self.force_model = name
        self._pair = model, tokenizer

    def load_model_and_processor(self, *_: Any, **__: Any) -> Any:
        """The model and its tokenizer."""
        return self._pair

    def get_gen_models(self, *_: Any) -> list[dict[str, Any]]:
        """As `/v1/models` lists it."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "kvmix"}]


class Running(GenerationState):
    """The state of transformers' server: always the one manager that runs."""

    def __init__(self, manager: PackedBatchingManager, queue_limit: int) -> None:
        """`queue_limit`: requests that may wait."""
        super().__init__(continuous_batching=True)
        self._cb_manager = Asked(manager, queue_limit)

    def get_manager(self, *_: Any, **__: Any) -> Any:
        """The same for every request."""
        return self._cb_manager


class Asked(CBGenerateManager):
    """How requests of the server reach the manager."""

    def __init__(self, manager: PackedBatchingManager, queue_limit: int) -> None:
        """`queue_limit`: requests that may wait."""
        super().__init__()
        self._cb: Any = manager
        self.manager, self.queue_limit, self.refused = manager, queue_limit, 0

    def init_cb(self, *_: Any) -> None:
        """Nothing: it runs already."""

    def _for(self, config: GenerationConfig) -> Asked:
        """This, for a request with a configuration of its own."""
        if waiting(self.manager) >= self.queue_limit:
            self.refused += 1
            raise HTTPException(
                429, f"{self.queue_limit} requests are waiting already: try again", {"Retry-After": "1"}
            )
        mine = copy.copy(self)
        mine._cb = _WithSampling(self.manager, sampling_of(config, self.manager))
        return mine

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **rest: Any
    ) -> Any:
        """As the original; refuses what cannot be done."""
        with _refusals():
            one = self._for(gen_config)
            return CBGenerateManager.generate_streaming(one, model, processor, inputs, gen_config, **rest)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        """As the original; refuses what cannot be done."""
        one = self._for(gen_config)
        try:
            with _refusals():
                return await CBGenerateManager.generate_non_streaming(
                    one, model, processor, inputs, gen_config, request_id
                )
        finally:
            # of a request that was refused, or whose client has gone, nothing more will come
            self.manager.output_router.result_handlers.pop(request_id, None)


@contextlib.contextmanager
def _refusals() -> Any:
    try:
        yield
    except RequestLengthError as error:
        raise HTTPException(400, str(error)) from error


class _WithSampling:
    """A manager whose requests all have these arguments besides."""

    def __init__(self, manager: PackedBatchingManager, given: dict[str, Any]) -> None:
        self._manager, self._given = manager, given

    def add_request(self, *args: Any, **kwargs: Any) -> Any:
        return self._manager.add_request(*args, **kwargs, **self._given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


def waiting(manager: PackedBatchingManager) -> int:
    """Requests that have not begun."""
    processor = manager.batch_processor
    inside = 0 if processor is None else len(processor.scheduler.waiting_requests)
    return int(manager.input_queue.qsize() + inside)


def sampling_of(config: GenerationConfig, manager: PackedBatchingManager) -> dict[str, Any]:
    """A request's sampling as the manager takes it; greedy is sampling from the likeliest alone.

    Raises:
        HTTPException: 400 for what continuous batching does not have, and would ignore.
    """
    if config.repetition_penalty not in (None, 1.0):
        raise HTTPException(400, "frequency_penalty is not available with continuous batching: leave it out")
    if config.stop_strings:
        raise HTTPException(400, "stop is not available with continuous batching: leave it out")
    vocabulary = int(manager.model.config.get_text_config().vocab_size)
    samples = bool(config.do_sample) or config.temperature not in (None, 0, 1.0)
    if not samples or config.temperature == 0:
        return {"temperature": 1.0, "top_p": 1.0, "top_k": 1}
    return {
        "temperature": float(1.0 if config.temperature is None else config.temperature),
        "top_p": float(1.0 if config.top_p is None else config.top_p),
        "top_k": int(config.top_k or vocabulary),
    }


def start_manager(
    model: PreTrainedModel, plan: KVPlan, memory: int | None, **options: Any
) -> PackedBatchingManager:
    """A manager that runs, whose requests each sample in their own way.

    options: of `ContinuousBatchingConfig`.
    """
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    config: Any = copy.deepcopy(model.generation_config)
    # the engine makes room for what is not neutral when it is made
    vocabulary = int(model.config.get_text_config().vocab_size)
    config.update(do_sample=True, temperature=0.5, top_p=0.5, top_k=vocabulary - 1, repetition_penalty=None)
    given: Any = ContinuousBatchingConfig
    manager = serve(
        model,
        plan,
        memory=memory,
        generation_config=config,
        continuous_batching_config=given(per_request_processors=True, **options),
    )
    manager.start()
    return manager


def build_app(name: str, tokenizer: Any, manager: PackedBatchingManager, queue_limit: int = 256) -> Any:
    """The ASGI application: transformers' routes, and /metrics.

    Args:
        name: of the model, as clients ask for it.
        tokenizer: its tokenizer.
        manager: of `start_manager`; closed when the application is.
        queue_limit: requests that may wait; one more is answered 429.
    """
    model: Any = manager.model
    models, state = OneModel(name, model, tokenizer), Running(manager, queue_limit)
    kinds = (
        ChatCompletionHandler,
        CompletionHandler,
        ResponseHandler,
        TranscriptionHandler,
        SystemOneHandler,
    )
    app: FastAPI = build_server(models, *(kind(models, state) for kind in kinds), state)

    @app.exception_handler(HTTPException)
    async def refuse(_request: Request, error: HTTPException) -> JSONResponse:
        # as clients of OpenAI read it
        kind = "rate_limit_error" if error.status_code == 429 else "invalid_request_error"
        content = {"error": {"message": error.detail, "type": kind, "code": error.status_code}}
        return JSONResponse(content, error.status_code, error.headers)

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(metrics_text(manager, state.get_manager().refused))

    inner = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(served: FastAPI) -> AsyncIterator[None]:
        async with inner(served):
            yield
        await asyncio.to_thread(manager.close)

    app.router.lifespan_context = lifespan
    return CancelGone(app, manager)


class CancelGone:
    """Cancels a request when its client has gone before the answer began."""

    def __init__(self, app: Any, manager: PackedBatchingManager) -> None:
        """`app`: what answers."""
        self.app, self.manager = app, manager

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope["type"] != "http" or scope["path"] not in ASKS:
            await self.app(scope, receive, send)
            return
        name = str(uuid.uuid4())
        given = [value for key, value in scope["headers"] if key.decode("latin-1").lower() == REQUEST_ID]
        if given:
            name = given[0].decode("latin-1")
        else:
            scope = {**scope, "headers": [*scope["headers"], (REQUEST_ID.encode(), name.encode())]}
        body: list[Message] = []
        while not body or body[-1].get("more_body"):
            body.append(await receive())
        gone = asyncio.Event()
        started = False

        async def replay() -> Message:
            if body:
                return body.pop(0)
            await gone.wait()
            return {"type": "http.disconnect"}

        async def answer(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        answering = asyncio.ensure_future(self.app(scope, replay, answer))
        listening = asyncio.ensure_future(listen())
        await asyncio.wait((answering, listening), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done() and not started:
            self.manager.cancel_request(name)
            answering.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await answering
        listening.cancel()


def metrics_text(manager: PackedBatchingManager, refused: int) -> str:
    """What a Prometheus server reads."""
    processor, counts = manager.batch_processor, manager.counts
    cache = None if processor is None else manager.cache
    running = 0 if processor is None else len(processor.scheduler.active_requests)
    geometry = manager.plan.geometry
    lines = [
        ("requests_finished_total", "counter", "Requests that ended.", counts.finished),
        ("requests_failed_total", "counter", "Of them, those with an error.", counts.failed),
        ("requests_refused_total", "counter", "Requests that found the queue full.", refused),
        ("requests_running", "gauge", "Requests that have pages.", running),
        ("requests_waiting", "gauge", "Requests that have not begun.", waiting(manager)),
        ("tokens_read_total", "counter", "Tokens computed, of prompts and answers.", counts.tokens),
        ("tokens_new_total", "counter", "Tokens generated.", counts.new),
        ("steps_total", "counter", "Steps of the model.", counts.steps),
        ("plan_bits", "gauge", "Bits per cached element in long contexts.", manager.plan.bits_per_element()),
    ]
    if cache is not None and geometry is not None:
        total = cache.num_sectors * cache.packed.blocks_per_sector
        free = round(total * cache.compute_free_capacity())
        lines += [
            ("pool_bytes", "gauge", "Bytes of the pool.", cache.nbytes),
            ("pages", "gauge", "Blocks of the pool.", total),
            ("pages_used", "gauge", "Of them, those in use.", total - free),
            ("page_tokens", "gauge", "Tokens of a page.", cache.packed.tokens_per_page),
        ]
    return "".join(
        f"# HELP kvmix_{name} {text}\n# TYPE kvmix_{name} {kind}\nkvmix_{name} {value}\n"
        for name, kind, text, value in lines
    )


__all__ = ["build_app", "start_manager"]
