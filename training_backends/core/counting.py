"""How an estimate counts tokens.

`TrainingBackend.estimate` takes only a configuration and a dataset, so that its signature is
stable for all backends. Counting preferences are passed in a context variable, which backends
that count with `training_backends.tokens` read.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["CountProgress", "Counting", "counting", "wishing"]

CountProgress = Callable[[Path, int, int], None]
"""Called with the file, the bytes counted so far and its size; may raise to stop counting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counting:
    """Preferences for counting tokens.

    Attributes:
        sample: Count a sample of this many rows and return an interval; None: all rows, or a
            sample if the data is very large.
        exact: Count all rows, even if the data is very large.
        cache: Directory of cached counts.
        on_progress: Called while counting.
    """

    sample: int | None = None
    exact: bool = False
    cache: Path | None = None
    on_progress: CountProgress | None = None


_WISHES: Final[ContextVar[Counting]] = ContextVar("counting", default=Counting())  # noqa: B039  # it is frozen


def counting() -> Counting:
    """Return the preferences of the current estimate; also works in its worker threads."""
    return _WISHES.get()


@contextmanager
def wishing(wishes: Counting) -> Iterator[None]:
    """Apply `wishes` to all estimates inside the block."""
    token = _WISHES.set(wishes)
    try:
        yield
    finally:
        _WISHES.reset(token)
