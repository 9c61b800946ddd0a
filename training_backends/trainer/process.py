"""Run one training process, from the spec to the result."""

import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Final

from pydantic import ValidationError

from training_backends.core.errors import validation_issues
from training_backends.core.tracing import TRACE_VARIABLES, remote_parent, span
from training_backends.rundir.checkpoints import remove_optimizer_state
from training_backends.rundir.directory import (
    Event,
    ExitRecord,
    MetricsRow,
    ResultRecord,
    RunDir,
    RunSpec,
    TrainerExitCode,
)
from training_backends.trainer.admission import Admission, when_admitted
from training_backends.trainer.control import StopRequest, report_status
from training_backends.trainer.environment import importing, show_only
from training_backends.trainer.errors import (
    Stopped,
    TrainerError,
    exit_code_of,
    failure_of,
    quotes_library,
)
from training_backends.trainer.queue import Device

__all__ = ["Launch", "train", "train_admitted", "work"]

_POLL: Final = 0.5
_EXPORTER: Final = "OTEL_TRACES_EXPORTER"


Launch = Callable[[RunDir, RunSpec, StopRequest, Sequence[Device]], ExitRecord]
"""Starts a run's processes and returns how the run ended, see `launch.launch`."""


def train(path: Path, launch: Launch | None = None) -> TrainerExitCode:
    """Train a run directory, starting from its newest checkpoint if there is one.

    Safe to repeat: a completed run is left as it is, and so is one that another process trains.

    Args:
        launch: Starts the processes that train, instead of this one or those of this machine.
    """
    return TrainerExitCode(when_admitted(path, lambda: partial(train_admitted, launch=launch)))


def train_admitted(admission: Admission, launch: Launch | None = None) -> TrainerExitCode:
    """Train with the directory lock and the devices that this process holds; see `train`."""
    run = RunDir(admission.run)
    before = run.read_exit()
    if before is not None and before.status == "completed":
        return TrainerExitCode.DONE
    run.take_reserve()
    try:
        with _traced("training_backends.train", run):
            record = _train(run, admission, launch)
    except BaseException as error:
        if not isinstance(error, Exception):  # such as SystemExit: record it, then re-raise
            _end(run, ExitRecord(status="failed", code=1, failure=failure_of(error)))
            raise
        record = _failed(run, error)
    if record.status == "stopped" and admission.stop.suspends:
        # Without an exit.json, the next observation restarts the run like any queued one.
        message = f"Suspended at step {record.step}; continues when observed again"
        run.reserve.unlink(missing_ok=True)
        report_status(run, "queued", message, step=record.step)
        admission.stop.clear()
    else:
        _end(run, record)
    if record.status == "completed":
        # Only resuming needs them, and a completed run is not resumed.
        shutil.rmtree(run.tokens, ignore_errors=True)
        with suppress(OSError):
            remove_optimizer_state(run)
    return TrainerExitCode(record.code)


@contextmanager
def _traced(name: str, run: RunDir) -> Iterator[None]:
    """Record the block as a span of the trace that launched the run, if it was passed on.

    Spans are exported as `OTEL_TRACES_EXPORTER` says; the run's log names the trace.
    """
    headers = {name.lower(): os.environ.get(name, "") for name in TRACE_VARIABLES}
    if not headers["traceparent"] or find_spec("opentelemetry.sdk") is None:
        yield
        return
    from opentelemetry import trace  # noqa: PLC0415  # optional

    try:
        _export_spans([each.strip() for each in os.environ.get(_EXPORTER, "").split(",")])
    except Exception:  # must not fail the run
        traceback.print_exc()
    with remote_parent(headers), span(name, run_id=run.path.name):
        found = trace.get_current_span().get_span_context()
        ids = {"trace_id": f"{found.trace_id:032x}", "span_id": f"{found.span_id:016x}"}
        run.add_event(Event(name="message", message=f"Trace {ids['trace_id']}", data=ids))
        yield
    if (flush := getattr(trace.get_tracer_provider(), "force_flush", None)) is not None:
        flush()


def _export_spans(names: Sequence[str]) -> None:
    from opentelemetry import trace  # noqa: PLC0415  # optional
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    installed = entry_points(group="opentelemetry_traces_exporter")
    if found := [each for each in installed if each.name in names]:
        provider = TracerProvider()
        for each in found:
            provider.add_span_processor(BatchSpanProcessor(each.load()()))
        trace.set_tracer_provider(provider)


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


