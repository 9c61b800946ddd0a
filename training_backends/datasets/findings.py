"""What is said of one row."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

__all__ = [
    "NO_WORDS",
    "Facts",
    "Finding",
    "brief",
    "empty",
    "is_blank",
    "nearest",
    "short",
    "too_long",
    "type_name",
    "wrong_type",
]

_MOST_LABELS: Final = 10_000
"""Labels that are counted apart; a column of free text is no label."""


@dataclass(slots=True)
class Facts:
    """Counts over rows; those of several parts of a file are added by `merge`.

    Rows with errors count too, as far as they could be told apart.

    Attributes:
        rows: Rows by type, such as `instruct`.
        formats: Rows by how they are written, see `RowFormat`.
        turns: Messages.
        roles: Messages by role.
        tool_rows: Rows that declare or call tools.
        tool_calls: Calls.
        image_rows: Rows with images.
        images: Images.
        weighted_rows: Rows in which a message has a weight.
        longest_row: Bytes of the longest row, as far as whoever reads them measured it.
        labels: Rows by `(target, label)` of a classifier.
        label_kinds: Rows by `(target, "single" or "multi")`.
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
        """Count a label, while there are not too many to be labels."""
        if (target, label) in self.labels or len(self.labels) < _MOST_LABELS:
            self.labels[target, label] += 1

    def count_label_kind(self, target: str, kind: str) -> None:
        """Count how a target is labelled, likewise."""
        if (target, kind) in self.label_kinds or len(self.label_kinds) < _MOST_LABELS:
            self.label_kinds[target, kind] += 1


NO_WORDS: Final = "fill it in or remove the row"


class Finding(NamedTuple):
    """One thing wrong with a row or a file."""

    code: str
    field: str | None
    message: str
    fix: str | None = None
    severity: Literal["error", "warning"] = "error"


def nearest(word: str, known: Collection[str]) -> str | None:
    """Return the known word that was probably meant."""
    if len(word) > 40 or len(known) > 1000:
        return None  # comparing takes long
    return _nearest(word.lower(), frozenset(known))


@lru_cache(maxsize=1000)
def _nearest(word: str, known: frozenset[str]) -> str | None:
    found = get_close_matches(word, sorted(known), n=1, cutoff=0.75)
    return found[0] if found else None


def brief(text: str) -> str:
    """Cut a text of the user's; data is not poured into messages at full length."""
    return text if len(text) <= 40 else text[:37] + "..."


def short(value: object) -> str:
    """Quote a value of the user's, cut."""
    if isinstance(value, str):
        return repr(brief(value))
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**20:
        return "a number of many digits"  # turning it into text takes long
    return brief(str(value)) if isinstance(value, int | float) else type_name(value)


def type_name(value: Any) -> str:
    """Return what JSON calls a value."""
    names = {dict: "an object", list: "an array", str: "a string", type(None): "null"}
    if isinstance(value, bool):
        return "true" if value else "false"
    return names.get(type(value), "a number")


def empty(field: str, what: str) -> Finding:
    """Say that something has nothing in it."""
    return Finding("empty_content", field, f"{what} is empty", NO_WORDS)


def wrong_type(field: str | None, value: Any, wanted: str) -> Finding:
    """Say that something is of another type than it may be."""
    text = f"expected {wanted}, got {type_name(value)}"
    return Finding("wrong_type", field, text, "correct the type")


def too_long(limit: int) -> Finding:
    """Say that a line has more bytes than are kept of one."""
    message = f"the line is longer than {limit >> 20} MiB"
    return Finding("line_too_long", None, message, "write one JSON object per line")


def is_blank(value: object) -> bool:
    """Tell whether a text has no words."""
    return isinstance(value, str) and (not value or value.isspace())
