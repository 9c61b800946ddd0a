"""Write checkpoints atomically, and find the newest intact one."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from training_backends.core.files import sync_directory, write_atomic
from training_backends.rundir.checkpoints import (
    STATE,
    IntactCheckpoint,
    describe_files,
    find_newest,
    step_of,
)
from training_backends.rundir.directory import CheckpointState, RunDir
from training_backends.trainer.errors import ProcessLost, TrainerError, failure_of

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
    """Write `checkpoints/step-N`, and remove the oldest beyond `keep`.

    Args:
        fill: Writes the files into the (temporary) directory it is given.
        scheduled: Whether a checkpoint was due, see `CheckpointState`.

    Raises:
        TrainerError: The checkpoint cannot be written, for example because the disk is full;
            earlier ones are kept.
    """
    run.checkpoints.mkdir(exist_ok=True)
    _clean(run)
    target = run.checkpoints / f"step-{step}"
    temporary = run.checkpoints / f".step-{step}.tmp"
    with _reported(step, temporary):
        temporary.mkdir()
        fill(temporary)
        _sync(temporary)
        sizes, checksums = describe_files(temporary)
        state = CheckpointState(
            step=step, metrics=metrics, files=sizes, checksums=checksums, scheduled=scheduled
        )
        write_atomic(temporary / STATE, state.model_dump_json(indent=2))
        _remove(target)
        temporary.rename(target)
        sync_directory(run.checkpoints)
    for path, _ in run.read_checkpoints()[:-keep]:
        _remove(path)
    _clean(run)
    return target


@contextmanager
def _reported(step: int, temporary: Path) -> Iterator[None]:
    """Report why a checkpoint could not be written, and remove the partial one."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(temporary.parent).free
        # The partial checkpoint takes up the space that is missing.
        shutil.rmtree(temporary, ignore_errors=True)
        failure = failure_of(error)
        if isinstance(error, TrainerError | ProcessLost) or failure.kind == "out_of_memory":
            raise
        raise TrainerError(
            f"Cannot write the checkpoint at step {step}: {failure.message.rstrip('.')}. "
            f"{free / 1e6:,.0f} MB of disk space are available, and earlier checkpoints are kept: "
            "free some space, then resume.",
            kind="internal",
            retryable=True,
        ) from error


def _remove(path: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that a crash leaves no partial one."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.old")
        path.rename(hidden)
        shutil.rmtree(hidden)


def _clean(run: RunDir) -> None:
    """Remove leftovers of a crash; damaged checkpoints only once a newer intact one exists."""
    newest = max((step_of(path) for path in run.checkpoints.glob("step-*")), default=-1)
    for path in run.checkpoints.glob(".step-*"):
        name, _, kind = path.name.removeprefix(".").rpartition(".")
        if kind != "damaged" or step_of(Path(name)) <= newest:
            shutil.rmtree(path, ignore_errors=True)


def _sync(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def newest_checkpoint(run: RunDir) -> IntactCheckpoint | None:
    """Return the newest intact checkpoint, or None; report damaged ones and rename them."""
    intact, damaged = find_newest(run)
    for each in damaged:
        renamed = each.path.with_name(f".{each.path.name}.damaged")
        shutil.rmtree(renamed, ignore_errors=True)
        each.path.rename(renamed)
        run.add_event(each.event(intact))
    return intact