def _train(run: RunDir, admission: Admission, launch: Launch | None) -> ExitRecord:
    spec = _read_spec(run)
    if isinstance(admission.error, ValueError):
        raise TrainerError(str(admission.error)) from admission.error
    if admission.error is not None:
        raise admission.error
    where = ""
    if chosen := admission.devices:
        os.environ.update(show_only(chosen[0]))  # has an effect only before torch is loaded
        where = f", on GPU {', '.join(device.name for device in chosen)}"
    if spec.integrations:
        from training_backends.trainer.tracking import start_tracking  # noqa: PLC0415

        start_tracking(run)
    report_status(run, "initializing", f"Loading {spec.model}{where}")
    from training_backends.trainer.encode import encode_data  # noqa: PLC0415  # see below

    encode_data(run, spec, lambda: admission.stop.requested)
    if launch is None and spec.num_processes > 1:
        from training_backends.trainer.launch import launch  # noqa: PLC0415
    if launch is not None:
        return launch(run, spec, admission.stop, chosen)
    with importing(spec.model):
        # Imported here: torch takes seconds and memory, which a queued process should not take
        # from the one that trains.
        from training_backends.trainer.run import TrainingProcess  # noqa: PLC0415

    process = TrainingProcess(run, spec, admission.stop)
    return _record_of(process.run(), process.step)


def _record_of(result: ResultRecord | None, step: int) -> ExitRecord:
    if result is None:
        return ExitRecord(status="stopped", code=TrainerExitCode.STOPPED, step=step)
    return ExitRecord(status="completed", code=TrainerExitCode.DONE, step=step, result=result)


def work(path: Path, parent: int | None = None, stored: str | None = None) -> TrainerExitCode:
    """Train as one of several processes, as the environment describes; see `launch`.

    How the run ended is reported to the process that holds the run directory's lock. Any exit code
    but DONE makes torch's agent end the others.

    Args:
        parent: Id of the parent process; this process exits when that has exited.
        stored: URL of the run in an object store, if each process has a directory of its own.
    """
    if parent is not None:
        Thread(target=_end_with, args=(parent,), name="parent", daemon=True).start()
    run = RunDir(path)
    stop = StopRequest(run.stop)
    spec = run.read_spec()
    with importing(spec.model):
        from training_backends.trainer.launch import Outcome  # noqa: PLC0415
        from training_backends.trainer.models import choose_device  # noqa: PLC0415
        from training_backends.trainer.run import TrainingProcess  # noqa: PLC0415
        from training_backends.trainer.world import has_lost_contact, join_world  # noqa: PLC0415

    outcome = Outcome(run)

    def restart(rows: int) -> None:
        outcome.limit_rows(rows)
        raise _OutOfMemory(rows)

    try:
        # The agent ends processes with SIGTERM; a stop request of its parent is a file.
        with nullcontext() if parent else stop.listening():
            world = join_world(choose_device(spec.device), is_apart=stored is not None)
            process = TrainingProcess(
                run if world.is_leader else _SilentRunDir(path),
                spec,
                stop,
                world,
                max_rows=outcome.max_rows(),
                on_halved=restart,
                **({"fetch_shares": partial(_fetch_shares, stored, run)} if stored else {}),
            )
            result = process.run()
    except Exception as error:
        if isinstance(error, _OutOfMemory) or has_lost_contact(error):
            print(repr(error), file=sys.stderr)  # noqa: T201  # the run's log
        else:
            outcome.report(_failed(run, error))
        return TrainerExitCode.CRASHED
    if world.is_leader:
        outcome.report(_record_of(result, process.step))
    return TrainerExitCode.DONE


def _fetch_shares(stored: str, run: RunDir, step: int) -> str | None:
    from training_backends.rundir.stored import StoredRun  # noqa: PLC0415  # rarely needed

    return StoredRun.at(stored).fetch_shares(step, run)


class _OutOfMemory(Exception):
    """All processes must start again with fewer rows at a time."""


class _SilentRunDir(RunDir):
    """A run directory that only the leader writes; warnings go to the log."""

    def add_event(self, event: Event) -> None:
        if event.level == "warning":
            print(event.message, file=sys.stderr)  # noqa: T201

    def add_metrics(self, row: MetricsRow) -> None:
        pass


def _end_with(parent: int) -> None:
    """Exit soon after the parent; the main thread may wait for another process forever."""
    while os.getppid() == parent:
        sleep(_POLL)
    os._exit(TrainerExitCode.STOPPED)


def _read_spec(run: RunDir) -> RunSpec:
    try:
        return run.read_spec()
    except ValidationError as error:
        raise TrainerError(f"spec.json is not valid: {validation_issues(error)[0]}") from error
    except ValueError as error:
        raise TrainerError(str(error)) from error
