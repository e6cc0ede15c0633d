"""An OpenAI-style chat endpoint over replicas of a model with a packed KV cache, on Ray Serve.

    serve run examples.serving.app:build model=smollm2 replicas=2 memory=100e6

Requests that reach a replica together are generated together, as many as its cache has memory for. A batch
runs to its end before the next one starts: this is no continuous batching.
"""

# no postponed annotations here: FastAPI and Ray Serve read them
import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from transformers import LogitsProcessor, StoppingCriteria

import kvmix_fx
from kvmix_fx import KVPlan
from kvmix_fx.cli.common import Placement, load_config, load_model
from kvmix_fx.integrations.transformers import KVMixStaticCache
from kvmix_fx.plan import default_plan

ATTEMPTS = 3
"""Replicas that are asked for an answer of which the client has seen nothing yet."""

PLANS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("uniform", {"key_bits": 8}),
    ("uniform", {"key_bits": 4}),
    ("tiers", {"bits": 3.1}),
    ("tiers", {"bits": 2.6}),
    ("tiers", {"bits": 2.4}),
)
"""Presets that are tried, where the bits follow from the memory."""


class Settings(BaseModel):
    """What is served, and in how much memory."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field("smollm2", description="a Hugging Face id or folder, or 'smollm2'")
    replicas: int = Field(2, ge=1)
    memory: float = Field(100e6, gt=0, description="bytes of every replica's cache")
    prompt_tokens: int = Field(1024, ge=1, description="of a conversation, at most")
    new_tokens: int = Field(256, ge=1, description="of an answer, at most")
    sequences: int | None = Field(None, ge=1, description="at once; the bits follow from the memory")
    plan: str | None = Field(None, description="a plan file; the number of sequences follows")
    device: str = "cpu"
    cpus: float = Field(1, description="of every replica")
    gpus: float = Field(0, description="of every replica")
    queue: int = Field(64, description="requests that wait for a replica; more are refused")

    @property
    def capacity(self) -> int:
        """Tokens of a sequence."""
        return self.prompt_tokens + self.new_tokens

    @property
    def placement(self) -> Placement:
        """Where a replica's model runs."""
        return Placement(device=self.device)


