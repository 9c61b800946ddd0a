"""Output of the `data` commands: text on stderr, JSON on stdout."""

import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any, Final, Self

import yaml
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape

from training_backends.cli.exit_codes import Interrupted
from training_backends.cli.views.render import (
    FileBars,
    console,
    issue_document,
    show_issues,
    show_text,
)
from training_backends.core.data_rules import ProviderFormat
from training_backends.core.dataset import DataFile, Dataset
from training_backends.core.errors import Issue
from training_backends.core.redaction import redact, redact_value
from training_backends.datasets.repair import REPAIRS, Repair, Repaired
from training_backends.datasets.shard import ShardFile
from training_backends.datasets.split import Split
from training_backends.datasets.write import Progress as OnProgress
from training_backends.tokens import TokenCount

__all__ = [
    "InspectView",
    "JsonList",
    "JsonRepairs",
    "ShownRepairs",
    "bar",
    "show_data",
    "show_shards",
    "show_split",
    "write_lists",
]

_MOST_LINES = 50
_MEMORY = 1 << 20


@contextmanager
def bar(out: Console, what: str) -> Iterator[OnProgress]:
    """Show progress per file, and report Ctrl-C as `Interrupted`.

    The bar is shown only on a terminal.
    """
    with FileBars(out=out) as bars:
        try:
            yield partial(bars.show, what)
        except KeyboardInterrupt:
            raise Interrupted("Interrupted; no partial files were left.") from None


class ShownRepairs:
    """Prints the first repairs and issues of one file and counts the others."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._repairs = 0
        self._issues: list[Issue] = []
        self._more = 0

    def repair(self, done: Repair) -> None:
        """Print a repair, up to the limit."""
        self._repairs += 1
        if self._repairs <= _MOST_LINES:
            self._out.print(f"  line {done.line}: {escape(redact(done.message))}")

    def issue(self, issue: Issue) -> None:
        """Store an issue for `finish`, up to the limit."""
        if len(self._issues) < _MOST_LINES:
            self._issues.append(issue)
        else:
            self._more += 1

    def finish(self, done: Repaired) -> None:
        """Print the summary of the file."""
        out = self._out
        self._show_more(self._repairs - _MOST_LINES)
        if self._issues:
            out.print("  cannot be repaired:")
            show_issues(self._issues, out)
            self._show_more(self._more)
        if done.source == done.target and not done.backup:
            out.print(f"{escape(str(done.source))}: nothing to repair")
        else:
            what = f"{done.rows:,} rows read, {done.written:,} written to {done.target}"
            out.print(f"{escape(f'{done.source}: {what}')}")
        for code, what in REPAIRS.items():
            if count := done.counts.get(code):
                out.print(f"  {what}: {count:,}")
        if done.invalid:
            out.print(f"  [red]rows still invalid: {done.invalid:,}[/]")
        if done.backup:
            out.print(f"  original backed up to {escape(str(done.backup))}")

    def _show_more(self, count: int) -> None:
        if count > 0:
            self._out.print(f"  … and {count:,} more (use --json to list all)")


class JsonList:
    """A JSON array that is spooled to disk, so that it may exceed memory."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_MEMORY, "w+", encoding="ascii")  # noqa: SIM115
        self._separator = ""

    def add(self, document: Any) -> None:
        """Append an entry."""
        self._file.write(self._separator)
        json.dump(document, self._file, default=str)
        self._separator = ",\n"

    def add_object(self, fields: dict[str, Any], **lists: "JsonList") -> None:
        """Append an object; `lists` become its array fields."""
        self._file.write(self._separator)
        _write_object(self._file, fields, lists)
        self._separator = ",\n"

    def copy_to(self, file: IO[str]) -> None:
        """Write the array to `file`."""
        file.write("[")
        self._file.seek(0)
        shutil.copyfileobj(self._file, file)
        file.write("]")


def write_lists(fields: dict[str, Any], **lists: JsonList) -> None:
    """Write the command's JSON document to stdout."""
    _write_object(sys.stdout, fields, lists)
    sys.stdout.write("\n")


def _write_object(file: IO[str], fields: dict[str, Any], lists: dict[str, JsonList]) -> None:
    file.write("{")
    for name, value in fields.items():
        file.write(f"{json.dumps(name)}: {json.dumps(value, default=str)}, ")
    for number, (name, each) in enumerate(lists.items()):
        file.write(f"{', ' if number else ''}{json.dumps(name)}: ")
        each.copy_to(file)
    file.write("}")


