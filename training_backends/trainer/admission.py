"""Wait for a slot in little memory: only parts of the standard library are loaded until then.

A queued run is a process that sleeps. One that had loaded pydantic and the models of the run
directory would hold 33 MB; this holds a third of it. So spec.json and events.jsonl are read and
written here as plain JSON; `rundir.directory` has their models.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from training_backends.core.files import append_line, hold_lock, read_lines
from training_backends.trainer.control import StopRequest
from training_backends.trainer.queue import Turn, hold_places, places_for

__all__ = ["Admission", "when_admitted"]

_BAD_INPUT: Final = 4
_ALREADY_ACTIVE: Final = 5
"""These two are of `rundir.directory.ExitCode`."""


class Admission(NamedTuple):
    """What a training process may do once it has waited.

    Attributes:
        devices: The GPUs to train on, as `CUDA_VISIBLE_DEVICES` names them; empty for the CPU.
        error: Why it must not train: it was stopped, or the run directory cannot be used.
    """

    run: Path
    stop: StopRequest
    devices: tuple[str, ...] = ()
    error: Exception | None = None


def when_admitted(path: Path, load: Callable[[], Callable[[Admission], int]]) -> int:
    """Wait for a run's slot, then train; return the exit code.

    Args:
        load: Imports and returns what trains; called once there is a slot.
    """
    if not path.is_dir():
        print(f"{path} is not a directory", file=sys.stderr)  # noqa: T201  # the child's log
        return _BAD_INPUT
    try:
        with _admitted(path) as admission:
            return load()(admission)
    except BlockingIOError:
        print(f"another process trains in {path}", file=sys.stderr)  # noqa: T201
        return _ALREADY_ACTIVE


@contextmanager
def _admitted(path: Path) -> Iterator[Admission]:
    """Hold a run directory's lock and a slot for the block; wait for the slot, not for the lock.

    Raises:
        BlockingIOError: Another process trains in this directory.
    """
    stop = StopRequest(path / "stop")
    with stop.listening(), hold_lock(path / "lock"), ExitStack() as held:
        try:
            admission = Admission(path, stop, _wait(path, stop, held))
        except Exception as error:  # the caller writes to the run directory how it ended
            admission = Admission(path, stop, error=error)
        yield admission


def _wait(path: Path, stop: StopRequest, held: ExitStack) -> tuple[str, ...]:
    """Take a slot as spec.json asks; return its GPUs.

    Raises:
        ValueError: The spec is not valid, or asks for more GPUs than there are.
        Stopped: A stop was requested while there was no free slot.
    """
    if ended := _read_object(path / "exit.json").get("status"):
        if ended == "completed":
            return ()
        (path / "exit.json").unlink(missing_ok=True)
        stop.clear()
    spec = _read_object(path / "spec.json")
    directory = spec.get("slots_dir")
    processes = int(spec.get("num_processes", 1))
    devices: tuple[str, ...] = ()
    if spec.get("device") != "cpu" and (directory or processes > 1):
        from training_backends.trainer.environment import visible_devices  # noqa: PLC0415  # 2 MB

        devices = visible_devices()
    gpus = processes if devices else 1
    if gpus > max(1, len(devices)):
        raise ValueError(
            f"num_processes is {gpus}, and this machine shows {len(devices)} GPUs: take fewer."
        )
    places = held.enter_context(
        hold_places(
            directory and Path(directory),
            Turn(str(spec.get("run_id")), int(spec.get("priority", 0)), _waits_since(path)),
            places_for(devices, spec.get("slots"), gpus),
            gpus=gpus,
            on_wait=partial(_say_position, path),
            should_stop=lambda: stop.requested,
        )
    )
    chosen = tuple(place.device for place in places if place.device is not None)
    return devices[:gpus] if gpus > 1 and not chosen else chosen


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if the file holds none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _waits_since(path: Path) -> datetime:
    """Return since when this run waits; an earlier process of it may have begun to."""
    since = datetime.now(UTC)
    for line, _ in reversed([*read_lines(path / "events.jsonl")]):
        try:
            event = json.loads(line)
            if event["name"] != "status":
                continue
            if event["data"]["status"] != "queued":
                break
            since = datetime.fromisoformat(event["at"])
        except (ValueError, KeyError, TypeError):
            continue  # torn by a crash and closed by the next writer
    return since


def _say_position(path: Path, position: int) -> None:
    event = {
        "at": datetime.now(UTC).isoformat(),
        "name": "status",
        "message": f"waits for a free place to train, at position {position} of the queue",
        "data": {"status": "queued", "position": position},
    }
    append_line(path / "events.jsonl", json.dumps(event))
