"""Files for their owner alone, written whole or not at all."""

import os
import threading
from pathlib import Path
from typing import Final

from training_backends.core.files import sync_directory

__all__ = ["write_private"]

_MODE: Final = 0o600


def write_private(path: Path, content: bytes) -> None:
    """Write a file that nobody else can read; a reader, or a crash, finds the old or the new."""
    writer = f"{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)