class JsonRepairs:
    """Collects the repairs and issues of one file for the JSON document."""

    def __init__(self, files: JsonList) -> None:
        self._files = files
        self._repairs = JsonList()
        self._issues = JsonList()

    def repair(self, done: Repair) -> None:
        """Add a repair."""
        self._repairs.add(redact_value(done._asdict()))

    def issue(self, issue: Issue) -> None:
        """Add an issue."""
        self._issues.add(issue_document(issue))

    def finish(self, done: Repaired) -> None:
        """Append the file to the document."""
        fields = {
            "source": done.source,
            "target": done.target,
            "backup": done.backup,
            "rows": done.rows,
            "written": done.written,
            "invalid": done.invalid,
            "counts": dict(done.counts),
        }
        self._files.add_object(fields, repairs=self._repairs, issues=self._issues)


def show_split(found: Split, out: Console) -> None:
    """Print both parts of a split file."""
    out.print(f"{escape(str(found.source))}:")
    for side in (found.train, found.validation):
        if side:
            _show_file(side.path, side.rows, side.size, out)


def show_shards(source: Path, parts: Sequence[ShardFile], out: Console) -> None:
    """Print the shards of a file."""
    count = "1 file" if len(parts) == 1 else f"{len(parts):,} files"
    out.print(f"{escape(str(source))}: {count}")
    for part in parts:
        _show_file(part.path, part.rows, part.size, out)


def _show_file(path: Path, rows: int, size: int, out: Console) -> None:
    out.print(f"  {escape(str(path))}  {_many(rows, 'row')}, {decimal(size)}")


def show_data(data: dict[str, Any], out: Console) -> None:
    """Print the `data` section of a configuration."""
    out.print("Add to the configuration:")
    show_text(yaml.safe_dump({"data": data}, sort_keys=False).rstrip(), out)


_BAR: Final = 24
_MOST_LISTED: Final = 8


class InspectView:
    """Prints issues as they are found, then a summary; shows progress on a terminal.

    Use it as a context manager; the progress bar is removed on exit.

    Args:
        provider_format: The provider format.
        max_issues: Maximum number of issues to print.
        quiet: Print nothing, for JSON output.
    """

    def __init__(self, provider_format: ProviderFormat, *, max_issues: int, quiet: bool) -> None:
        self._provider_format = provider_format
        self._left = max_issues
        self._hidden = 0
        self._quiet = quiet
        self._out = console()
        self._bars = FileBars(quiet=quiet, out=self._out)

    def __enter__(self) -> Self:
        self._bars.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.__exit__(*error)

    def issue(self, issue: Issue) -> None:
        """Print an issue, up to the limit."""
        if self._quiet:
            return
        if self._left <= 0:
            self._hidden += 1
            return
        self._left -= 1
        style = _style(issue.severity)
        self._out.print(f"[{style}]{issue.severity:<7}[/] {escape(redact(str(issue)))}")

    def reading(self, path: Path, done: int, total: int) -> None:
        """Update the progress of reading."""
        self._bars.show("reading", path, done, total)

    def counting(self, path: Path, done: int, total: int) -> None:
        """Update the progress of token counting."""
        self._bars.show("counting tokens of", path, done, total)

    def document(self, dataset: Dataset, tokens: TokenCount | None) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            "ok": not dataset.errors,
            "provider_format": self._provider_format.name,
            "files": [file.model_dump(mode="json") for file in dataset.files],
            "issues": [issue_document(issue) for issue in dataset.issues],
            "tokens": asdict(tokens) if tokens else None,
        }

    def show(self, dataset: Dataset, tokens: TokenCount | None) -> None:
        """Print the summary of each file and the verdict."""
        if self._hidden:
            self._out.print(f"… and {self._hidden:,} more (raise --max-issues to show them)")
        for file in dataset.files:
            self._out.print()
            self._file(file)
        if tokens:
            self._out.print()
            self._tokens(tokens)
        self._out.print()
        self._verdict(dataset)

    def _file(self, file: DataFile) -> None:
        purpose = "validation" if file.role == "validation" else "training"
        head = f"[bold]{escape(str(file.path))}[/]  ({purpose}, {file.sample_type or 'no rows'})"
        self._out.print(head)
        self._rows((*_facts(file), *_bars("row length", dict(file.summary.row_bytes), "bytes")))

    def _tokens(self, tokens: TokenCount) -> None:
        if tokens.data_tokens is None:
            self._out.print(f"[bold]tokens[/]  not counted: {escape(tokens.reason or 'unknown')}")
            return
        self._out.print(f"[bold]tokens[/]  (tokenizer {escape(tokens.tokenizer or 'unknown')})")
        between = ""
        if tokens.interval:
            between = f" (95% CI {tokens.interval[0]:,} to {tokens.interval[1]:,})"
        rows = [("tokens", f"{tokens.data_tokens:,}{between}, {tokens.basis}")]
        if tokens.mean is not None and tokens.shortest is not None and tokens.longest is not None:
            text = f"{tokens.mean:,.0f} on average, {tokens.shortest:,} to {tokens.longest:,}"
            rows.append(("per row", text))
        self._rows((*rows, *_bars("row length", tokens.histogram or {}, "tokens")))
        for note in tokens.notes:
            self._out.print(f"  [dim]note[/]         {escape(note)}")

    def _rows(self, rows: Iterable[tuple[str, str]]) -> None:
        for name, text in rows:
            self._out.print(f"  [dim]{name:<11}[/]  {escape(text)}")

    def _verdict(self, dataset: Dataset) -> None:
        kinds: Counter[tuple[str, str]] = Counter()
        graver = {issue.code for issue in dataset.errors}
        for code, count in _found(dataset).items():
            kinds["error" if code in graver else "warning", code] = count
        for (severity, code), count in sorted(kinds.items()):
            self._out.print(f"  [{_style(severity)}]{severity:<7}[/]  {count:>9,}  {code}")
        name = self._provider_format.name
        if not dataset.errors:
            self._out.print(f"[green]Valid[/] for {name}.")
            return
        errors = sum(count for (severity, _), count in kinds.items() if severity == "error")
        files = len({issue.path for issue in dataset.errors})
        where = f"{_many(errors, 'error')} in {_many(files, 'file')}"
        self._out.print(f"[red]Invalid[/] for {name}: {where}.")


