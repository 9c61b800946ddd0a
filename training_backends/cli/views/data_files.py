"""What people and programs are told while data files are written anew."""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import yaml
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape

from training_backends.cli.exit_codes import Interrupted
from training_backends.cli.views.render import FileBars, issue_document, show_issues, show_text
from training_backends.core.errors import Issue
from training_backends.core.redaction import redact, redact_value
from training_backends.datasets.repair import REPAIRS, Repair, Repaired
from training_backends.datasets.shard import ShardFile
from training_backends.datasets.split import Split
from training_backends.datasets.write import Progress as OnProgress

__all__ = [
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
    """Show how far each file is, once that takes a while, and tell of a Ctrl-C.

    A bar is shown on a terminal only.
    """
    with FileBars(out=out) as bars:
        try:
            yield partial(bars.show, what)
        except KeyboardInterrupt:
            raise Interrupted("Interrupted; no part of a file is left.") from None


class ShownRepairs:
    """Lists the first repairs and issues of one file, and counts them all."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._repairs = 0
        self._issues: list[Issue] = []
        self._more = 0

    def repair(self, done: Repair) -> None:
        """Show a repair, unless there were many."""
        self._repairs += 1
        if self._repairs <= _MOST_LINES:
            self._out.print(f"  line {done.line}: {escape(redact(done.message))}")

    def issue(self, issue: Issue) -> None:
        """Keep an issue for later, unless there were many."""
        if len(self._issues) < _MOST_LINES:
            self._issues.append(issue)
        else:
            self._more += 1

    def finish(self, done: Repaired) -> None:
        """Show what became of the file."""
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
            out.print(f"  [red]rows that are still invalid: {done.invalid:,}[/]")
        if done.backup:
            out.print(f"  what it was is in {escape(str(done.backup))}")

    def _show_more(self, count: int) -> None:
        if count > 0:
            self._out.print(f"  … and {count:,} more (--json has them all)")


class JsonList:
    """A list that is written as JSON and may be longer than the memory."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_MEMORY, "w+", encoding="ascii")  # noqa: SIM115
        self._separator = ""

    def add(self, document: Any) -> None:
        """Append an entry."""
        self._file.write(self._separator)
        json.dump(document, self._file, default=str)
        self._separator = ",\n"

    def add_object(self, fields: dict[str, Any], **lists: "JsonList") -> None:
        """Append an object, some fields of which are lists."""
        self._file.write(self._separator)
        _write_object(self._file, fields, lists)
        self._separator = ",\n"

    def copy_to(self, file: IO[str]) -> None:
        """Write the whole list."""
        file.write("[")
        self._file.seek(0)
        shutil.copyfileobj(self._file, file)
        file.write("]")


def write_lists(fields: dict[str, Any], **lists: JsonList) -> None:
    """Write the one JSON document of a command."""
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
    """Keeps the repairs and issues of one file for the document of all."""

    def __init__(self, files: JsonList) -> None:
        self._files = files
        self._repairs = JsonList()
        self._issues = JsonList()

    def repair(self, done: Repair) -> None:
        """Keep a repair."""
        self._repairs.add(redact_value(done._asdict()))

    def issue(self, issue: Issue) -> None:
        """Keep an issue."""
        self._issues.add(issue_document(issue))

    def finish(self, done: Repaired) -> None:
        """Add the file to the document."""
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
    """Show both sides of a split file."""
    out.print(f"{escape(str(found.source))}:")
    for side in (found.train, found.validation):
        if side:
            _show_file(side.path, side.rows, side.size, out)


def show_shards(source: Path, parts: Sequence[ShardFile], out: Console) -> None:
    """Show the parts of a file."""
    count = "1 file" if len(parts) == 1 else f"{len(parts):,} files"
    out.print(f"{escape(str(source))}: {count}")
    for part in parts:
        _show_file(part.path, part.rows, part.size, out)


def _show_file(path: Path, rows: int, size: int, out: Console) -> None:
    out.print(f"  {escape(str(path))}  {rows:,} rows, {decimal(size)}")


def show_data(data: dict[str, Any], out: Console) -> None:
    """Show the part of a configuration that names the files."""
    out.print("For the configuration:")
    show_text(yaml.safe_dump({"data": data}, sort_keys=False).rstrip(), out)
