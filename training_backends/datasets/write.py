"""Write data files so that each is there whole or not at all."""

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final, Self

from training_backends.core.errors import ConfigError, TrainingBackendError
from training_backends.core.files import sync_directory
from training_backends.datasets.open_file import STDIN, opened

__all__ = [
    "Meter",
    "NewFiles",
    "Progress",
    "name_of",
    "place_of",
    "read_bytes",
    "refuse_existing",
    "rereadable",
]

_BUFFER: Final = 1 << 20
_TELL_EVERY: Final = 8 << 20
_ENDINGS: Final = (".gz", ".zst", ".parquet", ".jsonl")

Progress = Callable[[Path, int, int], None]
"""Called with the file, the bytes done so far and how many there are; may raise to stop."""


class Meter:
    """Adds up the bytes of one file that are done, and tells of them."""

    def __init__(self, path: Path, total: int, on_progress: Progress | None) -> None:
        self._path = path
        self._total = total
        self._on_progress = on_progress
        self._done = self._told = 0

    def add(self, count: int) -> None:
        """Count some more bytes."""
        self.reach(self._done + count)

    def reach(self, done: int) -> None:
        """Say how many bytes are done in all."""
        self._done = done
        since = done - self._told
        if self._on_progress and since and (since >= _TELL_EVERY or done == self._total):
            self._told = done
            self._on_progress(self._path, done, max(done, self._total))


def name_of(path: Path) -> str:
    """Return a file's name without what says how it is written."""
    name = "stdin" if path == STDIN else path.name
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    return name or path.name


def place_of(path: Path) -> Path:
    """Return the directory in which the parts of a file are written, where none is named."""
    return Path() if path == STDIN else path.parent


@contextmanager
def rereadable(path: Path, directory: Path) -> Iterator[BinaryIO]:
    """Open a file in which one can go back, unpacked in `directory` if need be.

    Raises:
        DatasetError: The file cannot be read.
        TrainingBackendError: It cannot be unpacked, for example because the disk is full.
    """
    with opened(path) as source:
        if source.kind == "plain" and path != STDIN:
            with path.open("rb") as file:
                yield file
            return
        with _told_of(directory):
            _make_directory(directory)
            # It has no name, so that not even a killed process leaves it behind.
            copy = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  # closed below
        with copy:
            with _told_of(directory):
                copy.writelines(read_bytes(source.lines))
                copy.seek(0)
            yield copy


def refuse_existing(*paths: Path, hint: str | None = None) -> None:
    """Do nothing where none of the files is there yet.

    Args:
        hint: What to do otherwise; default another place or `--force`.

    Raises:
        ConfigError: One is.
    """
    for path in paths:
        if path.exists() or path.is_symlink():
            raise ConfigError(
                f"{path} already exists.",
                hint=hint or "Choose another path, or use --force to overwrite it.",
            )


class NewFiles:
    """Files that take their names together when the block ends well.

    What stood under a name is replaced then. After an error nothing is left behind.
    """

    def __init__(self) -> None:
        self._made: dict[Path, Path] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._name_all()
        finally:
            for temporary in self._made.values():
                temporary.unlink(missing_ok=True)

    @contextmanager
    def create(self, path: Path, *, like: Path | None = None) -> Iterator[BinaryIO]:
        """Open one of the files; at the end of the block its content is safe on the disk.

        Args:
            like: A file whose permissions it shall have.

        Raises:
            TrainingBackendError: It cannot be written, for example because the disk is full.
        """
        writer = f"{os.getpid()}-{threading.get_ident()}"
        temporary = path.with_name(f".{path.name}.{writer}.tmp")
        with _told_of(path):
            _make_directory(path.parent)
            if path.is_dir():
                # Found out at the end, the files named before it would stand there already.
                raise _refusal(errno.EISDIR)
            file = temporary.open("wb", buffering=_BUFFER)
            self._made[path] = temporary
            try:
                if like:
                    shutil.copymode(like, temporary)
                yield file
                file.flush()
                os.fsync(file.fileno())
            finally:
                # Where the disk is full, the bytes still in the buffer find no room again.
                with suppress(OSError):
                    file.close()

    def discard(self, path: Path) -> None:
        """Leave out one of the files that were created."""
        self._made.pop(path).unlink(missing_ok=True)

    def keep(self, path: Path, backup: Path) -> None:
        """Give what stands under the name of one of the files another name."""
        with _told_of(backup):
            try:
                backup.hardlink_to(path)
            except FileExistsError:
                raise
            except OSError:
                # Not every file system has links.
                shutil.copy2(path, backup)

    def _name_all(self) -> None:
        for path, temporary in self._made.items():
            with _told_of(path):
                temporary.replace(path)
        for directory in {path.parent for path in self._made}:
            with _told_of(directory):
                sync_directory(directory)


def read_bytes(file: BinaryIO, size: int | None = None) -> Iterator[bytes]:
    """Yield the next `size` bytes, or all that are left, in chunks.

    Raises:
        OSError: There are not as many.
    """
    left = size
    while left is None or left > 0:
        chunk = file.read(_BUFFER if left is None else min(_BUFFER, left))
        if chunk:
            yield chunk
        elif left is None:
            return
        else:
            raise OSError("the file was truncated while it was read")
        left = None if left is None else left - len(chunk)


def _make_directory(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise _refusal(errno.ENOTDIR)
    path.mkdir(parents=True, exist_ok=True)


def _refusal(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingBackendError(
            f"Could not write {path}: {error.strerror or error}.",
            hint="Check free space and write permission. No partial files were left.",
        ) from None
