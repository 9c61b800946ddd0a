"""Write checkpoints that are whole or not there, and find the newest whole one."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from training_backends.core.files import sync_directory, write_atomic
from training_backends.rundir.directory import CheckpointState, RunDir

__all__ = ["newest_checkpoint", "write_checkpoint"]


def write_checkpoint(
    run: RunDir,
    step: int,
    fill: Callable[[Path], None],
    *,
    metrics: dict[str, float],
    scheduled: bool,
    keep: int,
) -> Path:
    """Write `checkpoints/step-N` and remove the oldest beyond `keep`.

    Args:
        fill: Writes the files into the (temporary) directory that it is given.
        scheduled: Whether the step was due, see `CheckpointState`.
    """
    run.checkpoints.mkdir(exist_ok=True)
    target = run.checkpoints / f"step-{step}"
    temporary = run.checkpoints / f".step-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    fill(temporary)
    files = {}
    for path in sorted(temporary.iterdir()):
        _sync_file(path)
        files[path.name] = path.stat().st_size
    state = CheckpointState(step=step, metrics=metrics, files=files, scheduled=scheduled)
    write_atomic(temporary / "state.json", state.model_dump_json(indent=2))
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    sync_directory(run.checkpoints)
    for path, _ in run.read_checkpoints()[:-keep]:
        shutil.rmtree(path)
    return target


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest_checkpoint(run: RunDir) -> tuple[Path, CheckpointState] | None:
    """Return the newest whole checkpoint, or None."""
    found = run.read_checkpoints()
    return found[-1] if found else None
