"""Output of runs, estimates, issues and errors."""

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from training_backends.cli.views.console import (
    Column,
    ago,
    metric_text,
    money_text,
    progress,
    show_fields,
    show_table,
    stderr,
    stdout,
    time_text,
)
from training_backends.core.dataset import Dataset
from training_backends.core.errors import Issue, TrainingBackendError
from training_backends.core.escape import escape_controls
from training_backends.core.estimate import Estimate, PriceSource, format_duration
from training_backends.core.redaction import redact, redact_value
from training_backends.core.run import Checkpoint, LogRecord, Staleness, TrainingRun, utc_now
from training_backends.core.status import TrainingStatus

if TYPE_CHECKING:
    from training_backends.store import MetricPoint

__all__ = [
    "CountView",
    "FileBars",
    "error_document",
    "issue_document",
    "price_text",
    "remark",
    "show_age",
    "show_checkpoints",
    "show_comparison",
    "show_dataset",
    "show_error",
    "show_estimate",
    "show_issues",
    "show_log_record",
    "show_metrics",
    "show_note",
    "show_run",
    "show_runs",
    "time_left",
]

_STYLES = {
    TrainingStatus.COMPLETED: "green",
    TrainingStatus.FAILED: "red",
    TrainingStatus.CANCELLED: "yellow",
    TrainingStatus.UNKNOWN: "magenta",
}
_MOST_ISSUES = 50
PROGRESS_AFTER = 1.0
"""Seconds before a progress bar appears."""


def show_error(error: TrainingBackendError) -> None:
    """Print an error with its issues and hint."""
    out = stderr()
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
    out = out or stdout()
    listed = list(issues)
    for issue in listed[:_MOST_ISSUES]:
        style = "red" if issue.severity == "error" else "yellow"
        out.print(f"  [{style}]{issue.severity}[/] {escape(redact(str(issue)))}")
    if len(listed) > _MOST_ISSUES:
        out.print(f"  … and {len(listed) - _MOST_ISSUES} more (use --json for all)")


_FILES = (
    Column("file", cut=True),
    Column("role"),
    Column("type", drop=1),
    Column("rows", right=True),
    Column("messages", drop=2, right=True),
    Column("size", drop=3, right=True),
)


def show_dataset(dataset: Dataset, out: Console | None = None) -> None:
    """Print a table of the data files."""
    rows = [
        (
            file.path.name,
            file.role,
            file.sample_type or "none valid",
            f"{file.rows:,}",
            f"{file.turns:,}",
            decimal(file.size),
        )
        for file in dataset.files
    ]
    show_table(_FILES, rows, out or stdout())


def show_estimate(estimate: Estimate, out: Console | None = None) -> None:
    """Print an estimate, with the reasons for unknown values."""
    out = out or stdout()
    rows: list[tuple[str, str]] = []
    if estimate.data_tokens is not None:
        rows.append(("data tokens", _tokens(estimate.data_tokens, estimate.interval)))
    if estimate.train_tokens is not None:
        rows.append(("trained tokens", f"{estimate.train_tokens:,}"))
    if estimate.steps is not None:
        rows.append(("steps", f"{estimate.steps:,}"))
    if estimate.epochs is not None:
        rows.append(("epochs", f"{estimate.epochs:.4g}"))
    rows.extend(_cost_rows(estimate))
    duration = format_duration(estimate.duration) if estimate.duration else "unknown"
    rows.append(("duration", duration))
    numbers = (estimate.data_tokens, estimate.train_tokens, estimate.steps, estimate.duration)
    if estimate.totals or any(number is not None for number in numbers):
        rows.append(("method", estimate.basis))
    rows.extend(("difference", text) for text in estimate.differences)
    rows.extend(("note", note) for note in estimate.notes)
    show_fields(rows, out)


class FileBars:
    """Progress bars, one per file.

    They appear after a short delay, and only on a terminal. Use it as a context manager; leaving
    it removes the bars.

    Args:
        quiet: Show no bars.
    """

    def __init__(self, *, quiet: bool = False, out: Console | None = None) -> None:
        self._bars = progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=20),
            DownloadColumn(),
            TimeRemainingColumn(),
            quiet=quiet,
            out=out,
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
        if time.monotonic() - self._began < PROGRESS_AFTER:
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
    interval = _between(*map(money_text, estimate.cost_interval or ()))
    rows = [("cost", (price_text(estimate) or "unknown") + interval)]
    if len(estimate.costs) > 1:
        amounts = [money_text(item.amount) for item in estimate.costs]
        width, money = max(len(item.name) for item in estimate.costs), max(map(len, amounts))
        for item, amount in zip(estimate.costs, amounts, strict=True):
            text = f"{item.name:<{width}}  {amount:>{money}}  ({_source(item.source)})"
            rows.append(("", text))
    elif estimate.price_source:
        rows.append(("price from", _source(estimate.price_source)))
    return rows


