"""An Airflow operator that trains without holding a worker slot."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from os import PathLike, fspath
from typing import Any, ClassVar

from anyio import to_thread

from training_backends.client.client import AsyncTrainingClient
from training_backends.client.sync import TrainingClient
from training_backends.core.config import TrainingConfig
from training_backends.core.errors import RunNotFound, TrainingBackendError
from training_backends.core.run import RunFailed, TrainingRun, run_id_from
from training_backends.integrations import requires

with requires("apache-airflow>=3", "airflow"):
    from airflow.sdk import BaseOperator, BaseOperatorLink
    from airflow.sdk.exceptions import (
        AirflowException,
        AirflowFailException,
        TaskDeferralTimeout,
    )
    from airflow.triggers.base import BaseTrigger, TriggerEvent

__all__ = ["TrainingConsoleLink", "TrainingRunOperator", "TrainingRunTrigger"]

_RUN_ID = "run_id"
"""XCom with the id of the newest run."""


class TrainingRunTrigger(BaseTrigger):  # type: ignore[misc]  # an optional package
    """Fires once a run has finished; its log appears in that of the task.

    Args:
        run_id: The run, in the store that the triggerer's settings name.
    """

    def __init__(self, run_id: str) -> None:
        super().__init__()
        self.run_id = run_id

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what the triggerer makes the trigger from."""
        return f"{__name__}.{type(self).__name__}", {"run_id": self.run_id}

    async def run(self) -> AsyncIterator[Any]:
        """Follow the run to its end."""
        async with (
            await to_thread.run_sync(AsyncTrainingClient) as client,
            aclosing(client.logs(self.run_id, follow=True)) as records,
        ):
            async for record in records:
                self.log.info(record.message)
        yield TriggerEvent({"run_id": self.run_id})

    async def on_kill(self) -> None:
        """Stop the run of a deferred task that a user has cleared or marked."""
        async with await to_thread.run_sync(AsyncTrainingClient) as client:
            await client.stop(self.run_id, resumable=True)


class TrainingConsoleLink(BaseOperatorLink):  # type: ignore[misc]
    """The run's page in the console of a gateway."""

    name = "Training run"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """Return the page's URL; empty without a console."""
        del ti_key
        return getattr(operator, "console_link", "")


class TrainingRunOperator(BaseOperator):  # type: ignore[misc]
    """Trains to the end of a run, and returns the name of the model that it made.

    The run's id is made of the ids of the DAG, the task and the DAG run, so that a task that is
    retried or cleared, on any worker, continues with the same run. XCom has its `run_id`, its last
    `metrics` and, as the return value, its model.

    Args:
        config: A `TrainingConfig`, a mapping of its fields or the absolute path of a YAML file.
        backend: Name of the backend.
        run_id: Your own id; default: see above.
        attempts: Most runs for one task in all; a temporary failure is resumed as a new run.
        deferrable: Wait for the run in the triggerer instead of a worker.
        console: URL of the gateway at which the backend trains, for a link to the run's page.
    """

    template_fields: Sequence[str] = ("config", "backend", "run_id")
    template_fields_renderers: ClassVar[Mapping[str, str]] = {"config": "json"}
    operator_extra_links: Sequence[TrainingConsoleLink] = (TrainingConsoleLink(),)

    def __init__(
        self,
        *,
        config: TrainingConfig | Mapping[str, Any] | PathLike[str] | str,
        backend: str,
        run_id: str | None = None,
        attempts: int = 3,
        deferrable: bool = True,
        console: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if isinstance(config, TrainingConfig):
            config = config.model_dump(mode="json", exclude_unset=True)
        elif isinstance(config, PathLike):
            config = fspath(config)
        self.config = config
        self.backend = backend
        self.run_id = run_id
        self.attempts = attempts
        self.deferrable = deferrable
        self.console = console
        self.console_link: str = ""
        self._current: str | None = None
        self._killed = False

    def execute(self, context: Any, event: Any = None) -> str | None:
        """Launch or find the run, resume it after a temporary failure, and wait for its end.

        Raises:
            AirflowFailException: The run has failed, or cannot be launched; a retry would not help.
            TrainingBackendError: The provider cannot be reached for now.
        """
        del event  # the store is what counts
        with TrainingClient() as client:
            while True:
                run = self._newest(client, context)
                if run.status.is_terminal:
                    break
                if self.deferrable:
                    self.defer(
                        trigger=TrainingRunTrigger(run.id),
                        method_name="execute",
                        timeout=self.execution_timeout,
                    )
                for record in client.logs(run.id, follow=True):
                    self.log.info(record.message)
        context["ti"].xcom_push(key="metrics", value=run.metrics)
        return run.result_model

    def on_kill(self) -> None:
        """Stop the run of a task that is killed while it is on a worker; a retry resumes it."""
        self._killed = True
        if self._current is not None:
            self._stop(self._current)

    def resume_execution(self, next_method: str, next_kwargs: Any, context: Any) -> Any:
        """Continue after the triggerer; if it timed out, stop the run as on a worker."""
        try:
            return super().resume_execution(next_method, next_kwargs, context)
        except TaskDeferralTimeout:
            ti = context["ti"]
            run_id = ti.xcom_pull(task_ids=ti.task_id, key=_RUN_ID, map_indexes=ti.map_index)
            if run_id:
                self._stop(run_id)
            raise

    def _newest(self, client: TrainingClient, context: Any) -> TrainingRun:
        """Return the run to wait for, which is launched or resumed if need be, or its result."""
        ti = context["ti"]
        run_id = self.run_id or _task_run_id(ti)
        self._require_alive()
        try:
            run = client.run(
                self.config,
                backend=self.backend,
                run_id=run_id,
                attempts=self.attempts,
                follow=False,
            )
        except TrainingBackendError as error:
            if isinstance(error, RunFailed):
                ti.xcom_push(key=_RUN_ID, value=error.run_id)
            elif error.retryable:
                raise
            # Airflow shows the message alone, without notes: issues and hint.
            raise AirflowFailException("\n".join((str(error), *error.__notes__))) from error
        if run.id != self._current:
            ti.xcom_push(key=_RUN_ID, value=run.id)
        self._current = run.id
        if self._killed:  # during the launch, when `on_kill` could not know this run
            self._stop(run.id)
        self._require_alive()
        if self.console and run.remote_id:
            self.console_link = f"{self.console.rstrip('/')}/#/run/{run.remote_id}"
            ti.xcom_push(key=TrainingConsoleLink().xcom_key, value=self.console_link)
        return run

    def _require_alive(self) -> None:
        if self._killed:
            raise AirflowException(f"The task was killed, and its run {self._current} stopped.")

    def _stop(self, run_id: str) -> None:
        with TrainingClient() as client:
            try:
                client.stop(run_id, resumable=True)
            except RunNotFound:
                self.log.warning("Run %s is not in the store any more.", run_id)


def _task_run_id(ti: Any) -> str:
    index = f" {ti.map_index}" if ti.map_index is not None and ti.map_index >= 0 else ""
    return run_id_from(f"{ti.dag_id} {ti.task_id} {ti.run_id}{index}")
