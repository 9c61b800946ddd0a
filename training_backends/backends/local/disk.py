"""Writing to this machine's disk: whole or not at all, and what it refused is said."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from training_backends.core.errors import StoreError
from training_backends.core.files import make_private_directory
from training_backends.core.run import TrainingRun

__all__ = ["copy_whole", "reason_of", "reporting_disk", "require_space"]

_LEAST_SPACE: Final = 32 * 2**20
"""Bytes; with less, a training process could not even write why it failed."""


@contextmanager
def reporting_disk(run: TrainingRun) -> Iterator[None]:
    """Say what the system refused, such as a file on a full disk."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"The state of run {run.id} cannot be kept here: {reason_of(error)}.",
            hint="Is the disk full? Make space, then repeat the same command.",
            backend="local",
            run_id=run.id,
        ) from error


def require_space(path: Path) -> None:
    """Make a directory where a run is to begin, if its disk has the least that a run needs.

    Raises:
        OSError: There is too little space.
    """
    make_private_directory(path)
    if shutil.disk_usage(path).free < _LEAST_SPACE:
        raise OSError(errno.ENOSPC, f"less than {_LEAST_SPACE // 2**20} MiB of disk space is left")


def reason_of(error: OSError) -> str:
    """Return the system's words."""
    # A copy of many files fails with a list of its own in place of the system's word.
    return error.strerror or str(error)[:500]


def copy_whole(source: Path, target: Path, *, link: bool = True) -> None:
    """Copy a directory so that `target` appears whole or not at all.

    Args:
        link: Share the files where that works; they must never change then.
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
