"""retrieve(): what a model finds again in a long text that has been packed.

The text is read and packed first, and the question read against it, as in a conversation about a document.
Asked in one prompt, the question would attend to the text before it is packed, and be answered as well under
any plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvmix_fx.api import compile, restore
from kvmix_fx.contracts import cache_argument
from kvmix_fx.errors import EvaluationError
from kvmix_fx.evaluation.figures import figure_of_matplotlib
from kvmix_fx.evaluation.run import check_plain
from kvmix_fx.evaluation.tasks import SPREAD, Sample, check_task, make_sample
from kvmix_fx.plan import KVPlan
from kvmix_fx.progress import progress as bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SPARE_TOKENS = 8
"""What an answer may be longer than the answers alone: "and", commas, a few words."""


@dataclass(frozen=True)
class Score:
    """Mean share of the answers found, from 0 to 1, at one length and depth (None where there is none)."""

    task: str
    length: int
    depth: float | None
    value: float
    samples: int


@dataclass(frozen=True)
class Retrieval:
    """What was found, per task, length and depth."""

    scores: tuple[Score, ...]

    def mean(self, task: str, length: int | None = None) -> float:
        """Over the depths, and over the lengths if none is named."""
        found = [s.value for s in self.scores if s.task == task and length in (None, s.length)]
        return sum(found) / len(found)

    def to_dict(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [asdict(score) for score in self.scores]


def retrieve(
    model: nn.Module,
    plan: KVPlan | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] = ("passkey",),
    lengths: Sequence[int] = (512, 1024),
    depths: Sequence[float] = DEPTHS,
    samples: int = 2,
    seed: int = 0,
    progress: bool = True,
) -> Retrieval:
    """Let a model answer questions about texts in its cache.

    Args:
        model: a causal language model of transformers, in eval mode; left as it is.
        plan: bits per layer; None for the unquantized cache.
        tokenizer: of the model.
        tasks: of `kvmix_fx.evaluation.TASKS`.
        lengths: tokens of text and question.
        depths: places of what is asked for, from 0 to 1.
        samples: texts per task, length and depth; the same ones for every plan.
        seed: of the texts.
        progress: show a bar, if stderr is a terminal.

    Raises:
        EvaluationError: an unknown task, a length the model or the task cannot take, or the model has been
            compiled by kvmix_fx.
        NoSiteError: nothing in this model can be packed.
        PlanError, HeadSizeError: the plan does not fit the model.
    """
    check_plain(model)
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if longest is not None and max(lengths, default=0) > longest:
        raise EvaluationError(f"this model knows {longest} positions: ask for no length above that")
    if samples < 1 or not tasks or not lengths or not depths:
        raise EvaluationError("retrieval needs at least one sample, task, length and depth")
    made = list(_samples(tokenizer, tasks, lengths, depths, samples, seed))
    if plan is not None:
        compile(model, plan, inner="eager")
    try:
        scores = []
        with torch.no_grad(), bar("retrieving", sum(map(len, made)), progress) as advance:
            for group in made:
                found = []
                for sample in group:
                    found.append(sample.score(_answer(model, tokenizer, sample)))
                    advance()
                first = group[0]
                mean = sum(found) / len(found)
                scores.append(Score(first.task, first.length, first.depth, mean, len(found)))
    finally:
        if plan is not None:
            restore(model)
    return Retrieval(tuple(scores))


def _samples(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
) -> Iterable[list[Sample]]:
    def count(text: str) -> int:
        return len(tokenizer(text, verbose=False)["input_ids"])

    for task in tasks:
        check_task(task)
    for task in tasks:
        for length in lengths:
            for depth in depths[:1] if task in SPREAD else depths:
                yield [
                    make_sample(task, count, length, depth, f"{seed} {length} {depth} {n}")
                    for n in range(samples)
                ]


def _answer(model: Any, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> str:
    """What the model says greedily, the text packed before the question is read."""
    from transformers import DynamicCache

    device = next(model.parameters()).device

    def ids(text: str, start: bool) -> Tensor:
        return torch.tensor([tokenizer(text, add_special_tokens=start)["input_ids"]], device=device)

    count = len(tokenizer(" ".join(sample.answers), add_special_tokens=False)["input_ids"]) + SPARE_TOKENS
    cache = DynamicCache(config=model.config)
    held = {**cache_argument(model, cache), "use_cache": True}
    model(input_ids=ids(sample.context, True), **held)
    said: list[int] = []
    given = ids(sample.question, False)
    for _ in range(count):
        logits = model(input_ids=given, **held).logits
        given = logits[:, -1:].argmax(-1)
        said.append(int(given))
    return str(tokenizer.decode(said, skip_special_tokens=True))


def plot_retrieval(found: Mapping[str, Retrieval], path: str | Path) -> Path:
    """Draw a heat map per task and cache: lengths across, depths down.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: matplotlib knows no such kind of file.
    """
    picture = figure_of_matplotlib("drawing scores")
    tasks = list(dict.fromkeys(score.task for one in found.values() for score in one.scores))
    figure = picture(figsize=(1 + 3 * len(found), 2.4 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), len(found), squeeze=False)
    image = None
    for axes, task in zip(grid, tasks, strict=True):
        for axis, (name, one) in zip(axes, found.items(), strict=True):
            scores = {(s.depth, s.length): s.value for s in one.scores if s.task == task}
            depths = list(dict.fromkeys(depth for depth, _ in scores))
            lengths = list(dict.fromkeys(length for _, length in scores))
            rows = [[scores[depth, length] for length in lengths] for depth in depths]
            image = axis.imshow(rows, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axis.set_xticks(range(len(lengths)), [str(length) for length in lengths])
            axis.set_yticks(range(len(depths)), ["" if d is None else f"{d:.0%}" for d in depths])
            axis.set_title(f"{task}, {name}", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=grid, label="share of answers found")
    figure.savefig(path)
    return Path(path)


__all__ = ["DEPTHS", "Retrieval", "Score", "plot_retrieval", "retrieve"]
