"""Results about data files are kept until something that they depend on changes."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.readings import counted_readings
from training_backends.core.config import DataSource
from training_backends.core.dataset import Dataset
from training_backends.datasets import cache as cache_module
from training_backends.datasets.cache import ResultCache
from training_backends.datasets.inspect import inspect_files
from training_backends.datasets.provider_formats import LOCAL, MISTRAL

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def write(path: Path, *rows: object) -> DataSource:
    """Write a file of rows, one of them invalid."""
    lines = [json.dumps(row) for row in (*rows, {"messages": 5})]
    path.write_text("".join(line + "\n" for line in lines))
    return DataSource(path=path)


def inspected(cache: Path, *sources: DataSource) -> tuple[Dataset, int]:
    """Inspect files; return the result and the bytes that were read of them."""
    with counted_readings() as readings:
        found = inspect_files(sources, provider_format=MISTRAL, cache=cache)
    return found, sum(readings[str(source.local_path)] for source in sources)


def test_an_inspection_with_errors_is_kept(tmp_path: Path) -> None:
    """A second call reads nothing, and reports the same issues as they were found."""
    files = write(tmp_path / "a.jsonl", ROW, ROW), write(tmp_path / "b.jsonl", ROW)
    first, _ = inspected(tmp_path / "cache", *files)
    again, read = inspected(tmp_path / "cache", *files)
    assert read == 0
    assert again == first
    assert first.errors
    issues: list[object] = []
    inspect_files(files, provider_format=MISTRAL, cache=tmp_path / "cache", on_issue=issues.append)
    assert tuple(issues) == first.issues


def test_other_rules_files_and_roles_are_checked(tmp_path: Path) -> None:
    """An inspection answers only the question that was asked."""
    one, other = write(tmp_path / "a.jsonl", ROW), write(tmp_path / "b.jsonl", ROW, ROW)
    cache = tmp_path / "cache"
    results = [
        inspect_files([one], cache=cache, provider_format=MISTRAL),
        inspect_files([one], cache=cache, provider_format=LOCAL),
        inspect_files([one, other], cache=cache, provider_format=MISTRAL),
        inspect_files([other], [one], cache=cache, provider_format=MISTRAL),
        inspect_files([one.model_copy(update={"weight": 2})], cache=cache),
    ]
    assert len(list(cache.iterdir())) == len(results)


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_file_written_again_is_checked_again(tmp_path: Path, keeps_time: bool) -> None:
    """The same size, and even the same modification time, prove nothing."""
    source = write(tmp_path / "a.jsonl", ROW)
    first, _ = inspected(tmp_path / "cache", source)
    times = source.local_path.stat()
    source.local_path.write_text(source.local_path.read_text().replace("user", "oser"))
    if keeps_time:
        os.utime(source.local_path, ns=(times.st_atime_ns, times.st_mtime_ns))
    again, _ = inspected(tmp_path / "cache", source)
    assert len(again.errors) > len(first.errors)
    assert again.files[0].sha256 != first.files[0].sha256


@pytest.mark.parametrize("damage", [b"", b"{}", b"x\n{}"])
def test_a_damaged_entry_is_replaced(tmp_path: Path, damage: bytes) -> None:
    """The file is read instead."""
    source = write(tmp_path / "a.jsonl", ROW)
    first, _ = inspected(tmp_path / "cache", source)
    (entry,) = (tmp_path / "cache").iterdir()
    content = entry.read_bytes()
    entry.write_bytes(damage)
    assert inspected(tmp_path / "cache", source)[0] == first
    assert entry.read_bytes() == content


def test_a_file_that_cannot_be_read_is_tried_again(tmp_path: Path) -> None:
    """What a missing file or package prevents is not kept."""
    source = DataSource(path=tmp_path / "a.jsonl")
    assert inspected(tmp_path / "cache", source)[0].errors
    write(source.local_path, ROW)
    assert inspected(tmp_path / "cache", source)[0].files


def test_a_name_that_is_not_utf8_is_no_obstacle(tmp_path: Path) -> None:
    """Nothing is kept for it."""
    source = write(tmp_path / os.fsdecode(b"\xff.jsonl"), ROW)
    first, _ = inspected(tmp_path / "cache", source)
    assert inspected(tmp_path / "cache", source)[0] == first


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entries used longest ago are removed, and large ones are not kept."""
    monkeypatch.setattr(cache_module, "MAX_ENTRIES", 8)
    kept = ResultCache(tmp_path)
    for number in range(40):
        kept.keep(f"{number}", b"content")
        assert len(list(tmp_path.iterdir())) <= 8
    assert kept.find("39") == b"content"
    kept.keep("large", bytes(2 << 20))
    assert kept.find("large") is None


def test_writers_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """An entry is complete or not there."""
    kept = ResultCache(tmp_path)

    def use(number: int) -> bool:
        kept.keep("key", b"content")
        kept.keep(f"{number}", b"%d" % number)
        return kept.find("key") == b"content" and kept.find(f"{number}") == b"%d" % number

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(64)))
