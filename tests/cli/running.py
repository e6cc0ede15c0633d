from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WORDS = ["<pad>", "<end>", "<unk>", "the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "slept"]
PROMPT = "the cat sat on a mat and then it slept and the cat sat on it and on the mat it slept " * 9


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str

    @property
    def answer(self) -> dict[str, Any]:
        """The one JSON object on stdout; fails if anything else is there."""
        content = json.loads(self.stdout)
        assert isinstance(content, dict)
        return content


Kvmix = Callable[..., Outcome]