def _tokens(tokens: int, interval: tuple[int, int] | None) -> str:
    if interval is None:
        return f"{tokens:,}"
    margin = max(tokens - interval[0], interval[1] - tokens) / max(tokens, 1)
    return f"about {tokens:,} (±{margin:.2%})"


def _between(*bounds: str) -> str:
    return f" (95% interval {' to '.join(bounds)})" if bounds else ""


def _source(source: PriceSource) -> str:
    return f"{source.name}, {source.as_of.isoformat()}"


def price_text(estimate: Estimate) -> str | None:
    """Return the cost of a run as text, one amount per currency; None if unknown."""
    return " and ".join(map(money_text, estimate.totals)) or None


def show_run(run: TrainingRun, out: Console | None = None) -> None:
    """Print all details of a run."""
    out = out or stdout()
    style = _STYLES.get(run.status, "cyan")
    raw = run.raw_status
    word = f" ({escape(raw)})" if raw and raw.lower() != run.status else ""
    out.print(f"[bold]{escape(run.id)}[/]  [{style}]{run.status}[/]{word}")
    rows = [
        ("backend", run.backend),
        ("model", run.config.model),
        ("tags", _tags(run)),
        ("provider job id", run.remote_id if run.remote_id != run.id else None),
        ("created", time_text(run.created_at)),
        ("started", time_text(run.started_at)),
        ("finished", time_text(run.finished_at)),
        ("duration", _duration(run)),
        ("step", _steps(run)),
        ("time left", format_duration(left) if (left := time_left(run)) is not None else None),
        ("metrics", _metrics(run.metrics)),
        ("checkpoints", str(len(run.checkpoints)) if run.checkpoints else None),
        ("cost", money_text(run.cost) if run.cost else None),
        ("usage", ", ".join(f"{name} {value}" for name, value in run.usage.items()) or None),
        ("result", run.result_model),
        ("stored at", run.result_uri),
        ("resumed from", run.resumed_from),
        ("failure", f"{run.failure.kind}: {run.failure.message}" if run.failure else None),
        ("last seen", time_text(run.last_seen_at)),
    ]
    rows += [("quote", text) for text in (run.estimate.differences if run.estimate else ())]
    show_fields(rows, out)
    if run.stale:
        since = time_text(run.stale.since)
        text = f"since {since}: {run.stale.message}"
        show_fields([(_stale_word(run.stale), text)], out, style="yellow")


def time_left(run: TrainingRun) -> timedelta | None:
    """Return how long a run still needs at its average speed; None if that is unknown.

    The steps of a resumed run include those of the run that it continues, so its speed is
    unknown.
    """
    if run.status is not TrainingStatus.RUNNING or run.started_at is None or run.resumed_from:
        return None
    if not run.step or not run.total_steps:
        return None
    seen_at = run.last_seen_at or utc_now()
    left = (seen_at - run.started_at) * (run.total_steps - run.step) / run.step
    return max(left - (utc_now() - seen_at), timedelta(0))


def show_age(runs: Iterable[TrainingRun], missed: Mapping[str, str] | None) -> None:
    """Print on standard error how old the data of live runs is, and why.

    Args:
        missed: By run id, why a run was not refreshed; None if no refresh was tried.
    """
    by_reason: dict[str, list[TrainingRun]] = {}
    for run in runs:
        if _is_old(run, missed):
            reason = "not refreshed (--cached)" if missed is None else missed[run.id]
            by_reason.setdefault(reason, []).append(run)
    for reason, old in by_reason.items():
        oldest = min(run.last_seen_at or run.created_at for run in old)
        whose = f"run {old[0].id} was" if len(old) == 1 else f"{len(old)} live runs were"
        show_note(f"{whose} last updated {ago(oldest)}: {reason}")


def show_note(text: str) -> None:
    """Print a note on standard error."""
    stderr().print(f"[yellow]note:[/] {escape(text)}")


def _is_old(run: TrainingRun, missed: Mapping[str, str] | None) -> bool:
    if run.status.is_terminal or run.remote_id is None:
        return False
    return missed is None or run.id in missed


_RUNS = (
    Column("run"),
    Column("status"),
    Column("step", drop=1, right=True),
    Column("model", drop=3, cut=True),
    Column("backend", drop=4),
    Column("created", drop=2),
    Column("tags", drop=5, cut=True),
)


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
    if not runs:
        none_yet = "No runs yet. Try `training-backends quickstart`."
        stderr().print("No runs match these filters." if filtered else none_yet)
        return
    rows = []
    for run in runs:
        seen = f" (as of {ago(run.last_seen_at or run.created_at)})"
        note = remark(run) or (seen if _is_old(run, missed) else "")
        status = Text(run.status, _STYLES.get(run.status, "cyan")).append(note, "default")
        rows.append(
            (
                run.id,
                status,
                _steps(run) or "",
                run.config.model or "",
                run.backend,
                ago(run.created_at),
                _tags(run),
            )
        )
    show_table(_RUNS, rows, out or stdout())


