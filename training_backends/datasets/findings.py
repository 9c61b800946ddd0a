"""Findings and counts of rows."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

from training_backends.core.errors import nearest

__all__ = [
    "NO_WORDS",
    "Facts",
    "Finding",
    "brief",
    "empty",
    "is_blank",
    "nearest_name",
    "short",
    "too_long",
    "type_name",
    "wrong_type",
]

_MOST_LABELS: Final = 10_000
"""Maximum number of distinct labels that are counted; beyond it, the column is free text."""


@dataclass(slots=True)
class Facts:
    """Counts over the rows of a file; `merge` adds those of another part.

    Rows with errors are included if their type was recognized.

    Attributes:
        rows: Rows by sample type, such as `instruct`.
        formats: Rows by `RowFormat`.
        turns: Number of messages.
        roles: Messages by role.
        tool_rows: Rows that declare or call tools.
        tool_calls: Number of tool calls.
        image_rows: Rows with images.
        images: Number of images.
        weighted_rows: Rows with a message weight.
        longest_row: Bytes of the longest row, if the caller measures rows.
        labels: Classifier rows by `(target, label)`.
        label_kinds: Classifier rows by `(target, "single" or "multi")`.
    """

    rows: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    turns: int = 0
    roles: Counter[str] = field(default_factory=Counter)
    tool_rows: int = 0
    tool_calls: int = 0
    image_rows: int = 0
    images: int = 0
    weighted_rows: int = 0
    longest_row: int = 0
    labels: Counter[tuple[str, str]] = field(default_factory=Counter)
    label_kinds: Counter[tuple[str, str]] = field(default_factory=Counter)

    def merge(self, other: "Facts") -> None:
        """Add the counts of another part."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif one.name != "longest_row":
                setattr(self, one.name, mine + theirs)
        self.longest_row = max(self.longest_row, other.longest_row)

    def count_label(self, target: str, label: str) -> None:
        """Count a label, up to `_MOST_LABELS` distinct ones."""
        if (target, label) in self.labels or len(self.labels) < _MOST_LABELS:
            self.labels[target, label] += 1

    def count_label_kind(self, target: str, kind: str) -> None:
        """Count whether a target has a single label or a list, up to the same limit."""
        if (target, kind) in self.label_kinds or len(self.label_kinds) < _MOST_LABELS:
            self.label_kinds[target, kind] += 1


NO_WORDS: Final = "fill it in or remove the row"


class Finding(NamedTuple):
    """An error or warning about a row or a file."""

    code: str
    field: str | None
    message: str
    fix: str | None = None
    severity: Literal["error", "warning"] = "error"


def nearest_name(word: str, known: Collection[str]) -> str | None:
    """Return the known name that was probably meant; the same one may be misspelt in every row."""
    return _nearest(word.lower(), frozenset(known)) if len(word) <= 40 else None


@lru_cache(maxsize=1000)
def _nearest(word: str, known: frozenset[str]) -> str | None:
    return nearest(word, known, cutoff=0.75)


def brief(text: str) -> str:
    """Truncate user data for a message."""
    return text if len(text) <= 40 else text[:37] + "..."


def short(value: object) -> str:
    """Quote a value from user data, truncated."""
    if isinstance(value, str):
        return repr(brief(value))
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**20:
        return "a number with many digits"  # slow to format
    return brief(str(value)) if isinstance(value, int | float) else type_name(value)


def type_name(value: Any) -> str:
    """Return the JSON type of a value."""
    names = {dict: "an object", list: "an array", str: "a string", type(None): "null"}
    if isinstance(value, bool):
        return "true" if value else "false"
    return names.get(type(value), "a number")


def empty(field: str, what: str) -> Finding:
    """Return the finding for an empty value."""
    return Finding("empty_content", field, f"{what} is empty", NO_WORDS)


def wrong_type(field: str | None, value: Any, wanted: str) -> Finding:
    """Return the finding for a value of the wrong type."""
    text = f"expected {wanted}, got {type_name(value)}"
    return Finding("wrong_type", field, text, "correct the type")


def too_long(limit: int) -> Finding:
    """Return the finding for a line longer than `limit` bytes."""
    message = f"the line is longer than {limit >> 20} MiB"
    return Finding("line_too_long", None, message, "write one JSON object per line")


def is_blank(value: object) -> bool:
    """Return whether a value is an empty or whitespace-only string."""
    return isinstance(value, str) and (not value or value.isspace())
