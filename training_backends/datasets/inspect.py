"""Validate data files before anything is uploaded.

Each file is read once, in constant memory: size and row count come from the same pass as the
issues, which are reported as they are found, and so does the digest. Large files are checked by
several processes; the result does not depend on how many. Bad data never raises; it is reported as
issues.

With a cache, the result is kept until a file, the rules or this package changes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

from pydantic import ValidationError

from training_backends import __version__
from training_backends.core.config import ClassifierTarget, DataSource, TrainingConfig
from training_backends.core.data_rules import ProviderFormat
from training_backends.core.dataset import DataFile, Dataset, SampleType
from training_backends.core.errors import DatasetError, Issue
from training_backends.core.escape import plural
from training_backends.core.files import Stamp, keep_digest, settled_stamp
from training_backends.datasets.cache import ResultCache
from training_backends.datasets.file_report import Collector, FileRole
from training_backends.datasets.findings import brief, short
from training_backends.datasets.open_file import STDIN, unreadable
from training_backends.datasets.provider_formats import MISTRAL
from training_backends.datasets.scan import NOT_SEARCHED, Progress, Reading
from training_backends.datasets.scan_part import KEPT_PER_CODE, MAX_LINE_BYTES, packed_rules

__all__ = [
    "ISSUES_PER_CODE",
    "LineError",
    "OnIssue",
    "Progress",
    "UploadCheck",
    "against_limits",
    "against_method",
    "between_files",
    "check_upload",
    "inspect",
    "inspect_file",
    "inspect_files",
    "list_files",
    "raise_for_errors",
]

_VERSION: Final = f"inspection 1 {__version__}"
"""Increment the number when the rules or the findings change within a version."""

_METHODS: Final[Mapping[str, str]] = MappingProxyType(
    {"instruct": "sft", "pretrain": "sft", "classifier": "classifier", "preference": "dpo"}
)
"""Training method of each sample type."""


def between_files(files: Sequence[DataFile]) -> Iterator[Issue]:
    """Yield issues across files: duplicate content, mixed formats and single labels."""
    seen: dict[str, DataFile] = {}
    for number, file in enumerate(files):
        before = seen.setdefault(file.sha256 or str(number), file)
        if before is file or not file.size:
            continue
        if before.role != file.role:
            yield Issue(
                code="train_validation_overlap",
                message=f"same content as the training file {before.path}",
                path=str(file.path),
                fix="use validation rows that are not in the training data",
            )
        else:
            yield Issue(
                code="duplicate_file",
                message=f"same content as {before.path}",
                path=str(file.path),
                fix="list it once and set its weight",
                severity="warning",
            )
    yield from _single_labels([file for file in files if file.role == "train"])
    typed = [file for file in files if file.sample_type]
    for file in typed:
        if file.sample_type != typed[0].sample_type:
            yield Issue(
                code="mixed_formats",
                message=f"the file is {file.sample_type}, but {typed[0].path} is "
                f"{typed[0].sample_type}",
                path=str(file.path),
                fix="train on one format at a time",
            )


def _single_labels(files: Sequence[DataFile]) -> Iterator[Issue]:
    """Yield a warning for each classifier target with the same label in all rows."""
    labelled = [file for file in files if file.sample_type == "classifier"]
    labels: dict[str, Counter[str]] = {}
    for file in labelled:
        for target, counts in file.summary.labels.items():
            labels.setdefault(target, Counter()).update(counts)
    rows = sum(file.rows for file in labelled)
    for target, found in labels.items():
        # Rows without the label are a second class.
        if len(found) == 1 and found.total() >= rows:
            yield Issue(
                code="single_label",
                message=f"every row has the label {short(next(iter(found)))} for {short(target)}, "
                "so there is nothing to learn",
                field=f"labels.{brief(target)}",
                fix="add rows with other labels",
                severity="warning",
            )


def against_limits(files: Sequence[DataFile], provider_format: ProviderFormat) -> Iterator[Issue]:
    """Yield issues for files that exceed the provider's size limits."""
    for issue in (
        *_too_large(files, provider_format),
        *_validation(files, provider_format),
    ):
        level = provider_format.levels.get(issue.code, issue.severity)
        if level != "ignored":
            yield replace(issue, severity=level)


def _too_large(files: Sequence[DataFile], provider_format: ProviderFormat) -> Iterator[Issue]:
    most = provider_format.max_file_bytes
    for file in files:
        if most is None or file.size <= most:
            continue
        is_cut = provider_format.shards and file.role == "train"
        yield Issue(
            code="file_too_large",
            message=f"the file is {file.size:,} bytes; {provider_format.name} allows {most:,}"
            + ("; it is sharded at launch" if is_cut else ""),
            path=str(file.path),
            fix=None if is_cut else "use fewer rows",
            severity="warning" if is_cut else "error",
        )


