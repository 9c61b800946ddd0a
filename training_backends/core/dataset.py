"""Results of inspecting data files."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, Field

from training_backends.core.data_rules import SampleType
from training_backends.core.errors import Issue

__all__ = ["CountProgress", "Counting", "DataFile", "Dataset", "SampleType", "Summary"]

CountProgress = Callable[[Path, int, int], None]
"""Called with the file, the bytes counted so far and its size; may raise to stop counting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counting:
    """How the tokens of a dataset are counted.

    Attributes:
        sample: Count a sample of this many rows and return an interval; None: all rows, or a
            sample if the data is large.
        exact: Count all rows, even if the data is large.
        cache: Directory of kept counts.
        on_progress: Called while counting.
    """

    sample: int | None = None
    exact: bool = False
    cache: Path | None = None
    on_progress: CountProgress | None = None


class Summary(BaseModel, frozen=True):
    """Statistics about the rows of a file.

    Attributes:
        lines: Total size of the lines in bytes, uncompressed.
        formats: Number of rows by format, for example `messages`.
        roles: Number of messages by role.
        tool_rows: Number of rows that declare or call tools.
        tool_calls: Number of tool calls.
        image_rows: Number of rows with images.
        images: Number of images.
        weighted_rows: Number of rows with message weights.
        longest_row: Length of the longest row in bytes.
        row_bytes: Histogram of row lengths: `(most, rows)` counts the rows with up to `most`
            bytes that are longer than the previous bound.
        labels: Number of rows by classifier target and label.
        findings: Number of findings by issue code.
        duplicate_rows: Rows that repeat an earlier one in this file or another of the same role;
            None if not checked.
        overlapping_rows: Rows of a validation file that are also in the training data.
    """

    lines: int = 0
    formats: dict[str, int] = Field(default_factory=dict)
    roles: dict[str, int] = Field(default_factory=dict)
    tool_rows: int = 0
    tool_calls: int = 0
    image_rows: int = 0
    images: int = 0
    weighted_rows: int = 0
    longest_row: int = 0
    row_bytes: tuple[tuple[int, int], ...] = ()
    labels: dict[str, dict[str, int]] = Field(default_factory=dict)
    findings: dict[str, int] = Field(default_factory=dict)
    duplicate_rows: int | None = None
    overlapping_rows: int | None = None


class DataFile(BaseModel, frozen=True):
    """An inspected file.

    Attributes:
        role: Purpose of the file.
        weight: Sampling weight relative to the other training files.
        size: Size in bytes, as stored.
        sha256: Hex digest of the file as stored; None if it was not read completely.
        rows: Number of rows, not counting blank lines.
        bad_rows: Number of invalid rows.
        turns: Number of messages in all rows.
        sample_type: Type of the rows, from the first valid row; None for an empty file.
        packing: Compression or container of the file.
    """

    path: Path
    role: Literal["train", "validation"]
    weight: float = 1.0
    size: int
    sha256: str | None = None
    rows: int
    bad_rows: int = 0
    turns: int = 0
    sample_type: SampleType | None = None
    packing: Literal["plain", "gzip", "zstd", "parquet"] = "plain"
    summary: Summary = Summary()


class Dataset(BaseModel, frozen=True):
    """All inspected files of a run and their issues.

    `counting` is part of the dataset rather than an argument of `TrainingBackend.estimate` and
    `validate`, because whatever counts the tokens has the dataset already: a backend that passes
    it to `tokens.count_tokens` counts as the caller wishes, and one that does not count needs no
    parameter that it ignores.

    Attributes:
        counting: How its tokens are counted; not part of its serialized form.
    """

    files: tuple[DataFile, ...]
    issues: tuple[Issue, ...] = ()
    counting: Counting = Field(default=Counting(), exclude=True, repr=False)

    @property
    def train(self) -> tuple[DataFile, ...]:
        """The training files."""
        return tuple(file for file in self.files if file.role == "train")

    @property
    def validation(self) -> tuple[DataFile, ...]:
        """The validation files."""
        return tuple(file for file in self.files if file.role == "validation")

    @property
    def errors(self) -> tuple[Issue, ...]:
        """The issues that prevent a launch."""
        return tuple(issue for issue in self.issues if issue.severity == "error")

    def tolerating(self, fraction: float) -> Self:
        """Return the dataset with errors of invalid rows turned into warnings.

        Applies to files in which at most `fraction` of the rows are invalid.

        Args:
            fraction: Tolerated fraction of invalid rows, 0 to 1.
        """
        tolerated = {
            str(file.path)
            for file in self.files
            if file.bad_rows and file.bad_rows <= fraction * file.rows
        }
        if not tolerated:
            return self
        # Issues of single lines are followed by one issue per code that counts the rest.
        of_rows = {(issue.path, issue.code) for issue in self.issues if issue.line is not None}
        issues = tuple(
            replace(issue, severity="warning")
            if issue.path in tolerated and (issue.path, issue.code) in of_rows
            else issue
            for issue in self.issues
        )
        return self.model_copy(update={"issues": issues})
