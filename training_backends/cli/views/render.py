"""Output of runs, estimates, issues and errors, for people (stderr) and programs (stdout)."""

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from training_backends.core.dataset import Dataset
from training_backends.core.errors import Issue, TrainingBackendError
from training_backends.core.escape import escape_controls, escape_json
from training_backends.core.estimate import Estimate, PriceSource, format_duration
from training_backends.core.redaction import redact, redact_value
from training_backends.core.run import Checkpoint, LogRecord, TrainingRun, utc_now
from training_backends.core.status import TrainingStatus

if TYPE_CHECKING:
    from training_backends.store import MetricPoint

__all__ = [
    "CountView",
    "FileBars",
    "console",
    "error_document",
    "issue_document",
    "price_text",
    "show_age",
    "show_checkpoints",
    "show_dataset",
    "show_error",
    "show_estimate",
    "show_issues",
    "show_log_record",
    "show_metrics",
    "show_run",
    "show_runs",
    "show_text",
    "write_json",
    "write_json_line",
]

_STYLES = {
    TrainingStatus.COMPLETED: "green",
    TrainingStatus.FAILED: "red",
    TrainingStatus.CANCELLED: "yellow",
    TrainingStatus.UNKNOWN: "magenta",
}
_MOST_ISSUES = 50
_PATIENCE = 1.0
"""Seconds before a progress bar appears."""


class _SafeConsole(Console):
    """A console that prevents terminal injection.

    Escapes control characters in everything it prints, including line breaks; use `show_text`
    for multi-line text.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape before the width of the text is measured."""
        return super().render_str(escape_controls(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Escape text that bypasses `render_str`, such as progress bar columns."""
        if isinstance(renderable, Text):
            plain = renderable.plain
            escaped = escape_controls(plain, keep="\n")
            if escaped != plain:
                renderable = renderable.copy()
                renderable.plain = escaped
        return super().render(renderable, options)


def console() -> Console:
    """Return a console on standard error; standard output is reserved for JSON and CSV."""
    out = _SafeConsole(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    if not out.is_terminal:
        # Files and pipes have no width at which a table needs to be truncated.
        out.width = 200
    return out


def show_text(text: str, out: Console) -> None:
    """Print text that may have several lines, such as a model's answer."""
    for line in text.split("\n"):
        out.print(line.expandtabs(), markup=False)


def write_json(document: Any) -> None:
    """Write the JSON document of a command."""
    print(_json(document, indent=2))  # noqa: T201


def write_json_line(document: Any) -> None:
    """Write one document of a JSON Lines stream and flush."""
    print(_json(document), flush=True)  # noqa: T201


def _json(document: Any, *, indent: int | None = None) -> str:
    text = json.dumps(document, indent=indent, ensure_ascii=False, default=str)
    text = escape_json(text)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        # Standard output is not UTF-8: escape all non-ASCII characters.
        text = json.dumps(document, indent=indent, default=str)
    return text


def show_error(error: TrainingBackendError) -> None:
    """Print an error with its issues and hint."""
    out = console()
    out.print(f"[bold red]error:[/] {escape(error.message)}")
    show_issues(getattr(error, "issues", ()), out)
    install = getattr(error, "install", None)
    if install:
        out.print(f"  Install with: {escape(install)}")
    if error.hint and error.hint != install:
        out.print(f"  {escape(error.hint)}")


def error_document(error: TrainingBackendError, code: int) -> dict[str, Any]:
    """Return the JSON representation of an error."""
    issues: Sequence[Issue] = getattr(error, "issues", ())
    return {
        "error": {
            "type": type(error).__name__,
            "message": error.message,
            "hint": error.hint or getattr(error, "install", None),
            "backend": error.backend,
            "run_id": error.run_id,
            "retryable": error.retryable,
            "issues": [issue_document(issue) for issue in issues],
            "exit_code": int(code),
        }
    }


def issue_document(issue: Issue) -> dict[str, Any]:
    """Return the JSON representation of an issue; redacted, as it may quote the user's data."""
    document = {name: getattr(issue, name) for name in Issue.__dataclass_fields__}
    found: dict[str, Any] = redact_value(document)
    return found


def show_issues(issues: Iterable[Issue], out: Console | None = None) -> None:
    """Print issues, one per line."""
    out = out or console()
    listed = list(issues)
    for issue in listed[:_MOST_ISSUES]:
        style = "red" if issue.severity == "error" else "yellow"
        out.print(f"  [{style}]{issue.severity}[/] {escape(redact(str(issue)))}")
    if len(listed) > _MOST_ISSUES:
        out.print(f"  … and {len(listed) - _MOST_ISSUES} more (use --json for all)")


def show_dataset(dataset: Dataset, out: Console | None = None) -> None:
    """Print one line per data file."""
    out = out or console()
    for file in dataset.files:
        kind = file.sample_type or "no valid rows"
        out.print(
            f"  {file.role:<10} {escape(file.path.name)}: {file.rows:,} rows ({kind}), "
            f"{file.turns:,} messages, {_size(file.size)}"
        )


def show_estimate(estimate: Estimate, out: Console | None = None) -> None:
    """Print an estimate, with the reasons for unknown values."""
    out = out or console()
    rows: list[tuple[str, str]] = []
    if estimate.data_tokens is not None:
        interval = _between(*(f"{bound:,}" for bound in estimate.interval or ()))
        rows.append(("data tokens", f"{estimate.data_tokens:,}{interval}"))
    if estimate.train_tokens is not None:
        rows.append(("trained tokens", f"{estimate.train_tokens:,}"))
    if estimate.steps is not None:
        rows.append(("steps", f"{estimate.steps:,}"))
    if estimate.epochs is not None:
        rows.append(("epochs", f"{estimate.epochs:g}"))
    rows.extend(_cost_rows(estimate))
    duration = format_duration(estimate.duration) if estimate.duration else "unknown"
    rows.extend((("duration", duration), ("method", estimate.basis)))
    rows.extend(("difference", text) for text in estimate.differences)
    for name, value in rows:
        out.print(f"  {name:<15} {escape(value)}")
    for note in estimate.notes:
        out.print(f"  [dim]note[/]            {escape(note)}")


class FileBars:
    """Progress bars, one per file.

    They appear after a short delay, and only on a terminal. Use it as a context manager; leaving
    it removes the bars.

    Args:
        quiet: Show no bars.
    """

    def __init__(self, *, quiet: bool = False, out: Console | None = None) -> None:
        out = out or console()
        self._bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=20),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=out,
            transient=True,
            disable=quiet or not out.is_terminal,
        )
        self._began = time.monotonic()
        self._tasks: dict[tuple[str, Path], TaskID] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def show(self, what: str, path: Path, done: int, total: int) -> None:
        """Update the bar of a file.

        Args:
            what: The operation, such as "reading".
            done: Bytes processed.
            total: Size of the file in bytes.
        """
        if time.monotonic() - self._began < _PATIENCE:
            return
        key = what, path
        if key not in self._tasks:
            self._bars.start()
            self._tasks[key] = self._bars.add_task(
                f"{what} {escape(escape_controls(path.name))}", total=total
            )
        self._bars.update(self._tasks[key], completed=done, total=total, visible=done < total)