def _validation(files: Sequence[DataFile], provider_format: ProviderFormat) -> Iterator[Issue]:
    train, validation = (
        sum(file.size for file in files if file.role == role) for role in ("train", "validation")
    )
    share = provider_format.validation_max_share
    limits = {}
    if provider_format.validation_max_bytes is not None:
        limits[provider_format.validation_max_bytes] = ""
    if share is not None and train:
        limits[int(train * share)] = f", {share:.0%} of the training data"
    if limits and validation > min(limits):
        yield Issue(
            code="validation_too_large",
            message=f"the validation data is {validation:,} bytes; {provider_format.name} allows "
            f"{min(limits):,}{limits[min(limits)]}",
            field="data.validation",
            fix="use fewer validation rows",
        )


def against_method(config: TrainingConfig, files: Sequence[DataFile]) -> Iterator[Issue]:
    """Yield issues for files that do not match the configured method, if it is a known one."""
    if config.method not in _METHODS.values():
        return
    for file in files:
        if file.packing != "plain":
            yield Issue(
                code="packed_file",
                message=f"the file is compressed ({file.packing}); training requires JSON Lines",
                path=str(file.path),
                fix="decompress it, or convert it with `training-backends data repair`",
            )
        wanted = _METHODS.get(file.sample_type or "", config.method)
        if wanted != config.method:
            yield Issue(
                code="wrong_format",
                message=f"method {config.method} cannot train on {file.sample_type} rows",
                path=str(file.path),
                field="method",
                fix=f"use method: {wanted}",
            )


ISSUES_PER_CODE: Final = KEPT_PER_CODE
"""Maximum number of issues per code and file; one more has the number of the others."""

OnIssue = Callable[[Issue], None]
"""Called with each issue as it is found; may raise to stop reading."""


class LineError(NamedTuple):
    """An invalid line of an upload, with the fix."""

    line_number: int
    message: str
    fix: str | None = None


class UploadCheck(NamedTuple):
    """Result of validating an uploaded file.

    Attributes:
        num_lines: Number of rows, without blank lines; None if reading stopped early.
        errors: The first invalid lines; a file that is not JSON Lines has one error on
            line 1.
    """

    sample_type: SampleType | None
    num_lines: int | None
    errors: tuple[LineError, ...]


def inspect(
    config: TrainingConfig,
    *,
    provider_format: ProviderFormat = MISTRAL,
    on_issue: OnIssue | None = None,
    on_progress: Progress | None = None,
    processes: int | None = None,
    cache: Path | None = None,
) -> Dataset:
    """Summarize and validate all data files of a configuration that are on this machine.

    Blocks while reading: call it in a thread from async code. A file that cannot be read
    completely is missing from `files` and has an issue.

    Args:
        provider_format: The provider format, with its limits.
        on_issue: Called with each issue as it is found, ordered by line within a file.
        processes: Maximum number of processes; None chooses by size.
        cache: Directory of kept results, errors included; None always reads the files.
    """
    train, validation = (
        [source for source in sources if source.kind == "file"]
        for sources in (config.data.train, config.data.validation)
    )
    found = inspect_files(
        train,
        validation,
        provider_format=provider_format,
        targets=config.classifier_targets,
        on_issue=on_issue,
        on_progress=on_progress,
        processes=processes,
        cache=cache,
    )
    more = _collected(against_method(config, found.files), on_issue)
    return found.model_copy(update={"issues": (*found.issues, *more)})


def inspect_files(
    train: Sequence[DataSource],
    validation: Sequence[DataSource] = (),
    *,
    provider_format: ProviderFormat = MISTRAL,
    targets: Sequence[ClassifierTarget] = (),
    on_issue: OnIssue | None = None,
    on_progress: Progress | None = None,
    processes: int | None = None,
    cache: Path | None = None,
) -> Dataset:
    """Summarize and validate files without a configuration; "-" is standard input."""
    stamps = _stamps([*train, *validation]) if cache else None
    roles = [
        [(str(each.local_path), each.weight) for each in files] for files in (train, validation)
    ]
    key = f"{_VERSION}\n{provider_format}\n{[*targets]}\n{roles}\n{stamps}"
    if stamps and (kept := _kept(ResultCache(cache), key)):
        _keep_digests(stamps, kept)
        _collected(iter(kept.issues), on_issue)
        if on_progress:
            for file in kept.files:
                on_progress(file.path, file.size, file.size)
        return kept
    collectors = [
        Collector(each.local_path, "train", each.weight, provider_format) for each in train
    ]
    collectors += [
        Collector(each.local_path, "validation", each.weight, provider_format)
        for each in validation
    ]
    reading = Reading(
        collectors,
        rules=packed_rules(provider_format, targets),
        max_line=MAX_LINE_BYTES,
        on_progress=on_progress,
    )

    def issues() -> Iterator[Issue]:
        yield from reading.issues(processes)
        yield from between_files(reading.files)
        yield from against_limits(reading.files, provider_format)

    found = _collected(issues(), on_issue)
    dataset = Dataset(files=tuple(reading.files), issues=found)
    if stamps and len(dataset.files) == len(stamps) and stamps == _stamps([*train, *validation]):
        _keep_digests(stamps, dataset)
        if not any(issue.code == NOT_SEARCHED for issue in found):
            with suppress(ValueError):  # a file name that is not UTF-8
                ResultCache(cache).keep(key, dataset.model_dump_json().encode())
    return dataset


