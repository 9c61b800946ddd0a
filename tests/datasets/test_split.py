"""Setting rows aside: both sides together are the file, no row is on both, and it can be redone."""

import gzip
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.datasets.files import written
from training_backends import ConfigError, DatasetError
from training_backends.core.data_rules import ProviderFormat
from training_backends.datasets.provider_formats import MISTRAL
from training_backends.datasets.split import Split, split

rows = st.lists(
    st.integers(0, 40).map(lambda number: b'{"text": "%d"}' % (number * 7919)), min_size=2
)
ends = st.sampled_from([b"\n", b"\r\n"])


def numbered(count: int, start: int = 0) -> bytes:
    return b"".join(b'{"text": "row %06d"}\n' % n for n in range(start, start + count))


def sides(found: Split) -> tuple[list[bytes], list[bytes]]:
    """Read the rows of both sides."""
    assert found.train
    assert found.validation
    train = found.train.path.read_bytes().splitlines(keepends=True)
    validation = found.validation.path.read_bytes().splitlines(keepends=True)
    assert (len(train), len(validation)) == (found.train.rows, found.validation.rows)
    assert sum(map(len, train)) == found.train.size
    assert sum(map(len, validation)) == found.validation.size
    return train, validation


@given(rows, ends, st.floats(0.1, 0.9), st.integers())
def test_both_sides_make_up_the_file(
    lines: list[bytes], end: bytes, fraction: float, seed: int
) -> None:
    """Each row is on one side with its bytes and in its order; identical rows are on the same."""
    whole = [line + end for line in lines]
    with written(b"".join(whole)) as path:
        try:
            (found,) = split([path], fraction=fraction, seed=seed)
        except DatasetError as error:
            assert error.issues[0].code == "too_few_rows"  # noqa: PT017
            return
        train, validation = sides(found)
    assert Counter(train) + Counter(validation) == Counter(whole)
    assert not set(train) & set(validation)
    for side in (train, validation):
        assert side == [line for line in whole if line in set(side)]


@given(st.lists(st.integers(), unique=True, min_size=20, max_size=60), st.randoms())
def test_the_order_of_rows_does_not_matter(numbers: list[int], chance: random.Random) -> None:
    """The same rows are set aside however they are shuffled."""
    lines = [b'{"text": "%d"}\n' % number for number in numbers]
    shuffled = chance.sample(lines, len(lines))
    with written(b"".join(lines)) as path, written(b"".join(shuffled)) as other:
        (one,) = split([path], rows=5)
        (two,) = split([other], rows=5)
        assert set(sides(one)[1]) == set(sides(two)[1])


def test_it_can_be_redone(tmp_path: Path) -> None:
    """The same file and seed give the same bytes, another seed others."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(numbered(500))
    (first,) = split([path], seed=1, directory=tmp_path / "1")
    (again,) = split([path], seed=1, directory=tmp_path / "2")
    (other,) = split([path], seed=2, directory=tmp_path / "3")
    assert sides(first) == sides(again)
    assert sides(first)[1] != sides(other)[1]


def test_rows_added_later_leave_nearly_all_on_their_side(tmp_path: Path) -> None:
    """A file that grew by a tenth is not shuffled anew."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(numbered(2000))
    (before,) = split([path], fraction=0.1, directory=tmp_path / "1")
    path.write_bytes(numbered(2200))
    (after,) = split([path], fraction=0.1, directory=tmp_path / "2")
    was, now = set(sides(before)[1]), set(sides(after)[1])
    assert len(was - now) < 0.2 * len(was)


