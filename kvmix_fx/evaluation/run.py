"""evaluate(): a model with a packed cache against the same model without, token by token.

Each chunk of text is a prompt and a continuation. The prompt is read at once and packed; the continuation is
read in steps against the cache, whatever the model would have said itself. A log-likelihood taken in one
forward would show nothing: within one forward keys and values are exact under any plan.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvmix_fx.api import compile, restore
from kvmix_fx.cache.sizes import cache_size
from kvmix_fx.contracts import cache_argument
from kvmix_fx.errors import CalibrationError, EvaluationError
from kvmix_fx.evaluation.figures import Evaluation
from kvmix_fx.plan import KVPlan
from kvmix_fx.profiling.calibration import Calibration, is_text, load_calibration
from kvmix_fx.progress import progress as bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNKS, PROMPT, STEPS, BATCH = 8, 512, 128, 4
"""Unless told: chunks of text, tokens of each read at once, tokens read after them, chunks read together."""

WARM_UP_STEPS = 2


def evaluate(
    model: nn.Module,
    plan: KVPlan,
    data: object = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chunks: int = CHUNKS,
    prompt: int = PROMPT,
    steps: int = STEPS,
    step: int = 1,
    batch: int = BATCH,
    progress: bool = True,
) -> Evaluation:
    """Measure what `plan` costs a model's predictions, with a cache that is really packed.

    Both caches read the same tokens side by side, so nothing is kept of their logits but the comparison.

    Args:
        model: a causal language model of transformers, in eval mode; left as it is.
        plan: bits per layer.
        data: text to judge on: token ids [N, L], a text, a path, or "datasets:ID" (see
            `kvmix_fx.profiling.calibration.load_calibration`). None for Python's language reference, which
            every Python brings along. Use none that the plan was made from.
        tokenizer: of the model, for data that is text.
        chunks: pieces of text, at most, evenly spread over it.
        prompt: tokens of each piece that are read at once and not judged.
        steps: tokens of each that are then read, and whose predictions are compared. More of them show
            whether errors add up.
        step: tokens read at a time; 1 is what decoding does, more is faster. Tokens of one step attend to
            each other exactly.
        batch: pieces that are read together, at most.
        progress: show a bar, if stderr is a terminal.

    Returns:
        The figures; `.to_dict()` for JSON, `.plot(path)` for a picture.

    Raises:
        EvaluationError: the text cannot be read or is too short, a size makes no sense, or the model has been
            compiled by kvmix_fx, so that there is no unquantized one to compare with.
        NoSiteError: nothing in this model can be packed.
        PlanError, HeadSizeError: the plan does not fit the model.
        TrainingError: the model is in training mode.
    """
    for name, value in (("chunks", chunks), ("steps", steps), ("step", step), ("batch", batch)):
        if value < 1:
            raise EvaluationError(f"{name} must be at least 1, got {value}")
    check_plain(model)
    text = _text(data, tokenizer, chunks, prompt, steps)
    rows = _rows_together(len(text.ids), batch)
    pairs = _Pairs(model, plan, prompt, steps, step)
    total = 1 + len(text.ids) // rows * (2 + -(-steps // step))
    try:
        with torch.no_grad(), bar("evaluating", total, progress) as advance:
            pairs.warm_up(text.ids[:rows])
            advance()
            for ids in text.ids.split(rows):
                pairs.read(ids, advance)
    finally:
        restore(model)
    return pairs.result(
        {**text.describe(), "length": prompt + steps + 1},
        {"prompt": prompt, "steps": steps, "step": step, "batch": rows},
    )


def check_plain(model: nn.Module) -> None:
    """Raise EvaluationError if the model has been compiled by kvmix_fx."""
    if "_kvmix" in vars(model):
        raise EvaluationError(
            "this model has been compiled by kvmix_fx, so nothing unquantized is left to compare with: call "
            "kvmix_fx.restore(model) first"
        )


class _Pairs:
    """Reads chunks with both caches and keeps what differs."""

    def __init__(self, model: nn.Module, plan: KVPlan, prompt: int, steps: int, step: int) -> None:
        self.prompt, self.steps, self.step = prompt, steps, step
        self.plain: Callable[..., Any] = model.forward
        takes = inspect.signature(model.forward).parameters
        # of a prompt's logits none is judged, and all of them may be more than the cache
        self.prompt_options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.model: Any = compile(model, plan, inner="eager")
        self.device = next(model.parameters()).device
        self.seconds = {"plain": 0.0, "packed": 0.0}
        self.read_tokens = 0
        self.sizes: dict[str, tuple[int, int]] = {}
        self.found: list[tuple[Tensor, ...]] = []

    def warm_up(self, ids: Tensor) -> None:
        """Let the compiler see a prompt and the steps after it, so that neither is timed with it."""
        ids = ids.to(self.device)
        cache = self._read_prompt(self.model, ids)
        for n in range(WARM_UP_STEPS):
            start = self.prompt + n * self.step
            self.model(input_ids=ids[:, start : start + self.step], **self._with(cache))

    def read(self, ids: Tensor, advance: Callable[[], None]) -> None:
        """Read rows [B, prompt + steps + 1]."""
        ids = ids.to(self.device)
        calls = {"plain": self.plain, "packed": self.model}
        caches = {}
        for name, call in calls.items():
            caches[name] = self._read_prompt(call, ids)
            advance()
        end = self.prompt + self.steps
        parts = []
        for start in range(self.prompt, end, self.step):
            stop = min(start + self.step, end)
            logits = {}
            for name, call in calls.items():
                started = self._now()
                out = call(input_ids=ids[:, start:stop], **self._with(caches[name]))
                self.seconds[name] += self._now() - started
                logits[name] = out.logits
            parts.append(_compared(logits["plain"], logits["packed"], ids[:, start + 1 : stop + 1]))
            self.read_tokens += ids.shape[0] * (stop - start)
            advance()
        self.found.append(tuple(torch.cat(columns, 1) for columns in zip(*parts, strict=True)))
        for name, cache in caches.items():
            nbytes, elements = cache_size(cache)
            self.sizes[name] = nbytes // ids.shape[0], elements // ids.shape[0]

    def result(self, data: dict[str, Any], settings: dict[str, Any]) -> Evaluation:
        kl, loss, loss_change, probability_change, same_top = (
            torch.cat(columns) for columns in zip(*self.found, strict=True)
        )
        nbytes, elements = self.sizes["packed"]
        return Evaluation(
            kl,
            loss,
            loss_change,
            probability_change,
            same_top,
            nbytes,
            self.sizes["plain"][0],
            8 * nbytes / elements,
            self.read_tokens / self.seconds["packed"],
            self.read_tokens / self.seconds["plain"],
            data,
            settings,
        )

    def _read_prompt(self, call: Callable[..., Any], ids: Tensor) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        prompt = ids[:, : self.prompt]
        call(input_ids=prompt, **self._with(cache), **self.prompt_options)
        return cache

    def _with(self, cache: Any) -> dict[str, Any]:
        return {**cache_argument(self.model, cache), "use_cache": True}

    def _now(self) -> float:
        """The time once the device has done all it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def _compared(plain: Tensor, packed: Tensor, following: Tensor) -> tuple[Tensor, ...]:
    """KL, loss, its change, the change of the probability, and whether the top is the same, [B, n] each."""
    p, q = (logits.float().log_softmax(-1) for logits in (plain, packed))
    kl = (p.exp() * (p - q)).sum(-1)
    log_p, log_q = (x.gather(2, following[..., None])[..., 0] for x in (p, q))
    same = p.argmax(-1) == q.argmax(-1)
    found = (kl, -log_p, log_p - log_q, log_q.exp() - log_p.exp())
    return (*(x.double().cpu() for x in found), same.cpu())


