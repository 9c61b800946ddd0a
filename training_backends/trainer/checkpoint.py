"""Write checkpoints that are whole or not there, and find the newest whole one."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from training_backends.core.files import sync_directory, write_atomic
from training_backends.rundir.checkpoints import STATE, Whole, describe_files, find_newest, step_of
from training_backends.rundir.directory import CheckpointState, RunDir
from training_backends.trainer.errors import TeamLost, TrainerError, failure_of

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

    Raises:
        TrainerError: It cannot be written, as on a full disk; those before it are left.
    """
    run.checkpoints.mkdir(exist_ok=True)
    _clean(run)
    target = run.checkpoints / f"step-{step}"
    temporary = run.checkpoints / f".step-{step}.tmp"
    with _said(step, temporary):
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
def _said(step: int, temporary: Path) -> Iterator[None]:
    """Say what kept a checkpoint from being written, and leave no half of it."""
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(temporary.parent).free
        # What was written of it would take the room that is missing.
        shutil.rmtree(temporary, ignore_errors=True)
        failure = failure_of(error)
        if isinstance(error, TrainerError | TeamLost) or failure.kind == "out_of_memory":
            raise
        raise TrainerError(
            f"The checkpoint at step {step} cannot be written ({failure.message}), with "
            f"{free / 1e6:,.0f} MB free on the disk. Those before it are kept: make room, resume.",
            kind="internal",
            retryable=True,
        ) from error


def _remove(path: Path) -> None:
    """Remove a checkpoint; it loses its name first, so that a crash leaves no half of one."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.old")
        path.rename(hidden)
        shutil.rmtree(hidden)


def _clean(run: RunDir) -> None:
    """Remove what a crash has left; damaged ones only once there is a newer whole one."""
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


def newest_checkpoint(run: RunDir) -> Whole | None:
    """Return the newest whole checkpoint, or None; tell of damaged ones and set them aside."""
    whole, damaged = find_newest(run)
    for each in damaged:
        aside = each.path.with_name(f".{each.path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        each.path.rename(aside)
        run.add_event(each.event(whole))
    return whole
