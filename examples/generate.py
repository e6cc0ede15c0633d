"""Generate with a packed cache, and say what it took.

python examples/generate.py --prompt "The three laws of robotics are"
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvmix_fx


def main(arguments: list[str] | None = None) -> None:
    """Greedy text from one prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--prompt", default="The three laws of robotics are")
    parser.add_argument("--new-tokens", type=int, default=100)
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="sdpa").eval()
    plan = kvmix_fx.KVPlan.preset("tiers", model)
    model = kvmix_fx.compile(model, plan)

    inputs = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        out = model.generate(
            **inputs, max_new_tokens=options.new_tokens, do_sample=False, return_dict_in_generate=True
        )
    print(tokenizer.decode(out.sequences[0], skip_special_tokens=True), "\n")

    length, itemsize = kvmix_fx.returned_cache(out).get_seq_length(), model.dtype.itemsize
    for tokens in (length, 8192):
        print(f"{tokens} tokens take {plan.nbytes(1, tokens, itemsize=itemsize):,} bytes")
    print(f"{plan.bits_per_element():.2f} bits per element in long contexts, scales and offsets counted")


if __name__ == "__main__":
    main()
