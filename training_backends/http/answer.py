"""Responses: reading their bodies within limits, as bytes, JSON, lines or Server-Sent Events."""

import json
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar, overload

import httpx
from pydantic import BaseModel, ValidationError

from training_backends.core.errors import ProtocolError, validation_issues
from training_backends.core.redaction import redact

__all__ = [
    "LARGEST_BODY",
    "Answer",
    "Model",
    "ServerEvent",
    "Shape",
    "decoded",
    "is_too_deep",
    "lines_of",
    "read_capped",
    "request_line",
    "server_events",
]

Shape = Literal["object", "array", "any"]
"""What a JSON response must be."""

Model = TypeVar("Model", bound=BaseModel)

LARGEST_BODY: Final = 64 * 2**20
"""Maximum bytes of a response that is read into memory."""
_LARGEST_EXCERPT: Final = 64 * 2**10
_DEEPEST_JSON: Final = 64
"""Maximum nesting of a response; far more would raise RecursionError, now or when serialized."""
_PIECE: Final = 2**18
"""Bytes to decompress at a time."""
_LONGEST_LINE: Final = 2**20
_LONGEST_EVENT: Final = 2**22


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A response of a server.

    Attributes:
        headers: With lower-case names.
        request: Method and URL without its query, for messages.
    """

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    request: str
    backend: str | None = None

    @overload
    def json(self, shape: Literal["object"] = "object") -> dict[str, Any]: ...

    @overload
    def json(self, shape: Literal["array"]) -> list[Any]: ...

    @overload
    def json(self, shape: type[Model]) -> Model: ...

    @overload
    def json(self, shape: Shape) -> Any: ...

    def json(self, shape: Shape | type[BaseModel] = "object") -> Any:
        """Parse the body.

        Args:
            shape: `object`, `array`, or `any`: also a single value, and None for an empty body. A
                model parses an object.

        Raises:
            ProtocolError: The body is not such a document.
        """
        if isinstance(shape, type):
            return self.parse(shape, self.json())
        if shape == "any" and not self.body.strip():
            return None
        try:
            document = json.loads(self.body)
            fits = _fits(document, shape) and not _is_deep(document)
        except (ValueError, RecursionError):
            fits = False
        if fits:
            return document
        what = "JSON" if shape == "any" else f"a JSON {shape}"
        found = self.headers.get("content-type", "no content type")
        raise ProtocolError(
            f"{self.request}: the response is not {what} of at most {_DEEPEST_JSON} levels "
            f"({self.status}, {found[:200]}).",
            # Redact before truncating, or part of a secret could remain at the end.
            excerpt=redact(self.body[:_LARGEST_EXCERPT].decode("utf-8", "replace"))[:2000],
            hint="Check that the base URL is that of an API, not of a web page or proxy.",
            backend=self.backend,
        )

    def parse(self, model: type[Model], document: Any) -> Model:
        """Parse a part of the body.

        Raises:
            ProtocolError: It lacks a required field, or a value is of the wrong type.
        """
        try:
            return model.model_validate(document)
        except ValidationError as error:
            places = "; ".join(str(issue) for issue in validation_issues(error))
            raise ProtocolError(
                f"{self.request}: invalid {model.__name__} in the response: {places[:400]}.",
                backend=self.backend,
            ) from None


def _fits(document: Any, shape: Shape) -> bool:
    wanted = {"object": dict, "array": list, "any": object}[shape]
    return isinstance(document, wanted)


def request_line(request: httpx.Request) -> str:
    """Return method and URL without its query, which may contain secrets."""
    return f"{request.method} {request.url.copy_with(query=None)}"


async def read_capped(response: httpx.Response, most: int) -> bytes:
    """Read a body, at most `most` + 1 bytes."""
    body = bytearray()
    async with aclosing(decoded(response)) as pieces:
        async for piece in pieces:
            body += piece
            if len(body) > most:
                break
    return bytes(body[: most + 1])


async def decoded(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Yield a body in small pieces, decompressed at most once.

    httpx decodes every layer of encoding, each piece at once: a few kilobytes, compressed twice,
    could expand to gigabytes.

    Raises:
        ProtocolError: The encoding is not gzip, or the data is corrupt.
    """
    call = request_line(response.request)
    coding = response.headers.get("content-encoding", "").strip().lower()
    if coding in {"", "identity"}:
        async for piece in response.aiter_raw():
            yield piece
        return
    if coding not in {"gzip", "x-gzip"}:
        raise ProtocolError(
            f"{call}: unsupported content encoding in the response ({coding[:100]})."
        )
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        async for piece in response.aiter_raw():
            rest, unpacked = piece, b""
            while rest or len(unpacked) == _PIECE:
                unpacked = unpacker.decompress(rest, _PIECE)
                rest = unpacker.unconsumed_tail
                yield unpacked
    except zlib.error:
        raise ProtocolError(f"{call}: the compressed response is corrupt.") from None
    if not unpacker.eof and response.num_bytes_downloaded:
        raise ProtocolError(f"{call}: the compressed response is truncated.")


