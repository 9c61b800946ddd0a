"""Find the checkpoint to resume from, and copy it into the new run's directory."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from training_backends.backends.local.state import read_ending
from training_backends.core.errors import ConfigError, DuplicateRun, Issue, StoreError
from training_backends.core.files import make_private_directory
from training_backends.core.run import TrainingRun
from training_backends.rundir.checkpoints import damage_of, find_best, find_newest, step_of
from training_backends.rundir.directory import RunDir

__all__ = [
    "copy_atomically",
    "copy_checkpoint",
    "named_checkpoint",
    "reason_of",
    "reporting_disk",
    "require_ended",
    "require_space",
    "unknown_checkpoint",
]

_LEAST_SPACE: Final = 32 * 2**20
"""Bytes; with less, a training process could not even record why it failed."""


@contextmanager
def reporting_disk(run: TrainingRun) -> Iterator[None]:
    """Raise file system errors, such as a full disk, as StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"Cannot store run {run.id} on this machine: {reason_of(error)}.",
            hint="Check free space and write permission, then run the same command again.",
            backend="local",
            run_id=run.id,
        ) from error


def require_space(path: Path) -> None:
    """Create the directory for a run, if its disk has the minimum free space.

    Raises:
        OSError: There is too little space.
    """
    make_private_directory(path)
    if shutil.disk_usage(path).free < _LEAST_SPACE:
        raise OSError(errno.ENOSPC, f"less than {_LEAST_SPACE // 2**20} MiB of disk space left")


def reason_of(error: OSError) -> str:
    """Return the system's error message."""
    # shutil.copytree raises an error with a list of failures and no strerror.
    return error.strerror or str(error)[:500]


def copy_atomically(source: Path, target: Path, *, link: bool = True) -> None:
    """Copy a directory atomically.

    Args:
        link: Hard-link files where possible; they must never be modified then.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(source, temporary, copy_function=_link_or_copy if link else shutil.copy2)
        if link:
            shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def require_ended(run: TrainingRun, source: RunDir) -> None:
    """Require that a run has finished.

    Raises:
        DuplicateRun: It is still training.
    """
    if not read_ending(source):
        raise DuplicateRun(
            f"Run {run.id} is still training.",
            other=run.id,
            hint="Stop it first.",
            backend=run.backend,
            run_id=run.id,
        )


def copy_checkpoint(run: TrainingRun, source: RunDir, target: RunDir, requested: str | None) -> int:
    """Copy a checkpoint and the encoded rows of a finished run; return the step, 0 if none.

    Args:
        requested: A step, such as `120` or `step-120`; None for the newest intact one.

    Raises:
        DuplicateRun: The run is still training.
        ConfigError: The checkpoint does not exist, or is damaged.
    """
    require_ended(run, source)
    if requested is None:
        path = _newest(run, source, target)
    else:
        path = named_checkpoint(run, source, requested)
    if source.tokens.is_dir():  # used if the data is still the same
        with reporting_disk(run):
            make_private_directory(target.path)
            copy_atomically(source.tokens, target.tokens)
    if path is None:
        return 0
    copied = {path}
    if run.config.result.checkpoint == "best" and (best := find_best(source)):
        copied |= {best.path} if best.state.step < step_of(path) else set()
    with reporting_disk(run):
        target.checkpoints.mkdir(parents=True, exist_ok=True)
        for each in copied:
            copy_atomically(each, target.checkpoints / each.name)
    return step_of(path)


def _newest(run: TrainingRun, source: RunDir, target: RunDir) -> Path | None:
    intact, damaged = find_newest(source)
    with reporting_disk(run):
        make_private_directory(target.path)
        for each in damaged:
            target.add_event(each.event(intact))
    return intact.path if intact else None


def named_checkpoint(run: TrainingRun, source: RunDir, requested: str) -> Path:
    """Return the directory of a run's checkpoint.

    Raises:
        ConfigError: The checkpoint does not exist, or is damaged.
    """
    found = {step_of(path): path for path in source.checkpoints.glob("step-*")}
    step = requested.removeprefix("step-")
    if not step.isdecimal() or int(step) not in found:
        raise unknown_checkpoint(run, requested, found)
    if reason := damage_of(found[int(step)]):
        raise unknown_checkpoint(run, requested, found, damage=reason)
    return found[int(step)]


def unknown_checkpoint(
    run: TrainingRun, requested: str, steps: Iterable[int], *, damage: str | None = None
) -> ConfigError:
    """Return the error about a checkpoint that does not exist, or is damaged.

    Args:
        steps: The checkpoints that exist.
    """
    if damage is None:
        message = f"run {run.id} has no checkpoint {requested!r} on disk"
        fix = f"available: {', '.join(map(str, sorted(steps))) or 'none'}"
    else:
        message, fix = f"checkpoint {requested!r} is damaged: {damage}", "use another"
    issue = Issue(code="unknown_checkpoint", message=message, field="checkpoint", fix=fix)
    return ConfigError(
        f"Checkpoint {requested!r} cannot be used.",
        issues=[issue],
        backend=run.backend,
        run_id=run.id,
    )
