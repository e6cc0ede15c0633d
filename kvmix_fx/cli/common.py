"""What the commands share: how they answer and fail, and how they load models."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO, get_type_hints

import typer
from rich.console import Console, RenderableType

from kvmix_fx import hub
from kvmix_fx.errors import CommandError, KVMixError, MissingPackageError, ModelInputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"
"""What the commands call the small model of `kvmix_fx.testing.smollm2`."""

_AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", help=f"Hugging Face id or folder, or {SMOLLM2!r}.", show_default=False),
]


@dataclass(frozen=True)
class Answer:
    """What a command found.

    content: for --json. view: for people; text is printed unwrapped, None prints nothing.
    """

    content: dict[str, Any]
    view: RenderableType | None


def answers(function: Callable[..., Answer]) -> Callable[..., None]:
    """Make a command out of `function`: print its answer, and errors of ours as messages.

    Adds the option --json; with it, whatever else is printed meanwhile goes to stderr. A parameter whose
    type is a dataclass stands for one option per field.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[Parameter] = []
    grouped: list[Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            groups[name] = hints[name]
            grouped += _fields(hints[name])
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))
    as_json_option = Parameter("as_json", Parameter.KEYWORD_ONLY, default=False, annotation=_AsJson)
    parameters += [*grouped, as_json_option]

    def command(**given: Any) -> None:
        as_json, stdout = given.pop("as_json"), sys.stdout
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            try:
                answer = function(**given)
            except KVMixError as error:
                _fail(error, stdout if as_json else None)
        if as_json:
            _print_json(answer.content, stdout)
        elif isinstance(answer.view, str):
            typer.echo(answer.view, file=stdout)
        elif answer.view is not None:
            Console(file=stdout, highlight=False).print(answer.view, markup=False)

    # what typer reads
    command.__doc__ = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(function) or "")
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _fields(group: Any) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
        for field in dataclasses.fields(group)
    ]


def _fail(error: KVMixError, json_to: TextIO | None) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    if json_to is not None:
        _print_json({"error": {"type": type(error).__name__, "message": str(error)}}, json_to)
    raise typer.Exit(1) from error


def _print_json(content: dict[str, Any], file: TextIO) -> None:
    print(json.dumps(content, allow_nan=False, indent=2), file=file)


def note(text: str) -> None:
    """Say something that is no result."""
    typer.echo(text, err=True)


def size(nbytes: float) -> str:
    """Bytes for people: "1.50 MiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def duration(seconds: float) -> str:
    """A time for people, never nothing: "40 seconds", "3 minutes"."""
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(1, seconds):.0f} seconds"


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without its module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Placement:
    """Where a model runs and in which dtype; None for what is usual."""

    device: Annotated[
        str | None,
        typer.Option(help="A torch device; the accelerator if there is one.", show_default=False),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the model; bfloat16 on accelerators, float32 on CPU.", show_default=False),
    ] = None

    def torch_device(self) -> torch.device:
        """The device to use.

        Raises:
            CommandError: there is no such device.
        """
        import torch

        if self.device is None:
            return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # each backend has its own
            raise CommandError(f"device {self.device!r} cannot be used: {error}") from error
        return device

    def torch_dtype(self) -> torch.dtype:
        """The dtype to use.

        Raises:
            CommandError: no dtype for models has that name.
        """
        import torch

        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        usual = "float32" if self.torch_device().type == "cpu" else "bfloat16"
        dtype = dtypes.get(self.dtype or usual)
        if dtype is None:
            raise CommandError(f"--dtype must be one of {', '.join(dtypes)}; got {self.dtype!r}")
        return dtype


def load_model(name: str, placement: Placement) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode with its tokenizer.

    Raises:
        MissingPackageError: transformers, or what SmolLM2 needs, is not installed.
        CommandError: the model cannot be loaded as wanted.
    """
    transformers = _transformers()
    transformers.utils.logging.disable_progress_bar()
    _check_place(name)
    device, dtype = placement.torch_device(), placement.torch_dtype()
    note(f"loading {name} in {dtype_name(dtype)} on {device}")
    if name.lower() == SMOLLM2:
        from kvmix_fx.testing.smollm2 import load_smollm2

        with _quiet():
            return load_smollm2(dtype, device)
    with load_errors(name), _quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval().to(device), tokenizer