def fit(settings: Settings) -> tuple[KVPlan, int]:
    """The plan, and how many sequences a replica's memory holds under it."""
    config = load_config(settings.model)
    itemsize = settings.placement.torch_dtype().itemsize

    def size(plan: KVPlan, rows: int) -> int:
        return plan.nbytes(rows, settings.capacity, itemsize=itemsize, cache="fixed")

    rows = settings.sequences
    if settings.plan is not None:
        plan = KVPlan.from_pretrained(settings.plan).for_model(config)
    elif rows is None:
        plan = default_plan(config)
    else:
        plans = [KVPlan.preset(name, config, **options) for name, options in PLANS]
        plan = next((p for p in plans if size(p, rows) <= settings.memory), plans[-1])
    rows = rows or max(1, int(settings.memory // size(plan, 1)))
    if size(plan, rows) > settings.memory:
        raise ValueError(
            f"{rows} sequences of {settings.capacity} tokens take {size(plan, rows):,} bytes under "
            f"{plan.name}, and memory is {settings.memory:,.0f}: raise it, or lower sequences, "
            "prompt_tokens or new_tokens"
        )
    return plan, rows


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(BaseModel):
    """The part of OpenAI's request that is served; anything else is refused by name."""

    model_config = ConfigDict(extra="forbid")

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    stream: bool = False


@serve.deployment
class Replica:
    """One compiled model and its packed cache."""

    def __init__(self, settings: Settings, plan: str, rows: int) -> None:
        """Load, compile, and run the graphs once, so that no request waits for their compilation."""
        self.settings, self.plan = settings, KVPlan.from_json(plan)
        self.name = serve.get_replica_context().replica_id.unique_id
        self.model, self.tokenizer = load_model(settings.model, settings.placement)
        kvmix_fx.compile(self.model, self.plan)
        # one thread for all batches: they run one after another, and torch's settings belong to a thread
        self.thread = ThreadPoolExecutor(1)
        for count in {1, rows}:
            example = [{"ids": [1, 2, 3], "max_tokens": 3, "temperature": 0.0}] * count
            self.thread.submit(self.run, example, lambda _: None).result()
        self.batched.set_max_batch_size(rows)

    async def generate(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Tokens of one answer, one by one."""
        async for item in self.batched(request):
            yield item

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=0.02)
    async def batched(self, requests: list[dict[str, Any]]) -> AsyncIterator[list[Any]]:
        """One item for every request of a batch, in every step."""
        loop, steps = asyncio.get_running_loop(), asyncio.Queue()

        def put(step: Any) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, step)

        work = loop.run_in_executor(self.thread, self.run, requests, put)
        work.add_done_callback(lambda _: steps.put_nowait(None))
        ended = [False] * len(requests)
        while (tokens := await steps.get()) is not None:
            items: list[Any] = []
            for row, (token, finish) in enumerate(tokens):
                items.append(
                    StopIteration if ended[row] else {"token": token, "finish": finish, "replica": self.name}
                )
                ended[row] = ended[row] or finish is not None
            yield items
        await work

    def run(self, requests: list[dict[str, Any]], put: Callable[[Any], None]) -> None:
        """Generate for a batch; `put` gets (token, why it is the last) of every row in every step."""
        rows = [request["ids"] for request in requests]
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        limits = torch.tensor([request["max_tokens"] for request in requests])
        end = self.model.generation_config.eos_token_id
        ends = set(end if isinstance(end, list) else [] if end is None else [end])
        device = self.model.device
        cache = KVMixStaticCache(self.plan, self.model.config, self.settings.capacity)
        self.model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            **kvmix_fx.cache_argument(self.model, cache),
            max_new_tokens=int(limits.max()),
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=pad,
            logits_processor=[Temperatures(requests)],
            stopping_criteria=[Limits(width, limits)],
            streamer=Steps(limits.tolist(), ends, put),
        )  # fmt: skip


class Temperatures(LogitsProcessor):
    """Every row's own temperature; 0 leaves only the likeliest token."""

    def __init__(self, requests: list[dict[str, Any]]) -> None:
        self.values = torch.tensor([[request["temperature"]] for request in requests])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        values = self.values.to(scores)
        best = scores == scores.amax(-1, keepdim=True)
        greedy = scores.masked_fill(~best, -torch.inf)
        return torch.where(values == 0, greedy, scores / values.clamp(min=1e-4))


class Limits(StoppingCriteria):
    """Ends every row at its own length."""

    def __init__(self, prompt: int, limits: torch.Tensor) -> None:
        self.ends = prompt + limits

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return (input_ids.shape[1] >= self.ends).to(input_ids.device)


class Steps:
    """What generate() calls a streamer, for several rows."""

    def __init__(self, limits: list[int], ends: set[int], put: Callable[[Any], None]) -> None:
        self.limits, self.ends, self._put = limits, ends, put
        self.count = -1

    def put(self, tokens: torch.Tensor) -> None:
        """Called with the prompts and then with a token of every row."""
        self.count += 1
        if self.count:
            self._put([(token, self._finish(row, token)) for row, token in enumerate(tokens.tolist())])

    def _finish(self, row: int, token: int) -> str | None:
        return "stop" if token in self.ends else "length" if self.count >= self.limits[row] else None

    def end(self) -> None:
        """Called after the last token."""


api = FastAPI(title="Chat over a packed KV cache")


@api.exception_handler(HTTPException)
async def _as_openai(_: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse(_error(error.detail, error.status_code), error.status_code)


@api.exception_handler(RequestValidationError)
async def _not_understood(_: Request, error: RequestValidationError) -> JSONResponse:
    wrong = [f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors()]
    return JSONResponse(_error("; ".join(wrong), 400), 400)


def _error(message: str, code: int) -> dict[str, Any]:
    kind = "invalid_request_error" if code < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": code}}


class Answer:
    """An answer as it grows, and its OpenAI forms."""

    def __init__(self, tokenizer: Any, model: str, prompt_tokens: int) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.id, self.created, self.prompt_tokens = (
            f"chatcmpl-{uuid.uuid4().hex}",
            int(time.time()),
            prompt_tokens,
        )
        self.start()

    def start(self) -> None:
        """Nothing yet."""
        self.tokens: list[int] = []
        self.text, self.finish, self.replica = "", None, ""

    def add(self, item: dict[str, Any]) -> str:
        """One more token; returns what it adds to the text."""
        self.tokens.append(item["token"])
        self.finish, self.replica = item["finish"], item["replica"]
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if text.endswith("\ufffd") and self.finish is None:
            return ""  # a character of several tokens, not all of which are there
        piece, self.text = text[len(self.text) :], text
        return piece

    def event(self, delta: dict[str, str]) -> str:
        """A piece of it as a server-sent event; the last one is empty and says why."""
        choice = {"index": 0, "delta": delta, "finish_reason": None if delta else self.finish}
        return f"data: {json.dumps(self._form('chat.completion.chunk', choice))}\n\n"

    def whole(self) -> dict[str, Any]:
        """All of it."""
        message = {"role": "assistant", "content": self.text}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        usage = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(self.tokens),
            "total_tokens": self.prompt_tokens + len(self.tokens),
        }
        return self._form("chat.completion", choice) | {"usage": usage}

    def _form(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": self.replica, "choices": [choice],
        }  # fmt: skip


@serve.deployment(ray_actor_options={"num_cpus": 0})
@serve.ingress(api)
class Chat:
    """Speaks HTTP, turns text into tokens and back, and asks the replicas."""

    def __init__(self, settings: Settings, replicas: DeploymentHandle) -> None:
        from transformers import AutoTokenizer

        from kvmix_fx.testing.smollm2 import load_smollm2

        self.settings = settings
        if settings.model == "smollm2":
            self.tokenizer = load_smollm2()[1]
        else:
            self.tokenizer = AutoTokenizer.from_pretrained(settings.model)
        self.replicas = replicas.options(stream=True)

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The one model there is."""
        return {"object": "list", "data": [{"id": self.settings.model, "object": "model"}]}

    @api.post("/v1/chat/completions")
    async def complete(self, request: ChatRequest) -> Any:
        """Answer a conversation, whole or in pieces."""
        ids = self.tokenizer.apply_chat_template(
            [message.model_dump() for message in request.messages],
            add_generation_prompt=True, tokenize=True, return_dict=True,
        )["input_ids"]  # fmt: skip
        if len(ids) > self.settings.prompt_tokens:
            raise HTTPException(
                400,
                f"the conversation has {len(ids)} tokens, at most {self.settings.prompt_tokens} are served",
            )
        wanted = request.max_completion_tokens or request.max_tokens or self.settings.new_tokens
        if wanted > self.settings.new_tokens:
            raise HTTPException(400, f"max_tokens is {wanted}, at most {self.settings.new_tokens} are served")
        question = {"ids": ids, "max_tokens": wanted, "temperature": request.temperature}
        answer = Answer(self.tokenizer, self.settings.model, len(ids))
        pieces = self._pieces(question, answer, keep=not request.stream)
        if request.stream:
            # the first piece is waited for, so that what goes wrong before it is an HTTP error
            first = await anext(pieces)
            return StreamingResponse(self._events(answer, first, pieces), media_type="text/event-stream")
        async for _ in pieces:
            pass
        return answer.whole()

    async def _pieces(self, question: dict[str, Any], answer: Answer, keep: bool) -> AsyncIterator[str]:
        """Text as it comes. A replica that dies is replaced by another one while nothing has been sent.

        keep: nothing is sent before the end.
        """
        for attempt in range(1, ATTEMPTS + 1):
            answer.start()
            try:
                async for item in self.replicas.generate.remote(question):
                    yield answer.add(item)
                return
            except BackPressureError as error:
                raise HTTPException(503, "all replicas are busy and the queue is full: try later") from error
            except RayActorError as error:
                if attempt == ATTEMPTS or (answer.tokens and not keep):
                    raise HTTPException(503, "the replica died while it answered: ask again") from error

    async def _events(self, answer: Answer, first: str, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
        """Server-sent events of a streamed answer."""
        try:
            yield answer.event({"role": "assistant", "content": first})
            async for piece in pieces:
                if piece:
                    yield answer.event({"content": piece})
            yield answer.event({})
        except HTTPException as error:
            yield f"data: {json.dumps(_error(error.detail, error.status_code))}\n\n"
            return
        yield "data: [DONE]\n\n"


def build(settings: Settings) -> serve.Application:
    """The application, for `serve run examples.serving.app:build NAME=VALUE ...`."""
    plan, rows = fit(settings)
    print(f"{plan.name}: {rows} sequences of {settings.capacity} tokens a replica", flush=True)
    replica = Replica.options(
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        # one batch at a time; the others wait where they can still go to another replica
        max_ongoing_requests=rows,
        max_queued_requests=settings.queue,
        health_check_period_s=2,
    )
    return Chat.bind(settings, replica.bind(settings, plan.to_json(), rows))