def _found(dataset: Dataset) -> Counter[str]:
    """Count findings by code, including those without an issue of their own."""
    found: Counter[str] = Counter()
    counted = {str(file.path): file.summary.findings for file in dataset.files}
    for findings in counted.values():
        found.update(findings)
    for issue in dataset.issues:
        # Issues of unreadable files, and issues across files.
        found[issue.code] += issue.code not in counted.get(issue.path or "", {})
    return found


def _facts(file: DataFile) -> Iterator[tuple[str, str]]:
    summary = file.summary
    bad = f", {file.bad_rows:,} invalid" if file.bad_rows else ""
    packed = (
        f", {decimal(file.size)} compressed ({file.packing})" if file.packing != "plain" else ""
    )
    yield "rows", f"{file.rows:,}{bad}, {decimal(summary.lines)}{packed}"
    if len(summary.formats) > 1:
        yield "formats", _listed(summary.formats)
    if file.turns:
        each = f"{file.turns / file.rows:.1f} per row" if file.rows else ""
        yield "messages", f"{file.turns:,}, {each}: {_listed(summary.roles)}"
    if summary.tool_rows:
        yield "tools", f"in {_many(summary.tool_rows, 'row')}, {_many(summary.tool_calls, 'call')}"
    if summary.image_rows:
        yield "images", f"{summary.images:,} in {_many(summary.image_rows, 'row')}"
    if summary.weighted_rows:
        yield "weights", f"in {_many(summary.weighted_rows, 'row')}"
    for target, labels in summary.labels.items():
        yield f"label {target}"[:20], _listed(labels)
    if summary.duplicate_rows:
        yield "duplicates", _many(summary.duplicate_rows, "row")
    if summary.overlapping_rows:
        yield "overlap", f"{_many(summary.overlapping_rows, 'row')} also in the training data"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" + "s" * (count != 1)


def _listed(counts: Mapping[str, int]) -> str:
    most = sorted(counts.items(), key=lambda each: -each[1])
    text = ", ".join(f"{name} {count:,}" for name, count in most[:_MOST_LISTED])
    return f"{text} and {len(most) - _MOST_LISTED:,} more" if len(most) > _MOST_LISTED else text


def _bars(name: str, rows: Mapping[int, int], unit: str) -> Iterator[tuple[str, str]]:
    """Draw a histogram of row lengths."""
    if not rows:
        return
    most, width = max(rows.values()), len(f"{max(rows):,}")
    for bound, count in sorted(rows.items()):
        bar = "▇" * max(1, round(_BAR * count / most))
        yield name, f"≤ {bound:>{width},} {unit}  {bar:<{_BAR}}  {count:,}"
        name = ""


def _style(severity: str) -> str:
    return "red" if severity == "error" else "yellow"