def _text(
    data: object, tokenizer: PreTrainedTokenizerBase | None, chunks: int, prompt: int, steps: int
) -> Calibration:
    """Chunks of one length: prompt, steps, and a token that the last step is to predict."""
    if prompt < 1:
        raise EvaluationError(f"prompt must be at least 1 token, got {prompt}")
    source = ""
    if data is None:
        from kvmix_fx.testing import texts

        data, source = texts.prose(), "Python's language reference"
    length = prompt + steps + 1
    needed = (
        f"each of chunks={chunks} takes {length} (prompt={prompt}, steps={steps} and one to predict); pass a "
        "longer text, a shorter prompt or fewer steps"
    )
    try:
        text = load_calibration(
            data,
            tokenizer,
            prompts=chunks,
            length=length,
            # one less, for a tokenizer that puts a token before every piece
            shortest=length - 1 if is_text(data) else length,
            purpose="evaluation",
            needed=needed,
        )
    except CalibrationError as error:
        raise EvaluationError(str(error)) from error
    whole = [row[:length] for row, n in zip(text.ids, text.lengths, strict=True) if n >= length][:chunks]
    if not whole:
        raise EvaluationError(f"the evaluation text ({text.source}) is one token too short: {needed}")
    return Calibration(torch.stack(whole), (length,) * len(whole), source or text.source)


def _rows_together(chunks: int, batch: int) -> int:
    """The largest number of rows, at most `batch`, that divides the chunks: no other shape is compiled."""
    return next(rows for rows in range(min(batch, chunks), 0, -1) if chunks % rows == 0)


__all__ = ["check_plain", "evaluate"]
