"""What documents and examples take for granted, without a network: tiny models under every name."""

from __future__ import annotations

from typing import Any

import pytest

from kvmix_fx.testing.models import tiny_llama

WORDS = [
    *("<pad>", "<unk>", "<end>", "The", "three", "laws", "of", "robotics", "are", "a", "robot", "may", "not"),
    *("obey", "user", "assistant", ":", "Name", "What", "is", "it"),
]
LAYERS = 2
"""As many as the largest layer that a page names asks for. Tracing one takes a second of a test."""

CHAT = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}assistant :"


def tokenizer() -> Any:
    """A word is a token; other words are one that is unknown."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    made.chat_template = CHAT
    return made


def model(layers: int = LAYERS) -> Any:
    """A Llama of the tokenizer's vocabulary."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return tiny_llama(num_hidden_layers=layers, vocab_size=len(WORDS), head_dim=64, **sizes)


def answer_for_every_name(monkeypatch: pytest.MonkeyPatch, layers: int = LAYERS) -> None:
    """from_pretrained gives the tiny model and its tokenizer, whatever it is asked for."""
    transformers = pytest.importorskip("transformers")

    def pretrained(name: str, attn_implementation: str, **_: Any) -> Any:
        assert attn_implementation == "sdpa"
        return model(layers)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", pretrained)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer())
