"""Texts in which something has to be found again, at any length, from a seed and without any data.

The kinds are those of RULER (arXiv 2404.06654) that need no outside text, the pass key of landmark
attention (arXiv 2305.16300) and the lines of LongChat. The words, the filler and the wording are our own, so
scores compare plans of one model, not models across papers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from kvmix_fx.errors import EvaluationError

FILLER = (
    "The morning train leaves before the shops are open.",
    "Rain is expected in the valley by the evening.",
    "She put the kettle on and read the paper again.",
    "Two boats were tied to the old wooden pier.",
    "Nobody had swept the yard since the wind turned.",
    "The baker keeps his flour in a dry back room.",
    "A dog barked twice and then lay down to sleep.",
    "They painted the fence in the same green as last year.",
    "The road bends to the left behind the church.",
    "He counted the chairs and closed the window.",
)
THINGS = (
    "lantern", "harbour", "violin", "meadow", "compass", "teapot", "glacier", "orchard", "saddle", "candle",
    "bridge", "pepper", "marble", "falcon", "basket", "cellar", "anchor", "thistle", "mirror", "tunnel",
)  # fmt: skip
KINDS = (
    "quiet", "amber", "narrow", "distant", "hollow", "gentle", "copper", "frozen", "crooked", "silver",
    "dusty", "bitter", "golden", "sudden", "velvet", "broken", "hidden", "ancient", "rapid", "yellow",
)  # fmt: skip
SYLLABLES = ("ba", "do", "fe", "gu", "ka", "li", "mo", "ne", "pu", "ra", "si", "to", "vu", "wa", "ze")

NEEDLES = 4
"""Needles of the tasks that hide several."""


@dataclass(frozen=True)
class Sample:
    """One text, a question about it, and what the answer has to contain.

    context is packed first; question is read against it and ends where the answer begins.
    """

    task: str
    length: int
    depth: float | None
    context: str
    question: str
    answers: tuple[str, ...]

    def score(self, said: str) -> float:
        """Share of the answers that `said` contains."""
        return sum(answer.lower() in said.lower() for answer in self.answers) / len(self.answers)


@dataclass(frozen=True)
class Draft:
    """A sample whose length is still open: `context(n)` grows with n."""

    context: Callable[[int], str]
    question: str
    answers: tuple[str, ...]


Make = Callable[[random.Random, float], Draft]


def _haystack(introduction: str, needles: Sequence[tuple[float, str]], turn: int) -> Callable[[int], str]:
    """Needles at their depths, from 0 to 1, in n sentences of filler."""

    def context(n: int) -> str:
        sentences = [FILLER[(turn + i) % len(FILLER)] for i in range(n)]
        # from the end, so that places that are still to be filled stay where they are
        for depth, needle in sorted(needles, reverse=True):
            sentences.insert(round(depth * n), needle)
        return " ".join((introduction, *sentences))

    return context


def _number(rng: random.Random, digits: int) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _numbers(rng: random.Random, digits: int, count: int) -> list[str]:
    return [str(n) for n in rng.sample(range(10 ** (digits - 1), 10**digits), count)]


def _passkey(rng: random.Random, depth: float) -> Draft:
    key = _number(rng, 5)
    needle = f"The pass key is {key}. Remember it: {key} is the pass key."
    introduction = "A pass key is hidden in the text below. Find it and remember it."
    context = _haystack(introduction, [(depth, needle)], rng.randrange(len(FILLER)))
    return Draft(context, " What is the pass key? The pass key is", (key,))


def _lines(rng: random.Random, depth: float) -> Draft:
    """Line retrieval (LongChat): nothing but lines that are alike, one of which is asked for."""
    names = [f"{kind}-{thing}" for kind in KINDS for thing in THINGS]
    rng.shuffle(names)
    numbers = _numbers(rng, 5, len(names))
    lines = [f"Line {name}: the number is {number}." for name, number in zip(names, numbers, strict=True)]

    def context(n: int) -> str:
        others = [lines[1 + i % (len(lines) - 1)] for i in range(n)]
        others.insert(round(depth * n), lines[0])
        return "\n".join(("Below is a record of lines. Remember the number of each.", *others))

    return Draft(context, f"\nLine {names[0]}: the number is", (numbers[0],))


INTRODUCTION = "Numbers of things are hidden in the text below. Remember them."


def _niah(rng: random.Random, depth: float, keys: int, values: int, asked: int) -> Draft:
    things = rng.sample(THINGS, keys)
    numbers = _numbers(rng, 6, keys * values)
    told = "One number of the" if values > 1 else "The number of the"
    owners = [thing for thing in things for _ in range(values)]
    places = [depth, *(rng.random() for _ in numbers[1:])]
    needles = [
        (place, f"{told} {thing} is {number}.")
        for place, thing, number in zip(places, owners, numbers, strict=True)
    ]
    context = _haystack(INTRODUCTION, needles, rng.randrange(len(FILLER)))
    listed = " and the ".join(
        (", the ".join(things[: asked - 1]), things[asked - 1]) if asked > 1 else things[:1]
    )
    if values == asked == 1:
        question = f" What is the number of the {listed} in the text above? The number of the {listed} is"
    else:
        question = f" What are all the numbers of the {listed} in the text above? The numbers are"
    return Draft(context, question, tuple(numbers[: asked * values]))


def _variable_tracking(rng: random.Random, depth: float) -> Draft:
    del depth  # the chain is spread over the whole text
    names = ["".join(rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 4)) for _ in range(NEEDLES + 1)]
    value = _number(rng, 5)
    held = [value, *(f"VAR {name}" for name in names)]
    places = sorted(rng.random() for _ in names)
    lines = [(place, f"VAR {name} = {what}.") for place, name, what in zip(places, names, held, strict=False)]
    introduction = "Variables are assigned in the text below. Keep track of their values."
    context = _haystack(introduction, lines, rng.randrange(len(FILLER)))
    question = f" Which variables of the text above hold the value {value}? The variables are"
    return Draft(context, question, tuple(names))


def _common_words(rng: random.Random, depth: float) -> Draft:
    del depth
    words = [f"{kind} {thing}" for kind in KINDS for thing in THINGS]
    rng.shuffle(words)
    common, rare, order = words[:NEEDLES], words[NEEDLES:], rng.random()

    def context(n: int) -> str:
        # every rare word once until all are used, and a third of the list is common ones
        listed = [rare[i % len(rare)] for i in range(n)] + common * max(2, n // (2 * NEEDLES))
        random.Random(order).shuffle(listed)
        return "Remember which words occur most often in this list. " + ", ".join(listed) + "."

    question = f" Which {NEEDLES} words occur most often in the list above? The words are"
    return Draft(context, question, tuple(common))


def _frequent_words(rng: random.Random, depth: float) -> Draft:
    del depth
    words: list[str] = []
    while len(words) < 60:
        word = "".join(rng.choices(SYLLABLES, k=3))
        if word not in words:
            words.append(word)
    order = rng.random()
    weights = [1 / rank**2 for rank in range(1, len(words) + 1)]

    def context(n: int) -> str:
        # of each rank its exact share: chance must not make another word the most frequent
        counts = [round(weight / sum(weights) * n) for weight in weights]
        coded = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        random.Random(order).shuffle(coded)
        return "Remember which words occur most often in this coded text. " + " ".join(coded) + "."

    question = " Which three words occur most often in the coded text above? The words are"
    return Draft(context, question, tuple(words[:3]))


TASKS: Mapping[str, Make] = MappingProxyType(
    {
        "passkey": _passkey,
        "lines": _lines,
        "niah_single": lambda rng, depth: _niah(rng, depth, 1, 1, 1),
        "niah_multikey": lambda rng, depth: _niah(rng, depth, NEEDLES, 1, 1),
        "niah_multivalue": lambda rng, depth: _niah(rng, depth, 1, NEEDLES, 1),
        "niah_multiquery": lambda rng, depth: _niah(rng, depth, NEEDLES, 1, NEEDLES),
        "variable_tracking": _variable_tracking,
        "common_words": _common_words,
        "frequent_words": _frequent_words,
    }
)
"""Makers of samples by name."""

SPREAD = ("variable_tracking", "common_words", "frequent_words")
"""Tasks whose answer is spread over the whole text, so that there is no depth to choose."""


def check_task(task: str) -> None:
    """Raise EvaluationError unless there is a task of that name."""
    if task not in TASKS:
        raise EvaluationError(f"there is no task {task!r}; known: {', '.join(TASKS)}")


def make_sample(
    task: str, count_tokens: Callable[[str], int], length: int, depth: float = 0.5, seed: int | str = 0
) -> Sample:
    """A sample of at most `length` tokens, and so near to it as whole sentences allow.

    Args:
        task: a key of TASKS.
        count_tokens: of a text, by the model's tokenizer.
        length: tokens of context and question together.
        depth: where the needle that is asked for lies, 0 at the beginning, 1 at the end; tasks in SPREAD
            do not take it.
        seed: the same one gives the same sample.

    Raises:
        EvaluationError: an unknown task, a depth outside 0 to 1, or a length too short for the needles.
    """
    check_task(task)
    if not 0 <= depth <= 1:
        raise EvaluationError(f"depth must be from 0 to 1, got {depth}")
    draft = TASKS[task](random.Random(f"{task} {seed}"), depth)

    def fits(n: int) -> bool:
        return count_tokens(draft.context(n) + draft.question) <= length

    if not fits(NEEDLES):
        raise EvaluationError(f"{length} tokens are too few for the task {task!r}")
    high = 2 * NEEDLES
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    at = None if task in SPREAD else depth
    return Sample(task, length, at, draft.context(low), draft.question, draft.answers)


__all__ = ["SPREAD", "TASKS", "Sample", "check_task", "make_sample"]
