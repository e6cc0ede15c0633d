"""Plan files: round trips, hand-written forms, and every way a file can be wrong."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmix_fx import hub
from kvmix_fx.errors import MissingPackageError, PlanFileError, PlanVersionError
from kvmix_fx.plan import KVPlan, LayerPlan, ModelGeometry, QuantSpec, WindowRule, io
from kvmix_fx.testing.strategies import plans

PLAN = KVPlan.preset("kv-adaquant", ModelGeometry(3, 2, 64), key_axis="channel").with_layers(
    1, key=8, sink_length=4, tile=64
)


def explicit():
    return PLAN.to_dict()


def edited(path, value):
    """The explicit content with one entry replaced, without its digest."""
    content = explicit()
    del content["digest"]
    place = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return content


def shuffled(value, rng):
    if isinstance(value, list):
        return [shuffled(item, rng) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: shuffled(value[key], rng) for key in rng.sample(list(value), len(value))}


@given(plans())
def test_json_round_trip(plan):
    twin = KVPlan.from_json(plan.to_json())
    assert twin == plan
    assert twin.digest == plan.digest
    assert KVPlan.from_dict(plan.to_dict()) == plan


@given(plans(), st.randoms())
def test_key_order_means_nothing(plan, rng):
    content = shuffled(plan.to_dict(), rng)
    twin = KVPlan.from_json(json.dumps(content))
    assert twin == plan
    assert twin.digest == plan.digest


def test_the_written_file():
    content = json.loads(PLAN.to_json())
    assert content == PLAN.to_dict()
    assert content["format"] == "kvmix_plan"
    assert content["version"] == 1
    assert content["library_name"] == "kvmix_fx"
    assert content["digest"] == PLAN.digest
    assert content["geometry"] == {"num_layers": 3, "num_kv_heads": 2, "head_dim": 64}
    assert content["layers"][1] == {
        "key": {"bits": 8, "axis": "channel", "group_size": 32, "scale_dtype": "float16"},
        "value": {"bits": 2, "axis": "token", "group_size": "head", "scale_dtype": "float16"},
        "window": {"kind": "fixed", "length": 64},
        "sink_length": 4,
        "tile": 64,
    }
    assert sum(line.startswith('    {"key"') for line in PLAN.to_json().splitlines()) == 3


def test_a_file_of_version_one_keeps_its_meaning():
    """Frozen text: if this fails, files that users have stop loading."""
    text = """{
      "format": "kvmix_plan", "version": 1, "library_name": "kvmix_fx", "name": "n", "base_model": "org/m",
      "digest": "1cbf26eb32e8df92010bfe4dccbe8caa9472c9b8fae6db1f0333d3a461165f46",
      "geometry": {"num_layers": 1, "num_kv_heads": 2, "head_dim": 64},
      "provenance": {"signal": "gradients"},
      "layers": [{"key": {"bits": 3, "axis": "channel", "group_size": 32, "scale_dtype": "bfloat16"},
                  "value": {"bits": 2, "axis": "token", "group_size": "head", "scale_dtype": "float16"},
                  "window": {"kind": "fixed", "length": 64}, "sink_length": 4, "tile": null}]
    }"""
    plan = KVPlan.from_json(text)
    layer = LayerPlan(
        QuantSpec(3, "channel", 32, "bfloat16"), QuantSpec(2, "token", "head"), WindowRule(length=64), 4
    )
    assert plan == KVPlan((layer,), ModelGeometry(1, 2, 64), {"signal": "gradients"}, "n", "org/m")


def test_fields_left_out_by_hand():
    plan = KVPlan.from_dict({"layers": [{"key": {"bits": 4}, "value": {"bits": 2, "tiers": None}}]})
    assert plan == KVPlan((LayerPlan(QuantSpec(4, "channel"), QuantSpec(2, "token")),))


def test_compact_form():
    plan = KVPlan.from_json("""
        {"num_layers": 8,
         "defaults": {"key": {"bits": 2}, "value": {"bits": 2, "group_size": "head"},
                      "window": {"length": 64}},
         "layers": [{"match": "0-2,-1", "key": {"bits": 4}, "sink_length": 4},
                    {"match": [1, 2], "key": {"group_size": 64}},
                    {"match": 2, "key": {"bits": 8}}]}
    """)
    base = KVPlan.uniform(8, 2, window=64, sink_length=0).with_layers(
        "all", value=QuantSpec(2, "token", "head")
    )
    changed = base.with_layers("0-2,-1", key=4, sink_length=4)
    changed = changed.with_layers(1, key=QuantSpec(4, group_size=64)).with_layers(
        2, key=QuantSpec(8, group_size=64)
    )
    assert plan.layers == changed.layers
    assert KVPlan.from_json(plan.to_json()) == plan


def test_compact_form_without_defaults():
    content = {"num_layers": 2, "layers": [{"match": "all", "key": {"bits": 4}, "value": {"bits": 2}}]}
    assert KVPlan.from_dict(content).layers == KVPlan.uniform(2, 4, 2, sink_length=0).layers
    content["layers"][0]["match"] = 0
    with pytest.raises(PlanFileError, match=r"plan: layer 1: lacks key\.bits"):
        KVPlan.from_dict(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "plan: must be an object, got []"),
        ({}, 'plan: lacks "layers", or else "defaults" with "num_layers"'),
        ({"layers": []}, "plan: a plan needs at least one layer"),
        ({"layers": {}}, "plan: layers: must be a list, got {}"),
        ({"layers": [4]}, "plan: layers[0]: must be an object, got 4"),
        ({"layers": [{}]}, "plan: layers[0]: lacks key.bits"),
        ({"layers": [{"key": {"bits": 4}}]}, "plan: layers[0]: lacks value.bits"),
        ({"format": "gguf"}, "plan: format: must be 'kvmix_plan', got 'gguf'"),
        ({"version": "1"}, "plan: version: must be an integer, got '1'"),
        ({"version": 0}, "plan: version: versions start at 1, got 0"),
        (edited(["library_name"], 3), "plan: library_name: must be a text, got 3"),
        (edited(["name"], None), "plan: name: must be a text, got None"),
        (edited(["base_model"], 3), "plan: base_model: must be a text, got 3"),
        (edited(["provenance"], "x"), "plan: provenance: must be an object, got 'x'"),
        (edited(["layer"], []), "plan: unknown key 'layer'; did you mean 'layers'?"),
        (edited(["zz"], []), "plan: unknown key 'zz'; known are format, version,"),
        (edited(["geometry"], [3, 2, 64]), "plan: geometry: must be an object"),
        (edited(["geometry"], {"num_layers": 3}), "plan: geometry: lacks num_kv_heads, head_dim"),
        (edited(["geometry", "head_dim"], 0), "plan: geometry.head_dim: head_dim must be at least 1, got 0"),
        (edited(["geometry", "head_dim"], 72), "plan: layer 0, key: head size 72 is not a multiple of 16"),
        (edited(["geometry", "num_layers"], 4), "plan: the plan has 3 layers, the model has 4"),
        (edited(["num_layers"], 4), "plan: num_layers: is 4, but 3 layers are listed"),
        (
            edited(["layers", 2, "key", "bits"], 5),
            "plan: layers[2].key.bits: bits must be one of 1, 2, 3, 4, 6, 8, 16",
        ),
        (edited(["layers", 2, "key", "bits"], "4"), "plan: layers[2].key.bits: bits must be one of"),
        (edited(["layers", 2, "value"], 4), "plan: layers[2].value: must be an object, got 4"),
        (edited(["layers", 1, "value", "axis"], 1), "plan: layers[1].value.axis: axis must be one of"),
        (
            edited(["layers", 0, "value", "axis"], "channel"),
            'plan: layers[0].value.group_size: group_size "head"',
        ),
        (
            edited(["layers", 0, "value", "group_size"], 24),
            "plan: layers[0].value: group_size 24 must be a multiple",
        ),
        (
            edited(["layers", 0, "value", "tiers"], {}),
            "plan: layers[0].value.tiers: tiers must be pairs of bits and channels",
        ),
        (
            edited(["layers", 0, "key", "bit"], 4),
            "plan: layers[0].key: unknown key 'bit'; did you mean 'bits'?",
        ),
        (
            edited(["layers", 0, "window", "kind"], "ratio"),
            "plan: layers[0].window.kind: kind must be one of 'fixed'",
        ),
        (
            edited(["layers", 0, "window", "length"], 1.5),
            "plan: layers[0].window.length: length must be an integer",
        ),
        (
            edited(["layers", 0, "sink_length"], -4),
            "plan: layers[0].sink_length: sink_length must be at least 0",
        ),
        (
            edited(["layers", 0, "tile"], 40),
            "plan: layers[0]: key: group_size 32 does not divide the tile of 40",
        ),
        (edited(["digest"], 3), "plan: digest: must be a text, got 3"),
        (edited(["digest"], "0" * 64), 'after an edit by hand, remove the "digest" entry'),
        ({"defaults": {}}, 'plan: lacks "num_layers", which "defaults" and "match" need'),
        ({"defaults": {}, "num_layers": True}, "plan: num_layers: must be an integer, got True"),
        ({"defaults": {}, "num_layers": 10**9}, "plan: num_layers: must be from 1 to 10000"),
        ({"defaults": {}, "num_layers": 2}, "plan: layer 0: lacks key.bits"),
        ({"defaults": {"match": 0}, "num_layers": 2}, "plan: defaults: unknown key 'match'"),
        (
            {"defaults": {}, "num_layers": 2, "layers": [{}]},
            'plan: layers[0]: lacks "match", the layers it changes',
        ),
        (
            {"defaults": {}, "num_layers": 2, "layers": [{"match": {}}]},
            "plan: layers[0].match: must be an integer, a",
        ),
        (
            {"defaults": {}, "num_layers": 2, "layers": [{"match": "x"}]},
            "plan: layers[0].match: cannot read 'x'",
        ),
        (
            {"defaults": {}, "num_layers": 2, "layers": [{"match": 2}]},
            "plan: layers[0].match: there is no layer 2",
        ),
        (
            {
                "num_layers": 1,
                "layers": [
                    {"match": 0, "key": {"bits": 2, "group_size": 40}, "value": {"bits": 3}, "tile": 64}
                ],
            },
            "plan: layer 0: key: group_size 40 does not divide the tile of 64 tokens",
        ),
    ],
)
def test_wrong_content_is_named_with_its_place(content, message):
    with pytest.raises(PlanFileError) as caught:
        KVPlan.from_dict(content)
    assert message in str(caught.value)
    assert not isinstance(caught.value, PlanVersionError)


def test_a_newer_file_asks_for_an_upgrade():
    content = explicit() | {"version": 4, "something new": [1]}
    with pytest.raises(
        PlanVersionError, match="format version 4 and this package reads up to 3: pip install --upgrade"
    ):
        KVPlan.from_dict(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "plan: is empty"),
        (" \n", "plan: is empty"),
        ("K4V2", "plan: is not valid JSON"),
        ('{"name": "a", "name": "b"}', "the key 'name' occurs twice in one object"),
        ('{"provenance": {"loss": NaN}}', "NaN is no JSON number"),
        (
            '{"provenance": {"loss": 1e999}, "layers": [{"key": {"bits": 2}, "value": {"bits": 2}}]}',
            "provenance must hold plain JSON values",
        ),
        ("[" * 100_000, "plan: is nested too deeply"),
        ('{"version": ' + "9" * 5000 + "}", "plan: is not valid JSON"),
    ],
    ids=["empty", "blank", "words", "twice", "nan", "infinity", "deep", "long"],
)
def test_wrong_text_is_refused(text, message):
    with pytest.raises(PlanFileError) as caught:
        KVPlan.from_json(text)
    assert message in str(caught.value)


def test_every_truncation_is_seen():
    data = PLAN.to_json().encode()
    for end in range(0, len(data.rstrip()), 3):
        with pytest.raises(PlanFileError, match=r"^plan: "):
            io.from_json(data[:end])


def test_every_flipped_byte_is_seen_unless_it_leaves_the_layers_alone():
    data = PLAN.to_json().encode()
    start = data.index(b'"layers"')
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        try:
            plan = io.from_json(bytes(damaged))
        except PlanFileError:
            continue
        assert plan.digest == PLAN.digest
        assert position < start or chr(damaged[position]).isspace()


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(PLAN.to_json().encode()[:500])
    with pytest.raises(PlanFileError, match=r"mine\.json: is not valid JSON .*the file may be truncated"):
        KVPlan.load(path)


@given(st.binary(max_size=60))
def test_arbitrary_bytes_raise_nothing_else(data):
    with pytest.raises(PlanFileError):
        io.from_json(data)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 40)
    | st.floats()
    | st.sampled_from(["all", "head", "token", "0-1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["layers", "defaults", "num_layers", "key", "value", "bits", "window", "match", "tile"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_arbitrary_content_raises_nothing_else(content):
    try:
        plan = KVPlan.from_dict(content)
    except PlanFileError:
        return
    assert KVPlan.from_dict(plan.to_dict()) == plan


def test_save_and_load(tmp_path):
    path = PLAN.save(tmp_path / "mine.json")
    assert path == tmp_path / "mine.json"
    assert path.read_bytes() == PLAN.to_json().encode()
    assert KVPlan.load(path) == KVPlan.load(str(path)) == KVPlan.from_pretrained(path) == PLAN


def test_save_pretrained_makes_the_folder(tmp_path):
    folder = tmp_path / "a" / "b"
    assert PLAN.save_pretrained(folder) == folder / "kvmix_plan.json"
    assert KVPlan.from_pretrained(folder) == KVPlan.from_pretrained(str(folder)) == PLAN


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(PlanFileError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        KVPlan.load(tmp_path / "none.json")
    with pytest.raises(PlanFileError, match=r"holds no kvmix_plan\.json; write one with"):
        KVPlan.from_pretrained(tmp_path)
    (tmp_path / "kvmix_plan.json").write_text(json.dumps(edited(["layers", 0, "tile"], "x")))
    with pytest.raises(PlanFileError, match=r"kvmix_plan\.json: layers\[0\]\.tile: tile must be an integer"):
        KVPlan.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["./gone", "/gone", "a/b/c", "../gone", "~/gone", "gone/", "a\\b"])
def test_what_looks_like_a_path_is_not_sought_on_the_hub(text, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PlanFileError, match="there is no such folder or plan file"):
        KVPlan.from_pretrained(text)


def test_a_path_object_is_not_sought_on_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PlanFileError, match="there is no such folder or plan file"):
        KVPlan.from_pretrained(Path("organisation/name"))


def test_hub_plans_are_downloaded(tmp_path, monkeypatch):
    asked = []

    def download(repo, file_name, revision):
        asked.append((repo, file_name, revision))
        return str(PLAN.save(tmp_path / "cached.json"))

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download))
    monkeypatch.setattr(hub, "refusal", lambda *_: None)
    assert KVPlan.from_pretrained("organisation/name", revision="v1") == PLAN
    assert asked == [("organisation/name", "kvmix_plan.json", "v1")]


@pytest.mark.parametrize("error", [OSError("404"), ValueError("bad name")])
def test_hub_failures_are_file_errors(error, monkeypatch):
    def download(*_, **__):
        raise error

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download))
    monkeypatch.setattr(hub, "refusal", lambda *_: None)
    with pytest.raises(
        PlanFileError, match=r"name: no local folder has this name and the Hub gave no kvmix_plan"
    ):
        KVPlan.from_pretrained("name")


def test_a_hub_that_cannot_be_reached_is_told_without_a_download(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(PlanFileError, match=r"no such folder or plan file, and .* the Hub cannot be reached"):
        KVPlan.from_pretrained("nobody-at-all/no-such-plan")


def test_a_missing_hub_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r'needs huggingface_hub.*pip install "kvmix-fx\[hf\]"'):
        KVPlan.from_pretrained("organisation/name")
