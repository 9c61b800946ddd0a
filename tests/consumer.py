"""A user's program, type-checked only: strict mypy and pyright accept it."""

import sys
from contextlib import aclosing
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import ClassVar, Self

from training_backends import (
    AsyncTrainingClient,
    BackendContext,
    Budget,
    BudgetExceeded,
    Capabilities,
    Data,
    Dataset,
    DataSource,
    Estimate,
    Hyperparameters,
    Issue,
    Journal,
    LogRecord,
    Money,
    Observation,
    RunNotFound,
    RunState,
    TrainingBackend,
    TrainingBackendError,
    TrainingClient,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
    Tuning,
    ValidationReport,
    load_config,
)

CONFIG = TrainingConfig(
    model="tiny-mistral",
    data=Data(train=(DataSource(path=Path("train.jsonl"), weight=2.0),)),
    tuning=Tuning(kind="lora"),
    hyperparameters=Hyperparameters(training_steps=100),
    budget=Budget(max_cost=Money(amount=Decimal(25), currency="USD")),
)


def launch(path: Path) -> str:
    """Launch a run, wait for it and describe it."""
    with TrainingClient() as client:
        config = load_config(path).config
        report = client.validate(config, backend="local")
        problems: list[str] = [f"{issue.field}: {issue.message}" for issue in report.issues]
        estimate = client.estimate(config, backend="local", sample=1000)
        cost: Money | None = estimate.cost

        async def confirm(quote: Estimate) -> bool:
            return quote.cost == cost

        try:
            run = client.launch(config, backend="local", confirm=confirm)
        except BudgetExceeded as error:
            return f"{error.message} {error.hint or ''} {error.limit}"
        except TrainingBackendError as error:
            problems += [str(issue) for issue in error.issues]
            return "\n".join(problems)
        (run,) = client.wait(run.id, timeout=3600)
        duration: timedelta | None = estimate.duration
        return f"{run.id} {run.status.value} {duration} {run.metrics.get('train_loss', 0.0):.3f}"


async def follow(run_id: str) -> dict[str, TrainingStatus]:
    """Follow a run's log and list all runs."""
    async with AsyncTrainingClient(backends={"cluster": Cluster()}) as client:
        try:
            run = await client.status(run_id)
        except RunNotFound as error:
            return dict.fromkeys(error.candidates, TrainingStatus.UNKNOWN)
        async with aclosing(client.logs(run.id, follow=True)) as records:
            async for record in records:
                sys.stdout.write(f"{record.at:%H:%M:%S} {record.message}\n")
        for point in await client.metrics(run.id):
            sys.stdout.write(f"{point.step} {point.name} {point.value:.3f}\n")
        return {run.id: run.status for run in await client.list(status="completed")}


class Cluster(TrainingBackend):
    """A backend of the user's own."""

    name: ClassVar[str] = "cluster"

    def __init__(self, jobs: Path = Path("jobs")) -> None:
        self._jobs = jobs

    @classmethod
    def create(cls, context: BackendContext) -> Self:
        """Create the backend in the client's home."""
        return cls(context.home / "cluster")

    @property
    def capabilities(self) -> Capabilities:
        """It fine-tunes."""
        return Capabilities(methods=frozenset({"sft"}))

    async def validate(self, config: TrainingConfig, dataset: Dataset) -> ValidationReport:
        """Report a method that the cluster does not know."""
        if config.method == "sft" and dataset.files:
            return ValidationReport()
        return ValidationReport(issues=(Issue(code="method", message="unknown", field="method"),))

    async def estimate(self, config: TrainingConfig, dataset: Dataset) -> Estimate:
        """Estimate nothing."""
        return Estimate(notes=(f"{config.model}: {len(dataset.files)} files",))

    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        """Submit the run once."""

        async def submit() -> str:
            return run.id

        remote_id = str(await journal.step("submit", submit, repeatable=True))
        state = RunState(status=TrainingStatus.PENDING, remote_id=remote_id)
        await journal.record(state)
        return state

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        """Return the stored state and the one record of the log."""
        state = RunState(status=run.status, remote_id=run.remote_id)
        record = LogRecord(at=run.created_at, message="Submitted", source="status", cursor="0")
        return Observation(state, () if after else (record,), "0")

    async def stop(self, run: TrainingRun, *, save_checkpoint: bool = True) -> None:
        """Stop nothing."""

    async def resume(
        self,
        run: TrainingRun,
        new_run: TrainingRun,
        journal: Journal,
        *,
        checkpoint: str | None = None,
    ) -> RunState:
        """Refuse."""
        del run, new_run, journal, checkpoint
        raise self.unsupported("resume runs")
