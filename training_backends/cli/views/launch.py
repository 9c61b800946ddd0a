"""What people see while a run is launched and while it trains."""

from collections.abc import Awaitable, Callable, Collection
from contextlib import aclosing
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from training_backends.cli.views.render import console, show_estimate, show_log_record
from training_backends.client.client import AsyncTrainingClient
from training_backends.core.escape import escape_controls
from training_backends.core.estimate import Estimate
from training_backends.core.run import LogRecord, TrainingRun
from training_backends.core.status import TrainingStatus

__all__ = ["LaunchView", "follow_run"]

Confirm = Callable[[Estimate], Awaitable[bool]]


class LaunchView:
    """Upload bars, each status change, and the quote; silent when `quiet`.

    Attributes:
        shown: Statuses shown while the run was launched.
    """

    def __init__(self, *, quiet: bool, out: Console | None = None) -> None:
        self._out = out or console()
        self._quiet = quiet
        self._bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=20),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=self._out,
            disable=quiet or not self._out.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._status: TrainingStatus | None = None
        self.shown: set[str] = set()
        self._quoted = False

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def progress(self, name: str, done: int, total: int) -> None:
        """Show how far an upload is."""
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(
                escape(escape_controls(_short(name))), total=total
            )
        self._bars.update(self._tasks[name], completed=done)
        if done >= total and not self._quiet and not self._out.is_terminal:
            self._out.print(f"  {escape(_short(name))}: {total:,} bytes sent")

    def update(self, run: TrainingRun) -> None:
        """Show a change of status, and the provider's quote once it is there."""
        if self._quiet:
            return
        if run.status is not self._status:
            word = f" ({escape(run.raw_status)})" if run.raw_status else ""
            self._out.print(f"  [cyan]{run.status}[/]{word}")
            self._status = run.status
            self.shown.add(run.status)
        if run.estimate and run.estimate.basis == "quote" and not self._quoted:
            self._out.print("  the provider's quote:")
            show_estimate(run.estimate, self._out)
            self._quoted = True

    def notice(self, text: str) -> None:
        """Show a sentence that the user should read, with --json too: it is not a result."""
        self._out.print(f"  [yellow]{escape(text)}[/]")

    def asking(self, confirm: Confirm) -> Confirm:
        """Wrap a question so that the bars do not run over it."""

        async def ask(estimate: Estimate) -> bool:
            self._bars.stop()
            if not (self._quiet or self._quoted):
                show_estimate(estimate, self._out)
            agreed = await confirm(estimate)
            if agreed:
                self._bars.start()
            return agreed

        return ask


async def follow_run(
    client: AsyncTrainingClient,
    run_id: str,
    *,
    quiet: bool,
    shown_statuses: Collection[str] = (),
    out: Console | None = None,
) -> TrainingRun:
    """Show a run's log and progress until it is over, and return it.

    Args:
        shown_statuses: What a `LaunchView` has shown; the log, which begins before the launch
            was accepted, would show it again.
    """
    out = out or console()
    bar = Progress(
        TextColumn("  training"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=out,
        transient=True,
        disable=quiet or not out.is_terminal,
    )
    total = _steps_in_all(await client.get(run_id))
    shown = 0
    skipping = bool(shown_statuses)
    with bar:
        task = bar.add_task("", total=total or None)
        async with aclosing(client.logs(run_id, follow=True)) as records:
            async for record in records:
                if quiet:
                    continue
                if skipping and record.source == "status":
                    if record.fields.get("status") in shown_statuses:
                        continue
                    skipping = False
                total = record.fields.get("total_steps") or total
                bar.update(task, total=total or None)
                if record.step is not None:
                    bar.update(task, completed=record.step)
                if loss := _loss(record):
                    bar.update(task, description=loss)
                if not _is_measurement(record) or _is_worth_a_line(record, shown, total):
                    show_log_record(record, out)
                    shown = record.step or shown
    return await client.status(run_id)


def _steps_in_all(run: TrainingRun) -> int:
    """Return how many steps a run will take, or 0 while nobody knows."""
    return run.total_steps or (run.estimate and run.estimate.steps) or 0


def _is_measurement(record: LogRecord) -> bool:
    return record.source in {"metrics", "checkpoint"}


def _is_worth_a_line(record: LogRecord, shown: int, total: int) -> bool:
    """Thin measurements out to about twenty lines, keeping those on validation data."""
    if record.fields.get("valid_loss") is not None or not shown:
        return True
    return (record.step or 0) - shown >= max(total // 20, 1)


def _loss(record: LogRecord) -> str:
    loss = record.fields.get("train_loss")
    return f"loss {loss:.3f}" if isinstance(loss, float) else ""


def _short(step: str) -> str:
    """Shorten the content hash in a journal step's name."""
    verb, _, rest = step.partition(":")
    return f"{verb} {rest[:12]}" if rest else verb
