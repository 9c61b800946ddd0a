"""One training process from the spec to the result."""

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from training_backends.core.files import hold_lock
from training_backends.core.run import utc_now
from training_backends.engine.devices import VISIBLE, visible_devices
from training_backends.engine.errors import EngineError, Stopped, failure_of
from training_backends.engine.imports import prepare_imports
from training_backends.engine.leading import followed
from training_backends.engine.slots import Turn, hold_places, places_for
from training_backends.engine.status import say_status
from training_backends.engine.stop import StopRequest
from training_backends.engine.threads import prepare_threads
from training_backends.rundir.directory import (
    Event,
    ExitCode,
    ExitRecord,
    RunDir,
    RunSpec,
)

__all__ = ["train"]


def train(path: Path) -> ExitCode:
    """Train what a run directory asks for, from its newest checkpoint if it has one.

    Repeating it is safe: a completed run stays as it is, a run that another process works
    on is left alone.
    """
    run = RunDir(path)
    if not path.is_dir():
        print(f"{path} is not a directory", file=sys.stderr)  # noqa: T201  # the child's log
        return ExitCode.BAD_INPUT
    stop = StopRequest(run)
    try:
        with stop.listening(), hold_lock(run.lock):
            return _train_locked(run, stop)
    except BlockingIOError:
        print(f"another process trains in {path}", file=sys.stderr)  # noqa: T201
        return ExitCode.ALREADY_ACTIVE


def _train_locked(run: RunDir, stop: StopRequest) -> ExitCode:
    before = run.read_exit()
    if before is not None and before.status == "completed":
        return ExitCode.DONE
    if before is not None:
        run.clear_stale()
    try:
        record = _train_in_slot(run, stop)
    except BaseException as error:
        if not isinstance(error, Exception):  # such as SystemExit: say so, then go on with it
            _end(run, ExitRecord(status="failed", code=1, failure=failure_of(error)))
            raise
        record = _failed(run, error)
    _end(run, record)
    return ExitCode(record.code)


def _failed(run: RunDir, error: Exception) -> ExitRecord:
    step = max((state.step for _, state in run.read_checkpoints()), default=0)
    if isinstance(error, Stopped):
        return ExitRecord(status="stopped", code=ExitCode.STOPPED, step=step)
    traceback.print_exception(error)
    if isinstance(error, EngineError):
        return ExitRecord(status="failed", code=error.code, step=step, failure=error.failure)
    code = ExitCode.CRASHED
    return ExitRecord(status="failed", code=code, step=step, failure=failure_of(error))


def _end(run: RunDir, record: ExitRecord) -> None:
    message = record.failure.message if record.failure else record.status
    level = "error" if record.status == "failed" else "info"
    data = {"status": record.status}
    with suppress(OSError):  # a full disk, as the record may still say
        run.add_event(
            Event(name="status", level=level, message=message, step=record.step, data=data)
        )
    run.write_exit(record)
    run.stop.unlink(missing_ok=True)  # obeyed


def _train_in_slot(run: RunDir, stop: StopRequest) -> ExitRecord:
    spec = _read_spec(run)
    asks = spec.device != "cpu" and (spec.slots_dir or spec.num_processes > 1)
    devices = visible_devices() if asks else ()
    gpus = spec.num_processes if devices else 1
    if gpus > max(1, len(devices)):
        raise EngineError(
            f"num_processes is {gpus}, and this machine shows {len(devices)} GPUs: take fewer."
        )
    with hold_places(
        spec.slots_dir,
        Turn(spec.run_id, spec.priority, _waits_since(run)),
        places_for(devices, spec.slots, gpus),
        gpus=gpus,
        on_wait=partial(_say_position, run),
        should_stop=lambda: stop.requested,
    ) as places:
        chosen = [place.device for place in places if place.device is not None]
        if gpus > 1 and not chosen:
            chosen = list(devices[:gpus])
        where = ""
        if chosen:
            os.environ[VISIBLE] = chosen[0]  # has an effect only before torch is loaded
            where = f", on GPU {', '.join(chosen)}"
        say_status(run, "initializing", f"loads {spec.model}{where}")
        prepare_threads()
        prepare_imports(spec.model)
        return _work(run, spec, stop, chosen)


def _work(run: RunDir, spec: RunSpec, stop: StopRequest, devices: Sequence[str]) -> ExitRecord:
    with followed(partial(_end_at_once, run)) as followers:
        others: Sequence[str | None] = devices[1:] or [None] * (spec.num_processes - 1)
        followers.start(run.path, others)
        # Imported here: loading torch takes seconds and memory, which a queued process should not
        # take from the one that trains. The followers load it at the same time.
        from training_backends.engine.team import Team  # noqa: PLC0415
        from training_backends.engine.work import Work  # noqa: PLC0415

        team = Team(size=spec.num_processes)
        go = partial(followers.go, team.port)
        work = Work(run, spec, stop, team, on_loaded=go, on_trained=followers.end)
        outcome = work.run()
    if outcome is None:
        return ExitRecord(status="stopped", code=ExitCode.STOPPED, step=work.step)
    return ExitRecord(status="completed", code=ExitCode.DONE, step=work.step, result=outcome)


def _end_at_once(run: RunDir, error: EngineError) -> None:
    """End although the main thread waits, maybe forever, for a process that is not there."""
    try:
        _end(run, _failed(run, error))
    finally:
        os._exit(error.code)


def _waits_since(run: RunDir) -> datetime:
    """Return since when this run waits; an earlier process of it may have begun to."""
    since = utc_now()
    for event, _ in reversed(run.read_events()):
        if event.name != "status":
            continue
        if event.data.get("status") != "queued":
            break
        since = event.at
    return since


def _say_position(run: RunDir, position: int) -> None:
    message = f"waits for a free place to train, at position {position} of the queue"
    say_status(run, "queued", message, position=position)


def _read_spec(run: RunDir) -> RunSpec:
    try:
        return run.read_spec()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise EngineError(f"spec.json is not valid: {place}: {first['msg']}") from error
    except ValueError as error:
        raise EngineError(str(error)) from error
