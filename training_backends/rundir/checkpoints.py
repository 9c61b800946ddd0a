"""Checkpoints in a run directory: whole to the last bit, or not to be continued from.

`checkpoints/step-N/` has its name only once it is complete; its `state.json` lists the other
files with size and checksum. `checkpoints/.step-N.*` is being written or removed, or was set
aside because it is damaged.
"""

import zlib
from pathlib import Path
from typing import Final, NamedTuple

from pydantic import ValidationError

from training_backends.rundir.directory import CheckpointState, Event, RunDir

__all__ = [
    "STATE",
    "Damaged",
    "Found",
    "Whole",
    "damage_of",
    "describe_files",
    "find_newest",
    "step_of",
]

STATE: Final = "state.json"
_CHUNK: Final = 1 << 20


class Whole(NamedTuple):
    """A checkpoint that can be continued from."""

    path: Path
    state: CheckpointState


class Damaged(NamedTuple):
    """A checkpoint that must not be continued from, and why."""

    path: Path
    reason: str

    def event(self, instead: Whole | None) -> Event:
        """Tell of it, and of what is continued from in its place."""
        name = self.path.name
        goes_on = f"goes on from {instead.path.name if instead else 'the beginning'}"
        return Event(
            name="message",
            level="warning",
            message=f"the checkpoint {name} is damaged: {self.reason}; {goes_on}",
            data={"checkpoint": name, "reason": self.reason},
        )


class Found(NamedTuple):
    """The newest whole checkpoint, if there is one, and the damaged ones that are newer."""

    whole: Whole | None
    damaged: tuple[Damaged, ...]


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's name says; -1 for another name."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def describe_files(directory: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Return size and checksum of each file in a checkpoint, but for its `state.json`."""
    files = {path.relative_to(directory).as_posix(): path for path in _files(directory)}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    return sizes, {name: _checksum(path) for name, path in files.items()}


def find_newest(run: RunDir) -> Found:
    """Read checkpoints, the newest first, up to one that is whole to the last bit."""
    damaged: list[Damaged] = []
    for path in sorted(run.checkpoints.glob("step-*"), key=step_of, reverse=True):
        if (reason := damage_of(path)) is None:
            return Found(Whole(path, _read_state(path)), tuple(damaged))
        damaged.append(Damaged(path, reason))
    return Found(None, tuple(damaged))


def damage_of(path: Path) -> str | None:
    """Say what is wrong with a checkpoint, or None; reads all of it."""
    try:
        state = _read_state(path)
    except (OSError, ValidationError):
        return f"{STATE} cannot be read"
    if state.step != step_of(path):
        return f"{STATE} is that of step {state.step}"
    for name, size in state.files.items():
        try:
            if (there := (path / name).stat().st_size) != size:
                return f"{name} has {there:,} bytes, not {size:,}"
            if name in state.checksums and _checksum(path / name) != state.checksums[name]:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _read_state(path: Path) -> CheckpointState:
    return CheckpointState.model_validate_json((path / STATE).read_bytes())


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != STATE)


def _checksum(path: Path) -> int:
    # CRC-32: against bits that rot, not against people. It reads several gigabytes a second,
    # three times what the quickest cryptographic hash here does.
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return found
