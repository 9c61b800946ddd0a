"""Wait for a slot with a small memory footprint, importing only parts of the standard library.

A queued run is a sleeping process. With pydantic and the run directory's models loaded it would
take 33 MB; without, it takes a third of that. That is why spec.json and events.jsonl are handled
as plain JSON here; `rundir.directory` defines their models.
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
from training_backends.trainer.queue import Device, QueueEntry, hold_slots, slots_for

__all__ = ["Admission", "when_admitted"]

_BAD_INPUT: Final = 4
_ALREADY_ACTIVE: Final = 5
"""As in `rundir.directory.TrainerExitCode`, which is not imported here."""


class Admission(NamedTuple):
    """What a training process was granted.

    Attributes:
        devices: The GPUs to train on; empty for the CPU.
        error: Why it must not train: it was stopped, or the run directory cannot be used.
    """

    run: Path
    stop: StopRequest
    devices: tuple[Device, ...] = ()
    error: Exception | None = None


def when_admitted(path: Path, load: Callable[[], Callable[[Admission], int]]) -> int:
    """Wait for a slot, then train; return the exit code.

    Args:
        load: Imports and returns the training function; called once a slot is held.
    """
    if not path.is_dir():
        print(f"{path} is not a directory", file=sys.stderr)  # noqa: T201  # the child's log
        return _BAD_INPUT
    try:
        with _admitted(path) as admission:
            return load()(admission)
    except BlockingIOError:
        print(f"another process is already training in {path}", file=sys.stderr)  # noqa: T201
        return _ALREADY_ACTIVE


@contextmanager
def _admitted(path: Path) -> Iterator[Admission]:
    """Hold the run directory's lock and a slot for the block; only the slot is waited for.

    Raises:
        BlockingIOError: Another process trains in this directory.
    """
    stop = StopRequest(path / "stop")
    with stop.listening(), hold_lock(path / "lock"), ExitStack() as held:
        try:
            admission = Admission(path, stop, _wait(path, stop, held))
        except Exception as error:  # the caller records it in the run directory
            admission = Admission(path, stop, error=error)
        yield admission


def _wait(path: Path, stop: StopRequest, held: ExitStack) -> tuple[Device, ...]:
    """Take the slot that spec.json asks for; return its GPUs.

    Raises:
        ValueError: The spec is invalid, or asks for more GPUs than this machine has.
        Stopped: A stop was requested while waiting.
    """
    if ended := _read_object(path / "exit.json").get("status"):
        if ended == "completed":
            return ()
        (path / "exit.json").unlink(missing_ok=True)
        stop.clear()
    spec = _read_object(path / "spec.json")
    directory = spec.get("slots_dir")
    processes = int(spec.get("num_processes", 1))
    devices: tuple[Device, ...] = ()
    if spec.get("device") != "cpu" and (directory or processes > 1):
        from training_backends.trainer.environment import visible_devices  # noqa: PLC0415  # 2 MB

        devices = visible_devices()
    gpus = processes if devices else 1
    if gpus > max(1, len(devices)):
        raise ValueError(
            f"num_processes is {gpus}, but only {len(devices)} GPUs are visible: reduce it."
        )
    slots = held.enter_context(
        hold_slots(
            directory and Path(directory),
            QueueEntry(str(spec.get("run_id")), int(spec.get("priority", 0)), _waits_since(path)),
            slots_for(devices, spec.get("slots"), gpus),
            gpus=gpus,
            on_wait=partial(_report_position, path),
            should_stop=lambda: stop.requested,
        )
    )
    chosen = tuple(slot.device for slot in slots if slot.device is not None)
    return devices[:gpus] if gpus > 1 and not chosen else chosen


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file contains none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _waits_since(path: Path) -> datetime:
    """Return when this run was first queued, possibly by an earlier process of it."""
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
            continue  # truncated by a crash
    return since


def _report_position(path: Path, position: int) -> None:
    event = {
        "at": datetime.now(UTC).isoformat(),
        "name": "status",
        "message": f"Queued (position {position})",
        "data": {"status": "queued", "position": position},
    }
    append_line(path / "events.jsonl", json.dumps(event))
