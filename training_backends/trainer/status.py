"""Tell in the run directory what state the process is in."""

from training_backends.rundir.directory import Event, RunDir

__all__ = ["say_status"]


def say_status(run: RunDir, status: str, message: str, **data: object) -> None:
    """Append a `status` event; `data` goes beside the status."""
    run.add_event(Event(name="status", message=message, data={"status": status, **data}))
