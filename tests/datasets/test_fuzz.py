"""Whatever a file holds, reading it ends, in little memory and without an exception."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.datasets.files import written
from tests.datasets.rows import line, rows
from training_backends.core.data_rules import ProviderFormat
from training_backends.core.errors import Issue
from training_backends.datasets.inspect import ISSUES_PER_CODE, check_upload, inspect_file
from training_backends.datasets.provider_formats import MISTRAL, PROVIDER_FORMATS

PIECES = (
    *b'{ } [ ] " : , \\ "messages" "role" "text" "labels" null 1e999 \\ud800 user -0 ""'.split(),
    *(b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"PAR1"),
    *(b"\x28\xb5\x2f\xfd", b" " * 50, b"[" * 2000, b'{"a":' * 2000, b'{"messages":[' * 500),
)
junk = st.binary(max_size=300) | st.lists(st.sampled_from(PIECES), max_size=60).map(b"".join)


def is_told_well(path: Path, issues: tuple[Issue, ...]) -> None:
    """Hold issues to what all of them keep."""
    codes = [issue.code for issue in issues]
    assert all(codes.count(code) <= ISSUES_PER_CODE + 1 for code in codes)
    for issue in issues:
        assert issue.message
        assert issue.path == str(path)
        assert len(str(issue)) < 1000
        json.dumps(str(issue)).encode()


@given(junk, st.sampled_from(sorted(PROVIDER_FORMATS)))
def test_junk_gives_issues_and_no_exception(content: bytes, provider_format: str) -> None:
    """A bounded number of them, and a file or an error."""
    with written(content) as path:
        file, issues = inspect_file(path, provider_format=PROVIDER_FORMATS[provider_format])
        check_upload(path)
    is_told_well(path, issues)
    assert file is not None or any(issue.severity == "error" for issue in issues)
    if file is not None:
        assert file.bad_rows <= file.rows <= content.count(b"\n") + 1
        assert file.size == len(content)


@given(st.data())
def test_a_changed_row_blames_no_other_line(data: st.DataObject) -> None:
    """Bytes are cut out, put in or turned over; lines before and behind are as they were."""
    good = data.draw(st.lists(rows(MISTRAL, "messages"), min_size=1, max_size=4).map(_lines))
    place = data.draw(st.integers(0, len(good) - 1))
    row = bytearray(good[place])
    start = data.draw(st.integers(0, len(row) - 1))
    end = data.draw(st.integers(start, min(len(row), start + 30)))
    row[start:end] = data.draw(junk).replace(b"\n", b"").replace(b"\r", b"")
    changed = [*good[:place], bytes(row), *good[place + 1 :]]
    with written(b"\n".join(changed)) as path:
        file, issues = inspect_file(path)
    is_told_well(path, issues)
    if file is not None and not bytes(row).startswith(b"\xef\xbb\xbf"):
        assert {one.line for one in issues if one.severity == "error"} <= {place + 1, None}


def _lines(made: list[Any]) -> list[bytes]:
    return list(dict.fromkeys(map(line, made)))


@pytest.mark.parametrize(
    "provider_format", list(PROVIDER_FORMATS.values()), ids=list(PROVIDER_FORMATS)
)
@pytest.mark.parametrize(
    ("begin", "end"),
    [(b"[", b"]"), (b'{"a":', b"}"), (b'{"messages":', b"}"), (b'{"messages":[', b"]}")],
)
def test_deep_nesting_is_an_error_of_its_line(
    tmp_path: Path, provider_format: ProviderFormat, begin: bytes, end: bytes
) -> None:
    """However deep; closed again or not."""
    path = tmp_path / "a.jsonl"
    deep = begin * 50_000
    closed = deep + b"1" + end * 50_000
    path.write_bytes(b"\n".join((deep, closed, b'{"text": ' + closed + b"}")))
    file, issues = inspect_file(path, provider_format=provider_format)
    assert file is not None
    assert file.bad_rows == 3
    is_told_well(path, issues)


def test_junk_of_some_megabytes_is_read_to_its_end(tmp_path: Path) -> None:
    """Lines of any length, most of them no text at all."""
    path = tmp_path / "a.jsonl"
    content = random.Random(1).randbytes(3_000_000)
    path.write_bytes(content)
    file, issues = inspect_file(path)
    assert file is not None
    assert file.bad_rows > 5000
    assert file.size == len(content)
    is_told_well(path, issues)


def test_blank_lines_alone_fill_no_memory(tmp_path: Path) -> None:
    """A hundred thousand of them are one issue."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" * 100_000)
    file, issues = inspect_file(path)
    assert [issue.code for issue in issues] == ["empty_file"]
    assert file is not None
    assert file.rows == 0


SCRIPT = """
import resource, sys
from pathlib import Path
from training_backends.datasets.inspect import inspect_file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_, issues = inspect_file(Path(sys.argv[1]), processes=int(sys.argv[2]))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) // 1024, *sorted({issue.code for issue in issues}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told in other units elsewhere")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("begins", [b"", b'{"text": "'])
def test_a_line_of_a_quarter_gigabyte_fills_no_memory(
    tmp_path: Path, processes: int, begins: bytes
) -> None:
    """It is passed over, in about twice the space that the longest line may take."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n' + begins)
        file.truncate(1 << 28)  # takes no space on the disk
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, path, str(processes)],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    megabytes, *codes = done.stdout.split()
    assert codes == ["line_too_long"]
    assert int(megabytes) < 90
