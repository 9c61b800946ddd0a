"""Merge the verdicts on the parts of a file, in order, into issues and a `DataFile`."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, cast

from training_backends.core.data_rules import ProviderFormat
from training_backends.core.dataset import DataFile, SampleType, Summary
from training_backends.core.errors import Issue
from training_backends.core.files import Stamp, stamp_of
from training_backends.datasets.check_fast import file_findings
from training_backends.datasets.findings import Facts, Finding
from training_backends.datasets.scan_part import KEPT_PER_CODE, End, Verdict

__all__ = ["MOST_BLANK_LINES", "Collector", "FileRole"]

FileRole = Literal["train", "validation"]

_JSONL: Final = "write one JSON object per line"

MOST_BLANK_LINES: Final = 1_000_000
"""Consecutive blank lines; a small compressed file can contain billions."""


class Collector:
    """Collects the counts and issues of one file; issues are limited per code.

    Attributes:
        failed: The file could not be read completely.
        lines: Number of lines so far.
        rows: Number of non-blank lines so far.
        sample_type: Type of the first row whose type was recognized.
    """

    def __init__(
        self, path: Path, role: FileRole, weight: float, provider_format: ProviderFormat
    ) -> None:
        self.path = path
        self.role = role
        self.failed: bool = False
        self.lines: int = 0
        self.rows: int = 0
        self.sample_type: SampleType | None = None
        self._weight = weight
        self._provider_format = provider_format
        self._facts = Facts()
        self._invalid_rows = self._blank = self._blank_in_a_row = 0
        self._first_blank: int | None = None
        self._has_crlf = False
        self._sizes: Counter[int] = Counter()
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._reported: Counter[str] = Counter()

    def take(self, verdict: Verdict) -> Iterator[Issue]:
        """Add the verdict on the next part and yield its issues by line."""
        for code, (warnings, errors) in verdict.counts.items():
            self._counts[code] += warnings + errors
            self._errors[code] += errors
        found = [*verdict.found, *self._mixed(verdict), *self._line_ends(verdict)]
        found.sort(key=lambda each: each[0])
        for line, finding in found:
            yield from self._report(finding, self.lines + line)
        if verdict.first_blank:
            self._first_blank = self._first_blank or self.lines + verdict.first_blank
        self._blank_in_a_row = 0 if verdict.rows else self._blank_in_a_row + verdict.blank
        if self._blank_in_a_row > MOST_BLANK_LINES:
            self.failed = True
            text = f"more than {MOST_BLANK_LINES:,} blank lines in a row; the rest was not read"
            yield from self.add(Finding("only_blank_lines", None, text, _JSONL))
        self.lines += verdict.lines
        self.rows += verdict.rows
        self._invalid_rows += verdict.bad_rows
        self._blank += verdict.blank
        self._sizes.update(verdict.sizes)
        self._facts.merge(verdict.facts)

    def _mixed(self, verdict: Verdict) -> Iterator[tuple[int, Finding]]:
        """Yield a finding for rows of another type than the first."""
        if verdict.kinds and self.sample_type is None:
            self.sample_type = cast("SampleType", next(iter(verdict.kinds)))
        for name, kind in verdict.kinds.items():
            if name == self.sample_type:
                continue
            self._counts["mixed_formats"] += kind.rows
            self._errors["mixed_formats"] += kind.rows
            self._invalid_rows += kind.good
            text = f"this row is {name}, but the file starts with {self.sample_type} rows"
            finding = Finding("mixed_formats", None, text, "put each format in its own file")
            yield from ((line, finding) for line in kind.first)

    def _line_ends(self, verdict: Verdict) -> Iterator[tuple[int, Finding]]:
        if verdict.first_crlf and not self._has_crlf:
            self._has_crlf = True
            self._counts["line_ends"] += 1
            text = "CRLF line endings, first on this line"
            fix = "use LF"
            yield verdict.first_crlf, Finding("line_ends", None, text, fix, "warning")

    def end(self, end: End) -> Iterator[Issue]:
        """Yield the issues of the file as a whole, and the number of issues not shown."""
        if end.stamp is not None and not self._is_unchanged(end.stamp):
            self.failed = True
            fix = "try again when no other process is writing to it"
            yield from self.add(
                Finding("changed_file", None, "the file changed while it was read", fix)
            )
        elif not self.rows:
            what = "has only blank lines" if end.size else "is empty"
            yield from self.add(Finding("empty_file", None, f"the file {what}", _JSONL))
        else:
            if self._blank:
                what = (
                    "1 blank line"
                    if self._blank == 1
                    else f"{self._blank:,} blank lines, first here"
                )
                text = f"skipped {what}"
                finding = Finding("blank_lines", None, text, None, "warning")
                yield from self.add(finding, self._first_blank)
            for finding in file_findings(self._facts, self._provider_format):
                # Unreadable rows count towards the minimum.
                enough = self.role != "train" or self.rows >= self._provider_format.min_rows
                if finding.code != "too_few_rows" or not enough:
                    yield from self.add(finding)
        yield from self.rest()

    def _is_unchanged(self, stamp: Stamp) -> bool:
        try:
            # Without the time of the last status change: a new mode is no new content.
            return stamp_of(self.path)[:-1] == stamp[:-1]
        except OSError:
            return False

    def add(self, finding: Finding, line: int | None = None) -> Iterator[Issue]:
        """Yield an issue of the file or of a line, with the severity set by the provider format."""
        level = self._provider_format.levels.get(finding.code, finding.severity)
        if level != "ignored":
            self._counts[finding.code] += 1
            self._errors[finding.code] += level == "error"
            yield from self._report(finding._replace(severity=level), line)

    def leave(self, code: str, more: int, severity: Literal["error", "warning"]) -> None:
        """Count findings without an issue of their own; `rest` reports their number."""
        level = self._provider_format.levels.get(code, severity)
        if level != "ignored":
            self._counts[code] += more
            self._errors[code] += more * (level == "error")

    def rest(self) -> Iterator[Issue]:
        """Yield for each code the number of issues not shown, once."""
        for code, count in self._counts.items():
            if more := count - self._reported[code]:
                self._reported[code] = count
                yield Issue(
                    code=code,
                    message=f"{more:,} more like this (`{code}`)",
                    path=str(self.path),
                    severity="error" if self._errors[code] else "warning",
                )

    @property
    def findings(self) -> dict[str, int]:
        """Number of findings by code."""
        return {code: count for code, count in self._counts.items() if count}

    def _report(self, finding: Finding, line: int | None) -> Iterator[Issue]:
        code, field, message, fix, severity = finding
        if self._reported[code] < KEPT_PER_CODE:
            self._reported[code] += 1
            yield Issue(
                code=code,
                message=message,
                path=str(self.path),
                line=line,
                field=field,
                fix=fix,
                severity=severity,
            )

    def file(self, end: End) -> DataFile:
        """Return the summary of the file."""
        facts = self._facts
        labels: dict[str, dict[str, int]] = {}
        for (target, label), rows in facts.labels.items():
            labels.setdefault(target, {})[label] = rows
        summary = Summary(
            lines=end.unpacked,
            formats=dict(facts.formats),
            roles=dict(facts.roles),
            tool_rows=facts.tool_rows,
            tool_calls=facts.tool_calls,
            image_rows=facts.image_rows,
            images=facts.images,
            weighted_rows=facts.weighted_rows,
            longest_row=facts.longest_row,
            row_bytes=tuple((2**bits - 1, rows) for bits, rows in sorted(self._sizes.items())),
            labels=labels,
            findings=self.findings,
        )
        return DataFile(
            path=self.path,
            role=self.role,
            weight=self._weight,
            size=end.size,
            sha256=end.sha256,
            rows=self.rows,
            bad_rows=self._invalid_rows,
            turns=facts.turns,
            sample_type=self.sample_type,
            packing=end.packing,
            summary=summary,
        )
