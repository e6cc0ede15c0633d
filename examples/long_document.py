"""Questions about a long document, which is read and packed once.

python examples/long_document.py --document FILE --ask "What is it about?" --ask "Who wrote it?"
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvmix_fx


def main(arguments: list[str] | None = None) -> None:
    """Read, then answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--document", type=Path, required=True, help="a text file")
    parser.add_argument("--ask", action="append", required=True, help="a question; repeatable")
    parser.add_argument("--new-tokens", type=int, default=60)
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="sdpa").eval()
    plan = kvmix_fx.KVPlan.preset("tiers", model)
    model = kvmix_fx.compile(model, plan)

    document = tokenizer(options.document.read_text(), return_tensors="pt")["input_ids"].to(model.device)
    cache = kvmix_fx.KVMixCache(plan, model.config)
    with torch.inference_mode():
        model(input_ids=document, **kvmix_fx.cache_argument(model, cache), use_cache=True, logits_to_keep=1)
    length, itemsize = document.shape[1], model.dtype.itemsize
    sizes = kvmix_fx.ModelGeometry.of(model)
    plain = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * length * itemsize
    print(f"{length} tokens read, {plan.nbytes(1, length, itemsize=itemsize):,} bytes instead of {plain:,}")

    for question in options.ask:
        turn = tokenizer(f"\n\nQuestion: {question}\nAnswer:", add_special_tokens=False, return_tensors="pt")
        ids = torch.cat([document, turn["input_ids"].to(model.device)], 1)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                # a copy: the document's cache stays as it is
                **kvmix_fx.cache_argument(model, copy.deepcopy(cache)),
                max_new_tokens=options.new_tokens,
                do_sample=False,
            )
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        print(f"\n> {question}\n{answer.strip()}")


if __name__ == "__main__":
    main()
