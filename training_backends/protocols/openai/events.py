"""Messages of a job's events, written by servers and parsed by clients.

The messages of a job that succeeds were recorded in 2024-08 and 2024-12. Those of a job that is
paused, resumed, cancelled or fails are not documented; here they are this project's own.
"""

import re
from typing import Final

from training_backends.protocols.openai.wire import FineTuningJobEvent, StepMetrics

__all__ = [
    "CANCELLED",
    "COMPLETED",
    "PAUSED",
    "PAUSING",
    "RESUMED",
    "STARTED",
    "VALIDATED",
    "checkpoint_message",
    "created_message",
    "failed_message",
    "metrics_data",
    "metrics_message",
    "model_message",
    "read_checkpoint_message",
    "read_metrics",
    "read_model_message",
    "validating_message",
]

VALIDATED: Final = "Files validated, moving job to queued state"
STARTED: Final = "Fine-tuning job started"
COMPLETED: Final = "The job has successfully completed"
PAUSING: Final = "Pausing the job after a checkpoint"
PAUSED: Final = "The job is paused"
RESUMED: Final = "The job is resumed, moving job to queued state"
CANCELLED: Final = "The job was cancelled"

_CREATED: Final = "Created fine-tuning job: "
_MODEL: Final = "New fine-tuned model created: "

_NUMBER: Final = r"(?:-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|nan|-?inf)"
_STEP: Final = re.compile(r"Step (?P<step>\d{1,18})(?:/(?P<total>\d{1,18}))?: ", re.ASCII)
_VALUE: Final = re.compile(
    rf"(?P<name>training loss|full validation loss|validation loss)=(?P<value>{_NUMBER})", re.ASCII
)
_CHECKPOINT: Final = re.compile(
    r"Checkpoint created at step (?P<step>\d{1,18})(?: with Snapshot ID: (?P<name>\S+))?", re.ASCII
)
_LOSSES: Final = {
    "training loss": "train_loss",
    "validation loss": "valid_loss",
    "full validation loss": "full_valid_loss",
}


def created_message(job_id: str) -> str:
    """Return the first message of a job."""
    return f"{_CREATED}{job_id}"


def validating_message(training_file: str, validation_file: str | None = None) -> str:
    """Return the message for the start of the validation."""
    text = f"Validating training file: {training_file}"
    return f"{text} and validation file: {validation_file}" if validation_file else text


def metrics_message(metrics: StepMetrics) -> str:
    """Return the text of a metrics event: the losses that were measured, with two decimals."""
    total = "" if metrics.total_steps is None else f"/{metrics.total_steps}"
    values = metrics.values()
    losses = [f"{text}={values[name]:.2f}" for text, name in _LOSSES.items() if name in values]
    return f"Step {metrics.step or 0}{total}: {', '.join(losses)}"


def metrics_data(metrics: StepMetrics) -> dict[str, float]:
    """Return the `data` of a metrics event: step, total steps and what was measured."""
    return metrics.model_dump(exclude_none=True)


def checkpoint_message(step: int, name: str) -> str:
    """Return the message for a checkpoint and its model name."""
    return f"Checkpoint created at step {step} with Snapshot ID: {name}"


def model_message(name: str) -> str:
    """Return the message for the final model."""
    return f"{_MODEL}{name}"


def failed_message(reason: str) -> str:
    """Return the message of a job that failed."""
    return f"The job failed: {reason}"


def read_metrics(event: FineTuningJobEvent) -> StepMetrics | None:
    """Return the metrics of an event; None if it has none.

    `data` is exact; without it, as from servers that send none, the losses are parsed from the
    message, which has two decimals.
    """
    if event.data and event.type in {None, "metrics"}:
        metrics = StepMetrics.model_validate(event.data)
        if metrics.step is not None and metrics.values():
            return metrics
    found = _STEP.match(event.message)
    if found is None:
        return None
    losses = {
        _LOSSES[value["name"]]: float(value["value"])
        for value in _VALUE.finditer(event.message, found.end())
    }
    if not losses:
        return None
    total = found["total"]
    return StepMetrics.model_validate(
        {"step": int(found["step"]), "total_steps": int(total) if total else None, **losses}
    )


def read_checkpoint_message(message: str) -> tuple[int, str | None] | None:
    """Return step and model name from the message for a checkpoint; None for other messages."""
    found = _CHECKPOINT.fullmatch(message)
    return (int(found["step"]), found["name"]) if found else None


def read_model_message(message: str) -> str | None:
    """Return the model name from the message for the final model; None for other messages."""
    return message.removeprefix(_MODEL).strip() or None if message.startswith(_MODEL) else None
