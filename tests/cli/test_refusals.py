"""What cannot be done is said before a model is loaded, with what would do."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from running import Kvmix

from kvmix_fx.plan import KVPlan, ModelGeometry
from kvmix_fx.testing.models import tiny_llama

COMMANDS = {
    "generate": ("--prompt", "the cat"),
    "explain": (),
    "eval": (),
    "demo": (),
}


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model of two layers without its weights, which cannot be loaded."""
    folder = tmp_path_factory.mktemp("config")
    tiny_llama().config.save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans and texts in the working folder."""
    monkeypatch.chdir(tmp_path)
    KVPlan.uniform(2, 2).save("fits.json")
    KVPlan.uniform(32, 2).save("long.json")
    KVPlan.preset("tiers", ModelGeometry(2, 2, 64)).save("wide.json")
    Path("broken.json").write_text("{")
    Path("empty.txt").write_text(" \n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plan", "fits.json", "--preset", "kivi"), "leave out --preset"),
        (("--plan", "fits.json", "--key-bits", 4), "leave out --preset"),
        (("--plan", "long.json"), "long.json has a plan of 32 layers, {model} has 2: make one for it with "
        "`kvmix plan new OUT.json --model {model}`"),
        (("--plan", "wide.json"), "wide.json: layer 0, key"),
        (("--plan", "none.json"), "cannot be read"),
        (("--plan", "broken.json"), "not valid JSON"),
        (("--key-bits", 5), "bits must be one of"),
        (("--value-bits", 2), "needs --key-bits"),
        (("--set", "9:k4"), "no layer 9"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("files")
def test_a_plan_that_cannot_be_used_is_refused_before_loading(
    kvmix: Kvmix, config: Path, command: str, arguments: tuple[str | int, ...], message: str
) -> None:
    model = ("--model", config) if command == "demo" else (config,)
    outcome = kvmix(command, *model, *COMMANDS[command], *arguments)
    assert outcome.code == 1
    assert message.format(model=config) in outcome.stderr
    assert "loading" not in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "--data", "none.txt"), "--data: none.txt cannot be read"),
        (("eval", "--data", "binary.txt"), "--data: binary.txt is no text in UTF-8"),
        (("eval", "--data", "empty.txt"), "--data: empty.txt is empty"),
        (("profile", "--out", "p", "--data", "none.txt"), "--data: none.txt"),
        (("profile", "--out", "p", "--length", 5), "--length 5"),
        (("profile", "--out", "p", "--signal", "fishes"), "fishes"),
        (("plan", "auto", "--bits", 3, "--data", "none.txt"), "--data: none.txt"),
        (("plan", "auto", "--bits", 3, "--eval-data", "none.txt"), "--eval-data: none.txt"),
        (("plan", "auto", "--bits", 3, "--profile", "fits.json"), "looks like a plan"),
        (("generate", "--prompt", ""), "no tokens"),
    ],
)
@pytest.mark.usefixtures("files")
def test_a_text_that_cannot_be_used_is_refused_before_loading(
    kvmix: Kvmix, config: Path, arguments: tuple[str | int, ...], message: str
) -> None:
    outcome = kvmix(*arguments, config)
    assert outcome.code == 1
    assert message in outcome.stderr
    assert "loading" not in outcome.stderr


def test_what_can_be_used_comes_as_far_as_loading(kvmix: Kvmix, config: Path) -> None:
    outcome = kvmix("explain", config)
    assert outcome.code == 1
    assert "loading" in outcome.stderr


def test_a_plan_of_another_model_is_named_wherever_one_is_sized(
    kvmix: Kvmix, config: Path, tmp_path: Path
) -> None:
    file = KVPlan.uniform(32, 2).save(tmp_path / "long.json")
    for command in (("estimate", file), ("compare", file, file)):
        outcome = kvmix("plan", *command, "--model", config)
        assert outcome.code == 1
        assert f"{file} has a plan of 32 layers, {config} has 2" in outcome.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/model", "no such folder"),
        ("./model", "no such folder"),
        ("../model", "no such folder"),
        ("~/no-such-model", "no such folder"),
        ("some/sub/model", "no such folder"),
        ("bare", "holds no config.json"),
        ("file", "it is a file"),
        ("what is this", "no Hub id looks so"),
    ],
)
def test_a_model_that_is_no_folder_says_so(
    kvmix: Kvmix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bare").mkdir()
    Path("file").write_text("")
    for command in (("explain", name), ("plan", "new", "x.json", "--model", name)):
        outcome = kvmix(*command)
        assert outcome.code == 1
        assert message in outcome.stderr
        assert "loading" not in outcome.stderr


def test_an_id_that_cannot_be_had_is_asked_for_once_and_told_in_a_line(
    kvmix: Kvmix, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    # without the answer that it is made of: each release of the package has another library for it
    unknown = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    errors = (ConnectionError("no route"), unknown)

    def model_info(self: object, name: str, **options: object) -> None:
        asked.append(name)
        raise errors[len(asked) - 1]

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    for number, message in enumerate(("the Hub cannot be reached", "the Hub has none of that id"), 1):
        outcome = kvmix("explain", "nobody-at-all/no-such-model")
        assert outcome.code == 1
        assert message in outcome.stderr
        assert outcome.stderr.count("\n") == 1
        assert len(asked) == number


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "pass one of --bits, --bytes-per-token, --total-bytes; got none"),
        (("--bits", 3, "--total-bytes", 9), "got --bits and --total-bytes"),
        (("--bits", 3, "--batch", 2), "--batch is for --total-bytes"),
        (("--bits", 3, "--tp", 2), "--tp is for --total-bytes"),
        (("--total-bytes", 9, "--batch", 2), "--total-bytes needs --batch and --length"),
        (("--bits", 3), "fits.json cannot be read as a profile: it looks like a plan"),
    ],
)
@pytest.mark.usefixtures("files")
def test_solve_refuses_in_the_words_of_the_command_line(
    kvmix: Kvmix, arguments: tuple[str | int, ...], message: str
) -> None:
    outcome = kvmix("plan", "solve", "fits.json", "--out", "out.json", *arguments)
    assert outcome.code == 1
    assert message in outcome.stderr


def test_paragraphs_of_a_help_text_have_no_half_lines(kvmix: Kvmix, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.strip() for line in kvmix("eval", "--help").stdout.splitlines()]
    start = next(n for n, line in enumerate(lines) if line.startswith("The unquantized cache"))
    assert len(lines[start]) > 70
    assert len(lines[start + 1]) > 50
