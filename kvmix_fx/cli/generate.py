"""`kvmix generate`: text from any model with a packed cache."""

from __future__ import annotations

import contextlib
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from kvmix_fx.cli.common import (
    Answer,
    ModelName,
    Placement,
    answers,
    check_prompt,
    dtype_name,
    encode,
    note,
    size,
)
from kvmix_fx.cli.plan import PlanChoice, summary
from kvmix_fx.contracts import cache_argument, returned_cache
from kvmix_fx.errors import CommandError
from kvmix_fx.progress import progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmix_fx.plan import KVPlan


LENGTH_TOLD = 8192
"""Tokens for which the cost of a plan is told beside that of the text just made."""

SHORT_CACHE = 1.5
"""How many times its bits at length a cache may have before that needs a word."""


class CacheChoice(StrEnum):
    """Kinds of cache to generate with."""

    DYNAMIC = "dynamic"
    STATIC = "static"


@answers
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Option(help="What to continue or answer.")],
    choice: PlanChoice,
    placement: Placement,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    cache: Annotated[CacheChoice, typer.Option(help="A growing cache, or one of fixed capacity.")] = (
        CacheChoice.DYNAMIC
    ),
    chat: Annotated[
        bool | None, typer.Option(help="Use the chat template; by default if there is one.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
) -> Answer:
    """Generate text with a packed cache."""
    if temperature != 1.0 and not sample:
        raise CommandError("--temperature is for --sample")
    import torch

    import kvmix_fx
    from kvmix_fx.cache.sizes import cache_size

    check_prompt(prompt)
    network, tokenizer, chosen = choice.load(model, placement)
    kvmix_fx.compile(network, chosen)
    ids = encode(tokenizer, prompt, chat).to(network.device)
    capacity = ids.shape[1] + new_tokens
    torch.manual_seed(seed)
    started = time.perf_counter()
    with contextlib.nullcontext() if stream else progress("generating", new_tokens) as step:
        result = cast("Any", network).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=sample,
            **({"temperature": temperature} if sample else {}),
            **_cache(cache, network, chosen, capacity),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
            streamer=_text_streamer(tokenizer) if step is None else _Steps(step),
            return_dict_in_generate=True,
        )
    seconds = time.perf_counter() - started

    tokens = result.sequences[0, ids.shape[1] :]
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    nbytes, elements = cache_size(returned_cache(result))
    rewritten, total = len(kvmix_fx.compiled(network).report.rewritten_layers()), len(chosen.layers)
    content = {
        "model": model,
        "text": text,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(tokens),
        "seconds": seconds,
        "plan": summary(chosen),
        "rewritten_layers": rewritten,
        "total_layers": total,
        "cache": cache.value,
        "cache_bytes": nbytes,
        "effective_bits": 8 * nbytes / elements,
        "effective_bits_long_context": chosen.bits_per_element(),
        "dtype": dtype_name(network.dtype),
        "device": str(network.device),
    }
    note(
        f"{len(tokens)} tokens in {seconds:.1f} s, compilation included; {rewritten} of {total} layers "
        f"packed by {chosen.name}"
    )
    note(_cost(chosen, nbytes, 8 * nbytes / elements, network.dtype.itemsize))
    return Answer(content, None if stream else text)


def _cost(plan: KVPlan, nbytes: int, bits: float, itemsize: int) -> str:
    """What the cache took, why, and what the plan takes at length."""
    geometry = plan.geometry
    assert geometry is not None  # of `for_model`
    elements = geometry.elements(LENGTH_TOLD)
    later = plan.nbytes(1, LENGTH_TOLD, itemsize=itemsize)
    lines = [f"cache {size(nbytes)}, {bits:.2f} bits per element"]
    if bits > SHORT_CACHE * 8 * later / elements:
        lines[0] += ": so short a cache is mostly raw"
        lines.append("(recent tokens, a tile that is not full yet, room to grow); only old tokens are packed")
    lines.append(
        f"at {LENGTH_TOLD:,} tokens: {size(later)}, unquantized {size(elements * itemsize)}; "
        f"{plan.bits_per_element():.2f} bits per element in the limit"
    )
    return "\n".join(lines)


def _cache(choice: CacheChoice, model: Any, plan: Any, capacity: int) -> dict[str, Any]:
    """The cache argument of generate(); it makes a growing cache by itself."""
    if choice is CacheChoice.DYNAMIC:
        return {}
    from kvmix_fx.integrations.transformers import KVMixStaticCache

    return cache_argument(model, KVMixStaticCache(plan, model.config, capacity))


def _text_streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


class _Steps:
    """What generate() calls a streamer, as steps of a progress bar."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.step = step
        self.is_prompt = True

    def put(self, value: Any) -> None:
        """Called with the prompt and then with every token."""
        del value
        if not self.is_prompt:
            self.step()
        self.is_prompt = False

    def end(self) -> None:
        """Called after the last token."""
