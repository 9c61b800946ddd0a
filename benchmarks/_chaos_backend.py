"""The backend of the chaos benchmark's gateways: "trains" in a fraction of a second.

A training is a file that is created once and counts as finished when it is old enough. Any process
can therefore find a training that another one started, and the benchmark can count all of them.
"""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Final, Self

import anyio

from training_backends import (
    BackendContext,
    Capabilities,
    Dataset,
    Estimate,
    Journal,
    LogRecord,
    Money,
    Observation,
    RunNotFound,
    RunState,
    SuffixRule,
    TrainingBackend,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
    ValidationReport,
)

__all__ = ["QuickBackend"]

_TRAINS_FOR: Final = 0.3
"""Seconds: long enough to be observed running, short enough to finish before a repeated command."""


class QuickBackend(TrainingBackend):
    """Records trainings as files and trains nothing."""

    name: ClassVar[str] = "quick"
    summary: ClassVar[str] = "Finishes at once without training."

    def __init__(self, trainings: Path) -> None:
        self._trainings = trainings

    @classmethod
    def create(cls, context: BackendContext) -> Self:
        """Store the trainings in the client's home."""
        return cls(context.home / "trainings")

    @property
    def capabilities(self) -> Capabilities:
        """The minimum that a gateway needs."""
        return Capabilities(
            hyperparameters=None,
            weights=True,
            validation_files=True,
            suffix=SuffixRule(max_length=18),
        )

    async def validate(self, config: TrainingConfig, dataset: Dataset) -> ValidationReport:
        """Accept everything."""
        del config, dataset
        return ValidationReport()

    async def estimate(self, config: TrainingConfig, dataset: Dataset) -> Estimate:
        """Return an estimate with a cost of zero."""
        del config
        tokens = sum(file.size for file in dataset.train)
        free = Money.model_validate("0 USD")
        return Estimate(data_tokens=tokens, train_tokens=tokens, steps=1, cost=free)

    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        """Create the training's file, once."""
        path = anyio.Path(self._trainings / run.id)

        async def begin() -> str:
            await path.parent.mkdir(parents=True, exist_ok=True)
            # Its time is that of the start: content could be missing after a kill.
            await path.touch(exist_ok=False)
            return run.id

        async def find() -> str | None:
            return run.id if await path.exists() else None

        await journal.step("begin", begin, find)
        await journal.record(RunState(status=TrainingStatus.RUNNING, remote_id=run.id))
        return await self._state(run.id)

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        """Return the state, by the age of the file, and a single record when it is finished."""
        state = await self._state(run.remote_id or "")
        if state.finished_at is None or after is not None:
            return Observation(state, cursor=after)
        fields = {"status": state.status.value}
        record = LogRecord(
            at=state.finished_at, message="done", source="status", fields=fields, cursor="0"
        )
        return Observation(state, (record,), record.cursor)

    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        """Do nothing: the training finishes in a moment."""
        del run, save_checkpoint

    async def resume(
        self,
        run: TrainingRun,
        new_run: TrainingRun,
        journal: Journal,
        *,
        checkpoint: str | None = None,
    ) -> RunState:
        """Not supported."""
        del run, new_run, journal, checkpoint
        raise self.unsupported("resume a run", "Launch it again.")

    async def _state(self, training: str) -> RunState:
        path = anyio.Path(self._trainings / training)
        if not training or not await path.is_file():
            raise RunNotFound(f"There is no training {training!r}.", backend=self.name)
        began = (await path.stat()).st_mtime
        started = datetime.fromtimestamp(began, UTC)
        if time.time() - began < _TRAINS_FOR:
            return RunState(status=TrainingStatus.RUNNING, remote_id=training, started_at=started)
        return RunState(
            status=TrainingStatus.COMPLETED,
            remote_id=training,
            started_at=started,
            finished_at=datetime.fromtimestamp(began + _TRAINS_FOR, UTC),
            result_model=f"quick-{training}",
        )
