"""Pauses that grow while something fails or stays unchanged."""

__all__ = ["Backoff"]


class Backoff:
    """Pauses that grow from `first` to `longest` seconds; not shared between tasks.

    Args:
        factor: Growth from one pause to the next.
    """

    def __init__(self, first: float, longest: float, *, factor: float = 2.0) -> None:
        self._first = first
        self._longest = max(first, longest)
        self._factor = factor
        self._next = first

    def next(self) -> float:
        """Return the next pause in seconds, and lengthen the one after it."""
        pause = self._next
        self._next = min(pause * self._factor, self._longest)
        return pause

    def reset(self) -> None:
        """Start again with the first pause."""
        self._next = self._first