def is_too_deep(body: bytes) -> bool:
    """Return whether a body is JSON that is nested too deeply to be processed."""
    try:
        return _is_deep(json.loads(body))
    except RecursionError:
        return True
    except ValueError:
        return False


def _is_deep(document: Any) -> bool:
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(_DEEPEST_JSON):
        inner = (node.values() if isinstance(node, dict) else node for node in level)
        level = [each for nodes in inner for each in nodes if isinstance(each, dict | list)]
        if not level:
            return False
    return True


# -- streams ---------------------------------------------------------------------------


async def lines_of(pieces: AsyncIterator[bytes]) -> AsyncGenerator[str, None]:
    r"""Yield the lines of a stream as they arrive, without `\n` or `\r\n`.

    Raises:
        ProtocolError: A line is longer than 1 MiB.
    """
    rest = bytearray()
    async for piece in pieces:
        *complete, last = piece.split(b"\n")
        for end in complete:
            yield _line(rest + end)
            rest.clear()
        rest += last
        if len(rest) > _LONGEST_LINE:
            raise ProtocolError(f"A line of the stream is longer than {_LONGEST_LINE} bytes.")
    if rest:
        yield _line(rest)


def _line(line: bytes | bytearray) -> str:
    return line.removesuffix(b"\r").decode("utf-8", "replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerEvent:
    """A Server-Sent Event.

    Attributes:
        event: Its type.
        data: Its data lines, joined by line breaks.
        id: The last id of the stream so far; send it as `last_id` to continue after this event.
        retry: Seconds to wait before reconnecting, if the server has set it.
    """

    data: str
    event: str = "message"
    id: str | None = None
    retry: float | None = None


async def server_events(lines: AsyncIterator[str]) -> AsyncGenerator[ServerEvent, None]:
    """Yield the events of a `text/event-stream` (WHATWG HTML, section 9.2).

    Comments are dropped, and so is an event at the end of the stream that is incomplete.

    Raises:
        ProtocolError: An event is larger than 4 MiB.
    """
    data: list[str] = []
    kind, last_id, retry, size = "message", None, None, 0
    async for line in lines:
        # A single CR also ends a line; within data it has been escaped by the server.
        for field_line in line.removeprefix("\ufeff").split("\r"):
            if not field_line:
                if data:
                    yield ServerEvent(data="\n".join(data), event=kind, id=last_id, retry=retry)
                data, kind, size = [], "message", 0
                continue
            name, _, value = field_line.partition(":")
            value = value.removeprefix(" ")
            size += len(value)
            if size > _LONGEST_EVENT:
                raise ProtocolError(f"An event of the stream is larger than {_LONGEST_EVENT}.")
            if name == "data":
                data.append(value)
            elif name == "event":
                kind = value or "message"
            elif name == "id" and "\0" not in value:
                last_id = value
            elif name == "retry" and value.isascii() and value.isdigit():
                retry = int(value[:9]) / 1000
