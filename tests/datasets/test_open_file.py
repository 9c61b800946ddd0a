"""Data files of every kind are read as the same lines, and found by name, pattern and directory."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training_backends.core.errors import DatasetError
from training_backends.datasets.inspect import inspect_file
from training_backends.datasets.open_file import STDIN, expand, opened

zstd: Any = pytest.importorskip(
    "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
)

TEXT = "".join(
    json.dumps(
        {
            "messages": [
                {"role": "user", "content": "Où est-ce ?"},
                {"role": "assistant", "content": "Là.", "name": f"a{number}"},
            ]
        }
    )
    + "\n"
    for number in range(3000)
).encode()

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "zstd": zstd.compress,
}


def content(path: Path) -> bytes:
    with opened(path) as source:
        return source.lines.read()


def problem(path: Path) -> tuple[str, str]:
    with pytest.raises(DatasetError) as caught:
        content(path)
    (issue,) = caught.value.issues
    assert issue.path == str(path)
    assert issue.fix
    return issue.code, issue.message


@pytest.mark.parametrize("kind", sorted(PACKERS))
def test_what_a_file_is_its_first_bytes_say(tmp_path: Path, kind: str) -> None:
    """Its name says nothing; size and digest are of the file as it is stored."""
    path = tmp_path / "data.jsonl"
    packed = PACKERS[kind](TEXT)
    path.write_bytes(packed)
    with opened(path, digest=True) as source:
        assert source.kind == kind
        assert source.lines.read() == TEXT
        assert source.size == len(packed)
        assert source.sha256 == hashlib.sha256(packed).hexdigest()


@pytest.mark.parametrize("kind", sorted(PACKERS))
def test_packed_files_are_inspected_as_plain_ones(tmp_path: Path, kind: str) -> None:
    """The same rows, issues and lines come from all of them."""
    plain, path = tmp_path / "plain", tmp_path / "data"
    broken = TEXT.replace(b'"a7"', b"7") + b"\n"
    plain.write_bytes(broken)
    path.write_bytes(PACKERS[kind](broken))
    expected, told = inspect_file(plain)
    found, issues = inspect_file(path)
    assert expected is not None
    assert found is not None
    assert [(one.code, one.line) for one in issues] == [(one.code, one.line) for one in told]
    assert found.summary == expected.summary
    assert found.packing == kind
    assert found.size == path.stat().st_size


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
@pytest.mark.parametrize("damage", ["short", "changed", "no end", "behind"])
def test_damaged_files_are_an_issue(tmp_path: Path, kind: str, damage: str) -> None:
    """However they are damaged; never a traceback, and no file that seems whole."""
    packed = bytearray(PACKERS[kind](os.urandom(50_000) + TEXT))
    if damage == "short":
        del packed[len(packed) // 2 :]
    elif damage == "no end":
        del packed[-3:]
    elif damage == "changed":
        packed[len(packed) - 300 : len(packed) - 200] = b"x" * 100
    else:
        packed += b"not packed"
    path = tmp_path / "data"
    path.write_bytes(packed)
    code, message = problem(path)
    assert code == "damaged_file"
    assert kind in message
    file, issues = inspect_file(path)
    assert file is None
    assert issues[-1].code == "damaged_file"


def test_a_file_of_several_packed_pieces_is_one(tmp_path: Path) -> None:
    """As `cat a.gz b.gz` makes it."""
    for kind in ("gzip", "zstd"):
        path = tmp_path / kind
        path.write_bytes(PACKERS[kind](b"a\n") + PACKERS[kind](b"b\n"))
        assert content(path) == b"a\nb\n"


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_bomb_fills_no_memory(tmp_path: Path, kind: str) -> None:
    """300 MB in one line out of a few hundred kB are one issue."""
    path = tmp_path / "bomb"
    if kind == "gzip":
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(300):
                file.write(bytes(1 << 20))
    else:
        with zstd.open(path, "wb") as file:
            for _ in range(300):
                file.write(bytes(1 << 20))
    tracemalloc.start()
    found, issues = inspect_file(path, max_line=4 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(one.code, one.line) for one in issues] == [("line_too_long", 1)]
    assert found is not None
    assert found.summary.lines == 300 << 20
    assert peak < 32 << 20


def test_a_frame_that_asks_for_too_much_memory_is_refused(tmp_path: Path) -> None:
    """Its header alone could ask for gigabytes."""
    options = {zstd.CompressionParameter.window_log: 30}
    packed = zstd.ZstdCompressor(options=options)
    path = tmp_path / "data"
    path.write_bytes(packed.compress(os.urandom(1000)) + packed.flush())
    assert problem(path)[0] == "damaged_file"


def test_without_the_extra_the_issue_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no crash."""
    path = tmp_path / "data"
    path.write_bytes(zstd.compress(TEXT))
    for name in ("backports.zstd", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr("backports.zstd", raising=False)
    with pytest.raises(DatasetError) as caught:
        content(path)
    assert caught.value.issues[0].code == "missing_extra"
    assert "training-backends[zstd]" in str(caught.value.issues[0].fix)


def test_parquet_rows_are_lines(tmp_path: Path) -> None:
    """A field that is null in a row is left out of it; they come some at a time."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [json.loads(line) for line in TEXT.splitlines()]
    rows[1] = {"messages": [{"role": "user", "content": "Only a question?"}]}
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1000)
    assert [json.loads(line) for line in content(path).splitlines()] == rows
    file, issues = inspect_file(path)
    assert file is not None
    assert [(one.code, one.line) for one in issues] == [("no_assistant", 2)]
    assert (file.rows, file.packing) == (3000, "parquet")
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes()[:-50])
    assert problem(path)[0] == "damaged_file"


def test_standard_input_is_a_file_called_minus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed or plain; and nothing is lost where it comes byte by byte."""
    for packed in (TEXT, gzip.compress(TEXT)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(packed)))
        assert content(STDIN) == TEXT
    script = (
        "from pathlib import Path\n"
        "from training_backends.datasets.inspect import inspect_file\n"
        "print(inspect_file(Path('-'))[0].model_dump_json())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for byte in TEXT[:10]:
            process.stdin.write(bytes([byte]))
        process.stdin.write(TEXT[10:])
        process.stdin.close()
        found = json.loads(process.stdout.read())
    assert found["rows"] == 3000
    assert found["sha256"] == hashlib.sha256(TEXT).hexdigest()


def test_names_patterns_and_directories_stand_for_files(tmp_path: Path) -> None:
    """Each file comes once; a directory gives its data files, those below it too."""
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.parquet", "notes.txt", ".hidden/d.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    expected = [tmp_path / name for name in ("a.jsonl.gz", "b.jsonl", "sub/c.parquet")]
    assert expand([tmp_path]) == expected
    assert expand([tmp_path / "*.jsonl*", tmp_path / "b.jsonl"]) == expected[:2]
    assert expand([tmp_path / "**" / "*.parquet"]) == expected[2:]
    assert expand(["-", tmp_path / "gone.jsonl"]) == [STDIN, tmp_path / "gone.jsonl"]
    odd = tmp_path / "really[1].jsonl"
    odd.touch()
    assert expand([odd]) == [odd]


@pytest.mark.parametrize("name", ["*.nothing", ""])
def test_what_stands_for_no_file_is_an_error(tmp_path: Path, name: str) -> None:
    """An inspection of nothing would seem to find nothing wrong."""
    with pytest.raises(DatasetError) as caught:
        expand([tmp_path / name])
    assert caught.value.issues[0].code == "missing_file"


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    """A pipe is refused before it is waited for."""
    os.mkfifo(tmp_path / "pipe")
    assert problem(tmp_path / "gone")[0] == "missing_file"
    assert problem(tmp_path)[0] == "not_a_file"
    assert problem(tmp_path / "pipe")[0] == "not_a_file"