def list_files(config: TrainingConfig) -> Dataset:
    """Return the data files of a configuration that are on this machine, without reading them."""
    files: list[DataFile] = []
    issues: list[Issue] = []
    roles: dict[FileRole, Sequence[DataSource]] = {
        "train": config.data.train,
        "validation": config.data.validation,
    }
    for role, sources in roles.items():
        for source in sources:
            if source.path is None:
                continue
            try:
                size = source.path.stat().st_size
            except OSError as error:
                issues.append(unreadable(source.path, error))
                continue
            file = DataFile(path=source.path, role=role, weight=source.weight, size=size, rows=0)
            files.append(file)
    return Dataset(files=tuple(files), issues=tuple(issues))


def _stamps(sources: Sequence[DataSource]) -> list[Stamp] | None:
    """Return the stamps of the files; None if one of them cannot be known by its stamp."""
    stamps: list[Stamp] = []
    for source in sources:
        with suppress(OSError):
            if source.local_path != STDIN and (
                stamp := settled_stamp(source.local_path, wait=True)
            ):
                stamps.append(stamp)
    return stamps if len(stamps) == len(sources) else None


def _kept(cache: ResultCache, key: str) -> Dataset | None:
    content = cache.find(key)
    with suppress(ValidationError):
        return None if content is None else Dataset.model_validate_json(content)
    return None


def _keep_digests(stamps: Sequence[Stamp], dataset: Dataset) -> None:
    for stamp, file in zip(stamps, dataset.files, strict=True):
        if file.sha256:
            keep_digest(stamp, file.sha256)


def _collected(issues: Iterator[Issue], on_issue: OnIssue | None) -> tuple[Issue, ...]:
    collected = []
    for issue in issues:
        collected.append(issue)
        if on_issue:
            on_issue(issue)
    return tuple(collected)


def inspect_file(
    path: Path,
    *,
    provider_format: ProviderFormat = MISTRAL,
    role: FileRole = "train",
    weight: float = 1.0,
    targets: Sequence[ClassifierTarget] = (),
    max_line: int = MAX_LINE_BYTES,
    on_progress: Progress | None = None,
    processes: int | None = None,
) -> tuple[DataFile | None, tuple[Issue, ...]]:
    """Validate one data file; the `DataFile` is None if it cannot be read completely."""
    reading = Reading(
        [Collector(path, role, weight, provider_format)],
        rules=packed_rules(provider_format, targets),
        max_line=max_line,
        on_progress=on_progress,
    )
    issues = tuple(reading.issues(processes))
    return next(iter(reading.files), None), issues


def check_upload(
    path: Path,
    *,
    provider_format: ProviderFormat = MISTRAL,
    max_errors: int = 10,
    max_line: int = MAX_LINE_BYTES,
) -> UploadCheck:
    """Validate an uploaded file; stop at the `max_errors`-th invalid line."""
    collector = Collector(path, "train", 1.0, provider_format)
    reading = Reading(
        [collector], rules=packed_rules(provider_format), max_line=max_line, plain_only=True
    )
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
    """Raise `DatasetError` if a dataset has errors.

    Raises:
        DatasetError: There are errors; it has all issues, including warnings.
    """
    errors = dataset.errors
    if not errors:
        return
    files = len({issue.path for issue in errors})
    count = f"{plural(len(errors), 'error')} in {plural(files, 'file')}"
    raise DatasetError(
        f"The training data is invalid: {count}.",
        issues=dataset.issues,
        hint="Fix the lines listed, then try again."
        if any(issue.line for issue in errors)
        else None,
    )


def _in_order(errors: dict[int, LineError]) -> tuple[LineError, ...]:
    return tuple(errors[line] for line in sorted(errors))
