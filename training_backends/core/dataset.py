"""What was found in the data files of a configuration."""

from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from training_backends.core.data_rules import SampleType
from training_backends.core.errors import Issue

__all__ = ["DataFile", "Dataset", "SampleType", "Summary"]


class Summary(BaseModel):
    """What the rows of a file hold.

    Attributes:
        lines: Bytes of the lines, unpacked.
        formats: Rows by how they are written, for example `messages`.
        roles: Messages by role.
        tool_rows: Rows that declare or call tools.
        tool_calls: Calls of tools.
        image_rows: Rows with images.
        images: Images.
        weighted_rows: Rows in which a message has a weight.
        longest_row: Bytes of the longest row.
        row_bytes: Rows by length: `(most, rows)` says how many have up to `most` bytes and more
            than the entry before allows.
        labels: Rows by target and label of a classifier.
        findings: How often each thing was found that issues tell of, by their code.
        duplicate_rows: Rows that stand before, in this file or another of the same role; None
            where nobody looked.
        overlapping_rows: Rows of a validation file that are trained on, too.
    """

    model_config = ConfigDict(frozen=True)

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


class DataFile(BaseModel):
    """One inspected file.

    Attributes:
        role: What the file is for.
        weight: Share relative to the other training files.
        size: Bytes.
        sha256: Hex digest of the whole content; None where nobody needed it yet, see
            `datasets.hashing`.
        rows: Samples, blank lines not counted.
        bad_rows: Samples with an error.
        turns: Messages in all rows.
        sample_type: What the rows are, from the first that can be told; None for an empty file.
        packing: How the file is packed; `size` and `sha256` are of it as it is.
    """

    model_config = ConfigDict(frozen=True)

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


class Dataset(BaseModel):
    """All inspected files of a run and what is wrong with them."""

    model_config = ConfigDict(frozen=True)

    files: tuple[DataFile, ...]
    issues: tuple[Issue, ...] = ()

    @property
    def train(self) -> tuple[DataFile, ...]:
        """The files to train on."""
        return tuple(file for file in self.files if file.role == "train")

    @property
    def validation(self) -> tuple[DataFile, ...]:
        """The files to validate on."""
        return tuple(file for file in self.files if file.role == "validation")

    @property
    def errors(self) -> tuple[Issue, ...]:
        """The issues that stop a launch."""
        return tuple(issue for issue in self.issues if issue.severity == "error")

    def tolerating(self, fraction: float) -> Self:
        """Return the dataset with bad rows as warnings, where a file has few enough of them.

        Args:
            fraction: Share of a file's rows that may be bad, 0 to 1.
        """
        tolerated = {
            str(file.path)
            for file in self.files
            if file.bad_rows and file.bad_rows <= fraction * file.rows
        }
        if not tolerated:
            return self
        # Behind the issues of single lines stands one per code that counts the rest.
        of_rows = {(issue.path, issue.code) for issue in self.issues if issue.line is not None}
        issues = tuple(
            replace(issue, severity="warning")
            if issue.path in tolerated and (issue.path, issue.code) in of_rows
            else issue
            for issue in self.issues
        )
        return self.model_copy(update={"issues": issues})
