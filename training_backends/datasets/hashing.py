"""Hash files in a thread of their own, close behind whoever else reads them."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Self

__all__ = ["FollowingHash"]

_CHUNK: Final = 8 << 20
"""Bytes that are hashed at once: between two chunks the thread waits for the interpreter's lock,
which a busy thread hands over only every few milliseconds.
"""


class FollowingHash:
    """The SHA-256 of files, hashed as far as they were read by others. Use it in a `with`.

    So it comes from the system's cache, and as hashing holds no lock of the interpreter's, it
    takes the time of another processor.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "hash")
        self._files: dict[int, _Hashing] = {}
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def follow(self, number: int, path: Path, end: int) -> None:
        """Have a file hashed up to `end`, or nearly; nothing is waited for."""
        if number not in self._files:
            self._files[number] = _Hashing(path)
        hashing = self._files[number]
        hashing.wanted = end
        if end - hashing.asked >= _CHUNK:
            self._go_on(hashing)

    def _go_on(self, hashing: "_Hashing") -> None:
        hashing.asked = hashing.wanted
        self._last = self._thread.submit(hashing.go_on, hashing.wanted)

    def finish(self, number: int) -> str:
        """Return the hex digest of a file that was followed, or of nothing.

        Raises:
            OSError: The file cannot be read.
        """
        hashing = self._files.pop(number, None)
        if hashing:
            self._go_on(hashing)
        if self._last:
            self._last.result()
        return (hashing.digest if hashing else hashlib.sha256()).hexdigest()


class _Hashing:
    """One file.

    Attributes:
        wanted: Up to where it is to be hashed.
        asked: Up to where the thread was asked to.
    """

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256(usedforsecurity=False)
        self.wanted = self.asked = 0
        self._path = path
        self._done = 0

    def go_on(self, end: int) -> None:
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._done)
            while self._done < end and (chunk := file.read(min(_CHUNK, end - self._done))):
                self.digest.update(chunk)
                self._done += len(chunk)
