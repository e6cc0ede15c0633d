"""Tiny models of any class of transformers: its default configuration, made small by the names of its fields.

No model has an entry of its own here. What cannot be made small by these rules is left out of the table with
the error that says so.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

VOCABULARY = 128
HEADS = 4
ATTEMPTS: tuple[tuple[int | None, bool], ...] = ((32, False), (32, True), (128, False), (None, False))
"""Tried in this order: the size of a head, None for that of the default; whether fields are filled in that
the default leaves open."""
_MOST_LAYERS = 8
_MOST_PARAMETERS = 100_000_000

_HEAD, _WIDTH, _KEEP = "head", "width", "keep"
# the first pattern that is found in a field's name gives its number, or says what it is
_RULES: tuple[tuple[str, int | str], ...] = (
    (r"vocab|^codebook_size$", VOCABULARY),
    (r"(key_value|kv)_heads$|num_kv_heads|^n_head_kv$|num_key_value_heads|query_groups", HEADS // 2),
    (r"mamba_(n|num)_heads|n_mamba_heads", HEADS),
    (r"mamba_(d_head|head_dim|headdim)", 64),
    (r"mamba_d_ssm", 256),
    (r"index|linear_num|linear_.*dim|ssm|mamba|lightning|patch", _KEEP),
    (r"rope_head_dim|nope_head_dim|rotary_dim", 16),
    (r"head_dim$|^d_kv$|^d_head$|kv_channels|attention_head_size|dim_head|head_size$", _HEAD),
    (r"heads?$|^n_heads?$|_heads_", HEADS),
    (r"lora_rank|_rank$|lora_dim|low_rank", 32),
    (r"per_layer_input$", 16),
    (r"per_tok(en)?$|top_?k(_experts)?$|num_selected_experts|moe_k$|experts_top", 2),
    (r"n_group$|expert_group|topk_group|n_groups$|shared_experts|num_shared_expert$", 1),
    (r"(^|_)experts?$|num_experts|n_experts", 4),
    (r"first_k_dense|dense_replace", 1),
    (r"(hidden|encoder|decoder|cross|self|vision|text|prediction|num|dense|entity)_layers?$|^depth$|^n_layers?$"
     r"|num_layers$|_depth$|num_blocks$", 2),
    (r"intermediate|ffn|d_ff|inner|mlp_dim|feed_forward|ff_dim|moe_hidden|hidden_mlp|expert_size|mlp_hidden"
     r"|hidden_(size|dim)|d_model|n_embd|embed_dim|embedding_(size|dim)|^dim$|^dims$|width|model_dim"
     r"|projection_dim|emb_dim|_dim$|_hidden_size|d_embed|proj_size|^d_(?!conv|state)", _WIDTH),
    (r"sliding_window$", _KEEP),
    (r"image_size$|img_size|input_size$", 32),
    (r"max_.*position|n_positions|n_ctx|max_.*(len|length)$|_max_pos|max_seq", 512),
)  # fmt: skip
_WINDOW = re.compile(r"sliding_window(_size)?$|attention_chunk_size$")
_IDS = re.compile(r"_(id|ids|index)$")
_LAYERS = re.compile(r"hidden_layers$|^n_layers?$|^num_layers$|^decoder_layers$|^num_decoder_layers$")
_KINDS = re.compile(r"layer_types|layers_block_type|_types$")
_PERIOD = re.compile(r"interval|every|freq|period|pattern")
# of what others say, or of whatever made the file
_DERIVED = (
    "attention_hidden_size",
    "attention_head_dim",
    "qk_head_dim",
    "mamba_dt_rank",
    "model_type",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
)


def causal_and_other_models() -> list[tuple[str, str, str]]:
    """(task, model type, class name) of every mapping that is tried, as transformers lists them."""
    from transformers.models.auto import modeling_auto

    found = []
    for task, name in (
        ("causal", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
        ("sequence to sequence", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
        ("image and text", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    ):
        found += [(task, kind, model) for kind, model in getattr(modeling_auto, name).items()]
    return found


def build(model_type: str, class_name: str, attention: str, window: int | None = None) -> nn.Module:
    """A tiny model with random weights that make attention matter.

    `window`: tokens that its sliding and chunked windows have at most, if it has any.

    Raises:
        Exception: whatever the first attempt to build one raised.
    """
    import transformers

    model_class = getattr(transformers, class_name)
    default = _default(model_type, model_class)
    problem: Exception | None = None
    for head_size, fill in ATTEMPTS:
        try:
            config = _smaller(default, head_size, fill)
            if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
                config.is_decoder = True
            _set_attention(config, attention)
            if window is not None:
                shorten_windows(config, window)
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(config).parameters())
            if size > _MOST_PARAMETERS:
                raise ValueError(f"the model made small still has {size / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            model = sharpen(model_class(config).float().eval())
            _try_out(model)
            return model
        except Exception as error:
            problem = problem or error
    assert problem is not None
    raise problem


def shorten_windows(config: Any, tokens: int) -> bool:
    """Make windows of a configuration and its parts that short; whether there are any."""
    from transformers import PretrainedConfig

    found = False
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            found |= shorten_windows(value, tokens)
        elif _WINDOW.search(name) and type(value) is int and value > 0:
            setattr(config, name, min(value, tokens))
            found = True
    return found


def _try_out(model: Any) -> None:
    """Whether sizes fit together shows when tokens go through."""
    ids = torch.full((1, 8), 7)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(input_ids=ids, **more)


def _default(model_type: str, model_class: Any) -> Any:
    """The default configuration of a model type, or the part of it that the class takes."""
    from transformers import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]()
    wanted = model_class.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [part for part in vars(config).values() if isinstance(part, PretrainedConfig)]
    return next((part for part in parts if isinstance(part, wanted)), config)


def _smaller(default: Any, head_size: int | None, fill: bool) -> Any:
    """A configuration of the same class."""
    from transformers import PretrainedConfig

    written = {name: value for name, value in default.to_dict().items() if name not in _DERIVED}
    had, layers = _layer_counts(written)
    ids = iter(range(VOCABULARY - 2, VOCABULARY // 2, -1))
    given: dict[str, Any] = {}
    for name, value in written.items():
        own = vars(default).get(name)
        if isinstance(own, PretrainedConfig):
            given[name] = _smaller(own, head_size, fill).to_dict()
        elif isinstance(value, list) and _KINDS.search(name) and {*map(str, value)} == {"linear_attention"}:
            given[name] = [*value[: layers - 1], "full_attention"]
        elif isinstance(value, list) and len(value) == had:
            given[name] = [_small(name, one, layers, head_size, written) for one in value[:layers]]
        elif name == "per_layer_config" and isinstance(value, dict):
            given[name] = {
                i: {key: _small(key, one, layers, head_size, written) for key, one in own.items()}
                for i, own in value.items()
                if int(i) < layers
            }
        elif re.search(r"attn_layer_indices|full_attn_idxs", name):
            given[name] = [layers - 1]
        elif "shared_layers" in name and value:
            given[name] = layers // 2
        elif name == "head_dim" and "qk_rope_head_dim" in written:
            continue  # the rotary part of it
        elif value is None and fill:
            filled = 4096 if name == "sliding_window" else _small(name, 1 << 20, layers, head_size, written)
            given |= {} if filled == 1 << 20 else {name: filled}
        elif _IDS.search(name) and isinstance(value, int) and value >= VOCABULARY // 2:
            given[name] = next(ids)
        elif value is not None and not name.startswith("_"):
            given[name] = _small(name, value, layers, head_size, written)
    special = {
        "eos_token_id": VOCABULARY - 1,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "decoder_start_token_id": 2,
    }
    given |= {name: value for name, value in special.items() if name in written}
    if written.get("head_dim", 0) is None and head_size and "qk_rope_head_dim" not in written:
        given["head_dim"] = head_size
    return type(default)(**given)


def _layer_counts(written: dict[str, Any]) -> tuple[int, int]:
    """Layers of the default; and as few as have every kind of layer among them, two at least."""
    had = next((x for name, x in written.items() if _LAYERS.search(name) and isinstance(x, int)), 0)
    count = 2
    for name, value in written.items():
        if isinstance(value, list) and _KINDS.search(name) and len(value) == had:
            kinds = [str(one) for one in value]
            count = max(count, *(kinds.index(kind) + 1 for kind in kinds))
        elif isinstance(value, list) and _KINDS.search(name):
            count = max(count, len(value))
        elif _PERIOD.search(name) and type(value) is int:
            count = max(count, value if value <= _MOST_LAYERS else 0)
    count = min(count, _MOST_LAYERS)
    # every kind of layer that is shared has to be there once more
    return had, 2 * count if any("shared_layers" in name and x for name, x in written.items()) else count


def _small(name: str, value: Any, layers: int, head_size: int | None, written: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return _small_rope(name, value, head_size)
    if isinstance(value, list) and name.endswith("_layers"):
        return [x for x in value if not isinstance(x, int) or x < layers]
    if type(value) is not int:
        return value
    if _LAYERS.search(name):
        return layers
    if _IDS.search(name):
        return value
    for pattern, number in _RULES:
        if not re.search(pattern, name):
            continue
        if number == _KEEP or value <= 1 or (number == _HEAD and head_size is None):
            return value
        if number == HEADS // 2:
            heads = next(
                (written[n] for n in ("num_attention_heads", "n_head", "num_heads") if n in written), value
            )
            return HEADS if value == heads else min(value, HEADS // 2)
        if number == _HEAD:
            return head_size
        if number == _WIDTH:
            return HEADS * (head_size or 64)
        assert isinstance(number, int)
        return number if "mamba" in name else min(number, value)
    return value


def _small_rope(name: str, value: dict[str, Any], head_size: int | None) -> Any:
    """Sections of a rotary embedding add up to half of a head."""
    if "rope" not in name or head_size is None:
        return value
    smaller = {}
    for key, part in value.items():
        if isinstance(part, dict):
            smaller[key] = _small_rope(name, part, head_size)
        elif isinstance(part, list) and "section" in key:
            sections = [max(1, x * head_size // 2 // sum(part)) for x in part]
            sections[-1] += head_size // 2 - sum(sections)
            smaller[key] = sections
        else:
            smaller[key] = part
    return smaller


def _set_attention(config: Any, attention: str) -> None:
    from transformers import PretrainedConfig

    config._attn_implementation = attention
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig):
            _set_attention(part, attention)


def sharpen(model: nn.Module) -> nn.Module:
    """Weights of which damage to a cache shows: they vary more than initial weights do."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name and min(parameter.shape) > 1:
            scale = parameter.shape[1] ** -0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale * 1.5)
    return model
