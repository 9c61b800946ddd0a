"""Counting how often data files are read."""

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def counted_readings() -> Iterator[Counter[str]]:
    """Count the bytes that this process reads of each file, by path, below Python's buffers.

    Workers that check rows receive them from this process and read no file themselves.
    """
    found: Counter[str] = Counter()
    original = io.open

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            return self._add(super().readinto(buffer) or 0)

        def read(self, size: int | None = -1, /) -> bytes:
            content = super().read(size)
            self._add(len(content))
            return content

        def readall(self) -> bytes:
            content = super().readall()
            self._add(len(content))
            return content

        def _add(self, count: int) -> int:
            found[str(self.name)] += count
            return count

    def counting(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
        if mode != "rb" or not isinstance(file, str | Path):
            return original(file, mode, buffering, *rest, **more)
        raw = Counted(file)
        return raw if buffering == 0 else io.BufferedReader(raw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", counting)
        yield found
