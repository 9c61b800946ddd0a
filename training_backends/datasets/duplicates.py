"""Find duplicate rows in files of any size with little memory.

Rows are compared by a 64-bit hash: with 13 million distinct rows, the probability of a collision
is about 1 in 200,000, and its only effect is a warning. Large numbers of hashes are spooled to
disk. Equal hashes are found in slices of the hash space, each small enough for a set; a second
pass over all hashes finds their line numbers.
"""

import tempfile
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, NamedTuple, Self

__all__ = ["Found", "Repeat", "RowHashes", "RowLocation"]


class RowLocation(NamedTuple):
    """A line of a file."""

    file: int
    line: int


class Repeat(NamedTuple):
    """A duplicate row and its first occurrence."""

    place: RowLocation
    before: RowLocation


@dataclass(slots=True)
class Found:
    """Duplicate rows and overlaps between groups of files.

    Attributes:
        duplicates: Number of duplicate rows by file, within its group.
        overlaps: Number of rows by file that also occur in an earlier group.
        named: The first duplicates of each file, in order; incomplete if there are very many.
        named_overlaps: The same for overlaps.
    """

    duplicates: Counter[int] = field(default_factory=Counter)
    overlaps: Counter[int] = field(default_factory=Counter)
    named: list[Repeat] = field(default_factory=list)
    named_overlaps: list[Repeat] = field(default_factory=list)


class _Block(NamedTuple):
    """Position of a block of hashes in the spool file, followed by their line numbers."""

    file: int
    lines_before: int
    rows: int
    offset: int
    has_places: bool


