"""Open data files of any supported format as a stream of lines, and expand glob patterns.

The format is detected from the first bytes, not from the name. Only a few megabytes are in memory
at a time, whatever the compression ratio.
"""

import gzip
import hashlib
import io
import json
import re
import stat
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from glob import glob, has_magic
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, Final, Literal, NoReturn

import msgspec

from training_backends.core.errors import DatasetError, Issue
from training_backends.core.files import Stamp, settled_stamp, stamp_of
from training_backends.datasets.scan_part import BOM

__all__ = [
    "KEPT_BYTES",
    "STDIN",
    "Kind",
    "Source",
    "expand",
    "file_problem",
    "kind_of",
    "open_data",
    "opened",
    "unreadable",
]

KEPT_BYTES: Final = 16 << 20
"""Bytes of recently read files that are kept in memory, in all."""

STDIN: Final = Path("-")
"""Path that denotes standard input."""

Kind = Literal["plain", "gzip", "zstd", "parquet"]

_MAGIC: Final[dict[bytes, Kind]] = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "parquet",
}
_ENDINGS: Final = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_BUFFER: Final = 1 << 20
_ARRAY: Final = re.compile(rb"\[\s*\{")
_BATCH_BYTES: Final = 4 << 20
_LAYOUT_BYTES: Final = 1 << 16
"""Bytes read at most to distinguish JSON Lines from other JSON."""
_CONVERT: Final = "convert it to JSON Lines with `training-backends data convert`"
_WINDOW_LOG: Final = 27
"""128 MiB, the default limit of the `zstd` command; a frame may request any window size."""


class Source:
    """An open data file.

    Attributes:
        kind: Compression or container format.
        lines: Decompressed JSON Lines. Reading raises `DatasetError` if the file is corrupt.
    """

    def __init__(self, kind: Kind, lines: io.BufferedReader, stored: "_Stored") -> None:
        self.kind = kind
        self.lines = lines
        self._stored = stored

    @property
    def size(self) -> int:
        """Bytes of the stored file read so far."""
        return self._stored.size

    @property
    def sha256(self) -> str | None:
        """Hex digest of the stored bytes read so far; None unless requested."""
        digest = self._stored.digest
        return digest.hexdigest() if digest else None


def kind_of(head: bytes) -> Kind:
    """Detect the file format from its first four bytes."""
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "plain")


_kept: OrderedDict[Stamp, bytes] = OrderedDict()
_kept_lock: Final = Lock()


def open_data(path: Path) -> BinaryIO:
    """Open a data file for reading.

    The bytes of small files are kept, so that checking a file, hashing it and counting its tokens
    share one reading. They are read again once the file may have changed.

    Raises:
        OSError: The file cannot be read.
    """
    file = path.open("rb")
    try:
        size = stamp_of(file.fileno())[2]
        stamp = settled_stamp(file.fileno()) if 0 < size <= KEPT_BYTES else None
        if stamp is None:
            return file
        with _kept_lock:
            content = _kept.get(stamp)
        if content is None:
            content = file.read()
            if stamp_of(file.fileno()) != stamp:
                file.seek(0)
                return file
            _keep(stamp, content)
    except BaseException:
        file.close()
        raise
    file.close()
    return io.BytesIO(content)


def _keep(stamp: Stamp, content: bytes) -> None:
    with _kept_lock:
        _kept[stamp] = content
        while sum(map(len, _kept.values())) > KEPT_BYTES:
            _kept.popitem(last=False)


@contextmanager
def opened(path: Path, *, digest: bool = False) -> Iterator[Source]:
    """Open a data file as a stream of lines; "-" is standard input.

    Args:
        digest: Compute the SHA-256 digest while reading.

    Raises:
        DatasetError: The file cannot be read, or the package to decompress it is not installed.
    """
    if path != STDIN and (issue := file_problem(path)):
        _fail(path, issue)
    with ExitStack() as stack:
        try:
            file = _standard_input() if path == STDIN else stack.enter_context(open_data(path))
            stored = _Stored(file, digest=digest)
        except OSError as error:
            _fail(path, unreadable(path, error))
        kind = kind_of(stored.head)
        chunks = _with_data_errors(path, kind, _DECODERS[kind](stored, path))
        if kind != "parquet":
            chunks = _checked(path, chunks)
        yield Source(kind, io.BufferedReader(_Chunks(chunks), _BUFFER), stored)


