"""Find everything that is wrong with data files before the first byte leaves.

Each file is read once, in constant memory: size and row count come from the same pass as the
issues, which are told as they are found. Only files that may be the same, being of one size, are
read again, for their digests. Large files are judged by several processes;
what is found does not depend on how many. Bad data raises nothing; it is told in issues.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple

from training_backends.core.config import ClassifierTarget, DataSource, TrainingConfig
from training_backends.core.data_rules import Dialect
from training_backends.core.dataset import DataFile, Dataset, SampleType
from training_backends.core.errors import DatasetError, Issue
from training_backends.datasets.dialects import MISTRAL
from training_backends.datasets.file_report import Collector, FileRole
from training_backends.datasets.limits import against_limits, against_method, between_files
from training_backends.datasets.lines import MAX_LINE_BYTES
from training_backends.datasets.scan import Progress, Reading
from training_backends.datasets.scan_part import KEPT_PER_CODE, packed_rules

__all__ = [
    "ISSUES_PER_CODE",
    "LineError",
    "OnIssue",
    "Progress",
    "UploadCheck",
    "check_upload",
    "inspect",
    "inspect_file",
    "inspect_files",
    "raise_for_errors",
]

ISSUES_PER_CODE: Final = KEPT_PER_CODE
"""How many issues of one code a file gets in full; one more says how many there are."""

OnIssue = Callable[[Issue], None]
"""Called with each issue as it is found; may raise to stop reading."""


class LineError(NamedTuple):
    """One line that cannot be used, and what to do about it, as an upload is answered."""

    line_number: int
    message: str
    fix: str | None = None


class UploadCheck(NamedTuple):
    """What an uploaded file holds.

    Attributes:
        num_lines: Rows, blank lines not counted; None when reading stopped at an error.
        errors: The first lines that cannot be used; a file that is no JSON Lines at all
            has one error on line 1.
    """

    sample_type: SampleType | None
    num_lines: int | None
    errors: tuple[LineError, ...]


def inspect(
    config: TrainingConfig,
    *,
    dialect: Dialect = MISTRAL,
    on_issue: OnIssue | None = None,
    on_progress: Progress | None = None,
    processes: int | None = None,
) -> Dataset:
    """Read all data files of a configuration and say what is in them and what is wrong.

    Blocks while it reads: call it in a thread from async code. A file that cannot be read
    to its end is missing in `files` and has an issue.

    Args:
        dialect: Whose rules and limits the data is held against.
        on_issue: Told of each issue at once, those of a file by line.
        processes: How many may judge rows; None: as many as are worth it.
    """
    found = inspect_files(
        config.data.train,
        config.data.validation,
        dialect=dialect,
        targets=config.classifier_targets,
        on_issue=on_issue,
        on_progress=on_progress,
        processes=processes,
    )
    more = _all_told(against_method(config, found.files), on_issue)
    return found.model_copy(update={"issues": (*found.issues, *more)})


def inspect_files(
    train: Sequence[DataSource],
    validation: Sequence[DataSource] = (),
    *,
    dialect: Dialect = MISTRAL,
    targets: Sequence[ClassifierTarget] = (),
    on_issue: OnIssue | None = None,
    on_progress: Progress | None = None,
    processes: int | None = None,
) -> Dataset:
    """Do the same for files without a configuration; "-" is standard input."""
    collectors = [Collector(each.path, "train", each.weight, dialect) for each in train]
    collectors += [Collector(each.path, "validation", each.weight, dialect) for each in validation]
    reading = Reading(
        collectors,
        rules=packed_rules(dialect, targets),
        max_line=MAX_LINE_BYTES,
        on_progress=on_progress,
    )

    def issues() -> Iterator[Issue]:
        yield from reading.issues(processes)
        yield from between_files(reading.files)
        yield from against_limits(reading.files, dialect)

    told = _all_told(issues(), on_issue)
    return Dataset(files=tuple(reading.files), issues=told)


def _all_told(issues: Iterator[Issue], on_issue: OnIssue | None) -> tuple[Issue, ...]:
    told = []
    for issue in issues:
        told.append(issue)
        if on_issue:
            on_issue(issue)
    return tuple(told)


def inspect_file(
    path: Path,
    *,
    dialect: Dialect = MISTRAL,
    role: FileRole = "train",
    weight: float = 1.0,
    targets: Sequence[ClassifierTarget] = (),
    max_line: int = MAX_LINE_BYTES,
    on_progress: Progress | None = None,
    processes: int | None = None,
) -> tuple[DataFile | None, tuple[Issue, ...]]:
    """Read one data file; no `DataFile` when it cannot be read to its end."""
    reading = Reading(
        [Collector(path, role, weight, dialect)],
        rules=packed_rules(dialect, targets),
        max_line=max_line,
        on_progress=on_progress,
    )
    issues = tuple(reading.issues(processes))
    return next(iter(reading.files), None), issues


def check_upload(
    path: Path,
    *,
    dialect: Dialect = MISTRAL,
    max_errors: int = 10,
    max_line: int = MAX_LINE_BYTES,
) -> UploadCheck:
    """Judge one uploaded file and stop at the `max_errors`-th line that cannot be used."""
    collector = Collector(path, "train", 1.0, dialect)
    reading = Reading([collector], rules=packed_rules(dialect), max_line=max_line, plain_only=True)
    errors: dict[int, LineError] = {}
    with closing(reading.issues_of_rows()) as issues:
        for issue in issues:
            if issue.severity == "error":
                text = f"{issue.field}: {issue.message}" if issue.field else issue.message
                line = issue.line or 1
                errors.setdefault(line, LineError(line, text, issue.fix))
            if len(errors) >= max_errors:
                return UploadCheck(collector.sample_type, None, _in_order(errors))
    return UploadCheck(collector.sample_type, collector.rows, _in_order(errors))


def raise_for_errors(dataset: Dataset) -> None:
    """Do nothing for usable data.

    Raises:
        DatasetError: There are errors; it carries all issues, warnings too.
    """
    errors = dataset.errors
    if not errors:
        return
    files = len({issue.path for issue in errors})
    count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
    place = "1 file" if files == 1 else f"{files} files"
    raise DatasetError(
        f"The training data cannot be used: {count} in {place}.",
        issues=dataset.issues,
        hint="Correct the lines named, then try again."
        if any(issue.line for issue in errors)
        else None,
    )


def _in_order(errors: dict[int, LineError]) -> tuple[LineError, ...]:
    return tuple(errors[line] for line in sorted(errors))
