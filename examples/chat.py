"""A conversation in one packed cache: each turn reads only what is new.

python examples/chat.py    # type; an empty line ends it
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import kvmix_fx


def typed() -> Iterator[str]:
    """What somebody types, until an empty line."""
    while line := input("\n> ").strip():
        yield line


def chat(model: Any, tokenizer: Any, said: Iterable[str], new_tokens: int) -> Any:
    """Answer everything that is said, and return the cache of the conversation."""
    cache = kvmix_fx.KVMixCache(kvmix_fx.compiled(model).plan, model.config)
    ids = torch.empty(1, 0, dtype=torch.long, device=model.device)
    messages: list[dict[str, str]] = []
    answer = ""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for line in said:
        before = tokenizer.apply_chat_template(messages, tokenize=False) if messages else ""
        messages.append({"role": "user", "content": line})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # what follows the last answer: all before it stays as the very tokens that are in the cache
        new = text[before.rindex(answer) + len(answer) :]
        turn = tokenizer(new, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = torch.cat([ids, turn.to(ids.device)], 1)
        read = ids.shape[1]
        with torch.inference_mode():
            ids = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **kvmix_fx.cache_argument(model, cache),
                max_new_tokens=new_tokens,
                streamer=streamer,
            )
        if int(ids[0, -1]) in ends:
            ids = ids[:, :-1]  # it is in the text of the next turn
        answer = tokenizer.decode(ids[0, read:], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": answer})
    return cache


def main(arguments: list[str] | None = None) -> None:
    """Chat on the terminal, or answer what --say says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--say", action="append", help="instead of typing; repeatable")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="sdpa").eval()
    model = kvmix_fx.compile(model, kvmix_fx.KVPlan.preset("tiers", model))
    cache = chat(model, tokenizer, options.say or typed(), options.new_tokens)
    print(f"\n{cache.get_seq_length()} tokens are in the cache")


if __name__ == "__main__":
    main()
