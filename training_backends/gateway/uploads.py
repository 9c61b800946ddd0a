"""Receive multipart uploads as streams, check them and store them by content."""

import hashlib
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, Self
from urllib.parse import quote, unquote
from uuid import uuid4

import anyio
from anyio import to_thread
from multipart import (
    MultipartError,
    MultipartSegment,
    PushMultipartParser,
    parse_options_header,
)
from pydantic_core import from_json
from starlette.responses import FileResponse, Response

from training_backends.core.config import DataSource
from training_backends.core.data_rules import ProviderFormat
from training_backends.core.errors import DatasetError
from training_backends.core.escape import plural
from training_backends.core.files import hold_lock, make_private_directory, sync_directory
from training_backends.core.logging import get_logger
from training_backends.datasets.convert import convert
from training_backends.datasets.inspect import LineError, check_upload
from training_backends.datasets.open_file import opened
from training_backends.datasets.provider_formats import MISTRAL
from training_backends.datasets.scan_part import BOM
from training_backends.gateway.errors import HTTPProblem, invalid, is_temporary, plain, problem
from training_backends.protocols.openai.errors import not_jsonl

__all__ = [
    "ABANDONED",
    "FORM_OVERHEAD",
    "PART",
    "BlobStore",
    "FileFacts",
    "Incoming",
    "MinimumSpeed",
    "OpenFile",
    "Upload",
    "open_new",
    "read_facts",
    "read_openai_facts",
    "receive",
    "saved_as",
    "too_large",
]

SHOWN_ERRORS = 20
"""Checking stops after this many errors."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """Facts about an accepted file."""

    num_lines: int | None
    sample_type: str


def read_facts(path: Path, purpose: str, *, provider_format: ProviderFormat = MISTRAL) -> FileFacts:
    """Check a training file or count the lines of a batch file; other files are not read.

    Blocking; reads line by line.

    Args:
        provider_format: Format of the rows of a training file.

    Raises:
        HTTPProblem: A training file has invalid lines.
    """
    if purpose == "batch":
        return FileFacts(_count_lines(path), "batch_request")
    if purpose != "fine-tune":
        return FileFacts(None, "instruct")
    found = check_upload(path, provider_format=provider_format, max_errors=SHOWN_ERRORS)
    if found.errors:
        raise _refusal(found.errors)
    # The protocol has no sample type for classifier data and preference pairs.
    sample_type = "pretrain" if found.sample_type == "pretrain" else "instruct"
    return FileFacts(found.num_lines, sample_type)


def read_openai_facts(path: Path, purpose: str) -> FileFacts:
    """Check that a training file has JSON objects; their content is checked with the job.

    Blocking; reads line by line, and no other file.

    Raises:
        HTTPProblem: A line is not a JSON object.
    """
    if purpose != "fine-tune":
        return FileFacts(None, "instruct")
    rows = 0
    try:
        with opened(path) as source:
            for number, line in enumerate(source.lines, start=1):
                if row := line.removeprefix(BOM).strip():
                    rows += 1
                    if not _is_object(row):
                        raise problem(not_jsonl(number))
    except DatasetError as error:
        if is_temporary(error):
            raise
        raise problem(not_jsonl(1)) from error
    return FileFacts(rows, "instruct")


def _is_object(row: bytes) -> bool:
    try:
        return isinstance(from_json(row), dict)
    except ValueError:
        return False


def _refusal(errors: Sequence[LineError]) -> HTTPProblem:
    count = "at least " if len(errors) >= SHOWN_ERRORS else ""
    count += plural(len(errors), "error")
    return HTTPProblem(
        422,
        {
            "detail": "Invalid file format.",
            "description": f"Found {count} in this file. Each line must be a JSON object "
            "with `messages` or `text`, and `labels` for a classifier.",
            "errors": [
                {
                    # The service's error body has no field for a fix.
                    "message": f"{error.message} ({error.fix})" if error.fix else error.message,
                    "line_number": error.line_number,
                }
                for error in errors
            ],
        },
    )


def _count_lines(path: Path) -> int:
    count = 0
    last = b"\n"
    with path.open("rb", buffering=0) as file:
        while block := file.read(2**20):
            count += block.count(b"\n")
            last = block
    return count + (not last.endswith(b"\n"))


log = get_logger()

_PATIENCE: Final = 60.0
"""Seconds; processes of a home exclude each other for one transaction."""
PART: Final = ".part"
"""Ending of the names of files being received."""
OpenFile = Callable[[Path], BinaryIO]
"""Opens a new file for writing; tests replace it to simulate a full disk."""


def open_new(path: Path) -> BinaryIO:
    """Open a new file, unbuffered: callers write large blocks."""
    return path.open("xb", buffering=0)


class Incoming:
    """A file being received; deleted on exit unless it was kept."""

    def __init__(self, path: Path, open_file: OpenFile) -> None:
        self.path = path
        self.size: int = 0
        self._digest = hashlib.sha256()
        self._file = open_file(path)

    def write(self, data: bytes) -> None:
        """Append data to the file.

        Raises:
            OSError: The disk is full or fails.
        """
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._digest.update(data)
        self.size += len(data)

    def finish(self) -> None:
        """Flush to disk and close the file."""
        os.fsync(self._file.fileno())
        self._file.close()

    @property
    def sha256(self) -> str:
        """Hex digest of the data written so far."""
        return self._digest.hexdigest()

    def discard(self) -> None:
        """Close and delete the temporary file, unless it was kept."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()


