"""Output that follows runs: redrawn in place on a terminal, one line per change elsewhere."""

from collections.abc import Awaitable, Callable, Sequence
from io import StringIO
from typing import Final, Self, TypeVar

import anyio
from rich.console import Console
from rich.live import Live
from rich.text import Text

from training_backends.cli.views.console import write_json_line
from training_backends.cli.views.render import remark, time_left
from training_backends.core.estimate import format_duration
from training_backends.core.run import TrainingRun

__all__ = ["RunsView", "draw_progress", "progress_line", "repeated"]

T = TypeVar("T")
Draw = Callable[[Sequence[TrainingRun], Console], None]
"""Prints the current state of runs."""

_INTERVAL: Final = 1.0
"""Seconds between reads of the store."""
_LINES: Final = 20
"""At most about this many lines report the steps of a run."""


class RunsView:
    """Shows runs each time `show` is called; use it as a context manager.

    Args:
        draw: Prints what a terminal shows, which replaces the previous output.
        out: Where to show it; if this is no terminal, each change is printed as a line.
        json: Write a JSON line to standard output for each change instead.
        transient: Remove the output from the terminal at the end.
    """

    def __init__(
        self, draw: Draw, out: Console, *, json: bool = False, transient: bool = False
    ) -> None:
        self._draw = draw
        self._out = out
        self._json = json
        self._live = Live(console=out, auto_refresh=False, transient=transient)
        self._redraws = out.is_terminal and not json
        self._shown: dict[str, TrainingRun] = {}

    def __enter__(self) -> Self:
        if self._redraws:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def show(self, runs: Sequence[TrainingRun]) -> None:
        """Show the runs as they are now."""
        if self._redraws:
            self._live.update(_drawn(self._draw, runs, self._out), refresh=True)
            return
        for run in runs:
            before = self._shown.get(run.id)
            if self._json and (before is None or _document(before) != _document(run)):
                write_json_line(run.model_dump(mode="json"))
            elif not self._json and _is_news(before, run):
                self._out.print(progress_line(run), markup=False)
            else:
                continue
            self._shown[run.id] = run


async def repeated(show: Callable[[], Awaitable[None]], work: Callable[[], Awaitable[T]]) -> T:
    """Return the result of `work`; await `show` before it, every second, and after it."""

    async def repeat() -> None:
        while True:
            await anyio.sleep(_INTERVAL)
            await show()

    await show()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(repeat)
        result = await work()
        tasks.cancel_scope.cancel()
    await show()
    return result


def draw_progress(runs: Sequence[TrainingRun], out: Console) -> None:
    """Print one line per run."""
    for run in runs:
        out.print(progress_line(run), markup=False)


def progress_line(run: TrainingRun) -> str:
    """Return status, step, loss and remaining time of a run on one line."""
    parts = [f"{run.status}{remark(run)}"]
    if run.step is not None:
        parts.append(f"step {run.step}" + (f"/{run.total_steps}" if run.total_steps else ""))
    if (loss := run.metrics.get("train_loss")) is not None:
        parts.append(f"loss {loss:.4g}")
    if (left := time_left(run)) is not None:
        parts.append(f"{format_duration(left)} left")
    return f"{run.id}  {', '.join(parts)}"


def _drawn(draw: Draw, runs: Sequence[TrainingRun], out: Console) -> Text:
    """Return what `draw` prints, for a console like `out`."""
    paper = StringIO()
    kind = type(out)
    draw(
        runs,
        kind(
            file=paper,
            force_terminal=True,
            width=out.width,
            color_system=out.color_system,  # type: ignore[arg-type]  # declared as str | None
            highlight=False,
            soft_wrap=True,
            emoji=False,
        ),
    )
    return Text.from_ansi(paper.getvalue())


def _document(run: TrainingRun) -> TrainingRun:
    return run.model_copy(update={"last_seen_at": None})


def _is_news(before: TrainingRun | None, run: TrainingRun) -> bool:
    """Return whether a run has changed enough for a line."""
    if before is None or before.status is not run.status:
        return True
    if (before.stale and before.stale.kind) != (run.stale and run.stale.kind):
        return True
    if run.status.is_terminal:
        return False
    advance = (run.step or 0) - (before.step or 0)
    return advance >= max((run.total_steps or 0) // _LINES, 1)
