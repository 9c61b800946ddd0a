"""Keep counts from one time to the next, by content, tokenizer and version of this code."""

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

    def may_hold(self, file: DataFile) -> bool:
        """Tell whether the count of a file of this size is kept; the file is not read for it."""
        with suppress(OSError):
            return self._directory is not None and any(self._directory.glob(self._name(file, "*")))
        return False

    def known(self, file: DataFile) -> DataFile:
        """Return the file with the digest by which its count is kept, if any is kept at all.

        Raises:
            OSError: The file cannot be read.
        """
        return file if self._directory is None else digested(file)

    def find(self, file: DataFile) -> Lengths | None:
        """Return what was kept for a file of this content; it must be a `known` one."""
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
        """Remember the count of a `known` file."""
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
