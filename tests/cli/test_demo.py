from __future__ import annotations

from pathlib import Path

import pytest
import torch
from running import PROMPT, Kvmix

from kvmix_fx.cli.measure import agreement, generate_greedily, text_length
from kvmix_fx.errors import MissingPackageError
from kvmix_fx.testing.models import tiny_llama

KEYS = {
    "rewritten_layers",
    "total_layers",
    "cache_bytes",
    "cache_bytes_16bit",
    "estimated_cache_bytes",
    "effective_bits",
    "tokens_per_second",
    "tokens_per_second_16bit",
    "top1_agreement",
    "kl_nats",
    "dtype",
    "plan",
    "prompt_tokens",
    "new_tokens",
    "text",
    "text_16bit",
    "compile_seconds",
    "device",
    "versions",
}


def test_demo_measures_a_packed_cache(kvmix: Kvmix, tiny: Path) -> None:
    answer = kvmix("demo", "--model", tiny, "--prompt", PROMPT * 3, "--new-tokens", 40, "--json").answer
    assert answer.keys() >= KEYS
    assert (answer["rewritten_layers"], answer["total_layers"]) == (2, 2)
    length = answer["prompt_tokens"] + 39
    assert answer["cache_bytes_16bit"] == length * 2 * 2 * 2 * 32 * 4
    assert answer["cache_bytes"] == answer["estimated_cache_bytes"] < answer["cache_bytes_16bit"] / 2
    assert answer["effective_bits"] == pytest.approx(32 * answer["cache_bytes"] / answer["cache_bytes_16bit"])
    assert answer["kl_nats"] > 1e-5
    assert answer["tokens_per_second"] > 0
    assert answer["compared_steps"] == 39


def test_demo_finds_no_difference_where_nothing_is_packed(kvmix: Kvmix, tiny: Path) -> None:
    arguments = ("--model", tiny, "--prompt", PROMPT, "--new-tokens", 10, "--key-bits", 16, "--json")
    answer = kvmix("demo", *arguments).answer
    assert answer["rewritten_layers"] == 0
    assert answer["cache_bytes"] == answer["cache_bytes_16bit"]
    assert answer["top1_agreement"] == 1
    assert answer["kl_nats"] == pytest.approx(0, abs=1e-9)
    assert answer["text"] == answer["text_16bit"]


def test_demo_shows_figures_and_both_texts(kvmix: Kvmix, tiny: Path) -> None:
    arguments = ("--model", tiny, "--prompt", PROMPT, "--new-tokens", 4, "--set", "0:v4")
    shown = " ".join(kvmix("demo", *arguments).stdout.split())
    for part in (
        "2 of 2",
        "float32",
        "K4/2 of 8/24V4, K4/2 of 8/24V2",
        "tokens/s",
        "nats over 3 steps",
        "─ packed cache ─",
    ):
        assert part in shown


def test_demo_admits_that_a_short_cache_is_larger(kvmix: Kvmix, tiny: Path) -> None:
    shown = kvmix("demo", "--model", tiny, "--prompt", "the cat", "--new-tokens", 2).stdout
    assert "x larger" in shown
    assert "try a longer prompt" in " ".join(shown.split())


def test_agreement_of_known_distributions() -> None:
    p = torch.tensor([[0.5, 0.5], [0.75, 0.25]])
    q = torch.tensor([[0.25, 0.75], [0.75, 0.25]])
    top1, kl = agreement(p.log() + 3, q.log())
    # argmax of a tie is the first entry
    assert top1 == 0.5
    assert kl == pytest.approx((0.5 * torch.tensor(4 / 3).log().item()) / 2, rel=1e-5)
    assert agreement(p, p) == (1, 0)


def test_a_run_fed_its_own_tokens_repeats_itself() -> None:
    model, ids = tiny_llama(), torch.arange(20)[None]
    run = generate_greedily(model, ids, 8)
    again = generate_greedily(model, ids, 8, forced=run.tokens)
    other = generate_greedily(model, ids, 8, forced=(run.tokens + 1) % 128)
    assert torch.equal(again.logits, run.logits)
    assert not torch.allclose(other.logits, run.logits)
    assert run.logits.shape == (7, 128)
    assert torch.equal(run.logits.argmax(-1), run.tokens[1:])
    assert run.cache.get_seq_length() == 27
    assert 0 < run.decode_seconds < run.seconds


def test_text_ends_at_the_end_of_text_token(tiny: Path) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = tiny_llama(), AutoTokenizer.from_pretrained(tiny)
    tokens = torch.tensor([5, 6, 1, 7])
    assert text_length(tokens, model, tokenizer) == 4
    tokenizer.eos_token = "<end>"
    assert text_length(tokens, model, tokenizer) == 2
    model.generation_config.eos_token_id = [6, 9]
    assert text_length(tokens, model, tokenizer) == 1


@pytest.mark.real_model
def test_demo_of_a_real_model_keeps_its_promises(kvmix: Kvmix) -> None:
    from kvmix_fx.testing import texts

    prompt = texts.prose()[:1500]
    answer = kvmix("demo", "--prompt", prompt, "--new-tokens", 16, "--json").answer
    if answer.get("error", {}).get("type") == MissingPackageError.__name__:
        pytest.skip(answer["error"]["message"])
    assert answer.keys() >= KEYS
    assert answer["rewritten_layers"] == answer["total_layers"] == 30
    assert type(answer["rewritten_layers"]) is int
    assert answer["cache_bytes"] < answer["cache_bytes_16bit"] / 2
    assert answer["cache_bytes"] == answer["estimated_cache_bytes"]
    assert 0.6 < answer["top1_agreement"] <= 1
    # an unquantized cache gives 0 here, a broken one far more
    assert 1e-4 < answer["kl_nats"] < 0.5
    assert answer["text"]