def file_problem(path: Path) -> Issue | None:
    """Return why a path cannot be read as a file, or None if it can."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return unreadable(path, error)
    if stat.S_ISREG(mode):
        return None
    what, fix = "not a regular file", "copy the data to one, or use `-` for standard input"
    if stat.S_ISDIR(mode):
        what, fix = "a directory, not a file", "list the files in it"
    return _issue(path, "not_a_file", f"this is {what}", fix)


def expand(names: Iterable[Path | str]) -> list[Path]:
    """Expand names, glob patterns and directories to files, without duplicates.

    Raises:
        DatasetError: A pattern or directory matches no data file.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(each for each in path.rglob("*") if _is_data(each, path))
            ending = ", ".join(_ENDINGS)
            problem = f"the directory contains no data files ({ending})"
        elif has_magic(str(path)) and not path.exists():
            inside = [Path(each) for each in sorted(glob(str(path), recursive=True))]  # noqa: PTH207  # also absolute patterns
            problem = "no files match this pattern"
        else:
            inside, problem = [path], ""
        if not inside:
            _fail(path, _issue(path, "missing_file", problem, "check the path"))
        found |= dict.fromkeys(inside)
    return list(found)


def _is_data(path: Path, directory: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
    return not hidden and path.name.endswith(_ENDINGS) and path.is_file()


def _standard_input() -> Any:
    # Unbuffered, so that reading from a pipe returns what is available without waiting.
    return getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)


class _Stored(io.RawIOBase):
    """The stored file; counts and hashes the bytes that are read."""

    def __init__(self, file: Any, *, digest: bool) -> None:
        self._file = file
        self.size: int = 0
        self.digest = hashlib.sha256(usedforsecurity=False) if digest else None
        # A pipe may return its first bytes one at a time.
        self.head: bytes = b""
        while len(self.head) < 4 and (more := file.read(4 - len(self.head))):
            self.head += more
        self._replay = self.head

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        if self._replay:
            count = min(len(view), len(self._replay))
            view[:count] = self._replay[:count]
            self._replay = self._replay[count:]
        else:
            count = int(self._file.readinto(view) or 0)
        self.size += count
        if self.digest:
            self.digest.update(view[:count])
        return count

    def drain(self) -> None:
        """Read the rest of the file, to count and hash it."""
        buffer = bytearray(_BUFFER)
        while self.readinto(buffer):
            pass


class _Chunks(io.RawIOBase):
    """A file object over an iterator of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def _with_data_errors(path: Path, kind: Kind, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Convert everything that decompressors raise for bad data to `DatasetError`."""
    try:
        yield from chunks
    except DatasetError:
        raise
    except ImportError as error:
        fix = f"pip install 'training-backends[{kind}]'"
        _fail(path, _issue(path, "missing_extra", f"reading this file requires {error.name}", fix))
    except Exception as error:
        # System errors have an errno, errors of the decompressors have none.
        if isinstance(error, OSError) and error.errno is not None:
            _fail(path, unreadable(path, error))
        message = f"the {kind} data is corrupt: {_first_line(error)}"
        if isinstance(error, EOFError):
            message = f"the {kind} data is truncated"
        _fail(path, _issue(path, "damaged_file", message, "download or compress the file again"))


