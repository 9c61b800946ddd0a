"""Cache token counts by content, tokenizer and version of this code."""

from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

from training_backends.core.dataset import DataFile
from training_backends.core.files import write_atomic
from training_backends.datasets.scan import digested
from training_backends.tokens.counts import Lengths
from training_backends.tokens.tokenizers import Tokenizer

__all__ = ["CountCache"]

_VERSION: Final = 1
"""Increment when counting or the stored format changes."""


class CountCache:
    """Count cache in a directory, with one small file per data file; None disables it.

    Entries that cannot be read are ignored, and so are write errors: the cache must never make
    a count fail.
    """

    def __init__(self, directory: Path | None, tokenizer: Tokenizer, seq_len: int | None) -> None:
        self._directory = directory
        # The fingerprint reads tens of megabytes.
        print_ = tokenizer.fingerprint() if directory else ""
        self._key = f"{_VERSION}\n{print_}\n{seq_len}"

    def may_hold(self, file: DataFile) -> bool:
        """Return whether a count of a file of this size is cached, without reading the file."""
        with suppress(OSError):
            return self._directory is not None and any(self._directory.glob(self._name(file, "*")))
        return False

    def known(self, file: DataFile) -> DataFile:
        """Return the file with its digest, the cache key; unchanged if the cache is disabled.

        Raises:
            OSError: The file cannot be read.
        """
        return file if self._directory is None else digested(file)

    def find(self, file: DataFile) -> Lengths | None:
        """Return the cached count of a file returned by `known`."""
        if self._directory is None:
            return None
        with suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError):
            data = self._path(self._directory, file).read_bytes()
            found = msgspec.json.decode(data, type=Lengths)
            # Detects truncated entries.
            if found.rows == sum(found.buckets.values()):
                return found
        return None

    def keep(self, file: DataFile, lengths: Lengths) -> None:
        """Store the count of a file returned by `known`."""
        if self._directory is None:
            return
        with suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            text = msgspec.json.encode(lengths).decode()
            write_atomic(self._path(self._directory, file), text)

    def _path(self, directory: Path, file: DataFile) -> Path:
        return directory / self._name(file, f"{file.sha256}")

    def _name(self, file: DataFile, content: str) -> str:
        asked = sha256(f"{file.size}\n{self._key}".encode()).hexdigest()
        return f"{asked[:32]}-{content}.json"
