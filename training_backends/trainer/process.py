"""Run one training process, from the spec to the result."""

import os
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from training_backends.core.errors import validation_issues
from training_backends.rundir.directory import (
    Event,
    ExitRecord,
    RunDir,
    RunSpec,
    TrainerExitCode,
)
from training_backends.trainer.admission import Admission, when_admitted
from training_backends.trainer.control import StopRequest, report_status
from training_backends.trainer.environment import prepare_imports, prepare_threads, show_only
from training_backends.trainer.errors import (
    Stopped,
    TrainerError,
    exit_code_of,
    failure_of,
    quotes_library,
)
from training_backends.trainer.queue import Device
from training_backends.trainer.workers import followed

__all__ = ["train", "train_admitted"]


def train(path: Path) -> TrainerExitCode:
    """Train a run directory, starting from its newest checkpoint if there is one.

    Safe to repeat: a completed run is left as it is, and so is one that another process trains.
    """
    return TrainerExitCode(when_admitted(path, lambda: train_admitted))


def train_admitted(admission: Admission) -> TrainerExitCode:
    """Train with the directory lock and the devices that this process holds."""
    run = RunDir(admission.run)
    before = run.read_exit()
    if before is not None and before.status == "completed":
        return TrainerExitCode.DONE
    run.take_reserve()
    try:
        record = _train(run, admission)
    except BaseException as error:
        if not isinstance(error, Exception):  # such as SystemExit: record it, then re-raise
            _end(run, ExitRecord(status="failed", code=1, failure=failure_of(error)))
            raise
        record = _failed(run, error)
    if record.status == "stopped" and admission.stop.suspends:
        # Without an exit.json, whoever observes the run restarts it like any queued one.
        message = f"Suspended at step {record.step}; continues when observed again"
        run.reserve.unlink(missing_ok=True)
        report_status(run, "queued", message, step=record.step)
        admission.stop.clear()
    else:
        _end(run, record)
    return TrainerExitCode(record.code)


def _failed(run: RunDir, error: Exception) -> ExitRecord:
    step = max((state.step for _, state in run.read_checkpoints()), default=0)
    if isinstance(error, Stopped):
        return ExitRecord(status="stopped", code=TrainerExitCode.STOPPED, step=step)
    with suppress(OSError):  # log.txt is on the disk that may be full
        traceback.print_exception(error)
    code = exit_code_of(error)
    failure = failure_of(error)
    if quotes_library(error):
        # Relative to the home: a gateway shows the message to its clients.
        log = "/".join(run.log.parts[-3:])
        message = f"{failure.message.rstrip('.')}. The complete error is in {log}."
        failure = failure.model_copy(update={"message": message})
    return ExitRecord(status="failed", code=code, step=step, failure=failure)


def _end(run: RunDir, record: ExitRecord) -> None:
    message = record.failure.message if record.failure else record.status
    level = "error" if record.status == "failed" else "info"
    data = {"status": record.status}
    with suppress(OSError):
        run.reserve.unlink(missing_ok=True)
    with suppress(OSError):  # exit.json matters more
        run.add_event(
            Event(name="status", level=level, message=message, step=record.step, data=data)
        )
    run.write_exit(record)
    run.stop.unlink(missing_ok=True)  # the request has been served


def _train(run: RunDir, admission: Admission) -> ExitRecord:
    spec = _read_spec(run)
    if isinstance(admission.error, ValueError):
        raise TrainerError(str(admission.error)) from admission.error
    if admission.error is not None:
        raise admission.error
    where = ""
    if chosen := admission.devices:
        os.environ.update(show_only(chosen[0]))  # has an effect only before torch is loaded
        where = f", on GPU {', '.join(device.name for device in chosen)}"
    report_status(run, "initializing", f"Loading {spec.model}{where}")
    prepare_threads()
    prepare_imports(spec.model)
    return _train_group(run, spec, admission.stop, chosen)


def _train_group(
    run: RunDir, spec: RunSpec, stop: StopRequest, devices: Sequence[Device]
) -> ExitRecord:
    with followed(partial(_end_at_once, run)) as followers:
        others: Sequence[Device | None] = devices[1:] or [None] * (spec.num_processes - 1)
        followers.start(run.path, others)
        # Imported here: torch takes seconds and memory, which a queued process should not take
        # from the one that trains. The followers load it in parallel.
        from training_backends.trainer.distributed import ProcessGroup  # noqa: PLC0415
        from training_backends.trainer.run import TrainingProcess  # noqa: PLC0415

        group = ProcessGroup(size=spec.num_processes)
        go = partial(followers.go, group.port)
        process = TrainingProcess(run, spec, stop, group, on_loaded=go, on_trained=followers.end)
        outcome = process.run()
    if outcome is None:
        return ExitRecord(status="stopped", code=TrainerExitCode.STOPPED, step=process.step)
    return ExitRecord(
        status="completed", code=TrainerExitCode.DONE, step=process.step, result=outcome
    )


def _end_at_once(run: RunDir, error: TrainerError) -> None:
    """Exit even though the main thread may wait forever for a process that has died."""
    try:
        _end(run, _failed(run, error))
    finally:
        os._exit(error.code)


def _read_spec(run: RunDir) -> RunSpec:
    try:
        return run.read_spec()
    except ValidationError as error:
        raise TrainerError(f"spec.json is not valid: {validation_issues(error)[0]}") from error
    except ValueError as error:
        raise TrainerError(str(error)) from error
