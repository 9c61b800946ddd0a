"""Lines are read in bounded memory, and parts of a file have each of them once."""

import io
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from training_backends.datasets.scan_part import (
    line_at_or_after,
    lines_up_to,
    skip_line,
)

contents = st.text("ab\n", max_size=40).map(str.encode)


def lines_in(content: bytes, start: int, end: int) -> list[bytes]:
    """Return the lines that begin in a part."""
    file = io.BytesIO(content)
    at = line_at_or_after(file, start, end)
    found: list[bytes] = []
    while at is not None and at < end and (line := file.readline()):
        found.append(line)
        at += len(line)
    return found


@given(contents, st.lists(st.integers(0, 40), max_size=5))
def test_parts_side_by_side_have_every_line_once(content: bytes, cuts: list[int]) -> None:
    """Wherever a file is cut, put together the lines of its parts are its lines."""
    places = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    parts = pairwise(places)
    found = [line for start, end in parts for line in lines_in(content, start, end)]
    assert found == content.splitlines(keepends=True)


@given(contents, st.integers(1, 6))
def test_a_line_is_never_longer_than_the_limit(content: bytes, limit: int) -> None:
    """Of a longer one the beginning comes, and the rest can be passed over."""
    file = io.BytesIO(content)
    found = []
    for line in lines_up_to(file, limit):
        found.append(line)
        if not line.endswith(b"\n"):
            skip_line(file, 1 << 40)
    assert found == [line[:limit] for line in content.splitlines(keepends=True)]


def test_a_line_of_any_length_is_passed_over_and_measured() -> None:
    """What stands behind it is read next."""
    file = io.BytesIO(b"a" * (3 << 20) + b"\nb")
    assert skip_line(file, 1 << 40) == (3 << 20) + 1
    assert file.read() == b"b"
