"""Write a streamed response to a file atomically."""

import os
import secrets
import shutil
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import anyio
import anyio.to_thread

from training_backends.core.errors import BackendUnavailable, ConfigError, TrainingBackendError
from training_backends.core.files import sync_directory
from training_backends.http.upload import Progress

__all__ = ["new_directory", "save_stream"]


@asynccontextmanager
async def new_directory(target: Path) -> AsyncGenerator[Path, None]:
    """Yield a temporary directory that becomes `target` if the block succeeds.

    Raises:
        ConfigError: `target` exists and is not an empty directory.
        TrainingBackendError: It cannot be created.
    """
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        await anyio.to_thread.run_sync(_make_empty, part, target)
        try:
            yield part
            await anyio.to_thread.run_sync(_publish_directory, part, target)
        finally:
            with anyio.CancelScope(shield=True):
                remove = partial(shutil.rmtree, part, ignore_errors=True)
                await anyio.to_thread.run_sync(remove)
    except OSError as error:
        if isinstance(error, TrainingBackendError):
            raise
        raise TrainingBackendError(f"Cannot write {target}: {error.strerror or error}.") from error


def _make_empty(part: Path, target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty.", hint="Choose a new directory.")
    part.mkdir(parents=True)


def _publish_directory(part: Path, target: Path) -> None:
    part.replace(target)
    sync_directory(target.parent)


async def save_stream(
    chunks: AsyncIterator[bytes],
    target: Path,
    expected: int | None,
    on_progress: Progress | None = None,
) -> Path:
    """Write `chunks` to a temporary file, flush it to disk and rename it to `target`.

    Args:
        expected: Content length announced by the server, or None.

    Raises:
        BackendUnavailable: The number of bytes differs from the announced length.
        TrainingBackendError: The file cannot be written, for example on a full disk.
    """
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        file = await anyio.to_thread.run_sync(_create, part)
        try:
            done = await _write_all(file, chunks, expected, on_progress)
            if expected is not None and done != expected:
                raise BackendUnavailable(f"Received {done} of {expected} bytes of {target.name}.")
            await anyio.to_thread.run_sync(_publish, file, part, target)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(_discard, file, part)
    except OSError as error:
        if isinstance(error, TrainingBackendError):
            raise
        raise TrainingBackendError(f"Cannot write {target}: {error.strerror or error}.") from error
    return target


async def _write_all(
    file: BinaryIO,
    chunks: AsyncIterator[bytes],
    expected: int | None,
    on_progress: Progress | None,
) -> int:
    done = 0
    async for chunk in chunks:
        await anyio.to_thread.run_sync(file.write, chunk)
        done += len(chunk)
        if on_progress:
            on_progress(done, done if expected is None else expected)
    return done


def _create(part: Path) -> BinaryIO:
    part.parent.mkdir(parents=True, exist_ok=True)
    return part.open("xb")


def _publish(file: BinaryIO, part: Path, target: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    part.replace(target)
    sync_directory(target.parent)


def _discard(file: BinaryIO, part: Path) -> None:
    file.close()
    part.unlink(missing_ok=True)
