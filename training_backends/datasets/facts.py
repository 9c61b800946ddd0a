"""What is in a file beside what is wrong with it."""

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Final

__all__ = ["Facts"]

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
