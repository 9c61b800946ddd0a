"""Fill in the middle: learn a stretch of a text from what is before and behind it.

Bavarian et al., Efficient Training of Language Models to Fill in the Middle, 2022: two cuts
at random characters of the document.
"""

import random
from typing import NamedTuple

__all__ = ["Cut", "cut_out"]


class Cut(NamedTuple):
    """A text in three."""

    prefix: str
    middle: str
    suffix: str


def cut_out(text: str, chance: random.Random) -> Cut:
    """Cut a text at two random places."""
    first, last = sorted(chance.randint(0, len(text)) for _ in range(2))
    return Cut(text[:first], text[first:last], text[last:])