@pytest.mark.parametrize(("length", "limit"), [(0, 2000 * 23 * 5 // 105), (12_000, 10**6)])
def test_the_rule_of_the_provider_format_is_kept_and_used(
    tmp_path: Path, length: int, limit: int
) -> None:
    """The set is at most 5 % of the training set and 1 MB, and not much less."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(numbered(2000).replace(b"row", b"row" + b"x" * length))
    (found,) = split([path])
    assert found.train
    assert found.validation
    assert 0.95 * limit < found.validation.size <= limit
    assert MISTRAL.validation_max_share == 0.05
    assert found.validation.size <= 0.05 * found.train.size


def test_where_a_provider_format_has_no_rule_a_twentieth_is_set_aside(tmp_path: Path) -> None:
    """The usual share holds, without a limit in bytes."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(numbered(2100))
    (found,) = split([path], provider_format=ProviderFormat())
    assert len(sides(found)[1]) == 100


def test_how_much_is_set_aside_can_be_said(tmp_path: Path) -> None:
    """In rows or as a share of them."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(numbered(100))
    (by_rows,) = split([path], rows=7)
    assert len(sides(by_rows)[1]) == 7
    (by_share,) = split([path], fraction=0.25, force=True)
    assert len(sides(by_share)[1]) == 25


def test_one_large_row_is_passed_over(tmp_path: Path) -> None:
    """A row larger than the whole set does not keep others from being set aside."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        b"".join(
            b'{"text": "%d"}\n' % n + b'{"text": "%s"}\n' % (b"%d" % n * 900) for n in range(9)
        )
    )
    (found,) = split([path])
    assert all(len(row) < 30 for row in sides(found)[1])


@pytest.mark.parametrize(
    ("content", "fraction", "rows"),
    [
        (b'{"text": "a"}\n', None, None),
        (b'{"text": "a"}\n' * 100, None, None),
        (b'{"text": "a"}\n' * 100, None, 100),
        (numbered(5), None, None),
        (numbered(5), None, 5),
        (numbered(5), 0.01, None),
        (b"\n\n", None, 1),
        (b"", None, 1),
    ],
)
def test_too_few_rows_are_refused(
    tmp_path: Path, content: bytes, fraction: float | None, rows: int | None
) -> None:
    """Both sides need a row; else nothing is written."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        split([path], fraction=fraction, rows=rows)
    assert caught.value.issues[0].code == "too_few_rows"
    assert caught.value.issues[0].fix
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("rows", "size"), [(1, "1 row"), (2, "2 rows"), (1500, "1,500 rows")])
def test_the_size_that_was_asked_for_is_named(tmp_path: Path, rows: int, size: str) -> None:
    """In the number that goes with it."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * (rows + 1))
    with pytest.raises(DatasetError) as caught:
        split([path], rows=rows)
    assert caught.value.issues[0].message == f"no row fits in a validation set of {size}"


def test_rows_that_differ_only_in_line_end_and_byte_order_mark_are_the_same(tmp_path: Path) -> None:
    """They are never parted; blank lines are left out."""
    path = tmp_path / "data.jsonl"
    lines = numbered(200).splitlines()
    path.write_bytes(b"\xef\xbb\xbf" + b"\n\n".join(lines) + b"\n  \n" + b"\r\n".join(lines))
    (found,) = split([path], fraction=0.3)
    train, validation = (
        {row.strip().removeprefix(b"\xef\xbb\xbf") for row in side} for side in sides(found)
    )
    assert train | validation == set(lines)
    assert not train & validation


def test_several_files_are_split_as_one(tmp_path: Path) -> None:
    """A row that is in two files is on the same side in both; one size holds for all."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    first.write_bytes(numbered(60))
    second.write_bytes(gzip.compress(numbered(60, start=30)))
    one, two = split([first, second], rows=24)
    train = set(sides(one)[0]) | set(sides(two)[0])
    validation = [*sides(one)[1], *sides(two)[1]]
    assert not train & set(validation)
    assert 20 <= len(validation) <= 24
    assert two.train
    assert two.train.path == tmp_path / "b.train.jsonl"


def test_a_side_without_rows_is_not_written(tmp_path: Path) -> None:
    """A small file beside a large one may have nothing set aside."""
    large, small = tmp_path / "large.jsonl", tmp_path / "small.jsonl"
    large.write_bytes(numbered(1000))
    small.write_bytes(numbered(1, start=5000))
    found = split([large, small], rows=1)
    assert [bool(each.train) + bool(each.validation) for each in found] == [2, 1]
    assert len(list(tmp_path.iterdir())) == 5


def test_nothing_is_written_over(tmp_path: Path) -> None:
    """A file that is there is left alone, unless it is to be replaced."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(numbered(100))
    there = tmp_path / "data.validation.jsonl"
    there.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="already exists"):
        split([path])
    assert sorted(tmp_path.iterdir()) == [path, there]
    assert there.read_bytes() == b"mine"
    split([path], force=True)
    assert there.read_bytes() != b"mine"


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    """They would be written over one another."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.jsonl").write_bytes(numbered(100))
    paths = [tmp_path / name / "data.jsonl" for name in ("a", "b")]
    with pytest.raises(ConfigError, match="same output name"):
        split(paths, directory=tmp_path)
    assert len(split(paths)) == 2
