"""Keep counts from one time to the next, by content, tokenizer and version of this code."""

from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

from training_backends.core.dataset import DataFile
from training_backends.core.files import write_atomic
from training_backends.datasets.tokens.lengths import Lengths
from training_backends.datasets.tokens.models import Tokenizer

__all__ = ["CountCache"]

_VERSION: Final = 1
"""To be raised with every change of what is counted or kept."""


class CountCache:
    """Small files in a directory, one a counted file; None keeps nothing.

    What cannot be read counts as not there, and what cannot be written is not kept: a cache
    must not stop a count.
    """

    def __init__(self, directory: Path | None, tokenizer: Tokenizer, seq_len: int | None) -> None:
        self._directory = directory
        # Reading tens of megabytes for it is only worth while where something is kept.
        print_ = tokenizer.fingerprint() if directory else ""
        self._key = f"{_VERSION}\n{print_}\n{seq_len}"

    def find(self, file: DataFile) -> Lengths | None:
        """Return what was kept for a file of this content."""
        if self._directory is None:
            return None
        with suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError):
            data = self._path(self._directory, file).read_bytes()
            found = msgspec.json.decode(data, type=Lengths)
            # Every row has a count or none is kept, so a torn entry shows.
            if found.rows == sum(found.buckets.values()):
                return found
        return None

    def keep(self, file: DataFile, lengths: Lengths) -> None:
        """Remember the count of a file."""
        if self._directory is None:
            return
        with suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            text = msgspec.json.encode(lengths).decode()
            write_atomic(self._path(self._directory, file), text)

    def _path(self, directory: Path, file: DataFile) -> Path:
        digest = sha256(f"{file.sha256}\n{self._key}".encode()).hexdigest()
        return directory / f"{digest}.json"
