"""A backend without a provider: tests set the state of its runs."""

from collections.abc import Callable, Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import anyio

from training_backends.core.backend import Journal, TrainingBackend
from training_backends.core.capabilities import Capabilities, SuffixRule
from training_backends.core.config import TrainingConfig
from training_backends.core.dataset import Dataset
from training_backends.core.errors import ConfigError, RunNotFound, TrainingBackendError
from training_backends.core.estimate import Estimate, Money, PriceSource
from training_backends.core.run import (
    Failure,
    LogRecord,
    LogSource,
    Observation,
    Prompt,
    Reply,
    RunState,
    TrainingRun,
    ValidationReport,
    utc_now,
)
from training_backends.core.status import TrainingStatus

__all__ = ["ScriptedBackend"]


class ScriptedBackend(TrainingBackend):
    """Keeps its jobs in memory; the methods under "back door" change them from outside.

    Attributes:
        created: Provider job ids, in order of creation.
        before_create: Called within the step that creates a job; may raise.
        after_create: Called after the job is created and before its id is returned; may raise, to
            simulate a lost response.
        resumed: For each resumed run: the old run's id, the new one's, the checkpoint.
        price: Cost returned by `estimate`, or None.
        report: Returned by `validate`.
        gate: Event that `validate` waits for, or None.
        looks: Ids of the observed runs, in order.
        trouble: Raised by `observe` if set.
        page: Records of an observation; None: all.
    """

    name: ClassVar[str] = "scripted"
    summary: ClassVar[str] = "Runs whose state is set by a test."

    def __init__(self, *, capabilities: Capabilities | None = None) -> None:
        self._capabilities = capabilities or Capabilities(
            tunings=frozenset({"full", "lora", "qlora"}),
            hyperparameters=None,
            weights=True,
            validation_files=True,
            suffix=SuffixRule(max_length=64),
            pauses=True,
            resumes="checkpoint",
            downloads=True,
            samples=True,
            samples_chats=True,
            deletes=True,
        )
        self._jobs: dict[str, RunState] = {}
        self._owners: dict[str, str] = {}
        self._logs: dict[str, list[LogRecord]] = {}
        self.created: list[str] = []
        self.resumed: list[tuple[str, str, str | None]] = []
        self.closed: bool = False
        self.before_create: Callable[[], None] = lambda: None
        self.after_create: Callable[[], None] = lambda: None
        self.price: Money | None = Money.model_validate("0 USD")
        self.report: ValidationReport = ValidationReport()
        self.gate: anyio.Event | None = None
        self.looks: list[str] = []
        self.trouble: TrainingBackendError | None = None
        self.page: int | None = None

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities passed to the constructor."""
        return self._capabilities

    @property
    def poll_interval(self) -> tuple[timedelta, timedelta]:
        """Short, as there is no provider."""
        return timedelta(milliseconds=10), timedelta(milliseconds=50)

    async def validate(self, config: TrainingConfig, dataset: Dataset) -> ValidationReport:
        """Wait for the gate, if any, and return `report`."""
        del config, dataset
        if self.gate is not None:
            await self.gate.wait()
        return self.report

    async def estimate(self, config: TrainingConfig, dataset: Dataset) -> Estimate:
        """Return `price`; the tokens are the bytes of the training files."""
        del config
        tokens = sum(file.size for file in dataset.train)
        source = PriceSource(name="a test", as_of=date(2026, 1, 1)) if self.price else None
        return Estimate(
            data_tokens=tokens,
            train_tokens=tokens,
            steps=10,
            cost=self.price,
            price_source=source,
            notes=() if self.price else ("The test sets no price.",),
        )

    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        """Create a job, once."""

        async def create() -> str:
            self.before_create()
            remote_id = str(uuid4())
            self.created.append(remote_id)
            self._owners[run.id] = remote_id
            self.adopt(remote_id)
            self.after_create()
            return remote_id

        async def find() -> str | None:
            return self._owners.get(run.id)

        remote_id = str(await journal.step("create", create, find))
        await journal.record(self._jobs[remote_id])
        return self._jobs[remote_id]

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        """Return the job's state and the records added through the back door."""
        self.looks.append(run.id)
        if self.trouble is not None:
            raise self.trouble
        state = self._job(run)
        log = self._logs[str(run.remote_id)]
        known = [record.cursor for record in log]
        if after is not None and after not in known:
            raise ConfigError(f"{after!r} is not a cursor of run {run.id}.", backend=self.name)
        new = log[known.index(after) + 1 if after is not None else 0 :]
        records = tuple(new[: self.page])
        more = len(records) < len(new)
        return Observation(state, records, records[-1].cursor if records else after, more)

    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        """Start stopping; the back door's `say` ends the job."""
        del save_checkpoint
        state = self._job(run)
        if not state.status.is_terminal:
            self.say(str(run.remote_id), TrainingStatus.STOPPING)

    async def pause(self, run: TrainingRun) -> None:
        """Pause the job."""
        self._job(run)
        self.say(str(run.remote_id), TrainingStatus.PAUSED)

    async def unpause(self, run: TrainingRun) -> None:
        """Continue the job."""
        self._job(run)
        self.say(str(run.remote_id), TrainingStatus.RUNNING)

    async def resume(
        self,
        run: TrainingRun,
        new_run: TrainingRun,
        journal: Journal,
        *,
        checkpoint: str | None = None,
    ) -> RunState:
        """Create a new job."""
        self.resumed.append((run.id, new_run.id, checkpoint))
        return await self.launch(new_run, journal)

    async def download(self, run: TrainingRun, target: Path) -> Path:
        """Write a file that contains the run id."""
        self._job(run)
        await anyio.Path(target).mkdir(parents=True)
        await anyio.Path(target / "model.txt").write_text(run.id, encoding="utf-8")
        return target

    async def sample(self, run: TrainingRun, prompt: Prompt, *, max_tokens: int = 64) -> Reply:
        """Echo the prompt, or the last message of several, with one character per token."""
        self._job(run)
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        return Reply(answer=text[:max_tokens])

    async def delete(self, run: TrainingRun) -> None:
        """Delete the job."""
        self._job(run)
        del self._jobs[str(run.remote_id)]

    async def aclose(self) -> None:
        """Set `closed`."""
        self.closed = True

    # -- back door ---------------------------------------------------------------------

    def adopt(self, remote_id: str) -> None:
        """Add a running job that was not launched here."""
        self._jobs[remote_id] = RunState(
            status=TrainingStatus.RUNNING,
            remote_id=remote_id,
            started_at=utc_now(),
            changed_at=utc_now(),
        )
        self._logs[remote_id] = []

    def say(self, remote_id: str, status: TrainingStatus, **state: Any) -> None:
        """Set a job's status."""
        moments: dict[str, Any] = {"changed_at": utc_now()}
        if status.is_terminal:
            moments["finished_at"] = utc_now()
        self._change(remote_id, status=status, **(moments | state))

    def finish(self, remote_id: str, result_model: str = "model") -> None:
        """Complete a job."""
        self.say(remote_id, TrainingStatus.COMPLETED, result_model=result_model)

    def fail(self, remote_id: str, message: str = "it broke") -> None:
        """Fail a job."""
        failure = Failure(kind="internal", message=message)
        self.say(remote_id, TrainingStatus.FAILED, failure=failure)

    def tell(self, remote_id: str, status: TrainingStatus, **state: Any) -> None:
        """Set a job's status and log the change."""
        self._add(remote_id, status.value, "status", fields={"status": status.value})
        self.say(remote_id, status, **state)

    def log(self, remote_id: str, message: str) -> None:
        """Add a record to a job's log."""
        self._add(remote_id, message, "event")

    def measure(self, remote_id: str, step: int, **metrics: float | None) -> None:
        """Add a row of metrics to a job's log."""
        self._add(remote_id, f"step {step}", "metrics", step, metrics)

    def _add(
        self,
        remote_id: str,
        message: str,
        source: LogSource,
        step: int | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        records = self._logs[remote_id]
        records.append(
            LogRecord(
                at=utc_now(),
                message=message,
                source=source,
                step=step,
                fields=dict(fields or {}),
                cursor=str(len(records)),
            )
        )
        self._change(remote_id, changed_at=utc_now())

    def _change(self, remote_id: str, **state: Any) -> None:
        self._jobs[remote_id] = self._jobs[remote_id].model_copy(update=state)

    def lose(self, remote_id: str) -> None:
        """Remove a job from the provider."""
        del self._jobs[remote_id]

    def _job(self, run: TrainingRun) -> RunState:
        state = self._jobs.get(run.remote_id or "")
        if state is None:
            raise RunNotFound(f"Job {run.remote_id} not found.", backend=self.name, run_id=run.id)
        return state

    def refusing(self, error: TrainingBackendError) -> Callable[[], None]:
        """Return a hook that raises `error`."""

        def raise_it() -> None:
            raise error

        return raise_it
