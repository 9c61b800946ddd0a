"""Verify the checkpoints in a run directory, and reduce those of a completed run.

`checkpoints/step-N/` gets its name once complete; its `state.json` lists the size and checksum of
every other file. `checkpoints/.step-N.*` is being written or removed, or is damaged.
"""

import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from pydantic import ValidationError

from training_backends.core.files import write_atomic
from training_backends.rundir.directory import CheckpointState, Event, RunDir

__all__ = [
    "OPTIMIZER",
    "STATE",
    "DamagedCheckpoint",
    "FoundCheckpoints",
    "IntactCheckpoint",
    "best_step",
    "damage_of",
    "describe_files",
    "find_best",
    "find_newest",
    "remove_optimizer_state",
    "step_of",
]

STATE: Final = "state.json"
OPTIMIZER: Final = "optimizer"
"""Directory in a checkpoint whose files only resuming needs."""
_CHUNK: Final = 1 << 20


class IntactCheckpoint(NamedTuple):
    """An intact checkpoint, safe to resume from."""

    path: Path
    state: CheckpointState


class DamagedCheckpoint(NamedTuple):
    """A checkpoint that must not be resumed from, and why."""

    path: Path
    reason: str

    def event(self, instead: IntactCheckpoint | None) -> Event:
        """Return the event that reports it, and what is resumed from instead."""
        name = self.path.name
        fallback = f"Resuming from {instead.path.name if instead else 'the beginning'}."
        return Event(
            name="message",
            level="warning",
            message=f"Checkpoint {name} is damaged: {self.reason}. {fallback}",
            data={"checkpoint": name, "reason": self.reason},
        )


class FoundCheckpoints(NamedTuple):
    """The newest intact checkpoint, if any, and the newer damaged ones."""

    intact: IntactCheckpoint | None
    damaged: tuple[DamagedCheckpoint, ...]


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name; -1 for other names."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def describe_files(directory: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Return the size and checksum of each file in a checkpoint, except `state.json`."""
    files = {path.relative_to(directory).as_posix(): path for path in _files(directory)}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    return sizes, {name: _checksum(path) for name, path in files.items()}


def find_newest(run: RunDir) -> FoundCheckpoints:
    """Verify checkpoints from the newest to the first intact one."""
    damaged: list[DamagedCheckpoint] = []
    for path in sorted(run.checkpoints.glob("step-*"), key=step_of, reverse=True):
        if (reason := damage_of(path)) is None:
            return FoundCheckpoints(IntactCheckpoint(path, _read_state(path)), tuple(damaged))
        damaged.append(DamagedCheckpoint(path, reason))
    return FoundCheckpoints(None, tuple(damaged))


def find_best(run: RunDir) -> IntactCheckpoint | None:
    """Return the checkpoint with the lowest validation loss, without reading all of its files."""
    found = {state.step: IntactCheckpoint(path, state) for path, state in run.read_checkpoints()}
    best = best_step(each.state for each in found.values())
    return None if best is None else found[best]


def best_step(states: Iterable[CheckpointState]) -> int | None:
    """Return the step of the checkpoint with the lowest validation loss; None without any."""
    measured = [state for state in states if "valid_loss" in state.metrics]
    # Of equal ones the first, as with early stopping.
    best = min(measured, key=lambda state: state.metrics["valid_loss"], default=None)
    return None if best is None else best.step


def damage_of(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None; reads all of its files."""
    while True:
        try:
            state = _read_state(path)
            reason = _mismatch(path, state)
            # The run may have completed meanwhile, and its optimizer state have been removed.
            if reason is None or _read_state(path) == state:
                return reason
        except (OSError, ValidationError):
            return f"{STATE} cannot be read"


def remove_optimizer_state(run: RunDir) -> None:
    """Reduce the checkpoints of a completed run to what they need to be exported.

    A crash at any point leaves valid checkpoints.
    """
    for path, state in run.read_checkpoints():
        if not (path / OPTIMIZER).is_dir():  # saved by an earlier version
            continue
        changes = {"files": _exported(state.files), "checksums": _exported(state.checksums)}
        write_atomic(path / STATE, state.model_copy(update=changes).model_dump_json(indent=2))
        shutil.rmtree(path / OPTIMIZER)


def _exported(files: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in files.items() if not name.startswith(f"{OPTIMIZER}/")}


def _mismatch(path: Path, state: CheckpointState) -> str | None:
    """Return how a checkpoint differs from its state, or None."""
    if state.step != step_of(path):
        return f"{STATE} belongs to step {state.step}"
    for name, size in state.files.items():
        try:
            if (actual := (path / name).stat().st_size) != size:
                return f"{name} has {actual:,} bytes, expected {size:,}"
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
    # CRC-32 detects corruption, not tampering. It processes several gigabytes per second, three
    # times as much as the fastest cryptographic hash in the standard library.
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return found
