"""Progress output while a run is launched and while it trains."""

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
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from training_backends.cli.views.console import progress, stderr, stdout
from training_backends.cli.views.render import show_estimate, show_log_record
from training_backends.client.client import AsyncTrainingClient
from training_backends.core.escape import escape_controls
from training_backends.core.estimate import Estimate
from training_backends.core.run import LogRecord, TrainingRun
from training_backends.core.status import TrainingStatus

__all__ = ["LaunchView", "follow_run"]

Confirm = Callable[[Estimate], Awaitable[bool]]


class LaunchView:
    """Shows upload bars, status changes and the price quote; prints nothing when `quiet`.

    Attributes:
        shown: Statuses shown while the run was launched.
    """

    def __init__(self, *, quiet: bool, out: Console | None = None) -> None:
        self._out = out or stderr()
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
        self._run_id: str | None = None
        self._status: TrainingStatus | None = None
        self.shown: set[str] = set()
        self._quoted = False

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def progress(self, name: str, done: int, total: int) -> None:
        """Show the progress of an upload."""
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(
                escape(escape_controls(_short(name))), total=total
            )
        self._bars.update(self._tasks[name], completed=done)
        if done >= total and not self._quiet and not self._out.is_terminal:
            self._out.print(f"  {escape(_short(name))}: uploaded {total:,} bytes")

    def update(self, run: TrainingRun) -> None:
        """Show the run's id once, each status change, and the provider's quote once available."""
        if self._quiet:
            return
        if run.id != self._run_id:
            self._out.print(f"Run [bold]{escape(run.id)}[/] on {escape(run.backend)}")
            self._run_id = run.id
        if run.status is not self._status:
            word = f" ({escape(run.raw_status)})" if run.raw_status else ""
            self._out.print(f"  [cyan]{run.status}[/]{word}")
            self._status = run.status
            self.shown.add(run.status)
        if run.estimate and run.estimate.basis == "quote" and not self._quoted:
            self._out.print("  price quote from the provider:")
            show_estimate(run.estimate, self._out)
            self._quoted = True

    def notice(self, text: str) -> None:
        """Print a notice on standard error, even when `quiet`."""
        self._out.print(f"  [yellow]{escape(text)}[/]")

    def asking(self, confirm: Confirm) -> Confirm:
        """Wrap a prompt so that progress bars do not overwrite it."""

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
    """Show a run's log and progress until it finishes, and return it.

    Args:
        out: Console for the log; default: standard output.
        shown_statuses: Statuses already shown by a `LaunchView`; not repeated from the log,
            which starts before the launch was accepted.
    """
    out = out or stdout()
    bar = progress(
        TextColumn("  training"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        quiet=quiet,
    )
    total = _total_steps(await client.get(run_id))
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


def _total_steps(run: TrainingRun) -> int:
    """Return the number of steps of a run, or 0 if not known yet."""
    return run.total_steps or (run.estimate and run.estimate.steps) or 0


def _is_measurement(record: LogRecord) -> bool:
    return record.source in {"metrics", "checkpoint"}


def _is_worth_a_line(record: LogRecord, shown: int, total: int) -> bool:
    """Thin measurements to about 20 lines, but keep those with a validation loss."""
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
