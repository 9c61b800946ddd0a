"""Write data files atomically."""

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
_REPORT_EVERY: Final = 8 << 20
_ENDINGS: Final = (".gz", ".zst", ".parquet", ".jsonl")

Progress = Callable[[Path, int, int], None]
"""Called with the file, the bytes processed and the total; may raise to stop."""


class Meter:
    """Counts the processed bytes of one file and reports progress."""

    def __init__(self, path: Path, total: int, on_progress: Progress | None) -> None:
        self._path = path
        self._total = total
        self._on_progress = on_progress
        self._done = self._reported = 0

    def add(self, count: int) -> None:
        """Add processed bytes."""
        self.reach(self._done + count)

    def reach(self, done: int) -> None:
        """Set the number of processed bytes."""
        self._done = done
        since = done - self._reported
        if self._on_progress and since and (since >= _REPORT_EVERY or done == self._total):
            self._reported = done
            self._on_progress(self._path, done, max(done, self._total))


def name_of(path: Path) -> str:
    """Return a file's name without format extensions."""
    name = "stdin" if path == STDIN else path.name
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    return name or path.name


def place_of(path: Path) -> Path:
    """Return the default output directory for a file."""
    return Path() if path == STDIN else path.parent


@contextmanager
def rereadable(path: Path, directory: Path) -> Iterator[BinaryIO]:
    """Open a seekable file; compressed data is decompressed to a temporary file in `directory`.

    Raises:
        DatasetError: The file cannot be read.
        TrainingBackendError: It cannot be decompressed, for example because the disk is full.
    """
    with opened(path) as source:
        if source.kind == "plain" and path != STDIN:
            with path.open("rb") as file:
                yield file
            return
        with _write_errors(directory):
            _make_directory(directory)
            # An anonymous file, so that even a killed process leaves nothing behind.
            copy = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  # closed below
        with copy:
            with _write_errors(directory):
                copy.writelines(read_bytes(source.lines))
                copy.seek(0)
            yield copy


def refuse_existing(*paths: Path, hint: str | None = None) -> None:
    """Raise if any of the files exists.

    Args:
        hint: Hint of the error; default another path or `--force`.

    Raises:
        ConfigError: A file already exists.
    """
    for path in paths:
        if path.exists() or path.is_symlink():
            raise ConfigError(
                f"{path} already exists.",
                hint=hint or "Choose another path, or use --force to overwrite it.",
            )


class NewFiles:
    """Output files that are renamed into place together when the block succeeds.

    Existing files are replaced. After an error no files are left behind.
    """

    def __init__(self) -> None:
        self._made: dict[Path, Path] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._rename_all()
        finally:
            for temporary in self._made.values():
                temporary.unlink(missing_ok=True)

    @contextmanager
    def create(self, path: Path, *, like: Path | None = None) -> Iterator[BinaryIO]:
        """Open an output file; at the end of the block its content is flushed to disk.

        Args:
            like: File whose permissions are copied.

        Raises:
            TrainingBackendError: The file cannot be written, for example because the disk is full.
        """
        writer = f"{os.getpid()}-{threading.get_ident()}"
        temporary = path.with_name(f".{path.name}.{writer}.tmp")
        with _write_errors(path):
            _make_directory(path.parent)
            if path.is_dir():
                # Fail before any other file has been renamed into place.
                raise _os_error(errno.EISDIR)
            file = temporary.open("wb", buffering=_BUFFER)
            self._made[path] = temporary
            try:
                if like:
                    shutil.copymode(like, temporary)
                yield file
                file.flush()
                os.fsync(file.fileno())
            finally:
                # On a full disk, flushing the buffer fails again.
                with suppress(OSError):
                    file.close()

    def discard(self, path: Path) -> None:
        """Drop a created file."""
        self._made.pop(path).unlink(missing_ok=True)

    def keep(self, path: Path, backup: Path) -> None:
        """Back up the existing file at `path`."""
        with _write_errors(backup):
            try:
                backup.hardlink_to(path)
            except FileExistsError:
                raise
            except OSError:
                # Not every file system supports hard links.
                shutil.copy2(path, backup)

    def _rename_all(self) -> None:
        for path, temporary in self._made.items():
            with _write_errors(path):
                temporary.replace(path)
        for directory in {path.parent for path in self._made}:
            with _write_errors(directory):
                sync_directory(directory)


def read_bytes(file: BinaryIO, size: int | None = None) -> Iterator[bytes]:
    """Yield the next `size` bytes, or all remaining ones, in chunks.

    Raises:
        OSError: The file ends early.
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
        raise _os_error(errno.ENOTDIR)
    path.mkdir(parents=True, exist_ok=True)


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainingBackendError(
            f"Could not write {path}: {error.strerror or error}.",
            hint="Check free space and write permission. No partial files were left.",
        ) from None
