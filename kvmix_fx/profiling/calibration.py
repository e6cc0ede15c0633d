"""Calibration text: from ids, text, a file, a `datasets` id or the text that comes along, to prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvmix_fx.errors import CalibrationError, MissingPackageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = 8
"""Prompts that are cut from a text, unless told."""

LENGTH = 512
"""Tokens of each, unless told."""

DATASET_ROWS = 2000
"""Rows of a data set that are read at most."""


LONGEST_PATH = 250
"""Characters of a string that may be a path."""


@dataclass(frozen=True)
class Calibration:
    """Prompts to read while signals are measured.

    Attributes:
        ids: token ids int64 [N, L]; after `lengths` tokens come padding ids, which nothing depends on: with
            causal attention no token sees what follows it.
        lengths: tokens of each prompt that count.
        source: where the text came from, for people.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    source: str

    @property
    def tokens(self) -> int:
        """Tokens that count, of all prompts."""
        return sum(self.lengths)

    def spread(self, count: int) -> Calibration:
        """At most `count` of these prompts, evenly spread."""
        whole = len(self.lengths)
        places = [n * whole // count for n in range(count)] if count < whole else list(range(whole))
        return Calibration(self.ids[places], tuple(self.lengths[n] for n in places), self.source)

    def first(self, count: int) -> Calibration:
        """The first prompts of these."""
        return Calibration(self.ids[:count], self.lengths[:count], self.source)

    def describe(self) -> dict[str, Any]:
        """JSON values for provenance: source, size, and a digest of the token ids."""
        rows = [row[:length].tolist() for row, length in zip(self.ids, self.lengths, strict=True)]
        return {
            "source": self.source,
            "prompts": len(self.lengths),
            "length": self.ids.shape[1],
            "tokens": self.tokens,
            "sha256": hashlib.sha256(repr(rows).encode()).hexdigest(),
        }


@torch.inference_mode(False)  # tensors made in inference mode cannot take part in a backward
def load_calibration(
    data: object,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    prompts: int | None = None,
    length: int | None = None,
    shortest: int = 128,
    purpose: str = "calibration",
    needed: str | None = None,
) -> Calibration:
    """Prompts from whatever the user gave.

    Args:
        data: token ids, integers [N, L] or [L], taken as they are; a mapping with "input_ids" and perhaps
            "attention_mask"; a text, or several; the path of a text file; an id of the `datasets` library, as
            "datasets:OWNER/NAME", "datasets:OWNER/NAME:SPLIT" or "datasets:OWNER/NAME/CONFIG:SPLIT"; None for
            the text that comes with the package.
        tokenizer: of the model; needed for everything that is text.
        prompts: of a text, at most; cut evenly spread over it.
        length: tokens of each.
        shortest: prompts below this many tokens say nothing about a packed cache.
        purpose: what errors say the text is for.
        needed: what errors say that it takes.

    Raises:
        CalibrationError: nothing, too little, or of a form that is not known.
        MissingPackageError: a data set is named and `datasets` is not installed.
    """
    if isinstance(data, Mapping):
        return _from_ids(data.get("input_ids"), data.get("attention_mask"), shortest, purpose, needed)
    if isinstance(data, Tensor):
        return _from_ids(data, None, shortest, purpose, needed)
    prompts, length = prompts or PROMPTS, length or LENGTH
    check_sizes(prompts, length, shortest)
    text, source = _text(data, purpose)
    if not text.strip():
        raise CalibrationError(f"the {purpose} text ({source}) is empty; pass a text of a few thousand words")
    if tokenizer is None:
        raise CalibrationError(f"{purpose} text needs tokenizer=..., or pass token ids [N, L] instead")
    ids = torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64
    )
    start = _prefix(tokenizer)
    if len(ids) < shortest:
        wanted = f"a prompt needs {shortest}, and {prompts} of {length} are better: pass a longer text"
        raise CalibrationError(
            f"the {purpose} text ({source}) has {len(ids)} tokens, too short: {needed or wanted}"
        )
    return _cut(ids, start, prompts, length, source, shortest)


def check_sizes(prompts: int, length: int, shortest: int = 128) -> None:
    """Raise CalibrationError if prompts of that size say nothing about a packed cache."""
    if length < shortest or prompts < 1:
        raise CalibrationError(
            f"needs at least 1 prompt of {shortest} tokens or more, got prompts={prompts} and length={length}"
        )


def is_text(data: object) -> bool:
    """Whether what the user gave has to be read by a tokenizer."""
    return not isinstance(data, (Tensor, Mapping))


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer that belongs to a model's name; None for a model without one.

    Raises:
        CalibrationError: there is none under that name.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"no tokenizer was found at {name!r}: pass tokenizer=...") from error


