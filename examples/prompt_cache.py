"""A prompt's packed cache: made once, saved to a file, and continued in several ways.

python examples/prompt_cache.py --cache prompt.pt    # the second run reads the file instead of the prompt
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvmix_fx

PROMPT = "You are a careful assistant. You answer in one sentence, and say so when you do not know."


def main(arguments: list[str] | None = None) -> None:
    """Save or load, then branch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--cache", type=Path, default=Path("prompt.pt"), help="where the cache is kept")
    parser.add_argument("--prompt", default=PROMPT, help="what all branches have in common")
    parser.add_argument("--branch", action="append", help="a continuation; repeatable")
    parser.add_argument("--new-tokens", type=int, default=40)
    options = parser.parse_args(arguments)
    branches = options.branch or ["\nWhat is a robot?", "\nWhat is the sea?"]

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="sdpa").eval()
    plan = kvmix_fx.KVPlan.uniform(model, 4, 2)
    model = kvmix_fx.compile(model, plan)
    prompt = tokenizer(options.prompt, return_tensors="pt")["input_ids"].to(model.device)

    if options.cache.exists():
        # a pickle: load none that you have not made yourself
        saved = torch.load(options.cache, weights_only=False, map_location=model.device)
        if saved["model"] != options.model or not torch.equal(saved["prompt"], prompt):
            parser.error(f"{options.cache} is of another prompt or model: name another --cache, or delete it")
        cache = saved["cache"]
        print(f"{options.cache}: {cache.get_seq_length()} tokens, not read again")
    else:
        cache = kvmix_fx.KVMixCache(plan, model.config)
        with torch.inference_mode():
            model(input_ids=prompt, **kvmix_fx.cache_argument(model, cache), use_cache=True, logits_to_keep=1)
        torch.save({"model": options.model, "prompt": prompt, "cache": cache}, options.cache)
        print(f"{options.cache}: {options.cache.stat().st_size:,} bytes for {prompt.shape[1]} tokens")

    for branch in branches:
        turn = tokenizer(branch, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = torch.cat([prompt, turn.to(model.device)], 1)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                # copies: branches do not see each other
                **kvmix_fx.cache_argument(model, copy.deepcopy(cache)),
                max_new_tokens=options.new_tokens,
                do_sample=False,
            )
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        print(f"\n> {branch.strip()}\n{answer.strip()}")


if __name__ == "__main__":
    main()
