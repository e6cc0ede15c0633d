"""Real text that every CPython brings along: prose and code, cut into chunks of tokens.

The texts change with Python's patch version. Take the unquantized baseline in the same run; never compare
with a perplexity that was stored.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE_MODULES = (
    "argparse",
    "dataclasses",
    "tarfile",
    "difflib",
    "statistics",
    "functools",
    "textwrap",
    "shutil",
)
"""Standard-library modules whose sources make up `code()`."""

CALIBRATION_SHARE = 0.4
"""Share of a text's tokens, from its start, that belongs to calibration; the rest is for evaluation."""


def prose() -> str:
    """The Python language reference as plain text (about 110,000 SmolLM2 tokens, PSF-2.0)."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def code() -> str:
    """Python sources of the standard library (about 130,000 SmolLM2 tokens, PSF-2.0)."""
    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in CODE_MODULES)


def chunks(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    length: int,
    count: int,
    skip: int = 0,
    part: Literal["calibration", "evaluation"] = "evaluation",
) -> torch.Tensor:
    """Cut consecutive chunks of equal length from one part of a text.

    The text is tokenized as a whole and its tokens are split once, at `CALIBRATION_SHARE`, so chunks of the
    two parts never share a token whatever their lengths.

    Args:
        tokenizer: turns the text into ids; adds no special tokens.
        text: for example `prose()` or `code()`.
        length: tokens per chunk.
        count: number of chunks.
        skip: chunks of this length to leave out at the start of the part.
        part: "calibration" to choose a plan, "evaluation" to judge it.

    Returns:
        Token ids, int64 [count, length], on the CPU.

    Raises:
        ValueError: the part has fewer than (skip + count) * length tokens, or its name is unknown.
    """
    # verbose=False: a text longer than the model's context is meant to be
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    cut = int(len(ids) * CALIBRATION_SHARE)
    parts = {"calibration": ids[:cut], "evaluation": ids[cut:]}
    if part not in parts:
        raise ValueError(f'part must be "calibration" or "evaluation", got {part!r}')
    start, end = skip * length, (skip + count) * length
    if end > len(parts[part]):
        raise ValueError(
            f"the {part} part of this text has {len(parts[part])} tokens, too few for {skip} skipped and "
            f"{count} wanted chunks of {length}; at most {len(parts[part]) // length} fit"
        )
    return parts[part][start:end].view(count, length)
