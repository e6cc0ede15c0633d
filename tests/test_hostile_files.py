"""Files that are made to harm: an error of ours or a usable object, never another exception or a crash."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.errors import (
    CacheStateError,
    CacheVersionError,
    KVMixError,
    PlanFileError,
    ProfileFileError,
    TuningFileError,
)
from kvmix_fx.plan import KVPlan, ModelGeometry, QuantSpec
from kvmix_fx.plan.orders import encode_order
from kvmix_fx.plan.prices import Drop, Menu, Prices, Scores
from kvmix_fx.profiling import Profile
from kvmix_fx.profiling.report import FORMAT, ModelIdentity, _digest
from kvmix_fx.testing.tensors import values
from kvmix_kernels import layout
from kvmix_kernels.triton import configs

GEOMETRY = ModelGeometry(2, 2, 32)
TIERED = QuantSpec(4, "channel", 16, tiers=((4, 8), (2, 16), (0, 8)), order="prompt")

NUMBERS = st.sampled_from(
    (0, 1, -1, 2, 3, 255, 2**31, 2**40, 2**63, -(2**63), 10**30, 0.5, 1e308, float("nan"))
)
TEXTS = st.sampled_from(
    ("", "all", "head", "plan", "prompt", "0-999999999", "-1", "../../etc/passwd", "\0", "x" * 500)
)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
HOSTILE = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(TEXTS, LEAVES, max_size=3)


def places(tree, path=()):
    """Paths to all that is in a tree of dictionaries and lists."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, part in inside:
        yield (*path, key)
        yield from places(part, (*path, key))