def _checked(path: Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Reject JSON that is not JSON Lines once, instead of with an error on every line."""
    head_bytes = b""
    for chunk in chunks:
        head_bytes += chunk
        is_sure, problem = _layout_problem(
            path, head_bytes, at_end=len(head_bytes) >= _LAYOUT_BYTES
        )
        if is_sure:
            break
    else:
        _, problem = _layout_problem(path, head_bytes, at_end=True)
    if problem:
        _fail(path, problem)
    if head_bytes:
        yield head_bytes
    yield from chunks


def _layout_problem(path: Path, head_bytes: bytes, *, at_end: bool) -> tuple[bool, Issue | None]:
    """Return whether the layout could be determined, and its problem if any.

    Args:
        head_bytes: The first bytes of the file.
        at_end: `head_bytes` is all there is to examine.
    """
    text = head_bytes.removeprefix(BOM).lstrip()
    line, end, rest = text.partition(b"\n")
    line = line.rstrip()
    if path.suffix.lower() in {".csv", ".tsv"} and text and text[:1] not in b"[{":
        return True, _issue(path, "not_json_lines", "the file is CSV, not JSON Lines", _CONVERT)
    if not text or (not end and not at_end):
        return at_end, None
    if line == b"[" and not rest.strip():
        return at_end, None
    if _ARRAY.match(text):
        if _is_json(line) and rest.strip():
            return True, None  # each row is an array
        fix = "write one object per line: jq -c '.[]' FILE > rows.jsonl"
        problem = _issue(path, "not_json_lines", "the file is a JSON array, not JSON Lines", fix)
        return bool(rest.strip()) or at_end or not _is_json(line), problem
    if not line.startswith(b"{") or line.endswith((b"}", b"},")):
        return True, None
    if line == b"{" or _is_document(text):
        fix = "write one object per line: jq -c . FILE > rows.jsonl"
        message = "the file is pretty-printed JSON, not JSON Lines"
        return True, _issue(path, "not_json_lines", message, fix)
    return at_end, None


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _is_document(text: bytes) -> bool:
    """Return whether a text starts with a JSON value that spans several lines."""
    try:
        _, end = json.JSONDecoder().raw_decode(text.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return False
    return b"\n" in text[:end]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _read_all(file: Any) -> Iterator[bytes]:
    while chunk := file.read(_BUFFER):
        yield chunk


def _plain(stored: _Stored, _: Path) -> Iterator[bytes]:
    return _read_all(stored)


def _gzip(stored: _Stored, _: Path) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=io.BufferedReader(stored, _BUFFER)) as file:
        yield from _read_all(file)


def _zstd(stored: _Stored, _: Path) -> Iterator[bytes]:
    if sys.version_info >= (3, 14):
        from compression import zstd  # noqa: PLC0415
    else:
        from backports import zstd  # noqa: PLC0415
    limit = {int(zstd.DecompressionParameter.window_log_max): _WINDOW_LOG}
    with zstd.ZstdFile(io.BufferedReader(stored, _BUFFER), options=limit) as file:
        yield from _read_all(file)


def _parquet(stored: _Stored, path: Path) -> Iterator[bytes]:
    if path == STDIN:
        message = "Parquet cannot be read from standard input"
        _fail(path, _issue(path, "not_a_file", message, "save it to a file first"))
    from pyarrow import parquet  # noqa: PLC0415

    encode = msgspec.json.Encoder().encode
    # `pre_buffer` would load a complete row group into memory.
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
        for batch in file.iter_batches(batch_size=_batch_size(file), use_threads=False):
            yield b"".join(encode(_without_nulls(row)) + b"\n" for row in batch.to_pylist())
    stored.drain()


def _batch_size(file: Any) -> int:
    """Return how many rows take about `_BATCH_BYTES`."""
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    size = max(1, sum(int(group.total_byte_size) for group in groups))
    rows = sum(int(group.num_rows) for group in groups)
    return max(1, min(4096, _BATCH_BYTES * rows // size))


def _without_nulls(value: Any) -> Any:
    """Remove null fields: in Parquet every row has the fields of all rows."""
    if isinstance(value, dict):
        return {k: _without_nulls(each) for k, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


_DECODERS: Final[dict[Kind, Callable[[_Stored, Path], Iterator[bytes]]]] = {
    "plain": _plain,
    "gzip": _gzip,
    "zstd": _zstd,
    "parquet": _parquet,
}


def _fail(path: Path, issue: Issue) -> NoReturn:
    raise DatasetError(f"Could not read {path}.", issues=[issue]) from None


def _issue(path: Path, code: str, message: str, fix: str) -> Issue:
    return Issue(code=code, message=message, path=str(path), fix=fix)


def unreadable(path: Path, error: OSError) -> Issue:
    """Return the issue for a file that cannot be read."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        fix = "check the path; a configuration's paths are relative to its file"
        return _issue(path, "missing_file", "no such file", fix)
    if isinstance(error, PermissionError):
        fix = "make the file readable for the current user"
        return _issue(path, "unreadable_file", "permission denied", fix)
    message = f"could not read the file: {error.strerror or _first_line(error)}"
    return _issue(path, "unreadable_file", message, "check the disk")