class BlobStore:
    """Content-addressed files in one directory.

    Attributes:
        is_shared: Whether other gateways may use it too.

    Args:
        is_shared: See the attribute.
    """

    def __init__(
        self, root: Path, *, is_shared: bool = False, open_file: OpenFile = open_new
    ) -> None:
        self.is_shared = is_shared
        self._blobs = root / "files"
        self._incoming = root / "incoming"
        self._converted = root / "converted"
        self._parts = root / "parts"
        self._lock = root / "files.lock"
        self._open_file = open_file

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Exclude other processes of this home from a block; entering it blocks.

        Raises:
            BlockingIOError: Another process does not leave it.
        """
        make_private_directory(self._lock.parent)
        with hold_lock(self._lock, _PATIENCE):
            yield

    def prepare(self) -> None:
        """Create the directories and remove interrupted uploads."""
        for directory in (self._blobs, self._incoming, self._converted, self._parts):
            make_private_directory(directory)
        for path in self._incoming.iterdir():
            if path.suffix == PART:
                # Another gateway may be receiving it.
                if not self.is_shared or _written_before(path, time.time() - ABANDONED):
                    _remove(path)
            else:
                log.warning("unexpected file left in place", path=str(path))

    def check(self) -> None:
        """Check that the files can be reached.

        Raises:
            OSError: The directory cannot be read.
        """
        self.free()

    def collect(self, known: Mapping[str, float | None]) -> None:
        """Remove blobs left behind by a crash.

        A blob that is not in the database is kept: the database may be new, or restored from a
        backup older than the upload.

        Args:
            known: When the last reference to each blob in the database was deleted, by digest,
                in seconds since the epoch; None: still needed.
        """
        unknown = 0
        for path in self._blobs.iterdir():
            if path.name not in known:
                unknown += 1
            elif (deleted_at := known[path.name]) is not None and _written_before(path, deleted_at):
                _remove(path)
        for path in self._converted.iterdir():
            if not self.path(path.name.partition(".")[0]).exists():
                _remove(path)
        if unknown:
            log.warning("kept files unknown to the database", files=unknown, path=str(self._blobs))

    def path(self, sha256: str) -> Path:
        """Return the path of a blob, which may not exist."""
        return self._blobs / sha256

    def local(self, sha256: str) -> Path:
        """Return the path of a blob, fetched first if it is stored elsewhere."""
        return self.path(sha256)

    def receive(self) -> Incoming:
        """Create a new temporary file."""
        return Incoming(self._incoming / f"{uuid4()}{PART}", self._open_file)

    def keep(self, incoming: Incoming) -> None:
        """Move a finished file to its permanent path; identical content is stored once."""
        # Replace even if it exists, so that timing does not reveal whether it did.
        incoming.path.replace(self.path(incoming.sha256))
        sync_directory(self._blobs)

    def keep_part(self, incoming: Incoming, part_id: str) -> None:
        """Move a finished file to the path of a part."""
        incoming.path.replace(self.part(part_id))
        sync_directory(self._parts)

    def part(self, part_id: str) -> Path:
        """Return the path of a part, which may not exist."""
        return self._parts / part_id

    def parts(self, before: float) -> Sequence[str]:
        """Return the ids of the parts that were stored before a time, in seconds."""
        return [path.name for path in self._parts.iterdir() if _written_before(path, before)]

    def read_part(self, part_id: str) -> Iterator[bytes]:
        """Yield the content of a part.

        Raises:
            OSError: There is no such part.
        """
        with self.part(part_id).open("rb", buffering=0) as part:
            while block := part.read(_BLOCK):
                yield block

    def remove_part(self, part_id: str) -> None:
        """Remove a part; safe to repeat."""
        self.part(part_id).unlink(missing_ok=True)

    def remove(self, sha256: str) -> None:
        """Remove a blob; safe to repeat."""
        self.path(sha256).unlink(missing_ok=True)
        for path in self.conversions(sha256):
            Path(path).unlink(missing_ok=True)

    def source(self, sha256: str) -> DataSource:
        """Return where the client finds a blob."""
        return DataSource(path=self.path(sha256))

    def convert(self, source: DataSource, provider_format: ProviderFormat) -> DataSource:
        """Return a blob's rows in a provider's format: a new file, or the blob itself.

        Raises:
            DatasetError: The blob cannot be read.
        """
        blob = source.local_path
        target = self._converted / f"{blob.name}.{provider_format.name}"
        if not target.exists():
            fresh = self._incoming / f"{uuid4()}{PART}"
            if convert([blob], fresh, provider_format=provider_format).path is None:
                return source
            fresh.replace(target)
        return source.model_copy(update={"path": target})

    def conversions(self, sha256: str) -> Sequence[str]:
        """Return the places of what `convert` made of a blob."""
        return [str(path) for path in self._converted.glob(f"{sha256}.*")]

    async def response(
        self, sha256: str, filename: str, headers: Mapping[str, str]
    ) -> Response | None:
        """Return a blob's content; None if there is no such blob.

        Args:
            headers: Those of the request, which may ask for a range.
        """
        del headers  # the response reads them itself
        path = self.path(sha256)
        if not await anyio.Path(path).exists():
            return None
        return FileResponse(path, media_type="application/octet-stream", filename=filename)

    def sign(self, sha256: str, *, seconds: int, filename: str) -> str | None:
        """Return a URL at which a blob can be read without the gateway, if there can be one.

        Args:
            seconds: How long it is valid.
        """
        del sha256, seconds, filename
        return None

    def free(self) -> int:
        """Return the free disk space in bytes."""
        found = os.statvfs(self._blobs)
        return found.f_bavail * found.f_frsize


ABANDONED: Final = 24 * 3600.0
"""Seconds after which a file being received has been given up; no upload may take as long."""


def saved_as(filename: str) -> str:
    """Return the Content-Disposition under whose name browsers save a file."""
    return f"attachment; filename*=utf-8''{quote(filename, safe='')}"


def _written_before(path: Path, moment: float) -> bool:
    try:
        return path.stat().st_mtime < moment
    except OSError:
        return False


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:  # a directory of that name, or a read-only disk
        log.warning("leftover not removed", path=str(path), reason=error.strerror)


FORM_OVERHEAD = 64 * 1024
"""Maximum bytes of a form excluding its file."""
_BLOCK = 2**20
"""Bytes per write to disk."""
_MAX_FIELD = 1024
_MAXPARTS = 16


_EXTENDED = re.compile(r"""\bfilename\*="?(utf-8|iso-8859-1)'[^';]*'([^\s;"]+)""", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class MinimumSpeed:
    """Minimum speed of an upload.

    Attributes:
        silence: Seconds without data after which it is aborted.
        rate: Minimum average rate in bytes per second after the first `silence` seconds; only
            time spent waiting for the client counts.
    """

    silence: float
    rate: float


@dataclass(slots=True)
class Upload:
    """The fields of a form; the file's content is in its `Incoming`.

    Attributes:
        filename: Name given by the client; None without a file.
    """

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    content_type: str | None = None


def too_large(limit: int) -> HTTPProblem:
    """Return a 413 for a file above the limit."""
    return plain(413, f"File too large; the limit is {limit} bytes.")


async def receive(
    chunks: AsyncIterator[bytes],
    content_type: str,
    into: Incoming,
    *,
    limit: int,
    pace: MinimumSpeed,
    name: str = "file",
) -> Upload:
    """Read a form, streaming one of its parts to disk.

    Memory use is one or two blocks for any file size: reading waits for the disk.

    Args:
        limit: Maximum file size in bytes.
        name: Name of the part with the file.

    Raises:
        HTTPProblem: The body is not a form, a part is too large, or the client is too slow.
        OSError: The disk is full or fails.
    """
    kind, options = parse_options_header(content_type)
    if kind != "multipart/form-data" or not options.get("boundary"):
        raise invalid(["body", name], "Send the file as multipart/form-data.", "missing")
    form = _Form(into, limit, name)
    try:
        await form.read(_paced(chunks, pace), options["boundary"])
    except MultipartError as error:
        raise plain(422, f"Invalid multipart form: {error.args[0]}.") from error
    await to_thread.run_sync(into.finish)
    return form.upload


async def _paced(chunks: AsyncIterator[bytes], pace: MinimumSpeed) -> AsyncIterator[bytes]:
    """Pass chunks through and enforce the pace."""
    waited, arrived = 0.0, 0
    while True:
        began = anyio.current_time()
        left = pace.silence + arrived / pace.rate - waited
        try:
            with anyio.fail_after(min(pace.silence, left)):
                chunk = await anext(chunks, None)
        except TimeoutError:
            raise _too_slow(pace, silent=left >= pace.silence) from None
        if chunk is None:
            return
        waited += anyio.current_time() - began
        arrived += len(chunk)
        yield chunk


def _too_slow(pace: MinimumSpeed, *, silent: bool) -> HTTPProblem:
    why = (
        f"No data arrived for {pace.silence:g} s"
        if silent
        else f"The upload is slower than {pace.rate:g} bytes/s"
    )
    # Close: data still in flight belongs to no request.
    return HTTPProblem(408, {"detail": f"{why}; upload the file again."}, {"connection": "close"})


class _Form:
    """Collects a form's fields and writes its file in blocks."""

    def __init__(self, into: Incoming, limit: int, name: str) -> None:
        self.upload = Upload()
        self._into = into
        self._limit = limit
        self._name = name
        self._part: MultipartSegment | None = None
        self._text = b""
        self._pending: list[bytes] = []
        self._pending_size = 0
        self._beside = 0

    async def read(self, chunks: AsyncIterator[bytes], boundary: str) -> None:
        """Read the form to its end."""
        parser = PushMultipartParser(boundary, max_segment_count=_MAXPARTS)
        size = 0
        with parser:
            async for chunk in chunks:
                size += len(chunk)
                if size > self._limit + FORM_OVERHEAD:  # includes data after the form's end
                    raise too_large(self._limit)
                if not chunk or parser.closed:
                    continue
                self._beside += len(chunk)
                for event in parser.parse(chunk):
                    self._take(event)
                if self._beside > FORM_OVERHEAD:
                    raise plain(
                        413, f"The form has more than {FORM_OVERHEAD} bytes besides its file."
                    )
                if self._pending_size >= _BLOCK:
                    await self._flush()
        await self._flush()

    def _take(self, event: MultipartSegment | bytes | None) -> None:
        if isinstance(event, MultipartSegment):
            self._begin(event)
        elif event is None:
            self._end()
        elif self._part is not None and self._part.name == self._name:
            if self._part.bytes_received > self._limit:
                raise too_large(self._limit)
            self._beside -= len(event)
            self._pending.append(event)
            self._pending_size += len(event)
        else:
            self._text += event
            if len(self._text) > _MAX_FIELD:
                raise plain(422, "A form field is too long.")

    def _begin(self, part: MultipartSegment) -> None:
        self._part, self._text = part, b""
        if part.name != self._name:
            return
        if self.upload.filename is not None:
            raise invalid(["body", self._name], "Send one file per request.")
        filename = _extended_filename(part) or part.filename
        if filename is None:
            message = f"Send `{self._name}` as a file part with a file name."
            raise invalid(["body", self._name], message)
        self.upload.filename, self.upload.content_type = filename, part.content_type

    def _end(self) -> None:
        if self._part is not None and self._part.name != self._name:
            self.upload.fields[self._part.name] = self._text.decode("utf-8", "replace")
        self._part = None

    async def _flush(self) -> None:
        if self._pending:
            block, self._pending, self._pending_size = b"".join(self._pending), [], 0
            await to_thread.run_sync(self._into.write, block)


def _extended_filename(part: MultipartSegment) -> str | None:
    """Return the `filename*` parameter (RFC 5987), which some clients send besides an ASCII one."""
    found = _EXTENDED.search(part.header("Content-Disposition", ""))
    return unquote(found[2], found[1], "replace") if found else None