@st.composite
def exchanged(draw, tree):
    """A tree with one to three of its parts exchanged, left out, put in twice, or under another name."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(tree))
        if not known:
            break
        *path, key = known[draw(st.integers(0, len(known) - 1))]
        inside = functools.reduce(lambda part, at: part[at], path, tree)
        match draw(st.sampled_from(("exchange", "exchange", "leave out", "twice", "nest", "rename"))):
            case "leave out":
                del inside[key]
            case "twice" if isinstance(inside, list):
                inside.append(copy.deepcopy(inside[key]))
            case "nest":
                inside[key] = [inside[key]]
            case "rename" if isinstance(inside, dict):
                inside[draw(TEXTS)] = inside.pop(key)
            case _:
                inside[key] = draw(HOSTILE)
    return tree


EDITS = st.lists(
    st.tuples(
        st.sampled_from(("flip", "bytes", "bytes", "leave out", "twice", "end")),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)
"""Of bytes: what is done, where (a share of the length), and with which bytes (or as many)."""


def cut(data, edits):
    """Bytes with some of them exchanged, left out or put in twice."""
    damaged = bytearray(data)
    for kind, share, other in edits:
        at = int(share * len(damaged))
        span = slice(at, at + len(other))
        match kind:
            case "flip" if damaged:
                damaged[at] ^= 1 << other[0] % 8
            case "bytes":
                damaged[span] = other
            case "leave out":
                del damaged[span]
            case "twice":
                damaged[at:at] = damaged[span]
            case "end":
                del damaged[at:]
    return bytes(damaged)


@functools.cache
def plan_content():
    tiered = KVPlan.uniform(2, 2, window=8).with_layers(1, key=TIERED, sink_length=4)
    order = encode_order([list(range(31, -1, -1))] * 2)
    key = QuantSpec(4, "channel", 16, tiers=((4, 8), (2, 24)), order="plan", channel_order=order)
    return tiered.with_layers(0, key=key).to_dict()


@given(exchanged(plan_content()), st.booleans())
def test_a_hostile_plan(content, honest):
    if honest and isinstance(content, dict):
        content.pop("digest", None)
    try:
        plan = KVPlan.from_json(json.dumps(content))
    except PlanFileError:
        return
    assert KVPlan.from_json(plan.to_json()) == plan
    assert str(plan)


@given(EDITS)
def test_a_hostile_plan_of_bytes(edits):
    with contextlib.suppress(PlanFileError):
        KVPlan.from_json(cut(json.dumps(plan_content()).encode(), edits))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"layers":' * 50_000,
        '{"num_layers": ' + "9" * 5000 + "}",
        '{"num_layers": 1000000000000, "defaults": {"key": {"bits": 4}, "value": {"bits": 4}}}',
        '{"num_layers": 2, "layers": [{"match": "0-999999999999", "key": {"bits": 4}}]}',
        '{"version": 1e400}',
        "\ud800",
    ],
    ids=["deep list", "deep object", "long number", "many layers", "long range", "infinite", "surrogate"],
)
def test_a_plan_that_asks_for_too_much(text):
    with pytest.raises(PlanFileError):
        KVPlan.from_json(text)


@functools.cache
def profile_parts():
    """The header and arrays of a profile, as `Profile.save` writes them."""
    menu = Menu(
        (QuantSpec(2, "channel", 16), TIERED), (QuantSpec(2, "token", 16), QuantSpec(4, "token", "head"))
    )
    rows = ((1.0, 0.5), (3.0, 0.25))
    return Profile(
        {"fisher": Scores("fisher", (1.0, 2.0), (3.0, 4.0))},
        {"kl": Prices("kl", menu, rows, rows)},
        menu,
        GEOMETRY,
        ModelIdentity("org/model", "0" * 64),
        {"source": "text", "tokens": 10},
        {"seed": 0},
        {"weight_norm": "not here"},
        {1: "a reason"},
        (encode_order([list(range(32))] * 2),) * 2,
        {1: (Drop(0.0001, 0.1), Drop(0.1, 1.0))},
    )


def written(tmp):
    path = profile_parts().save(tmp / "profile.safetensors")
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return path, json.loads(file.metadata()[FORMAT]), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return written(tmp_path_factory.mktemp("profile"))


ARRAYS = (
    lambda a: a[:0],
    lambda a: a[None],
    lambda a: a.reshape(-1)[0],
    lambda a: a[:1],
    lambda a: a.astype(np.int8),
    lambda a: a.astype(bool),
    lambda a: -a,
    lambda a: a * np.nan,
    lambda a: a * np.inf,
    lambda a: a.astype(np.float16),
    lambda a: np.concatenate([a, a]),
)


def loads(path):
    """What can be read is used for a plan, and written again."""
    try:
        found = Profile.load(path)
    except ProfileFileError:
        return
    assert found.describe()
    found.save(path)
    for name in found.signals:
        try:
            found.plan(bits=5.0, signal=name, allocator="greedy")
        except KVMixError:
            continue


@given(st.data())
def test_a_hostile_profile(profile, data):
    """Whoever writes one knows how to write its digest."""
    path, header, arrays = profile
    if data.draw(st.booleans()):
        header = data.draw(exchanged(header))
    else:
        name = data.draw(st.sampled_from(sorted(arrays)))
        arrays = dict(arrays)
        change = data.draw(st.sampled_from((None, *ARRAYS)))
        part = arrays.pop(name)
        if change is not None:
            arrays[name] = np.ascontiguousarray(change(part))
    text = json.dumps(header)
    path.with_name("hostile").write_bytes(save(arrays, {FORMAT: text, "digest": _digest(text, arrays)}))
    loads(path.with_name("hostile"))


@pytest.mark.parametrize(
    "text", ["[]", "7", "", "{", "[" * 100_000, "9" * 5000, '{"version": [1]}', '{"version": 2}']
)
def test_a_profile_of_which_the_header_is_none(profile, text):
    path = profile[0].with_name("hostile")
    path.write_bytes(save({}, {FORMAT: text, "digest": _digest(text, {})}))
    with pytest.raises(ProfileFileError):
        Profile.load(path)


@given(EDITS)
def test_a_hostile_profile_of_bytes(profile, edits):
    path = profile[0]
    path.with_name("hostile").write_bytes(cut(path.read_bytes(), edits))
    loads(path.with_name("hostile"))


TUNED = {
    "attend": [{"match": {"bits": 2}, "use": {"tokens": 64, "warps": 4}}, {"match": {}, "use": {}}],
    "multiprocessors": 132,
}


@given(exchanged(TUNED), EDITS, st.booleans())
def test_hostile_launch_parameters(tmp_path_factory, content, edits, bytes_too):
    path = tmp_path_factory.getbasetemp() / "launch.json"
    text = json.dumps(content).encode()
    path.write_bytes(cut(text, edits) if bytes_too else text)
    with contextlib.suppress(TuningFileError):
        for entry in configs.read(path)["attend"]:
            assert all(0 <= number <= configs.LARGEST for number in configs.AttendConfig(**entry["use"]))


def tensor(fixed=True):
    fmt = layout.make_format(4, "channel", 16, 16, 4, 8, tiers=((4, 8), (2, 24)), order="prompt")
    x = values("normal", (1, 2, 90, 32), 0)
    if not fixed:
        return QuantizedKVTensor.from_hp(x, fmt)
    empty = QuantizedKVTensor.empty_fixed(1, 2, 100, 32, fmt, torch.float32, "cpu")
    return empty.index_copy_(2, torch.arange(90), x)


def one_number(x):
    return x.reshape(-1)[:1].reshape([1] * x.dim()).expand(x.shape)


BUFFERS = {
    "expanded": one_number,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every other": lambda x: torch.stack([x, x], -1)[..., 0],
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "packed": lambda x: tensor(fixed=False),
    "gradient": lambda x: x.double().requires_grad_(),
    "complex": lambda x: x.to(torch.complex64),
    "huge": lambda x: x.reshape(-1)[:1].reshape([1] * x.dim()).expand([2**14] * x.dim()),
}


@pytest.mark.parametrize("change", BUFFERS)
@pytest.mark.parametrize("name", ["residual", "qdata", "scale", "order"])
def test_a_hostile_buffer_of_a_saved_cache(name, change):
    """Kernels compute addresses from a buffer's shape, and write to it."""
    state = tensor().to_state()
    state[name] = BUFFERS[change](state[name])
    with pytest.raises((CacheStateError, CacheVersionError)):
        QuantizedKVTensor.from_state(state)


