"""Reading a model's sizes from its configuration."""

from types import SimpleNamespace

import pytest

from kvmix_fx.errors import PlanGeometryError
from kvmix_fx.plan import ModelGeometry

LLAMA = {"num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "hidden_size": 3072}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768}


@pytest.mark.parametrize(
    ("attributes", "sizes"),
    [
        (LLAMA, (28, 8, 128)),
        (LLAMA | {"head_dim": 256}, (28, 8, 256)),
        (LLAMA | {"head_dim": None}, (28, 8, 128)),
        (LLAMA | {"num_key_value_heads": None}, (28, 24, 128)),
        (GPT2, (12, 12, 64)),
        (GPT2 | {"multi_query": True}, (12, 1, 64)),
        (LLAMA | {"multi_query": True, "new_decoder_architecture": True}, (28, 24, 128)),
        ({"n_layers": 2, "n_heads": 4, "d_model": 64}, (2, 4, 16)),
    ],
)
def test_attribute_names(attributes, sizes):
    config = SimpleNamespace(**attributes)
    for target in (config, SimpleNamespace(config=config), ModelGeometry(*sizes)):
        assert ModelGeometry.of(target) == ModelGeometry(*sizes)


def test_the_text_part_of_a_composite_configuration_is_read():
    parts = {True: SimpleNamespace(**LLAMA)}
    config = SimpleNamespace(num_hidden_layers=99, get_text_config=lambda decoder: parts[decoder])
    assert ModelGeometry.of(config) == ModelGeometry(28, 8, 128)


def test_several_text_parts_are_not_guessed_between():
    def choose(decoder):
        raise ValueError(f"two with decoder={decoder}")

    with pytest.raises(PlanGeometryError, match="several text parts"):
        ModelGeometry.of(SimpleNamespace(get_text_config=choose))


@pytest.mark.parametrize("missing", ["num_hidden_layers", "num_attention_heads", "hidden_size"])
def test_a_missing_size_is_named(missing):
    attributes = {name: value for name, value in LLAMA.items() if name != missing}
    with pytest.raises(
        PlanGeometryError, match=rf"SimpleNamespace has none of {missing}.*pass ModelGeometry\("
    ):
        ModelGeometry.of(SimpleNamespace(**attributes))


@pytest.mark.parametrize(
    ("name", "value"), [("num_key_value_heads", [8, 4]), ("head_dim", 64.0), ("head_dim", 0)]
)
def test_a_size_that_is_no_number_is_shown(name, value):
    with pytest.raises(PlanGeometryError, match=f"{name} should be one positive integer"):
        ModelGeometry.of(SimpleNamespace(**LLAMA | {name: value}))


def test_a_size_that_varies_by_layer_is_named():
    class Config(SimpleNamespace):
        @property
        def head_dim(self):
            raise RuntimeError("it varies")

    with pytest.raises(PlanGeometryError, match="head_dim differs between the layers of this model"):
        ModelGeometry.of(Config(**LLAMA))


def test_latent_attention_is_refused():
    with pytest.raises(PlanGeometryError, match="latent attention"):
        ModelGeometry.of(SimpleNamespace(**LLAMA, kv_lora_rank=512))


@pytest.mark.parametrize(
    ("kind", "options", "sizes"),
    [
        ("LlamaConfig", {"num_hidden_layers": 2, "num_key_value_heads": 4}, (2, 4, 128)),
        ("MistralConfig", {"num_hidden_layers": 2}, (2, 8, 128)),
        ("GPT2Config", {}, (12, 12, 64)),
        ("GPTBigCodeConfig", {"n_layer": 2}, (2, 1, 64)),
        ("OPTConfig", {}, (12, 12, 64)),
        ("FalconConfig", {}, (32, 1, 64)),
        ("Gemma3Config", {}, (26, 4, 256)),
        ("Qwen3MoeConfig", {"num_hidden_layers": 3, "head_dim": 128}, (3, 4, 128)),
    ],
)
def test_transformers_configurations(kind, options, sizes):
    transformers = pytest.importorskip("transformers", reason="reads configurations of transformers")
    assert ModelGeometry.of(getattr(transformers, kind)(**options)) == ModelGeometry(*sizes)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("DeepseekV3Config", "latent attention"), ("Gemma4TextConfig", "head_dim differs between the layers")],
)
def test_transformers_configurations_with_mixed_sizes(kind, message):
    transformers = pytest.importorskip("transformers", reason="reads configurations of transformers")
    if not hasattr(transformers, kind):
        pytest.skip(f"this version of transformers has no {kind}")
    with pytest.raises(PlanGeometryError, match=message):
        ModelGeometry.of(getattr(transformers, kind)())
