"""How far tests search: `pytest --hypothesis-profile thorough` searches longer."""

from collections.abc import Sequence
from typing import TypeVar

import hypothesis

__all__ = ["is_thorough", "some"]

T = TypeVar("T")


def is_thorough() -> bool:
    """Tell whether the tests may take long."""
    return hypothesis.settings.get_current_profile_name() == "thorough"


def some(items: Sequence[T], count: int) -> Sequence[T]:
    """Return this many items, evenly spread and the last one among them; all if thorough."""
    if is_thorough() or count >= len(items):
        return items
    last = len(items) - 1
    return [items[last * number // (count - 1)] for number in range(count)]
