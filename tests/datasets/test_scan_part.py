"""However a file is cut and read, the verdicts on its parts add up to the same."""

import gzip
import re
import tempfile
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from training_backends.core.errors import Issue
from training_backends.datasets import file_report, scan, scan_part
from training_backends.datasets.check_fast import RowRules
from training_backends.datasets.file_report import Collector
from training_backends.datasets.provider_formats import MISTRAL
from training_backends.datasets.scan_part import End, FilePart, judge, packed_rules

RULES = packed_rules(MISTRAL)
CHAT = b'{"messages":[{"role":"user","content":"%s"},{"role":"assistant","content":"b"}]}'
ODD = (b"", b" ", b"\r", b"}", b"{}", b"\xff", b"x" * 127, b" " * 128, b'{"text":" "}', CHAT[:-3])
ENDS = (*[b"\n"] * 9, b"\r\n", b" \n", b"}\n")


def rows_of(size: int, max_line: int) -> st.SearchStrategy[bytes]:
    """Make right rows, many as long as what is read at once or as a line may be, or nearly so."""
    lengths = st.sampled_from([0, 0, size, 2 * size, 4 * size, max_line])
    near = st.builds(int.__add__, lengths, st.integers(-3, 3))
    texts = st.builds(
        lambda length, letter: b'{"text":"%s"}' % (letter * max(1, length - 11)),
        near,
        st.sampled_from([b"a", b"b", b"c"]),
    )
    return texts | st.sampled_from([b"a", b"c" * size]).map(CHAT.__mod__)


@st.composite
def contents(draw: st.DrawFn, size: int, max_line: int) -> bytes:
    """Make a file of rows, a few of them odd, with or without an end of its last line."""
    rows = rows_of(size, max_line)
    each = st.tuples(rows | rows | rows | st.sampled_from(ODD), st.sampled_from(ENDS))
    lines = draw(st.lists(each, max_size=25))
    content = b"".join(line + end for line, end in lines)
    return content.removesuffix(b"\n") if draw(st.booleans()) else content


def places_in(content: bytes) -> st.SearchStrategy[int]:
    """Choose where to cut: anywhere, or at the end of a line or next to it."""
    last = max(1, len(content) - 1)
    ends = [match.end() + step for match in re.finditer(b"\n", content) for step in (-1, 0, 1)]
    near = [place for place in ends if 0 < place < last]
    anywhere = st.integers(1, last)
    return st.sampled_from(near) | anywhere if near else anywhere


class Added(NamedTuple):
    """What is known of a file in the end.

    Attributes:
        hashes: By line, of the rows that have no error.
    """

    issues: list[Issue]
    hashes: list[tuple[int, int]]
    file: Any


def added(path: Path, made: Iterable[FilePart], size: int) -> Added:
    """Judge parts and add up what is found."""
    collector = Collector(path, "train", 1.0, MISTRAL)
    issues: list[Issue] = []
    hashes: list[tuple[int, int]] = []
    for part in made:
        verdict = judge(part)
        places = verdict.places or range(1, len(verdict.hashes) + 1)
        hashes += zip((collector.lines + n for n in places), verdict.hashes, strict=True)
        issues += collector.take(verdict)
    end = End("plain", size, None, size)
    # What is said of all lines together comes last, in the order in which parts brought it up.
    issues += sorted(collector.end(end), key=str)
    return Added(issues, hashes, collector.file(end))


def cut(content: bytes, places: Iterable[int], max_line: int) -> Iterator[FilePart]:
    """Cut a file at the ends of the lines in which some places are."""
    ends = sorted({content.find(b"\n", place) + 1 or len(content) for place in places})
    for start, end in pairwise((0, *ends, len(content))):
        if start < end:
            yield FilePart(lines=content[start:end], rules=RULES, max_line=max_line)


def blocks(path: Path, max_line: int) -> Iterator[FilePart]:
    """Cut a file as it is cut wherever it is read."""
    for told in scan.parts_of(0, path, rules=RULES, max_line=max_line):
        if isinstance(told.what, FilePart):
            yield told.what


class Simply(NamedTuple):
    """What a plain loop over lines finds.

    Attributes:
        too_long: The lines that are.
    """

    rows: int
    bad_rows: int
    hashes: list[tuple[int, int]]
    too_long: list[int]


def simply(content: bytes, max_line: int) -> Simply:
    """Judge lines one by one."""
    rules = RowRules(MISTRAL)
    rows = bad = 0
    kinds: set[str] = set()
    hashes: list[tuple[int, int]] = []
    too_long: list[int] = []
    for number, line in enumerate(re.findall(rb"[^\n]*\n|[^\n]+", content), 1):
        row = line.rstrip() + b"\n"
        if len(line.removesuffix(b"\n")) > max_line:
            too_long.append(number)
        elif row == b"\n":
            continue
        else:
            kind, findings = rules.judge(row)
            kinds |= {kind} if kind and not kinds else set()
            wrong = any(finding.severity == "error" for finding in findings)
            bad += wrong or (kind is not None and kind not in kinds)
            hashes += [] if wrong else [(number, xxh3_64_intdigest(row))]
        rows += 1
    return Simply(rows, bad + len(too_long), hashes, too_long)


@given(st.data())
def test_any_parts_of_any_file_give_the_verdict_on_the_whole(data: st.DataObject) -> None:
    """Wherever lines end: in a part, in what is read at once, or nowhere."""
    size = data.draw(st.sampled_from([16, 128]), "read at once")
    max_line = data.draw(st.sampled_from([1, size - 1, size, size + 1, 3 * size, 1000]), "longest")
    content = data.draw(contents(size, max_line), "content")
    cuts = data.draw(st.lists(places_in(content), max_size=6), "cuts")
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.jsonl"
        path.write_bytes(content)
        as_it_is = added(path, cut(content, (), max_line), len(content))
        # What most rows are is settled after a few of them, and few lines are read at once.
        for module in (scan_part, file_report):
            patch.setattr(module, "KEPT_PER_CODE", 2)
        alone = added(path, cut(content, (), max_line), len(content))
        patch.setattr(scan_part, "_PIECE", size)
        patch.setattr(scan_part, "_AT_ONCE", data.draw(st.integers(1, 4), "lines at once"))
        in_pieces = added(path, cut(content, (), max_line), len(content))
        together = added(path, cut(content, cuts, max_line), len(content))
        if data.draw(st.booleans(), "compressed"):
            path.write_bytes(gzip.compress(content))
        for name in ("FIRST_BLOCK", "LARGEST_BLOCK"):
            patch.setattr(scan, name, data.draw(st.integers(1, 100), name))
        unpacked = added(path, blocks(path, max_line), len(content))
    assert alone == in_pieces == together == unpacked
    assert (as_it_is.hashes, as_it_is.file) == (alone.hashes, alone.file)
    expected = simply(content, max_line)
    assert (alone.file.rows, alone.file.bad_rows) == (expected.rows, expected.bad_rows)
    assert alone.hashes == expected.hashes
    told = [issue.line for issue in as_it_is.issues if issue.code == "line_too_long"]
    assert [line for line in told if line] == expected.too_long[:20]