class Runs:
    """What a pickle that runs code looks like."""

    def __reduce__(self):
        return print, ("code has been run",)


def torch_file(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def test_a_pickle_with_code_in_it_is_refused(capsys):
    data = torch_file({"cache": tensor(), "more": Runs()})
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(data), weights_only=True)
    assert "code has been run" not in capsys.readouterr().out


CACHE = torch_file(tensor())
PARTS = {
    name: zipfile.ZipFile(io.BytesIO(CACHE)).read(name)
    for name in zipfile.ZipFile(io.BytesIO(CACHE)).namelist()
}


def archive(parts):
    """A file of torch whose checksums are right."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, part in parts.items():
            file.writestr(name, part)
    return stream.getvalue()


@given(EDITS, st.sampled_from((None, "archive/data.pkl", *PARTS)))
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_hostile_cache_of_bytes(edits, part):
    """The reader of the file is torch's, which has no error of its own; what it hands to us is checked."""
    assert isinstance(torch.load(io.BytesIO(archive(PARTS)), weights_only=True), QuantizedKVTensor)
    data = cut(CACHE, edits) if part is None else archive(PARTS | {part: cut(PARTS[part], edits)})
    try:
        found = torch.load(io.BytesIO(data), weights_only=True)
    except (MemoryError, SystemError):
        raise
    except Exception:
        return
    if isinstance(found, QuantizedKVTensor):
        assert found.dequantize().shape == found.shape
