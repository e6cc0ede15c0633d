"""Where launch parameters come from, and what `kvmix tune` leaves behind."""

from __future__ import annotations

import itertools
import json
import types
import warnings
from pathlib import Path

import pytest
import torch

from kvmix_fx.errors import TuningFileError
from kvmix_kernels.triton import configs, tune
from kvmix_kernels.triton.configs import ALIKE, Gpu
from kvmix_kernels.triton.timing import Case

STEP = {"head_dim": 128, "group": 128, "columns": 8, "bulk": True, "heads": 512}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with a GPU of some name, and a cache folder of its own."""
    monkeypatch.setenv("KVMIX_CACHE_DIR", str(tmp_path))

    def named(name, capability=(9, 0), multiprocessors=132, hip=None):
        properties = types.SimpleNamespace(
            name=name, major=capability[0], minor=capability[1], multi_processor_count=multiprocessors
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.version, "hip", hip)
        for kept in (configs._gpu_of, configs.entries, configs._attend_config):
            kept.cache_clear()
        return configs._gpu_of(0)

    yield named
    monkeypatch.undo()
    for kept in (configs._gpu_of, configs.entries, configs._attend_config):
        kept.cache_clear()


def parameters(found, text="2,2,128,0", **step):
    setting = tune.Setting.parse(text)
    step = STEP | {"group": setting.k_group} | step
    return configs.attend_config(found, *setting.formats(step["head_dim"]), **step)


def test_a_gpu_with_a_file_takes_it_and_says_nothing(gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu("NVIDIA H200") == Gpu("NVIDIA_H200")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_a_gpu_that_nobody_measured_takes_those_of_one_built_alike(gpu, capability):
    with pytest.warns(UserWarning, match="never measured on NVIDIA New.*H100.*kvmix tune"):
        found = gpu("NVIDIA New", capability, 66)
    measured = Gpu(ALIKE)
    for text in ("2,2,128,0", "4,2,32,32", "tiers"):
        mine, theirs = parameters(found, text), parameters(measured, text)
        # half as many multiprocessors: half as many programs, and all else alike
        assert mine == theirs._replace(programs=theirs.programs // 2)


@pytest.mark.parametrize(("capability", "hip"), [((7, 5), None), ((9, 4), "6.2")])
def test_an_old_gpu_or_one_of_another_maker_takes_the_conservative_ones(gpu, capability, hip):
    with pytest.warns(UserWarning, match="conservative"):
        assert gpu("Another", capability, 80, hip) == Gpu()


def fake_timings(monkeypatch, best):
    """Every candidate is compiled; the one that `best` says is fastest."""
    monkeypatch.setattr(tune, "compile_all", lambda jobs, processes, done: [(done(), "")[1] for _ in jobs])
    monkeypatch.setattr(tune, "time_config", lambda case, setting: lambda config: 10.0 - best(config))


def test_what_was_tuned_is_found_first(gpu, monkeypatch):
    fake_timings(monkeypatch, lambda config: config.stages == 2 and config.tokens == 64)
    steps = itertools.count()
    cases = [Case.parse(name) for name in ("b64 h8x4 n8192 d128", "b1 h8x4 n8192 d128")]
    settings = [tune.Setting.parse(text) for text in ("2,2,128,0", "tiers")]
    lines = []
    entries = tune.tune(cases, settings, 132, 1, lambda: next(steps), lines.append)
    assert next(steps) == 2 * len(tune.jobs(cases, settings, 132))
    assert len(entries) == 4
    before = {text: parameters(Gpu("NVIDIA_H200"), text) for text in ("2,2,128,0", "4,4,128,0", "tiers")}
    file = configs.user_file("NVIDIA_H200")
    tune.merge(entries, file)
    found = gpu("NVIDIA H200")
    for text in ("2,2,128,0", "tiers"):
        assert (parameters(found, text).stages, parameters(found, text).tokens) == (2, 64)
        assert parameters(found, text) != before[text]
    assert parameters(found, "4,4,128,0") == before["4,4,128,0"]
    # what was tuned for one format is not taken for the other
    fake_timings(monkeypatch, lambda config: config.warps == 2)
    tune.merge(tune.tune(cases[:1], settings[1:], 132, 1), file)
    found = gpu("NVIDIA H200")
    assert parameters(found, "tiers").warps == 2
    assert parameters(found, "2,2,128,0").stages == 2
    assert len(json.loads(file.read_text())["attend"]) == 4


def test_nothing_that_ran_leaves_what_was_known(monkeypatch):
    monkeypatch.setattr(tune, "compile_all", lambda jobs, processes, done: ["no memory"] * len(jobs))
    monkeypatch.setattr(tune, "time_config", lambda case, setting: None)
    assert tune.tune([Case.parse("b1 h8x4 n8192 d128")], [tune.Setting.parse("2,2,128,0")], 132, 1) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"attend": [{"use": {}}]}',
        '{"attend": [{"match": {"colour": 1}, "use": {}}]}',
        '{"attend": [{"match": {}, "use": {"tokens": "64"}}]}',
        '{"attend": [{"match": {}, "use": {"colour": 1}}]}',
    ],
)
def test_a_damaged_file_is_named(gpu, text):
    file = configs.user_file("NVIDIA_H200")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    found = gpu("NVIDIA H200")
    with pytest.raises(TuningFileError, match=f"{file} holds no launch parameters.*delete it"):
        parameters(found)
    # and a new measurement replaces it
    tune.merge([{"match": {}, "use": {"tokens": 64}}], file)
    assert parameters(gpu("NVIDIA H200")).tokens == 64


def test_files_of_the_package_can_be_read():
    for file in (Path(configs.__file__).parent / "configs").glob("*.json"):
        configs.read(file)
