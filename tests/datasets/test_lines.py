"""Lines are cut the same way however the file falls into chunks."""

import hashlib
import io

from hypothesis import given
from hypothesis import strategies as st

from training_backends.datasets.lines import CHUNK_BYTES, LineReader


class Slow(io.BytesIO):
    """A file that gives a few bytes at a time."""

    def read(self, size: int | None = -1) -> bytes:
        del size
        return super().read(3)


@given(st.lists(st.binary(max_size=8)).map(b"".join) | st.text("a\n", max_size=30).map(str.encode))
def test_lines_do_not_depend_on_the_chunks(content: bytes) -> None:
    """What is read in pieces of three bytes is what a split gives."""
    expected = content.split(b"\n")
    if not expected[-1]:
        expected.pop()
    reader = LineReader(Slow(content))
    assert list(reader) == expected
    assert reader.size == len(content)
    assert reader.sha256 == hashlib.sha256(content).hexdigest()


@given(st.text("ab\n", max_size=40).map(str.encode), st.integers(1, 5))
def test_only_lines_over_the_limit_are_left_out(content: bytes, limit: int) -> None:
    """None stands where a longer line was."""
    expected = content.split(b"\n")
    if not expected[-1]:
        expected.pop()
    found = list(LineReader(Slow(content), max_line=limit))
    assert found == [line if len(line) <= limit else None for line in expected]


def test_a_line_over_several_chunks_is_whole() -> None:
    """A line longer than a chunk is put together."""
    line = b"x" * (CHUNK_BYTES * 2 + 5)
    assert list(LineReader(io.BytesIO(b"a\n" + line + b"\nb"))) == [b"a", line, b"b"]
