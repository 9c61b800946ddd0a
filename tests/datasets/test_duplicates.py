"""Rows that stand twice are found in files of any size, and their lines named."""

import tracemalloc
from array import array
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training_backends.datasets.duplicates import Found, Repeat, RowHashes, RowLocation

FEW = 100
"""More than any of the small examples has to name."""


def found_in(
    files: list[list[int]], groups: list[list[int]], most: int = FEW, slice_rows: int = 1 << 17
) -> Found:
    with RowHashes(slice_rows=slice_rows) as hashes:
        for number, file in enumerate(files):
            # In two parts, the second of which begins with a line that is no row.
            half = len(file) // 2
            hashes.add(number, array("Q", file[:half]), 0, None)
            rest = array("Q", file[half:])
            hashes.add(number, rest, half, array("I", range(2, len(rest) + 2)))
        return hashes.find(groups, most=most)


def line(file: list[int], index: int) -> int:
    return index + 1 if index < len(file) // 2 else index + 2


SLICES = pytest.mark.parametrize("slice_rows", [1 << 17, 4])
"""All hashes at once, or few at a time."""

rows = st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63, 2**64 - 1]), max_size=12)


@SLICES
@given(data=st.data())
def test_what_is_found_is_what_a_simple_search_finds(slice_rows: int, data: st.DataObject) -> None:
    """Whatever the hashes are: how many, which lines, and which lines before."""
    train = data.draw(st.lists(rows, min_size=1, max_size=3))
    validation = data.draw(st.lists(rows, max_size=2))
    files = [*train, *validation]
    groups = [list(range(len(train))), list(range(len(train), len(files)))]
    expected = Found()
    trained: dict[int, RowLocation] = {}
    for group in groups:
        first: dict[int, RowLocation] = {}
        for number in group:
            for index, one in enumerate(files[number]):
                place = RowLocation(number, line(files[number], index))
                if one in first:
                    expected.duplicates[number] += 1
                    expected.named.append(Repeat(place, first[one]))
                if one in trained:
                    expected.overlaps[number] += 1
                    expected.named_overlaps.append(Repeat(place, trained[one]))
                first.setdefault(one, place)
        trained = first
    found = found_in(files, groups, slice_rows=slice_rows)
    assert +found.duplicates == +expected.duplicates
    assert +found.overlaps == +expected.overlaps
    assert found.named == expected.named
    assert found.named_overlaps == expected.named_overlaps


@SLICES
def test_of_many_only_the_first_are_named(slice_rows: int) -> None:
    """All are counted."""
    found = found_in([[1, 2, 3] * 5, [3, 3, 9]], [[0, 1]], most=2, slice_rows=slice_rows)
    assert found.duplicates == Counter({0: 12, 1: 2})
    assert [repeat.place for repeat in found.named] == [
        RowLocation(0, 4),
        RowLocation(0, 5),
        RowLocation(1, 1),
        RowLocation(1, 3),
    ]


def test_a_file_in_no_group_is_left_out() -> None:
    """Its rows are those of another file, word for word."""
    assert found_in([[1, 2], [1, 2]], [[0]]).duplicates == Counter({0: 0})


def test_memory_stays_small() -> None:
    """Hashes beyond some megabytes lie on the disk, also where all of them are repeated."""
    half = 40_000
    numbers = array("Q", (number * 0x9E3779B97F4A7C15 % 2**64 for number in range(half)))
    tracemalloc.start()
    with RowHashes(slice_rows=1 << 13, known=1 << 12) as hashes:
        for before in (0, half):
            for start in range(0, half, 1000):
                hashes.add(0, numbers[start : start + 1000], before + start, None)
        found = hashes.find([[0]], most=20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.duplicates == Counter({0: half})
    assert len(found.named) == 20
    for repeat in found.named:
        assert repeat.place.line - repeat.before.line == half
    assert peak < 3 << 20
