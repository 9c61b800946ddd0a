"""The progress of a run as one display of a notebook, updated in place."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from training_backends.core.run import LogRecord, TrainingRun
from training_backends.core.run_html import run_html

__all__ = ["NotebookProgress", "notebook_progress"]

_INTERVAL: Final = 0.5
"""Least seconds between two updates, which the browser has to draw."""
_MOST_POINTS: Final = 400
"""Losses that are kept; more would not be seen."""


@dataclass(frozen=True)
class _Shown:
    run: TrainingRun
    losses: tuple[float, ...]

    def __repr__(self) -> str:
        return repr(self.run)

    def _repr_html_(self) -> str:
        return run_html(self.run, self.losses)


class NotebookProgress:
    """Status, progress bar, metrics and loss curve of a run.

    Args:
        display: `IPython.display.display`.
    """

    def __init__(self, display: Callable[..., Any]) -> None:
        self._display = display
        self._handle: Any = None
        self._losses: list[float] = []
        self._every = 1  # of how many losses one is kept
        self._seen = 0
        self._next = 0.0

    def is_due(self, record: LogRecord) -> bool:
        """Note the loss of a record; return whether the run should be shown again."""
        loss = record.fields.get("train_loss") if record.source == "metrics" else None
        if isinstance(loss, float):
            self._seen += 1
            if self._seen % self._every == 0:
                self._losses.append(loss)
            if len(self._losses) > _MOST_POINTS:
                self._losses = self._losses[1::2]
                self._every *= 2
        return time.monotonic() >= self._next

    def show(self, run: TrainingRun) -> None:
        """Show a run, in the place of what was shown before."""
        shown = _Shown(run, tuple(self._losses))
        if self._handle is None:
            self._handle = self._display(shown, display_id=True)
        else:
            self._handle.update(shown)
        self._next = time.monotonic() + _INTERVAL


def notebook_progress() -> NotebookProgress | None:
    """Return the progress of a run for the notebook in which this is called; None elsewhere."""
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    # A shell in a terminal has no kernel, and nothing that could be updated.
    if getattr(shell, "kernel", None) is None:
        return None
    from IPython.display import display  # noqa: PLC0415  # of the kernel

    return NotebookProgress(display)
