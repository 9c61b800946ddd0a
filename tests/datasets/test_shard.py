"""Cutting files between lines: nothing is lost, nothing is above the limit, nothing is halved."""

import gzip
import hashlib
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.datasets.files import written
from training_backends import ConfigError, DatasetError, TrainingBackendError
from training_backends.datasets.open_file import kind_of
from training_backends.datasets.shard import plan_shards, shard

texts = st.binary(max_size=20).map(lambda text: text.replace(b"\n", b" "))
contents = st.lists(texts, max_size=20).map(b"\n".join)
limits = st.integers(21, 60)


def joined(directory: Path, pattern: str = "*-of-*.jsonl") -> bytes:
    """Put shards together as `cat` would, in the order of their names."""
    return b"".join(path.read_bytes() for path in sorted(directory.glob(pattern)))


@given(contents, limits)
def test_parts_make_up_the_file(content: bytes, limit: int) -> None:
    """Parts follow one another, keep the limit, end with a line and tell of their own bytes."""
    with written(content) as path:
        parts = plan_shards(path, limit)
    pieces = [content[part.offset : part.offset + part.size] for part in parts]
    assert b"".join(pieces) == content
    assert all(piece.endswith(b"\n") for piece in pieces[:-1])
    for part, piece in zip(parts, pieces, strict=True):
        assert 0 < len(piece) <= limit
        assert part.sha256 == hashlib.sha256(piece).hexdigest()
        assert part.rows == len(piece.removesuffix(b"\n").split(b"\n"))


@given(contents, limits)
def test_there_are_as_few_parts_as_can_be(content: bytes, limit: int) -> None:
    """No part had room for the first line of the next."""
    with written(content) as path:
        parts = plan_shards(path, limit)
    for part, following in itertools.pairwise(parts):
        line = content[following.offset :].partition(b"\n")
        assert part.size + len(line[0] + line[1]) > limit


@given(contents.filter(lambda content: content and kind_of(content) == "plain"), limits)
def test_shards_put_together_are_the_file(content: bytes, limit: int) -> None:
    """Byte for byte, whatever stands in it, and their names sort in order."""
    with written(content) as path:
        parts = shard(path, limit)
        assert joined(path.parent) == content
        assert [part.path.read_bytes() for part in parts] == [
            content[part.offset : part.offset + part.size] for part in plan_shards(path, limit)
        ]
        assert path.read_bytes() == content


def test_names_say_which_of_how_many(tmp_path: Path) -> None:
    """Names sort as the parts follow one another, also above nine."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"1234\n" * 11)
    parts = shard(path, 5)
    names = [part.path.name for part in parts]
    assert names[0] == "data-00001-of-00011.jsonl"
    assert names == sorted(names)


def test_a_line_may_be_longer_than_what_is_read_at_a_time(tmp_path: Path) -> None:
    """The end of the last line that fits is found over many megabytes."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"a\n" + b"b" * (3 << 20) + b"\n" + b"c" * (3 << 20))
    assert [part.rows for part in plan_shards(path, (3 << 20) + 2)] == [1, 1, 1]
    assert [part.rows for part in plan_shards(path, (3 << 20) + 3)] == [2, 1]


def test_a_packed_file_gives_its_unpacked_bytes(tmp_path: Path) -> None:
    """The limit holds for what is written, and the name loses what said how it was packed."""
    content = b"".join(b"%d\n" % number for number in range(1000))
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(content))
    parts = shard(path, 1000)
    assert parts[0].path.name == "data-00001-of-00004.jsonl"
    assert joined(tmp_path) == content
    assert len(list(tmp_path.iterdir())) == len(parts) + 1


@pytest.mark.parametrize("content", [b"a\n" + b"b" * 9 + b"\nc\n", b"a\n\n" + b"b" * 10])
def test_a_line_above_the_limit_is_named(tmp_path: Path, content: bytes) -> None:
    """It cannot be cut, and nothing is written."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        shard(path, 9)
    (issue,) = caught.value.issues
    assert (issue.code, issue.line) == ("row_over_limit", 2 + content.count(b"\n\n"))
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    """A shard that is there is left alone, unless it is to be replaced."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"1\n2\n")
    there = tmp_path / "data-00002-of-00002.jsonl"
    there.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="already exists"):
        shard(path, 2)
    assert sorted(tmp_path.iterdir()) == [there, path]
    assert there.read_bytes() == b"mine"
    shard(path, 2, force=True)
    assert there.read_bytes() == b"2\n"


def test_shards_may_lie_elsewhere(tmp_path: Path) -> None:
    """A directory that is not there yet is made."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"1\n2\n")
    shard(path, 2, directory=tmp_path / "a" / "b")
    assert joined(tmp_path / "a" / "b") == b"1\n2\n"


def test_where_nothing_can_be_written_nothing_is_left(tmp_path: Path) -> None:
    """A refusal of the system is told with the name of the file."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"1\n2\n")
    (tmp_path / "data-00002-of-00002.jsonl").mkdir()
    with pytest.raises(TrainingBackendError, match=r"Could not write .*00002-of-00002\.jsonl"):
        shard(path, 2, force=True)
    assert {one.name for one in tmp_path.iterdir()} == {"data.jsonl", "data-00002-of-00002.jsonl"}


def test_an_empty_file_has_no_parts(tmp_path: Path) -> None:
    """There is nothing to cut."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"")
    assert list(plan_shards(path, 9)) == []
    with pytest.raises(DatasetError) as caught:
        shard(path, 9)
    assert caught.value.issues[0].code == "empty_file"


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    """Each byte is read once to plan and once to copy."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"1234567\n" * (2 << 20))
    seen: list[tuple[Path, int, int]] = []
    shard(path, 9 << 20, on_progress=lambda *told: seen.append(told))
    size = path.stat().st_size
    assert seen[-1] == (path, 2 * size, 2 * size)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert len(seen) > 2