def show_comparison(run_ids: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> None:
    """Print what differs between runs: a column for each, or a block for each name if too wide."""
    if not rows:
        stderr().print("The runs do not differ.")
        return
    cells = [[name, *(_compared(name, value) for value in row)] for name, row in rows.items()]
    out = stdout()
    columns = [Column(""), *map(Column, run_ids)]
    widest = [max(map(len, column)) for column in zip(("", *run_ids), *cells, strict=True)]
    if not out.is_terminal or sum(widest) + 2 * len(widest) <= out.width:
        show_table(columns, cells, out)
        return
    for name, *values in cells:
        out.print(Text(name, "bold"))
        show_fields(zip(run_ids, values, strict=True), out)


def _compared(name: str, value: Any) -> str:
    if value is None:
        return "-"
    return metric_text(name, value) if isinstance(value, float) else escape_controls(str(value))


def _stale_word(stale: Staleness) -> str:
    return stale.kind.replace("_", " ")


def remark(run: TrainingRun) -> str:
    """Return a remark on the status of a run, such as stalled or draft."""
    if run.stale:
        return f" ({_stale_word(run.stale)})"
    if run.failure and not run.status.is_terminal and run.started_at is None:
        return " (draft)"
    return ""


def show_metrics(
    points: "Sequence[MetricPoint]",
    run: TrainingRun,
    *,
    up_to_date: bool = True,
    out: Console | None = None,
) -> None:
    """Print metrics as a table, one row per step.

    Args:
        run: The run that the metrics belong to.
        up_to_date: Whether the run has just been refreshed.
    """
    if not points:
        if run.status.is_terminal:
            text = f"The run {run.id} is {run.status} and has no metrics."
        elif up_to_date:
            text = "No metrics yet."
        else:
            seen = ago(run.last_seen_at or run.created_at)
            text = f"No metrics yet; the run was last updated {seen}."
        stderr().print(text, markup=False)
        return
    by_step: dict[int, dict[str, str]] = {}
    for point in points:
        cell = metric_text(point.name, point.value)
        by_step.setdefault(point.step, {})[point.name] = cell
    names = sorted(dict.fromkeys(point.name for point in points), key=_rank)
    columns = [Column(name, drop=place, right=True) for place, name in enumerate(names)]
    rows = [
        (str(step), *(values.get(name, "") for name in names))
        for step, values in sorted(by_step.items())
    ]
    hidden = show_table((Column("step", right=True), *columns), rows, out or stdout())
    if hidden:
        show_note(f"no room for {', '.join(reversed(hidden))} (choose with --metric, or use --csv)")


def _rank(metric: str) -> int:
    """Order metrics by how much they tell: losses and other measures of learning first."""
    return 0 if "loss" in metric else 1 if metric.startswith(("train_", "valid_")) else 2


_CHECKPOINTS = (
    Column("id"),
    Column("step", right=True),
    Column("created", drop=1),
    Column("metrics", drop=2, cut=True),
)


def show_checkpoints(checkpoints: Sequence[tuple[str, Checkpoint]], run: TrainingRun) -> None:
    """Print checkpoints with their ids as a table.

    Args:
        run: The run that the checkpoints belong to.
    """
    if not checkpoints:
        yet = "" if run.status.is_terminal else " yet"
        stderr().print(f"Run {run.id} has no checkpoints{yet}.", markup=False)
        return
    rows = [
        (name, str(each.step), ago(each.at), _metrics(each.metrics)) for name, each in checkpoints
    ]
    show_table(_CHECKPOINTS, rows, stdout())


def show_log_record(record: LogRecord, out: Console) -> None:
    """Print a log record on one line; a terminal gets the date only if it is not today."""
    style = {"error": "red", "warning": "yellow"}.get(record.level, "default")
    at = (record.at or utc_now()).astimezone()
    if not out.is_terminal:
        time = at.isoformat(timespec="seconds")
    elif at.date() == utc_now().astimezone().date():
        time = f"{at:%H:%M:%S}"
    else:
        time = f"{at:%Y-%m-%d %H:%M:%S}"
    out.print(f"[dim]{time} {escape(record.source):<10}[/] [{style}]{escape(record.message)}[/]")


def _steps(run: TrainingRun) -> str | None:
    if run.step is None:
        return None
    return f"{run.step}/{run.total_steps}" if run.total_steps else str(run.step)


def _metrics(metrics: dict[str, float]) -> str:
    named = sorted(metrics.items(), key=lambda each: (_rank(each[0]), each[0]))
    return ", ".join(f"{name} {metric_text(name, value)}" for name, value in named)


def _tags(run: TrainingRun) -> str:
    return ", ".join(f"{name}={value}" for name, value in run.config.tags.items())


def _duration(run: TrainingRun) -> str | None:
    """Return how long a run has trained, if it has started."""
    if run.started_at is None or (run.finished_at is None and run.status.is_terminal):
        return None
    return format_duration((run.finished_at or utc_now()) - run.started_at)
