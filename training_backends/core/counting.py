"""How tokens are to be counted for an estimate.

`TrainingBackend.estimate` takes a configuration and a dataset and nothing else, so that
everybody's backend can be asked. What whoever asks wishes beyond that lies beside the call,
in its context, and is there for the backends that count by `datasets.tokens`.
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
    """Wishes for a count of tokens.

    Attributes:
        sample: Count so many rows and say how sure that is; None: all rows, or a sample where
            the data is huge.
        exact: Count all rows however many there are.
        cache: Directory where counts are kept from one time to the next.
    """

    sample: int | None = None
    exact: bool = False
    cache: Path | None = None
    on_progress: CountProgress | None = None


_WISHES: Final[ContextVar[Counting]] = ContextVar("counting", default=Counting())  # noqa: B039  # it is frozen


def counting() -> Counting:
    """Return what the caller of an estimate wishes; also in a thread that it started."""
    return _WISHES.get()


@contextmanager
def wishing(wishes: Counting) -> Iterator[None]:
    """Have every estimate inside count like this."""
    token = _WISHES.set(wishes)
    try:
        yield
    finally:
        _WISHES.reset(token)