class CountView(FileBars):
    """Progress bars for token counting."""

    def progress(self, path: Path, done: int, total: int) -> None:
        """Update the bar of a file."""
        self.show("counting tokens of", path, done, total)


def _cost_rows(estimate: Estimate) -> list[tuple[str, str]]:
    interval = _between(*map(str, estimate.cost_interval or ()))
    rows = [("cost", (price_text(estimate) or "unknown") + interval)]
    if len(estimate.costs) > 1:
        width = max(len(item.name) for item in estimate.costs)
        money = max(len(str(item.amount)) for item in estimate.costs)
        rows += [
            ("", f"{item.name:<{width}}  {item.amount!s:>{money}}  ({_source(item.source)})")
            for item in estimate.costs
        ]
    elif estimate.price_source:
        rows.append(("price from", _source(estimate.price_source)))
    return rows


def _between(*bounds: str) -> str:
    return f" (95% interval {' to '.join(bounds)})" if bounds else ""


def _source(source: PriceSource) -> str:
    return f"{source.name}, {source.as_of.isoformat()}"


def price_text(estimate: Estimate) -> str | None:
    """Return the cost of a run as text, one amount per currency; None if unknown."""
    return " and ".join(map(str, estimate.totals)) or None


def show_run(run: TrainingRun, out: Console | None = None) -> None:
    """Print all details of a run."""
    out = out or console()
    style = _STYLES.get(run.status, "cyan")
    word = f" ({escape(run.raw_status)})" if run.raw_status else ""
    out.print(f"[bold]{escape(run.id)}[/]  [{style}]{run.status}[/]{word}")
    rows = [
        ("backend", run.backend),
        ("model", run.config.model),
        ("provider job", run.remote_id),
        ("created", _time(run.created_at)),
        ("started", _time(run.started_at)),
        ("finished", _time(run.finished_at)),
        ("step", _steps(run)),
        ("metrics", _metrics(run.metrics)),
        ("checkpoints", str(len(run.checkpoints)) if run.checkpoints else None),
        ("cost", str(run.cost) if run.cost else None),
        ("result", run.result_model),
        ("resumed from", run.resumed_from),
        ("failure", f"{run.failure.kind}: {run.failure.message}" if run.failure else None),
        ("last seen", _time(run.last_seen_at)),
    ]
    rows += [("quote", text) for text in (run.estimate.differences if run.estimate else ())]
    for name, value in rows:
        if value:
            out.print(f"  {name:<13} {escape(value)}")
    if run.stale:
        since = _time(run.stale.since)
        out.print(f"  [yellow]{run.stale.kind:<13} since {since}: {escape(run.stale.message)}[/]")


