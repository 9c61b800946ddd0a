"""Receive a multipart upload as it arrives, in any order of its parts."""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import unquote

import anyio
from anyio import to_thread
from multipart import (
    MultipartError,
    MultipartSegment,
    PushMultipartParser,
    parse_options_header,
)

from training_backends.gateway.blobs import Incoming
from training_backends.gateway.errors import Refusal, invalid, plain

__all__ = ["FORM_OVERHEAD", "Pace", "Upload", "receive", "too_large"]

FORM_OVERHEAD = 64 * 1024
"""Bytes that a form may have beside its file."""
_BLOCK = 2**20
"""Bytes written to disk at a time."""
_MAX_FIELD = 1024
_MAX_PARTS = 16


_EXTENDED = re.compile(r"""\bfilename\*="?(utf-8|iso-8859-1)'[^';]*'([^\s;"]+)""", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Pace:
    """How slow an upload may be.

    Attributes:
        silence: Seconds without a byte after which it is given up.
        rate: Bytes a second that it must make on the whole, beyond the first `silence`
            seconds; only the time spent waiting for the client counts.
    """

    silence: float
    rate: float


@dataclass(slots=True)
class Upload:
    """What a form held; the file's bytes are in the `Incoming` it was received into.

    Attributes:
        filename: As the client named it, or None when there was no file.
    """

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    content_type: str | None = None


def too_large(limit: int) -> Refusal:
    """Return the answer to a file that is larger than allowed."""
    return plain(413, f"The file is too large; at most {limit} bytes are accepted.")


async def receive(
    chunks: AsyncIterator[bytes], content_type: str, into: Incoming, *, limit: int, pace: Pace
) -> Upload:
    """Read a whole form; the part named `file` goes to disk while it arrives.

    Memory stays at a block or two whatever the file's size: reading waits for the disk.

    Args:
        limit: Largest file, in bytes.

    Raises:
        Refusal: It is no form, a part is too large, or it comes too slowly.
        OSError: The disk is full, or fails.
    """
    kind, options = parse_options_header(content_type)
    if kind != "multipart/form-data" or not options.get("boundary"):
        raise invalid(["body", "file"], "Send the file as multipart/form-data.", "missing")
    form = _Form(into, limit)
    try:
        await form.read(_paced(chunks, pace), options["boundary"])
    except MultipartError as error:
        raise plain(422, f"The form cannot be read: {error.args[0]}.") from error
    await to_thread.run_sync(into.finish)
    return form.upload


async def _paced(chunks: AsyncIterator[bytes], pace: Pace) -> AsyncIterator[bytes]:
    """Pass on what arrives, for as long as it keeps coming."""
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


def _too_slow(pace: Pace, *, silent: bool) -> Refusal:
    why = (
        f"Nothing arrived for {pace.silence:g} s"
        if silent
        else f"The upload is slower than {pace.rate:g} bytes a second"
    )
    # What is still on its way belongs to nothing.
    return Refusal(408, {"detail": f"{why}; upload the file again."}, {"connection": "close"})


class _Form:
    """Sorts a form's parts: fields are collected, the file is written in blocks."""

    def __init__(self, into: Incoming, limit: int) -> None:
        self.upload = Upload()
        self._into = into
        self._limit = limit
        self._part: MultipartSegment | None = None
        self._text = b""
        self._pending: list[bytes] = []
        self._pending_size = 0
        self._beside = 0

    async def read(self, chunks: AsyncIterator[bytes], boundary: str) -> None:
        """Read the form to its end."""
        parser = PushMultipartParser(boundary, max_segment_count=_MAX_PARTS)
        size = 0
        with parser:
            async for chunk in chunks:
                size += len(chunk)
                if size > self._limit + FORM_OVERHEAD:  # also what comes after the form's end
                    raise too_large(self._limit)
                if not chunk or parser.closed:
                    continue
                self._beside += len(chunk)
                for event in parser.parse(chunk):
                    self._take(event)
                if self._beside > FORM_OVERHEAD:
                    raise plain(
                        413, f"The form has more than {FORM_OVERHEAD} bytes beside its file."
                    )
                if self._pending_size >= _BLOCK:
                    await self._flush()
        await self._flush()

    def _take(self, event: MultipartSegment | bytes | None) -> None:
        if isinstance(event, MultipartSegment):
            self._begin(event)
        elif event is None:
            self._end()
        elif self._part is not None and self._part.name == "file":
            if self._part.bytes_received > self._limit:
                raise too_large(self._limit)
            self._beside -= len(event)
            self._pending.append(event)
            self._pending_size += len(event)
        else:
            self._text += event
            if len(self._text) > _MAX_FIELD:
                raise plain(422, "A field of the form is too long.")

    def _begin(self, part: MultipartSegment) -> None:
        self._part, self._text = part, b""
        if part.name != "file":
            return
        if self.upload.filename is not None:
            raise invalid(["body", "file"], "Send one file at a time.")
        filename = _extended_filename(part) or part.filename
        if filename is None:
            raise invalid(["body", "file"], "Send `file` as a file with a name.")
        self.upload.filename, self.upload.content_type = filename, part.content_type

    def _end(self) -> None:
        if self._part is not None and self._part.name != "file":
            self.upload.fields[self._part.name] = self._text.decode("utf-8", "replace")
        self._part = None

    async def _flush(self) -> None:
        if self._pending:
            block, self._pending, self._pending_size = b"".join(self._pending), [], 0
            await to_thread.run_sync(self._into.write, block)


def _extended_filename(part: MultipartSegment) -> str | None:
    """Return the name in `filename*` (RFC 5987), which some clients send beside an ASCII one."""
    found = _EXTENDED.search(part.header("Content-Disposition", ""))
    return unquote(found[2], found[1], "replace") if found else None
