"""A plan for a budget of bits, from a profile, and what it costs against a uniform plan of about that size.

python examples/plan_from_profile.py --calibration FILE --held-out OTHER_FILE --bits 3.0
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import kvmix_fx


def main(arguments: list[str] | None = None) -> None:
    """Profile, solve, evaluate, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", type=Path, help="a text like those that the model will read")
    parser.add_argument("--held-out", type=Path, help="a text to judge on; never that of the calibration")
    parser.add_argument("--bits", type=float, default=3.0, help="effective bits: scales and offsets counted")
    parser.add_argument("--prompts", type=int, help="pieces of the calibration text")
    parser.add_argument("--length", type=int, help="tokens of each")
    parser.add_argument("--chunks", type=int, default=8, help="pieces of the text to judge on")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each that are packed first")
    parser.add_argument("--steps", type=int, default=64, help="tokens of each that are judged")
    parser.add_argument("--out", type=Path, default=Path("my-plan"))
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="sdpa").eval()
    calibration = str(options.calibration) if options.calibration else None
    profile = kvmix_fx.profile(
        model, calibration, tokenizer=tokenizer, prompts=options.prompts, length=options.length
    )
    planned = profile.plan(bits=options.bits)
    print(planned.describe())

    held_out = str(options.held_out) if options.held_out else None
    for name, plan in (("planned", planned), ("uniform K2V2", kvmix_fx.KVPlan.uniform(model, 2))):
        found = kvmix_fx.evaluate(
            model, plan, held_out, tokenizer=tokenizer,
            chunks=options.chunks, prompt=options.prompt, steps=options.steps,
        )  # fmt: skip
        bits, kl, same = plan.bits_per_element(), found.kl_mean.value, found.same_top_share.value
        print(f"{name}: {bits:.2f} bits, KL {kl:.4f} nats per token, same top token {same:.1%}")
    planned.save_pretrained(options.out)


if __name__ == "__main__":
    main()