def show_age(runs: Iterable[TrainingRun], missed: Mapping[str, str] | None) -> None:
    """Print on standard error how old the data of live runs is, and why.

    Args:
        missed: By run id, why a run was not refreshed; None if no refresh was tried.
    """
    out = console()
    by_reason: dict[str, list[TrainingRun]] = {}
    for run in runs:
        if _is_old(run, missed):
            reason = "not refreshed (--cached)" if missed is None else missed[run.id]
            by_reason.setdefault(reason, []).append(run)
    for reason, old in by_reason.items():
        oldest = min(run.last_seen_at or run.created_at for run in old)
        whose = f"run {old[0].id} was" if len(old) == 1 else f"{len(old)} live runs were"
        out.print(f"[yellow]note:[/] {whose} last updated {_ago(oldest)}: {escape(reason)}")


def _is_old(run: TrainingRun, missed: Mapping[str, str] | None) -> bool:
    if run.status.is_terminal or run.remote_id is None:
        return False
    return missed is None or run.id in missed


def _ago(moment: datetime) -> str:
    age = max(utc_now() - moment, timedelta(0))
    return f"{format_duration(age)} ago"


def show_runs(
    runs: Sequence[TrainingRun],
    missed: Mapping[str, str] | None = None,
    *,
    filtered: bool = False,
    out: Console | None = None,
) -> None:
    """Print runs as a table, newest first.

    Args:
        missed: See `show_age`; these runs are marked with their age.
        filtered: Whether `runs` was filtered; selects the message for an empty list.
    """
    out = out or console()
    if not runs:
        none_yet = "No runs yet. Try `training-backends quickstart`."
        out.print("No runs match these filters." if filtered else none_yet)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", no_wrap=True, min_width=max(len(run.id) for run in runs))
    for column in ("status", "backend", "model", "step", "created"):
        table.add_column(column, no_wrap=True)
    for run in runs:
        style = _STYLES.get(run.status, "cyan")
        seen = f" (as of {_ago(run.last_seen_at or run.created_at)})"
        note = _remark(run) or (seen if _is_old(run, missed) else "")
        table.add_row(
            escape(run.id),
            f"[{style}]{run.status}[/]{note}",
            escape(run.backend),
            escape(run.config.model),
            _steps(run) or "",
            _time(run.created_at)[:16],
        )
    out.print(table)


def _remark(run: TrainingRun) -> str:
    """Return a remark on the status of a run, such as stalled or draft."""
    if run.stale:
        return f" ({run.stale.kind})"
    if run.failure and not run.status.is_terminal and run.started_at is None:
        return " (draft)"
    return ""


def show_metrics(
    points: "Sequence[MetricPoint]", run: TrainingRun, *, up_to_date: bool = True
) -> None:
    """Print metrics as a table, one row per step.

    Args:
        run: The run that the metrics belong to.
        up_to_date: Whether the run has just been refreshed.
    """
    out = console()
    if not points:
        if run.status.is_terminal:
            out.print(f"The run {escape(run.id)} is {run.status} and has no metrics.")
        elif up_to_date:
            out.print("No metrics yet.")
        else:
            seen = _ago(run.last_seen_at or run.created_at)
            out.print(f"No metrics yet; the run was last updated {seen}.")
        return
    names = list(dict.fromkeys(point.name for point in points))
    by_step: dict[int, dict[str, float]] = {}
    for point in points:
        by_step.setdefault(point.step, {})[point.name] = point.value
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", *names):
        table.add_column(column, no_wrap=True, justify="right")
    for step, values in sorted(by_step.items()):
        cells = (f"{values[name]:.6g}" if name in values else "" for name in names)
        table.add_row(str(step), *cells)
    out.print(table)


def show_checkpoints(checkpoints: Sequence[tuple[str, Checkpoint]], run: TrainingRun) -> None:
    """Print checkpoints with their ids as a table.

    Args:
        run: The run that the checkpoints belong to.
    """
    out = console()
    if not checkpoints:
        yet = "" if run.status.is_terminal else " yet"
        out.print(f"Run {run.id} has no checkpoints{yet}.", markup=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("id", "step", "created", "metrics"):
        table.add_column(column, no_wrap=True)
    for name, checkpoint in checkpoints:
        metrics = _metrics(checkpoint.metrics) or ""
        table.add_row(escape(name), str(checkpoint.step), _time(checkpoint.at), escape(metrics))
    out.print(table)


def show_log_record(record: LogRecord, out: Console) -> None:
    """Print a log record on one line."""
    style = {"error": "red", "warning": "yellow"}.get(record.level, "default")
    time = record.at.astimezone().strftime("%H:%M:%S")
    out.print(f"[dim]{time} {escape(record.source):<10}[/] [{style}]{escape(record.message)}[/]")


def _steps(run: TrainingRun) -> str | None:
    if run.step is None:
        return None
    return f"{run.step}/{run.total_steps}" if run.total_steps else str(run.step)


def _metrics(metrics: dict[str, float]) -> str | None:
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items())) or None


def _time(moment: datetime | None) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S") if moment else ""


def _size(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
