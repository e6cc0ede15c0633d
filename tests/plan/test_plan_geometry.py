"""Reading a model's sizes from its configuration."""

from types import SimpleNamespace

import pytest

from kvmix_fx.errors import PlanFieldError, PlanGeometryError
from kvmix_fx.plan import LayerGeometry, ModelGeometry

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


def test_a_size_that_answers_with_an_error_is_named():
    class Config(SimpleNamespace):
        @property
        def head_dim(self):
            raise RuntimeError("it varies")

    with pytest.raises(PlanGeometryError, match="head_dim differs between the layers of this model"):
        ModelGeometry.of(Config(**LLAMA))


def test_latent_attention_caches_one_latent_and_the_rotated_part():
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert ModelGeometry.of(SimpleNamespace(**LLAMA, **latent)).layer(27) == LayerGeometry(1, 512, 64)


@pytest.mark.parametrize(
    ("kind", "options", "sizes"),
    [
        ("LlamaConfig", {"num_hidden_layers": 2, "num_key_value_heads": 4}, (2, 4, 128)),
        ("MistralConfig", {"num_hidden_layers": 2, "sliding_window": None}, (2, 8, 128)),
        ("GPT2Config", {}, (12, 12, 64)),
        ("GPTBigCodeConfig", {"n_layer": 2}, (2, 1, 64)),
        ("OPTConfig", {}, (12, 12, 64)),
        ("FalconConfig", {}, (32, 1, 64)),
        ("Qwen3MoeConfig", {"num_hidden_layers": 3, "head_dim": 128}, (3, 4, 128)),
    ],
)
def test_transformers_configurations(kind, options, sizes):
    transformers = pytest.importorskip("transformers", reason="reads configurations of transformers")
    assert ModelGeometry.of(getattr(transformers, kind)(**options)) == ModelGeometry(*sizes)


def full(heads, size, **more):
    return LayerGeometry(heads, size, size, **more)


MIXED = {
    # every sixth layer attends to all tokens
    "Gemma3TextConfig": [full(4, 256, window=4096)] * 5 + [full(4, 256)],
    # whose heads are larger and fewer, while the last layers read others' caches
    "Gemma4TextConfig": [full(4, 256, window=512)] * 5 + [full(4, 512)],
    "GptOssConfig": [full(8, 64, window=128), full(8, 64)],
    "Llama4TextConfig": [full(8, 128, window=8192)] * 3 + [full(8, 128)],
    "Qwen3NextConfig": [full(0, 256)] * 3 + [full(2, 256)],
    "JambaConfig": [full(0, 128)] * 4 + [full(8, 128)],
    "Lfm2Config": [full(8, 80)],
    "BartConfig": [full(16, 64, cross_heads=16)],
    "T5Config": [full(8, 64, cross_heads=8)],
    "WhisperConfig": [full(6, 64, cross_heads=6)],
    "DeepseekV3Config": [LayerGeometry(1, 512, 64)],
}


@pytest.mark.parametrize("kind", MIXED)
def test_each_layer_has_its_own_sizes(kind):
    transformers = pytest.importorskip("transformers", reason="reads configurations of transformers")
    geometry = ModelGeometry.of(getattr(transformers, kind)())
    layers = [geometry.layer(i) for i in range(geometry.num_layers)]
    assert layers[: len(MIXED[kind])] == MIXED[kind]
    assert ModelGeometry.from_dict(geometry.to_dict()) == geometry


def test_layers_that_read_the_cache_of_others_have_none():
    transformers = pytest.importorskip("transformers", reason="reads configurations of transformers")
    geometry = ModelGeometry.of(transformers.Gemma3nTextConfig(num_hidden_layers=10, num_kv_shared_layers=5))
    assert [layer.num_kv_heads > 0 for layer in geometry.layers] == [True] * 5 + [False] * 5


def test_as_many_layers_are_described_as_there_are():
    with pytest.raises(PlanFieldError, match="1 layers are described, of 2"):
        ModelGeometry(2, 4, 64, (LayerGeometry(4, 64, 64),))
    assert ModelGeometry(2, 4, 64, (LayerGeometry(4, 64, 64),) * 2).layers == ()
