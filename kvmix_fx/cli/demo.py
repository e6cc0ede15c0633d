"""`kvmix demo`: the same prompt with an unquantized and with a packed cache, side by side.

Four greedy runs of the same length. Unquantized: a short one to warm up, then one that is timed. Packed: one
that is fed the unquantized run's tokens, so that the logits of both can be compared step by step (and that
compiles everything), then one of its own that is timed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kvmix_fx.cli.common import (
    SMOLLM2,
    Answer,
    Placement,
    answers,
    check_prompt,
    dtype_name,
    encode,
    size,
)
from kvmix_fx.cli.env import versions
from kvmix_fx.cli.measure import Run, agreement, generate_greedily, text_length
from kvmix_fx.cli.plan import PlanChoice, summary
from kvmix_fx.errors import MissingPackageError
from kvmix_fx.progress import progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvmix_fx.plan import KVPlan

EXCERPT_TOKENS = 512
EXCERPT_START = 'The "with" statement\n***'
WARM_UP_TOKENS = 4
"""Prefill, and enough steps for a compiler to see that the length varies."""

INSTRUCTION = "Explain in plain words, for somebody new to Python, what this page of the manual says."


@answers
def demo(
    choice: PlanChoice,
    placement: Placement,
    model: Annotated[str, typer.Option(help="Hugging Face id or folder.")] = SMOLLM2,
    prompt: Annotated[
        str | None, typer.Option(help="Instead of a page of Python's documentation.", show_default=False)
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
) -> Answer:
    """Compare a 16-bit and a packed KV cache on one prompt: text, memory, speed, agreement.

    Without plan options, the preset "tiers" is used: about 2.4 bits per element, no calibration.
    """
    import kvmix_fx
    from kvmix_fx.cache.sizes import cache_size

    if prompt is not None:
        check_prompt(prompt)
    try:
        network, tokenizer, chosen = choice.load(model, placement)
    except MissingPackageError as error:
        if model != SMOLLM2:
            raise
        raise MissingPackageError(f"{error} Or pass --model with a Hugging Face id or folder.") from error
    ids = encode(tokenizer, default_prompt(tokenizer) if prompt is None else prompt).to(network.device)

    plain, plain_compiler = _run_plain(network, ids, new_tokens)
    kvmix_fx.compile(network, chosen)
    with progress("packed cache: compiling", new_tokens) as step:
        forced = generate_greedily(network, ids, new_tokens, plain.tokens, step)
    with progress("packed cache: measuring", None):
        packed = generate_greedily(network, ids, new_tokens)

    # what comes after the end is no text; the last token has no logits after it
    compared = min(max(1, text_length(plain.tokens, network, tokenizer)), new_tokens - 1)
    top1, kl = agreement(plain.logits[:compared], forced.logits[:compared])
    length, itemsize = packed.cache.get_seq_length(), network.dtype.itemsize
    nbytes, elements = cache_size(packed.cache)
    content = {
        "model": model,
        "plan": summary(chosen),
        "rewritten_layers": len(kvmix_fx.compiled(network).report.rewritten_layers()),
        "total_layers": len(chosen.layers),
        "prompt_tokens": ids.shape[1],
        "new_tokens": new_tokens,
        "cached_tokens": length,
        "dtype": dtype_name(network.dtype),
        "device": _device_name(network.device),
        "cache_bytes": nbytes,
        "cache_bytes_16bit": cache_size(plain.cache)[0],
        "estimated_cache_bytes": chosen.nbytes(1, length, itemsize=itemsize),
        "effective_bits": 8 * nbytes / elements,
        "effective_bits_long_context": chosen.bits_per_element(),
        "tokens_per_second": packed.tokens_per_second,
        "tokens_per_second_16bit": plain.tokens_per_second,
        "compiler_16bit": plain_compiler,
        "compile_seconds": max(0.0, forced.seconds - packed.seconds),
        "top1_agreement": top1,
        "kl_nats": kl,
        "compared_steps": compared,
        "text": _text(packed, network, tokenizer),
        "text_16bit": _text(plain, network, tokenizer),
        "versions": versions(),
    }
    return Answer(content, _view(content, chosen))


def default_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """A page of real prose with a task."""
    from kvmix_fx.testing import texts

    text = texts.prose()
    start = max(0, text.rfind(EXCERPT_START))
    ids = tokenizer(text[start : start + 8 * EXCERPT_TOKENS], add_special_tokens=False)["input_ids"]
    return f"{tokenizer.decode(ids[:EXCERPT_TOKENS])}\n\n{INSTRUCTION}"


def _run_plain(model: PreTrainedModel, ids: Tensor, count: int) -> tuple[Run, str]:
    """The unquantized run, and what compiled it: on accelerators, what compiles the packed run too."""
    import torch

    compiler = "none" if ids.device.type == "cpu" else "inductor"
    forward = model.forward
    if compiler == "inductor":
        vars(model)["forward"] = torch.compile(forward)
    try:
        with progress("16-bit cache: warming up", WARM_UP_TOKENS) as step:
            generate_greedily(model, ids, WARM_UP_TOKENS, step=step)
        with progress("16-bit cache: measuring", None):
            return generate_greedily(model, ids, count), compiler
    finally:
        vars(model).pop("forward", None)


def _text(run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = run.tokens[: text_length(run.tokens, model, tokenizer)]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _view(content: dict[str, Any], plan: KVPlan) -> Group:
    nbytes, nbytes_16bit = content["cache_bytes"], content["cache_bytes_16bit"]
    head = Text(
        f"{content['model']} on {content['device']}, {content['prompt_tokens']} prompt tokens and "
        f"{content['new_tokens']} new ones, {content['rewritten_layers']} of {content['total_layers']} "
        f"attention layers rewritten\n{plan.describe()}\n"
    )
    table = Table("", "16-bit cache", "packed cache")
    table.add_row("kept in", content["dtype"], ", ".join(content["plan"]["layers"].values()))
    table.add_row(
        "cache, allocated", size(nbytes_16bit), f"{size(nbytes)}, {_compared(nbytes, nbytes_16bit)}"
    )
    table.add_row("cache, estimated", "", size(content["estimated_cache_bytes"]))
    table.add_row(
        "bits per element", f"{content['effective_bits'] * nbytes_16bit / nbytes:.2f}", _bits(content)
    )
    table.add_row(
        "decode, tokens/s", f"{content['tokens_per_second_16bit']:.2f}", f"{content['tokens_per_second']:.2f}"
    )
    table.add_row("compilation", "", f"{content['compile_seconds']:.1f} s, once")
    compared = f"over {content['compared_steps']} steps"
    table.add_row("same top token", "", f"{content['top1_agreement']:.1%} {compared}")
    table.add_row("KL divergence", "", f"{content['kl_nats']:.4f} nats {compared}")
    return Group(
        head,
        table,
        Text(_remarks(content, plan)),
        Panel(Text(content["text_16bit"]), title="16-bit cache"),
        Panel(Text(content["text"]), title="packed cache"),
    )


def _compared(nbytes: int, reference: int) -> str:
    if nbytes > reference:
        return f"{nbytes / reference:.2f}x larger"
    return f"{reference / nbytes:.2f}x smaller"


def _bits(content: dict[str, Any]) -> str:
    return f"{content['effective_bits']:.2f}; {content['effective_bits_long_context']:.2f} in long contexts"


def _remarks(content: dict[str, Any], plan: KVPlan) -> str:
    """What the figures mean where they may mislead."""
    remarks = ["Agreement: both caches were fed the tokens of the 16-bit run."]
    if content["dtype"] == "float32":
        length, geometry = content["cached_tokens"], plan.geometry
        assert geometry is not None
        raw = 2 * geometry.elements(length)
        packed = plan.nbytes(1, length, itemsize=2)
        remarks.append(
            '"16-bit" names the unquantized cache; here it is float32, and so are the raw tokens of the '
            f"packed one. In a 16-bit dtype: {size(raw)} against {size(packed)} (estimated)."
        )
    if content["cache_bytes"] > content["cache_bytes_16bit"]:
        remarks.append("So short a cache is mostly raw tokens and room to grow: try a longer prompt.")
    if content["device"] == "cpu":
        remarks.append(
            "On CPUs packed attention runs in a C kernel, where there is a compiler and the format is one it "
            "knows, else as PyTorch ops."
        )
    return "\n".join(remarks)
