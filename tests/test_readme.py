"""The README's Python blocks, run one after another as a reader would."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import kvmix_fx
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.testing.models import tiny_llama

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
WORDS = [
    "<pad>",
    "<unk>",
    "The",
    "three",
    "laws",
    "of",
    "robotics",
    "are",
    "a",
    "robot",
    "may",
    "not",
    "obey",
]
LAYERS = 21
"""As many as the largest layer that a block names asks for."""


@pytest.fixture
def hub(monkeypatch):
    """A tiny model and tokenizer under every name; nothing is fetched."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"
    )
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}

    def model(name, attn_implementation):
        assert attn_implementation == "sdpa"
        return tiny_llama(num_hidden_layers=LAYERS, vocab_size=len(WORDS), **sizes)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)


@pytest.mark.timeout(600)
def test_the_blocks_run_in_their_order(hub, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    Path("calibration.txt").write_text(" ".join(WORDS[2:]) + "\n" + "a robot may obey the three laws " * 120)
    # what a block takes for granted
    names = {"torch": torch, "step": lambda x: x + 1}
    seen = []
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"README.md, block {number}", "exec"), names)
        seen.append(dict(names))
    first = seen[0]["out"]
    assert isinstance(first.past_key_values.layers[5].keys, QuantizedKVTensor)
    assert first.sequences.shape[1] > 200
    assert kvmix_fx.compiled(names["model"]).report.rewritten_layers() == list(range(LAYERS))
    assert Path("my-plan", "kvmix_plan.json").exists()
    assert Path("profile.safetensors").exists()
    assert Path("signals.png").stat().st_size > 1000
    assert callable(names["step"])


def test_every_public_name_can_be_imported_and_is_listed():
    for name in kvmix_fx.__all__:
        assert getattr(kvmix_fx, name) is not None
    assert set(kvmix_fx._HOMES) <= set(kvmix_fx.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        kvmix_fx.no_such_name  # noqa: B018
