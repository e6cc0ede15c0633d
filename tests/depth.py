"""How many examples a test that says a number of its own tries, in every profile of hypothesis."""

from __future__ import annotations

from hypothesis import settings


def examples(count: int) -> int:
    """`count`, and as many times more as the profile has more examples than that of CI."""
    return max(count, count * settings.default.max_examples // settings.get_profile("tests").max_examples)
