"""Output of the `data` commands."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import yaml
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.text import Text

from training_backends.cli.exit_codes import Interrupted
from training_backends.cli.views.console import (
    show_fields,
    show_text,
    stderr,
    stdout,
    write_json_line,
)
from training_backends.cli.views.render import FileBars, issue_document, show_issues
from training_backends.core.data_rules import ProviderFormat
from training_backends.core.dataset import DataFile, Dataset
from training_backends.core.errors import Issue
from training_backends.core.escape import escape_controls, plural
from training_backends.core.redaction import redact, redact_value
from training_backends.datasets.foreign import ConvertedData
from training_backends.datasets.repair import REPAIRS, Repair, Repaired
from training_backends.datasets.shard import ShardFile
from training_backends.datasets.split import Split
from training_backends.datasets.write import Progress as OnProgress
from training_backends.tokens import TokenCount
from training_backends.tokens.preview import PreviewExample

__all__ = [
    "InspectView",
    "RepairLines",
    "RepairView",
    "bar",
    "preview_document",
    "show_converted",
    "show_data",
    "show_preview",
    "show_shards",
    "show_split",
]

_MOST_LINES = 50


@contextmanager
def bar(what: str) -> Iterator[OnProgress]:
    """Show progress per file, and report Ctrl-C as `Interrupted`.

    The bar is shown only on a terminal.
    """
    with FileBars() as bars:
        try:
            yield partial(bars.show, what)
        except KeyboardInterrupt:
            raise Interrupted("Interrupted; no partial files were left.") from None


class RepairView:
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
            what = f"{plural(done.rows, 'row')} read, {done.written:,} written to {done.target}"
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
            self._out.print(f"  … and {count:,} more (use --json to show all)")


class RepairLines:
    """Writes one JSON line per repair and issue as they are found, and one per file."""

    def repair(self, done: Repair) -> None:
        """Write a repair."""
        write_json_line({"type": "repair", **redact_value(done._asdict())})

    def issue(self, issue: Issue) -> None:
        """Write an issue."""
        write_json_line({"type": "issue", **issue_document(issue)})

    def finish(self, done: Repaired) -> None:
        """Write the summary of the file."""
        fields = {
            "source": done.source,
            "target": done.target,
            "backup": done.backup,
            "rows": done.rows,
            "written": done.written,
            "invalid": done.invalid,
            "counts": dict(done.counts),
        }
        write_json_line({"type": "file", **fields})


def show_split(found: Split, out: Console) -> None:
    """Print both parts of a split file."""
    out.print(f"{escape(str(found.source))}:")
    for side in (found.train, found.validation):
        if side:
            _show_file(side.path, side.rows, side.size, out)


def show_converted(done: ConvertedData) -> None:
    """Print what a conversion wrote, and the rows that it left out."""
    formats = ", ".join(f"{rows:,} {name}" for name, rows in done.formats.items())
    stderr().print(escape(f"{done.path}  {plural(done.rows, 'row')}: {formats}"))
    show_issues(done.issues, stderr())
    show_data({"train": [str(done.path)]})


def show_shards(source: Path, parts: Sequence[ShardFile], out: Console) -> None:
    """Print the shards of a file."""
    out.print(f"{escape(str(source))}: {plural(len(parts), 'file')}")
    for part in parts:
        _show_file(part.path, part.rows, part.size, out)


def _show_file(path: Path, rows: int, size: int, out: Console) -> None:
    out.print(f"  {escape(str(path))}  {plural(rows, 'row')}, {decimal(size)}")


def show_data(data: dict[str, Any]) -> None:
    """Print the `data` section of a configuration."""
    stderr().print("Add to the configuration:")
    text = yaml.safe_dump({"data": data}, sort_keys=False, allow_unicode=True)
    show_text(text.rstrip(), stdout())


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
        self._out = stdout()
        self._bars = FileBars(quiet=quiet)

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
            if dataset.issues or file is not dataset.files[0]:
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
        bars = _bars("row length", dict(file.summary.row_bytes), "bytes")
        show_fields((*_facts(file), *bars), self._out, style="dim")

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
        rows.extend(_bars("row length", tokens.histogram or {}, "tokens"))
        rows.extend(("note", note) for note in tokens.notes)
        show_fields(rows, self._out, style="dim")

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
        where = f"{plural(errors, 'error')} in {plural(files, 'file')}"
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
        yield (
            "tools",
            f"in {plural(summary.tool_rows, 'row')}, {plural(summary.tool_calls, 'call')}",
        )
    if summary.image_rows:
        yield "images", f"{summary.images:,} in {plural(summary.image_rows, 'row')}"
    if summary.weighted_rows:
        yield "weights", f"in {plural(summary.weighted_rows, 'row')}"
    for target, labels in summary.labels.items():
        yield f"label {target}"[:20], _listed(labels)
    if summary.duplicate_rows:
        yield "duplicates", plural(summary.duplicate_rows, "row")
    if summary.overlapping_rows:
        yield "overlap", f"{plural(summary.overlapping_rows, 'row')} also in the training data"


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


_TRAINED: Final = "bold green"
_MARKS: Final = ("⟦", "⟧")


def show_preview(examples: Sequence[PreviewExample]) -> None:
    """Print examples with what is in the loss coloured, or marked without colours."""
    out = stdout()
    marks = ("", "") if out.is_terminal and out.color_system else _MARKS
    for example in examples:
        out.print(Text(_preview_head(example), "bold red" if example.reason else "bold"))
        if example.reason:
            continue
        text = Text()
        for segment in example.segments:
            shown = escape_controls(redact(segment.text), keep="\n")
            if segment.trained:
                text.append(f"{marks[0]}{shown}{marks[1]}", _TRAINED)
            else:
                text.append(shown, "dim")
        for line in text.split("\n"):
            out.print(Text("  ").append_text(line) if line else line)


def _preview_head(example: PreviewExample) -> str:
    here = Path.cwd()
    path = example.path.relative_to(here) if example.path.is_relative_to(here) else example.path
    place = f"{path}:{example.line}"
    if example.reason is not None:
        return f"{place}  rejected: {redact(example.reason)}"
    if example.part:
        place += f"  {example.part}"
    elif example.examples > 1:
        place += f"  example {example.example} of {example.examples}"
    cut = ", truncated" if example.truncated else ""
    return (
        f"{place}  {plural(example.tokens, 'token')}, {example.trained_tokens:,} in the loss{cut}"
    )


def preview_document(example: PreviewExample) -> dict[str, Any]:
    """Return an example as a JSON object."""
    counts = {"tokens": example.tokens, "trained_tokens": example.trained_tokens}
    document: dict[str, Any] = redact_value({**asdict(example), **counts})
    return document