def load_config(name: str) -> Any:
    """The configuration of a model, without its weights. Raises as `load_model` does."""
    transformers = _transformers()
    if name.lower() == SMOLLM2:
        from kvmix_fx.testing.smollm2 import smollm2_config

        return smollm2_config()
    _check_place(name)
    with load_errors(name):
        return transformers.AutoConfig.from_pretrained(name)


def _check_place(name: str) -> None:
    """Raise CommandError unless `name` is a folder with a model, or is an id that the Hub may have."""
    if name.lower() == SMOLLM2:
        return
    path = Path(name).expanduser()
    cannot = f"model {name!r} cannot be loaded"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CommandError(f"{cannot}: the folder holds no config.json")
        if name.startswith("~"):
            raise CommandError(f"{cannot}: write {str(path)!r}, the ~ is the shell's")
        return
    if path.is_file():
        raise CommandError(f"{cannot}: it is a file; name the folder that it lies in")
    if not name or name.startswith((".", "~", "/", "\\")) or path.is_absolute() or name.count("/") > 1:
        raise CommandError(f"{cannot}: there is no such folder")
    refusal = hub.refusal(name, "config.json")
    if refusal is not None:
        raise CommandError(f"{cannot}: there is no such folder, and {refusal}")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError.for_extra("transformers", "hf", "loading a model") from error
    return transformers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back torchao's warnings of libraries for other machines; transformers imports it to load."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    for logger in loggers:
        logger.addFilter(_nothing)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextlib.contextmanager
def load_errors(name: str) -> Iterator[None]:
    """What goes wrong while a model is loaded, as an error of ours that names it."""
    try:
        yield
    except KVMixError:
        raise
    except (OSError, ValueError, ImportError) as error:  # transformers has no error class of its own
        raise CommandError(f"model {name!r} cannot be loaded: {error}") from error


@contextlib.contextmanager
def as_options(*names: str) -> Iterator[None]:
    """In errors from here, arguments of Python as this command's options: steps=1 as --steps 1."""
    try:
        yield
    except KVMixError as error:
        told = str(error)
        for name in names:
            told = re.sub(rf"\b{name}=", f"--{name.replace('_', '-')} ", told)
        error.args = (told,)
        raise


def text_source(option: str, name: str | None) -> Any:
    """A text that was named on the command line, as the API takes it, once it is known that it can be read.

    Raises:
        CommandError: the file is missing, no text or empty.
        MissingPackageError: a data set is named and `datasets` is not installed.
    """
    if name is None:
        return None
    if name.startswith("datasets:"):
        if importlib.util.find_spec("datasets") is None:
            raise MissingPackageError(
                f"{option} {name} needs datasets, which is not installed: pip install datasets"
            )
        return name
    try:
        text = Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{option}: {name} is no text in UTF-8") from error
    except OSError as error:
        raise CommandError(f"{option}: {name} cannot be read ({error.strerror or error})") from error
    if not text.strip():
        raise CommandError(f"{option}: {name} is empty")
    return Path(name)


def check_prompt(prompt: str) -> None:
    """Raise ModelInputError for a prompt of nothing, before a model is loaded for it."""
    if not prompt:
        raise ModelInputError("the prompt holds no tokens: write something after --prompt")


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool | None = None) -> torch.Tensor:
    """Token ids of a prompt, int64 [1, L].

    Args:
        tokenizer: of the model.
        prompt: what the user says.
        chat: whether it goes through the chat template; None for "if the tokenizer has one".

    Raises:
        ModelInputError: the prompt holds no tokens.
        CommandError: a chat template is wanted and there is none.
    """
    has_template = bool(tokenizer.chat_template)
    if chat and not has_template:
        raise CommandError("--chat needs a chat template, and the tokenizer of this model has none")
    templated = has_template if chat is None else chat
    if templated:
        message = {"role": "user", "content": prompt}
        prompt = str(tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
    ids: torch.Tensor = tokenizer(prompt, add_special_tokens=not templated, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise ModelInputError("the prompt holds no tokens; pass at least one")
    return ids.long()
