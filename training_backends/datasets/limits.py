"""Hold data files against one another and against a provider's limits."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from training_backends.core.config import TrainingConfig
from training_backends.core.data_rules import Dialect
from training_backends.core.dataset import DataFile
from training_backends.core.errors import Issue
from training_backends.datasets.findings import brief, short

__all__ = ["against_limits", "against_method", "between_files"]

_METHODS: Final[Mapping[str, str]] = MappingProxyType(
    {"instruct": "sft", "pretrain": "sft", "classifier": "classifier", "preference": "dpo"}
)
"""The method for each sample type."""


def between_files(files: Sequence[DataFile]) -> Iterator[Issue]:
    """Tell of content given twice, and of files whose rows cannot be used together."""
    seen: dict[str, DataFile] = {}
    for number, file in enumerate(files):
        before = seen.setdefault(file.sha256 or str(number), file)
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
    yield from _single_labels([file for file in files if file.role == "train"])
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


def _single_labels(files: Sequence[DataFile]) -> Iterator[Issue]:
    """Tell of targets of a classifier that have the same label in all rows."""
    labelled = [file for file in files if file.sample_type == "classifier"]
    labels: dict[str, Counter[str]] = {}
    for file in labelled:
        for target, counts in file.summary.labels.items():
            labels.setdefault(target, Counter()).update(counts)
    rows = sum(file.rows for file in labelled)
    for target, found in labels.items():
        # Where some rows have none of the labels, there is something to tell apart.
        if len(found) == 1 and found.total() >= rows:
            yield Issue(
                code="single_label",
                message=f"every row has the label {short(next(iter(found)))} for {short(target)}, "
                "so there is nothing to learn",
                field=f"labels.{brief(target)}",
                fix="add rows with other labels",
                severity="warning",
            )


def against_limits(
    files: Sequence[DataFile], dialect: Dialect, *, cuts_files: bool = True
) -> Iterator[Issue]:
    """Tell of files that are larger than a provider takes.

    Args:
        cuts_files: Training files that are too large are cut at launch.
    """
    for issue in (*_too_large(files, dialect, cuts_files=cuts_files), *_validation(files, dialect)):
        level = dialect.levels.get(issue.code, issue.severity)
        if level != "ignored":
            yield replace(issue, severity=level)


def _too_large(files: Sequence[DataFile], dialect: Dialect, *, cuts_files: bool) -> Iterator[Issue]:
    most = dialect.max_file_bytes
    for file in files:
        if most is None or file.size <= most:
            continue
        is_cut = cuts_files and file.role == "train"
        yield Issue(
            code="file_too_large",
            message=f"the file has {file.size:,} bytes, {dialect.name} takes {most:,}"
            + ("; it is cut at launch" if is_cut else ""),
            path=str(file.path),
            fix=None if is_cut else "cut it with `training-backends data shard`",
            severity="warning" if is_cut else "error",
        )


def _validation(files: Sequence[DataFile], dialect: Dialect) -> Iterator[Issue]:
    train, validation = (
        sum(file.size for file in files if file.role == role) for role in ("train", "validation")
    )
    share = dialect.validation_max_share
    limits = {}
    if dialect.validation_max_bytes is not None:
        limits[dialect.validation_max_bytes] = ""
    if share is not None and train:
        limits[int(train * share)] = f", {share:.0%} of the training data"
    if limits and validation > min(limits):
        yield Issue(
            code="validation_too_large",
            message=f"there are {validation:,} bytes of validation data, {dialect.name} takes "
            f"{min(limits):,}{limits[min(limits)]}",
            field="data.validation",
            fix="validate on fewer rows",
        )


def against_method(config: TrainingConfig, files: Sequence[DataFile]) -> Iterator[Issue]:
    """Tell of files that cannot be trained on as the configuration wants it."""
    for file in files:
        if file.packing != "plain":
            yield Issue(
                code="packed_file",
                message=f"the file is packed ({file.packing}), training takes plain JSON Lines",
                path=str(file.path),
                fix="unpack it; `training-backends data repair` does, too",
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
