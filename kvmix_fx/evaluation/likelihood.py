"""log_likelihoods(): what a model gives continuations whose contexts are packed.

One forward over context and continuation never reads a packed cache: within one forward keys and values are
exact under any plan. So all of a context but its last token is read first and packed, and the last token and
the continuation are read against it. The prediction of the first token of a continuation, which a prompt's
own forward would give, then comes from the packed cache like the others.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvmix_fx.contracts import cache_argument
from kvmix_fx.errors import EvaluationError

STEP = 32
"""Tokens of a continuation that are read together, unless told. They see each other exactly, as they would in
the recent window, which by default has no fewer."""


@dataclass(frozen=True)
class Continuation:
    """A context and what follows it, token ids; both have at least one."""

    context: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """The sum of the tokens' log-probabilities in nats, and whether each was the likeliest."""

    log_probability: float
    is_greedy: bool


@dataclass
class _Row:
    """Tokens that are read together: `prompt` is packed first. `asked`: places of the continuations."""

    prompt: tuple[int, ...]
    read: tuple[int, ...]
    asked: list[int] = field(default_factory=list)


@torch.no_grad()
def log_likelihoods(
    model: Any,
    continuations: Sequence[Continuation],
    *,
    batch: int = 1,
    step: int = STEP,
    softmax_dtype: torch.dtype | None = None,
    advance: Callable[[], object] = lambda: None,
) -> list[Likelihood]:
    """Score continuations against the cache that `model` makes of their contexts.

    Contexts of one length are read together, without padding, so the batch does not change what is packed.
    Continuations of one context share its cache, and those that differ in their last token alone everything.

    Args:
        model: a causal language model of transformers; packed if it was compiled by `kvmix_fx.compile`.
        continuations: what to score.
        batch: rows read together, at most; one row for each different text but for its last token.
        step: tokens of a continuation read at a time; 1 is what decoding does. Without a context but one
            token, the first step is all that is read exactly.
        softmax_dtype: of the probabilities; None for that of the logits.
        advance: called once for every continuation.

    Returns:
        One for each continuation, in their order.

    Raises:
        EvaluationError: a context or continuation without tokens, or a size below 1.
    """
    for name, value in (("batch", batch), ("step", step)):
        if value < 1:
            raise EvaluationError(f"{name} must be at least 1, got {value}")
    found: dict[int, Likelihood] = {}
    for rows in _batches(continuations, batch):
        asked = [place for row in rows for place in row.asked]
        targets = [list(continuations[place].tokens) for place in asked]
        of_row = torch.tensor([n for n, row in enumerate(rows) for _ in row.asked], device=model.device)
        scores = _scores(model, rows, of_row, _padded(targets, model.device), step, softmax_dtype)
        for place, tokens, log_probabilities, greedy in zip(asked, targets, *scores, strict=True):
            n = len(tokens)
            found[place] = Likelihood(float(log_probabilities[:n].sum()), bool(greedy[:n].all()))
            advance()
    return [found[place] for place in range(len(continuations))]


def _batches(continuations: Sequence[Continuation], batch: int) -> Iterator[list[_Row]]:
    """Rows that are read together, the longest first: what does not fit into memory fails at once."""
    rows: dict[tuple[tuple[int, ...], tuple[int, ...]], _Row] = {}
    for place, one in enumerate(continuations):
        if not one.context or not one.tokens:
            raise EvaluationError("a context and its continuation need at least one token each")
        prompt = tuple(one.context[:-1])
        read = (one.context[-1], *one.tokens[:-1])
        rows.setdefault((prompt, read), _Row(prompt, read)).asked.append(place)
    by_length: dict[int, list[_Row]] = defaultdict(list)
    for row in rows.values():
        by_length[len(row.prompt)].append(row)
    for _, alike in sorted(by_length.items(), reverse=True):
        alike.sort(key=lambda row: (row.prompt, -len(row.read)))
        for start in range(0, len(alike), batch):
            yield alike[start : start + batch]


def _scores(
    model: Any, rows: Sequence[_Row], of_row: Tensor, targets: Tensor, step: int, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets [n, tokens] and whether each was the likeliest; `of_row` [n]: whose."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    if prompts[0]:
        # of a prompt's logits none is asked for, and all of them may be more than the cache
        takes = inspect.signature(type(model).forward).parameters
        options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        ids = torch.tensor(prompts, device=model.device)
        model(input_ids=ids, use_cache=True, **cache_argument(model, cache), **options)
        if len(prompts) < len(rows):
            places = {prompt: n for n, prompt in enumerate(prompts)}
            order = torch.tensor([places[row.prompt] for row in rows], device=model.device)
            cache.reorder_cache(order)  # pyrefly: ignore[bad-argument-type] - a LongTensor is no class
    # what a row has too few is filled up behind it, where none of its own tokens looks
    read = _padded([row.read for row in rows], model.device)
    log_probabilities: list[Tensor] = []
    greedy: list[Tensor] = []
    for start in range(0, read.shape[1], step):
        stop = min(start + step, read.shape[1])
        given = cache_argument(model, cache)
        logits = model(input_ids=read[:, start:stop], use_cache=True, **given).logits
        wanted = targets[:, start:stop]
        columns = torch.arange(stop - start, device=model.device)
        log_softmax = logits.log_softmax(-1, dtype=dtype)
        log_probabilities.append(log_softmax[of_row[:, None], columns, wanted])
        greedy.append(logits.argmax(-1)[of_row] == wanted)
    return torch.cat(log_probabilities, 1).cpu(), torch.cat(greedy, 1).cpu()


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


__all__ = ["STEP", "Continuation", "Likelihood", "log_likelihoods"]
