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
    ("name", "value"), [("num_key_value_heads", [8, 4, 2]), ("head_dim", 64.0), ("head_dim", 0)]
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


PER_LAYER = {
    "a list of KV heads": ({"num_key_value_heads": [8, 4]}, [(8, 128), (4, 128)]),
    "lists of all sizes": (
        {"num_key_value_heads": (2, 4), "head_dim": [64, 96], "num_attention_heads": [8, 12]},
        [(2, 64), (4, 96)],
    ),
    "query heads alone": (
        {"num_key_value_heads": None, "num_attention_heads": [12, 24], "head_dim": 64},
        [(12, 64), (24, 64)],
    ),
    "heads of windows": ({"swa_num_key_value_heads": 4}, [(8, 128), (4, 128)]),
    "all sizes of windows": ({"swa_num_key_value_heads": 4, "swa_head_dim": 64}, [(8, 128), (4, 64)]),
    "no size of windows": ({"swa_num_key_value_heads": None}, [(8, 128), (8, 128)]),
}


@pytest.mark.parametrize("case", PER_LAYER)
def test_sizes_that_are_told_for_each_layer(case):
    told, sizes = PER_LAYER[case]
    types = ["full_attention", "sliding_attention"]
    two = {"num_hidden_layers": 2, "layer_types": types, "sliding_window": 8}
    geometry = ModelGeometry.of(SimpleNamespace(**LLAMA | two | told))
    windows = zip(sizes, (0, 8), strict=True)
    assert [geometry.layer(i) for i in (0, 1)] == [full(*size, window=window) for size, window in windows]


def test_values_of_windows_have_a_size_of_their_own():
    kind = {"layer_types": ["hybrid_sliding"], "num_hidden_layers": 1, "sliding_window": 8}
    own = {"v_head_dim": 128, "swa_v_head_dim": 64}
    geometry = ModelGeometry.of(SimpleNamespace(**LLAMA | kind | own))
    assert geometry.layer(0) == LayerGeometry(8, 128, 64, window=8)


class Model(SimpleNamespace):
    """A model of attention modules, each with a layer and the query heads of a KV head."""

    def modules(self):
        return [self, *(SimpleNamespace(layer_idx=i, num_key_value_groups=n) for i, n in self.parts)]


@pytest.mark.parametrize(
    ("parts", "heads"),
    [
        ([(0, 3), (1, 6)], [8, 4]),  # as the modules say
        ([(0, 3), (1, 3)], [8, 8]),
        ([(0, 1), (1, 1)], [8, 8]),  # what is the same everywhere is the configuration's matter
        ([(0, 2), (1, 6)], [8, 8]),  # no layer is as the configuration says, so groups mean something else
        ([(0, 3), (1, 7)], [8, 8]),  # as they do where query heads do not divide by them
        ([(0, 3), (1, 6), (1, 3)], [8, 8]),  # which of the two has a cache is not known
        ([(1, 6), (0, 3), (7, 3)], [8, 4]),  # a module beyond the layers is none of them
        ([(None, 3), (0, 3), (1, 1.5)], [8, 8]),
    ],
)
def test_heads_that_only_the_modules_of_a_model_tell(parts, heads):
    config = SimpleNamespace(**LLAMA | {"num_hidden_layers": 2})
    geometry = ModelGeometry.of(Model(config=config, parts=parts))
    assert [geometry.layer(i).num_kv_heads for i in (0, 1)] == heads
    assert geometry.num_kv_heads == 8


def test_modules_do_not_correct_a_configuration_that_tells_layers_apart():
    config = SimpleNamespace(**LLAMA | {"num_hidden_layers": 2, "num_key_value_heads": [8, 2]})
    assert ModelGeometry.of(Model(config=config, parts=[(0, 3), (1, 6)])).layer(1).num_kv_heads == 2


def test_layers_may_have_other_query_heads_and_the_same_kv_heads():
    types = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}
    windows = {"sliding_window": 8, "swa_num_attention_heads": 48}
    config = SimpleNamespace(**LLAMA | types | windows)
    geometry = ModelGeometry.of(Model(config=config, parts=[(0, 3), (1, 6)]))
    assert [geometry.layer(i).num_kv_heads for i in (0, 1)] == [8, 8]


def test_only_the_part_of_a_model_that_generates_is_asked():
    config = SimpleNamespace(**LLAMA | {"num_hidden_layers": 2})
    text = Model(parts=[(0, 3), (1, 6)])
    whole = Model(config=config, parts=[(0, 1), (1, 1), (1, 2)], get_decoder=lambda: text)
    assert ModelGeometry.of(whole).layer(1).num_kv_heads == 4


def test_layers_that_read_the_cache_of_others_have_none():
    transformers = pytest.importorskip("transformers", reason="reads configurations of transformers")
    geometry = ModelGeometry.of(transformers.Gemma3nTextConfig(num_hidden_layers=10, num_kv_shared_layers=5))
    assert [layer.num_kv_heads > 0 for layer in geometry.layers] == [True] * 5 + [False] * 5


def test_as_many_layers_are_described_as_there_are():
    with pytest.raises(PlanFieldError, match="1 layers are described, of 2"):
        ModelGeometry(2, 4, 64, (LayerGeometry(4, 64, 64),))
    assert ModelGeometry(2, 4, 64, (LayerGeometry(4, 64, 64),) * 2).layers == ()