def check_vocabulary(model: nn.Module, calibration: Calibration) -> None:
    """Raise CalibrationError if the text has tokens that the model does not know."""
    largest = int(calibration.ids.max())
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(size, int) and largest >= size:
        raise CalibrationError(
            f"the calibration text has token id {largest}, the model knows {size}: pass its own tokenizer"
        )


def _from_ids(given: Any, mask: Any, shortest: int, purpose: str, needed: str | None) -> Calibration:
    if not isinstance(given, Tensor) or given.dim() not in (1, 2) or given.dtype.is_floating_point:
        what = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise CalibrationError(f"{purpose} ids must be an integer tensor [N, L], got {what}")
    ids = given.detach().clone().cpu().long().reshape(-1, given.shape[-1])
    rows = list(ids) if mask is None else [r[m.bool()] for r, m in zip(ids, mask.cpu(), strict=True)]
    lengths = tuple(len(row) for row in rows)
    if not lengths or min(lengths) < shortest:
        found = f"one of {min(lengths)} tokens" if lengths else "none"
        told = f"{found} is too short: {needed}" if needed and lengths else f"got {found}"
        raise CalibrationError(f"{purpose} prompts need at least {shortest} tokens each, {told}")
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Calibration(padded, lengths, "token ids")


def _cut(ids: Tensor, start: list[int], prompts: int, length: int, source: str, shortest: int) -> Calibration:
    room = length - len(start)
    whole = len(ids) // room
    if whole >= prompts:
        gap = (len(ids) - room) / max(prompts - 1, 1)
        pieces = [ids[int(n * gap) : int(n * gap) + room] for n in range(prompts)]
    else:
        pieces = [piece for piece in ids.split(room) if len(piece) >= shortest][:prompts]
    rows = [torch.cat((torch.tensor(start, dtype=torch.int64), piece)) for piece in pieces]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Calibration(padded, tuple(len(row) for row in rows), source)


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: its beginning-of-sequence token, if it does."""
    beginning = getattr(tokenizer, "bos_token_id", None)
    added = tokenizer("")["input_ids"]
    return [beginning] if beginning is not None and added[:1] == [beginning] else []


def _text(data: object, purpose: str) -> tuple[str, str]:
    """A text and where it came from."""
    if data is None:
        file = resources.files("kvmix_fx.profiling") / "calibration.txt"
        return file.read_text(encoding="utf-8"), "kvmix_fx calibration.txt"
    if isinstance(data, str) and data.startswith("datasets:"):
        return _dataset(data.removeprefix("datasets:")), data
    if isinstance(data, Path) or _names_a_file(data):
        path = Path(str(data))
        try:
            return path.read_text(encoding="utf-8"), path.name
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{purpose} file {str(path)!r} cannot be read: {_cause(error)}") from error
    if isinstance(data, str):
        return data, "text"
    if isinstance(data, Sequence) and all(isinstance(item, str) for item in data):
        return "\n\n".join(data), "text"
    raise CalibrationError(
        f"{purpose} data must be token ids, text, a path or 'datasets:ID', got {type(data).__name__}"
    )


def _cause(error: OSError | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is no text in UTF-8"
    return error.strerror or str(error)


def _names_a_file(data: object) -> bool:
    """Whether a string is a path rather than a text: one that exists, or a single short word."""
    if not isinstance(data, str) or not data or len(data) > LONGEST_PATH or "\n" in data:
        return False
    return Path(data).is_file() or len(data.split()) == 1


def _dataset(name: str) -> str:
    try:
        import datasets  # type: ignore[import-not-found]  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise MissingPackageError(
            "reading a data set needs datasets, which is not installed: pip install datasets"
        ) from error
    place, _, split = name.partition(":")
    owner, *rest = place.split("/")
    identifier, config = ("/".join((owner, *rest[:1])), rest[1] if len(rest) > 1 else None)
    try:
        rows = datasets.load_dataset(identifier, config, split=split or "train", streaming=True)
        first = [row for _, row in zip(range(DATASET_ROWS), rows, strict=False)]
    except Exception as error:  # the library has no error class of its own
        raise CalibrationError(f"data set {name!r} cannot be read: {error}") from error
    column = next((key for key in ("text", "content") if first and key in first[0]), None)
    if column is None:
        column = next(
            (key for key, value in (first[0] if first else {}).items() if isinstance(value, str)), None
        )
    if column is None:
        raise CalibrationError(f"data set {name!r} has no column of text")
    return "\n\n".join(str(row[column]) for row in first)
