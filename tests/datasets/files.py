"""Data files for property tests, which have no directory of their own for each example."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written(content: bytes) -> Iterator[Path]:
    """Have a data file of this content for the block."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.jsonl"
        path.write_bytes(content)
        yield path
