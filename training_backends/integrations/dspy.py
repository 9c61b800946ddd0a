"""A DSPy provider: `LM.finetune` and `BootstrapFinetune` on any backend."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Final

from training_backends.client.sync import TrainingClient
from training_backends.core.errors import RunNotFound
from training_backends.core.run import new_run_id
from training_backends.core.status import TrainingStatus
from training_backends.integrations import requires

with requires("dspy", "dspy"):
    from dspy.clients.provider import Provider, TrainingJob
    from dspy.clients.utils_finetune import TrainDataFormat, save_data
    from dspy.clients.utils_finetune import TrainingStatus as DspyStatus

__all__ = ["DspyTrainingJob", "TrainingProvider"]

_STATUSES: Final = {
    TrainingStatus.RUNNING: "running",
    TrainingStatus.PAUSED: "running",
    TrainingStatus.STOPPING: "running",
    TrainingStatus.COMPLETED: "succeeded",
    TrainingStatus.FAILED: "failed",
    TrainingStatus.CANCELLED: "cancelled",
}
"""DSPy's statuses; all others are pending."""
_PREFIX: Final = "openai/"
"""How `dspy.LM` names the protocol that a model is served with; no part of the model's name."""


class DspyTrainingJob(TrainingJob):  # type: ignore[misc]  # an optional package
    """A fine-tune that DSPy waits for.

    Attributes:
        run_id: The id of its run; of the newest, if a failed run was resumed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run_id: str = new_run_id()

    def status(self) -> Any:
        """Return DSPy's word for the run's status."""
        with TrainingClient() as client:
            try:
                run = client.status(self.run_id)
            except RunNotFound:  # it is being prepared, or was refused
                return DspyStatus.failed if self.done() else DspyStatus.not_started
        return DspyStatus(_STATUSES.get(run.status, "pending"))

    def cancel(self) -> bool:
        """Stop the run."""
        cancelled = Future.cancel(self)
        with TrainingClient() as client, suppress(RunNotFound):
            client.stop(self.run_id)
        return cancelled

    def set_result(self, result: Any) -> None:
        """Set the tuned model, or the error; ignored after `cancel`."""
        with suppress(InvalidStateError):
            super().set_result(result)


class TrainingProvider(Provider):  # type: ignore[misc]
    """Fine-tunes with a backend: `dspy.LM("openai/NAME", provider=TrainingProvider("openai"))`.

    The tuned LM is a copy of the one that was fine-tuned, with the new model's name: it answers if
    the server at its `api_base` serves that model, as a gateway does.

    Args:
        backend: Name of the backend.
        attempts: Most runs for one fine-tune in all; see `TrainingClient.run`.
    """

    def __init__(self, backend: str, *, attempts: int = 3) -> None:
        super().__init__()
        self.finetunable = True
        self.TrainingJob = DspyTrainingJob
        self._backend = backend
        self._attempts = attempts

    def finetune(
        self,
        job: Any,
        model: str,
        train_data: Sequence[Mapping[str, Any]],
        train_data_format: Any,
        train_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Train to the end of a run and return the tuned model's name.

        Args:
            train_kwargs: Further fields of the configuration, such as `hyperparameters`.

        Raises:
            ValueError: DSPy's data is of another format than chats and completions.
            RunFailed: The run has failed.
            TrainingBackendError: As by `TrainingClient.run`.
        """
        given = dict(train_kwargs or {})
        path = save_data([_row(row, train_data_format) for row in train_data])
        given["data"] = {"train": path, **given.get("data", {})}
        prefix = _PREFIX if model.startswith(_PREFIX) else ""
        config = {"model": model.removeprefix(prefix), **given}
        first = job.run_id
        with TrainingClient() as client:
            while True:
                run = client.run(
                    config,
                    backend=self._backend,
                    run_id=first,
                    attempts=self._attempts,
                    follow=False,
                )
                job.run_id = run.id
                if run.status.is_terminal:
                    break
                client.wait(run.id)
        return f"{prefix}{run.result_model}"


def _row(row: Mapping[str, Any], kind: Any) -> Mapping[str, Any]:
    """Return a row of DSPy's data as a chat."""
    if kind == TrainDataFormat.CHAT:
        return row
    if kind == TrainDataFormat.COMPLETION:
        said = (("user", row["prompt"]), ("assistant", row["completion"]))
        return {"messages": [{"role": role, "content": text} for role, text in said]}
    raise ValueError(f"data of the format {kind} cannot be trained on; use chats or completions")
