"""Runs at Weights & Biases."""

import os
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from training_backends.trackers.tracker import Measurement, Tracker

__all__ = ["WandbTracker"]


class WandbTracker(Tracker):
    """Reports under the run's own id, so that a restarted run is continued."""

    requires: ClassVar[Sequence[str]] = ("wandb",)
    install: ClassVar[str] = "pip install 'training-backends[wandb]'"
    _run: Any = None

    def start(self) -> None:
        """Open the run, or continue it."""
        import wandb  # noqa: PLC0415

        if self.key is not None:
            os.environ["WANDB_API_KEY"] = self.key.get_secret_value()
        given = self.integration
        self._run = wandb.init(
            project=given.project,
            entity=given.entity,
            name=given.run_name or given.name or self.run.id,
            id=self.run.id,
            resume="allow",
            tags=list(given.tags) or None,
            config=dict(self.run.parameters),
            dir=str(self.run.directory),
            mode=given.mode,
            settings=wandb.Settings(
                console="off", disable_git=True, disable_code=True, silent=True
            ),
        )

    def measured(self, measurements: Sequence[Measurement]) -> None:
        """Log metrics by step; W&B ignores steps that it already has."""
        for each in measurements:
            self._run.log({**each.values, "time": each.at.timestamp()}, step=each.step)

    def finish(self, status: Literal["completed", "failed", "cancelled"], message: str) -> None:
        """Close the run; an exit code other than 0 marks it as failed."""
        if message:
            self._run.summary["failure"] = message
        self._run.finish(exit_code=int(status != "completed"))
        self._run = None

    def close(self) -> None:
        """Let the run be continued by the next process."""
        if self._run is not None:
            self._run.finish(exit_code=1)
            self._run = None