class RowHashes:
    """Row hashes of several files, in order; a context manager.

    Args:
        slice_rows: Hashes that are compared at once; as a Python set, the default takes about
            9 MB. Four times the bytes of a slice stay in memory, the rest is on disk.
        known: Repeated hashes whose line numbers are reported; any others are only counted.
    """

    def __init__(self, *, slice_rows: int = 1 << 17, known: int = 1 << 16) -> None:
        self._slice_rows = slice_rows
        self._in_memory = 4 * 8 * slice_rows
        self._known = known
        self._stored: IO[bytes] = tempfile.SpooledTemporaryFile(self._in_memory)  # noqa: SIM115  # see __exit__
        self._blocks: list[_Block] = []
        self._error: OSError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stored.close()

    def add(
        self, file: int, hashes: "array[int]", lines_before: int, places: "array[int] | None"
    ) -> None:
        """Add the next rows of a file.

        If they cannot be stored, `find` raises the error.

        Args:
            file: Number of the file.
            hashes: One hash per row.
            lines_before: Number of lines of the file before these rows.
            places: Line number of each row, relative to `lines_before`; None for 1, 2, 3…
        """
        if not hashes or self._error:
            return
        offset = self._stored.tell()
        try:
            self._stored.write(hashes.tobytes())
            if places is not None:
                self._stored.write(places.tobytes())
        except OSError as error:
            self._error = error
        block = _Block(file, lines_before, len(hashes), offset, places is not None)
        self._blocks.append(block)

    def find(self, groups: Sequence[Sequence[int]], *, most: int) -> Found:
        """Find rows that occur twice within a group of files or again in a later group.

        Args:
            groups: File numbers by group; other files are ignored.
            most: Maximum number of rows to name per file.

        Raises:
            OSError: The hashes could not be stored.
        """
        if self._error:
            raise self._error
        search = _Search(groups, self._known)
        order = [file for group in groups for file in group]
        blocks = sorted(
            (block for block in self._blocks if block.file in order),
            key=lambda block: order.index(block.file),
        )
        for by_file in self._slices(blocks):
            search.count(by_file)
        left = search.to_name(most)
        for block in blocks if left else ():
            hashes = self._hashes(block)
            if not search.known.isdisjoint(hashes):
                left -= search.name(block.file, self._placed(block, hashes), most)
            if not left:
                break
        return search.found

    def _slices(self, blocks: Sequence[_Block]) -> Iterator["Mapping[int, array[int]]"]:
        """Yield the hashes by file in slices; equal hashes are in the same slice."""
        bits = (sum(block.rows for block in blocks) // self._slice_rows).bit_length()
        if not bits:
            yield self._by_file(blocks)
            return
        slices = [array("Q") for _ in range(1 << bits)]
        with tempfile.SpooledTemporaryFile(max_size=self._in_memory) as stored:
            parts: list[list[tuple[int, int, int]]] = [[] for _ in slices]

            def store(file: int) -> None:
                for each, where in zip(slices, parts, strict=True):
                    if each:
                        where.append((file, stored.tell(), len(each)))
                        stored.write(each.tobytes())
                        del each[:]

            dealt = 0
            for number, block in enumerate(blocks):
                deal = [each.append for each in slices]
                for one in self._hashes(block):
                    deal[one >> (64 - bits)](one)
                dealt += block.rows
                is_last = number + 1 == len(blocks) or blocks[number + 1].file != block.file
                if is_last or dealt >= 2 * self._slice_rows:
                    store(block.file)
                    dealt = 0
            for where in parts:
                by_file: defaultdict[int, array[int]] = defaultdict(lambda: array("Q"))
                for file, offset, count in where:
                    by_file[file].frombytes(_read(stored, offset, 8 * count))
                yield by_file

    def _by_file(self, blocks: Sequence[_Block]) -> "Mapping[int, array[int]]":
        by_file: defaultdict[int, array[int]] = defaultdict(lambda: array("Q"))
        for block in blocks:
            by_file[block.file] += self._hashes(block)
        return by_file

    def _hashes(self, block: _Block) -> "array[int]":
        hashes = array("Q")
        hashes.frombytes(_read(self._stored, block.offset, 8 * block.rows))
        return hashes

    def _placed(self, block: _Block, hashes: "array[int]") -> Iterator[tuple[int, int]]:
        """Yield each hash with its line number."""
        places: Sequence[int] = range(1, block.rows + 1)
        if block.has_places:
            lines = array("I")
            lines.frombytes(_read(self._stored, block.offset + 8 * block.rows, 4 * block.rows))
            places = lines
        for one, place in zip(hashes, places, strict=True):
            yield one, block.lines_before + place


class _Search:
    """Counts equal hashes, then finds their line numbers.

    Attributes:
        known: Hashes whose line numbers are to be found.
    """

    def __init__(self, groups: Sequence[Sequence[int]], most_known: int) -> None:
        self._most_known = most_known
        self._groups = groups
        self._group_of = {file: n for n, group in enumerate(groups) for file in group}
        self._first: list[dict[int, RowLocation]] = [{} for _ in groups]
        self._named: Counter[int] = Counter()
        self._named_across: Counter[int] = Counter()
        self.known: set[int] = set()
        self.found = Found()

    def count(self, by_file: "Mapping[int, array[int]]") -> None:
        """Count equal hashes in a slice."""
        before: set[int] = set()
        for group in self._groups:
            seen: set[int] = set()
            for file in group:
                hashes = by_file[file]
                new = set(hashes)
                again = len(hashes) - len(new - seen if seen else new)
                across = sum(map(before.__contains__, hashes)) if before else 0
                self.found.duplicates[file] += again
                self.found.overlaps[file] += across
                if (again or across) and len(self.known) < self._most_known:
                    self.known |= new & (seen | before)
                    self.known.update(one for one, n in Counter(hashes).items() if n > 1)
                seen = seen | new if seen else new
            before = before | seen if before else seen

    def to_name(self, most: int) -> int:
        """Return how many line numbers are to be found."""
        counts = (*self.found.duplicates.values(), *self.found.overlaps.values())
        return sum(min(most, count) for count in counts)

    def name(self, file: int, rows: Iterator[tuple[int, int]], most: int) -> int:
        """Record the line numbers of the next rows, up to the limit; return how many."""
        group = self._group_of[file]
        first = self._first[group]
        before = len(self.found.named) + len(self.found.named_overlaps)
        for one, line in rows:
            if one not in self.known:
                continue
            place = RowLocation(file, line)
            earlier = first.setdefault(one, place)
            if earlier is not place and self._named[file] < most:
                self._named[file] += 1
                self.found.named.append(Repeat(place, earlier))
            across = next((each[one] for each in self._first[:group] if one in each), None)
            if across and self._named_across[file] < most:
                self._named_across[file] += 1
                self.found.named_overlaps.append(Repeat(place, across))
        return len(self.found.named) + len(self.found.named_overlaps) - before


def _read(file: IO[bytes], offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)
