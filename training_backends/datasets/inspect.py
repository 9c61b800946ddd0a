"""Find everything that is wrong with data files before the first byte leaves.

Each file is read once, line by line, in constant memory: sizes, digest and row count
come from the same pass as the issues. Bad data raises nothing; it is told in issues.
"""

import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, Literal, NamedTuple

from training_backends.core.config import ClassifierTarget, DataSource, TrainingConfig
from training_backends.core.dataset import DataFile, Dataset, SampleType
from training_backends.core.errors import DatasetError, Issue
from training_backends.datasets.lines import MAX_LINE_BYTES, LineReader
from training_backends.datasets.rules import Finding, RowRules

__all__ = [
    "ISSUES_PER_CODE",
    "LineError",
    "Progress",
    "UploadCheck",
    "check_upload",
    "inspect",
    "inspect_file",
    "raise_for_errors",
]

ISSUES_PER_CODE: Final = 20
"""How many issues of one code a file gets in full; one more says how many there are."""

_BOM: Final = b"\xef\xbb\xbf"
_UTF16: Final = (b"\xff\xfe", b"\xfe\xff")
_GZIP: Final = b"\x1f\x8b"
_PROGRESS_EVERY: Final = 8 << 20

FileRole = Literal["train", "validation"]
Progress = Callable[[Path, int, int], None]
"""Called with the file, the bytes read so far and its size; may raise to stop reading."""


class LineError(NamedTuple):
    """One line that cannot be used, as an upload is answered."""

    line_number: int
    message: str


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


class _Collector:
    """The issues of one file, capped per code."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._issues: list[Issue] = []
        self._counts: Counter[str] = Counter()
        self._severity: dict[str, Literal["error", "warning"]] = {}

    def add(self, line: int | None, finding: Finding) -> None:
        code, field, message, fix, severity = finding
        self._counts[code] += 1
        if severity == "error" or code not in self._severity:
            self._severity[code] = severity
        if self._counts[code] <= ISSUES_PER_CODE:
            self._issues.append(
                Issue(
                    code=code,
                    message=message,
                    path=self._path,
                    line=line,
                    field=field,
                    fix=fix,
                    severity=severity,
                )
            )

    def finish(self) -> tuple[Issue, ...]:
        """Return all issues, behind them what the cap left out."""
        for code, count in self._counts.items():
            if count > ISSUES_PER_CODE:
                more = count - ISSUES_PER_CODE
                self._issues.append(
                    Issue(
                        code=code,
                        message=f"{more:,} more of this kind (`{code}`)",
                        path=self._path,
                        severity=self._severity[code],
                    )
                )
        return tuple(self._issues)


class _FileReader:
    """One pass over one file.

    Attributes:
        whole: Whether the file was read to its end.
    """

    def __init__(
        self,
        path: Path,
        rules: RowRules,
        *,
        max_line: int = MAX_LINE_BYTES,
        on_progress: Progress | None = None,
    ) -> None:
        self._path = path
        self._rules = rules
        self._max_line = max_line
        self._on_progress = on_progress
        self._told = 0
        self._blank = 0
        self._first_blank: int | None = None
        self.size = 0
        self.sha256 = ""
        self.rows = 0
        self.turns = 0
        self.sample_type: SampleType | None = None
        self.whole = False

    def findings(self) -> Iterator[tuple[int | None, Finding]]:
        """Yield what is wrong, with the line; the counts are complete when it ends."""
        problem = _not_a_file(self._path)
        if problem:
            yield None, problem
            return
        try:
            with self._path.open("rb", buffering=0) as file:
                head = file.read(len(_BOM))
                file.seek(0)
                problem = _encoding(head)
                if problem:
                    yield 1, problem
                if not problem or head == _BOM:
                    yield from self._read(file, skip=len(_BOM) if head == _BOM else 0)
        except OSError as error:
            yield None, _unreadable(error)

    def _read(self, file: BinaryIO, *, skip: int) -> Iterator[tuple[int | None, Finding]]:
        reader = LineReader(file, max_line=self._max_line)
        for number, line in enumerate(reader, start=1):
            text = line[skip:] if line and number == 1 else line
            for finding in self._row(number, text):
                yield number, finding
            if reader.size - self._told >= _PROGRESS_EVERY:
                self._tell(reader.size)
        self._tell(reader.size)
        self.size, self.sha256, self.whole = reader.size, reader.sha256, True
        yield from self._whole_file()

    def _row(self, number: int, line: bytes | None) -> Sequence[Finding]:
        if line is None:
            self.rows += 1
            return (_too_long(self._max_line),)
        if not line or line.isspace():
            self._blank += 1
            self._first_blank = self._first_blank or number
            return ()
        self.rows += 1
        sample_type, turns, findings = self._rules.judge(line)
        self.turns += turns
        if sample_type is None or sample_type == self.sample_type:
            return findings
        if self.sample_type is None:
            self.sample_type = sample_type
            return findings
        return (*findings, _mixed(sample_type, self.sample_type))

    def _whole_file(self) -> Iterator[tuple[int | None, Finding]]:
        if not self.rows:
            what = "has only blank lines" if self.size else "is empty"
            fix = "write one JSON object on each line"
            yield None, Finding("empty_file", None, f"the file {what}", fix)
        elif self._blank:
            what = "1 blank line is" if self._blank == 1 else f"{self._blank:,} blank lines are"
            text = f"{what} skipped, the first is this"
            yield self._first_blank, Finding("blank_lines", None, text, None, "warning")

    def _tell(self, done: int) -> None:
        self._told = done
        if self._on_progress:
            self._on_progress(self._path, done, max(done, self._path.stat().st_size))


def inspect(config: TrainingConfig, *, on_progress: Progress | None = None) -> Dataset:
    """Read all data files of a configuration and say what is in them and what is wrong.

    Blocks while it reads: call it in a thread from async code. A file that cannot be read
    at all is missing in `files` and has an issue.
    """
    files: list[DataFile] = []
    issues: list[Issue] = []
    sources: list[tuple[FileRole, DataSource]] = []
    sources += (("train", source) for source in config.data.train)
    sources += (("validation", source) for source in config.data.validation)
    for role, source in sources:
        file, found = inspect_file(
            source.path,
            role=role,
            weight=source.weight,
            targets=config.classifier_targets,
            on_progress=on_progress,
        )
        issues.extend(found)
        if file:
            files.append(file)
    issues.extend(_between_files(files))
    issues.extend(_against_method(config, files))
    return Dataset(files=tuple(files), issues=tuple(issues))


def inspect_file(
    path: Path,
    *,
    role: FileRole = "train",
    weight: float = 1.0,
    targets: Sequence[ClassifierTarget] = (),
    max_line: int = MAX_LINE_BYTES,
    on_progress: Progress | None = None,
) -> tuple[DataFile | None, tuple[Issue, ...]]:
    """Read one data file; no `DataFile` when it cannot be read to its end."""
    reading = _FileReader(path, RowRules(targets), max_line=max_line, on_progress=on_progress)
    collector = _Collector(path)
    bad_lines: set[int] = set()
    for line, finding in reading.findings():
        collector.add(line, finding)
        if line is not None and finding.severity == "error":
            bad_lines.add(line)
    if not reading.whole:
        return None, collector.finish()
    file = DataFile(
        path=path,
        role=role,
        weight=weight,
        size=reading.size,
        sha256=reading.sha256,
        rows=reading.rows,
        bad_rows=len(bad_lines),
        turns=reading.turns,
        sample_type=reading.sample_type,
    )
    return file, collector.finish()


def check_upload(
    path: Path, *, max_errors: int = 10, max_line: int = MAX_LINE_BYTES
) -> UploadCheck:
    """Judge one uploaded file and stop at the `max_errors`-th line that cannot be used."""
    reading = _FileReader(path, RowRules(), max_line=max_line)
    errors: dict[int, str] = {}
    for line, finding in reading.findings():
        if finding.severity == "error":
            text = f"{finding.field}: {finding.message}" if finding.field else finding.message
            errors.setdefault(line or 1, text)
        if len(errors) >= max_errors:
            return UploadCheck(reading.sample_type, None, _line_errors(errors))
    return UploadCheck(reading.sample_type, reading.rows, _line_errors(errors))


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
        hint="Correct the lines named, then try again.",
    )


def _line_errors(errors: dict[int, str]) -> tuple[LineError, ...]:
    return tuple(LineError(line, message) for line, message in sorted(errors.items()))


def _not_a_file(path: Path) -> Finding | None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return _unreadable(error)
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        fix = "name the .jsonl files in it"
        return Finding("not_a_file", None, "this is a directory, not a file", fix)
    return Finding("not_a_file", None, "this is not a regular file", "copy the data to one")


def _unreadable(error: OSError) -> Finding:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        fix = "correct the path; it is relative to the configuration file"
        return Finding("missing_file", None, "there is no such file", fix)
    if isinstance(error, PermissionError):
        fix = "make it readable for the user who runs this"
        return Finding("unreadable_file", None, "the file may not be read", fix)
    return Finding("unreadable_file", None, f"the file cannot be read: {error.strerror}")


def _encoding(head: bytes) -> Finding | None:
    if head == _BOM:
        fix = "save the file as UTF-8 without a byte order mark"
        return Finding("byte_order_mark", None, "the file starts with a byte order mark", fix)
    if head.startswith(_UTF16):
        return Finding("bad_utf8", None, "the file is UTF-16", "save the file as UTF-8")
    if head.startswith(_GZIP):
        return Finding("bad_utf8", None, "the file is compressed", "unpack it first")
    return None


def _too_long(limit: int) -> Finding:
    message = f"the line is longer than {limit >> 20} MiB"
    return Finding("line_too_long", None, message, "write one JSON object on each line")


def _mixed(found: SampleType, first: SampleType) -> Finding:
    message = f"this row is {found}, the file began with {first}"
    return Finding("mixed_formats", None, message, "put each format in a file of its own")


def _between_files(files: Sequence[DataFile]) -> Iterator[Issue]:
    seen: dict[str, DataFile] = {}
    for file in files:
        before = seen.setdefault(file.sha256, file)
        if before is file or not file.size:
            continue
        if before.role != file.role:
            yield Issue(
                code="train_validation_overlap",
                message=f"the same content is in the training file {before.path}",
                path=str(file.path),
                fix="validate on rows that are not trained on",
            )
        else:
            yield Issue(
                code="duplicate_file",
                message=f"the same content is in {before.path}",
                path=str(file.path),
                fix="name it once and give it a weight",
                severity="warning",
            )
    typed = [file for file in files if file.sample_type]
    for file in typed:
        if file.sample_type != typed[0].sample_type:
            yield Issue(
                code="mixed_formats",
                message=f"the file is {file.sample_type}, {typed[0].path} is "
                f"{typed[0].sample_type}",
                path=str(file.path),
                fix="train on one format at a time",
            )


def _against_method(config: TrainingConfig, files: Sequence[DataFile]) -> Iterator[Issue]:
    if config.method == "dpo":
        yield Issue(
            code="unsupported_format",
            message="preference pairs cannot be inspected yet",
            field="method",
            fix="use method: sft or classifier",
        )
        return
    for file in files:
        is_classifier = file.sample_type == "classifier"
        if file.sample_type and is_classifier != (config.method == "classifier"):
            yield Issue(
                code="wrong_format",
                message=f"method {config.method} cannot train on {file.sample_type} rows",
                path=str(file.path),
                field="method",
                fix="use method: classifier" if is_classifier else "use method: sft",
            )
