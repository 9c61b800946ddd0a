"""What a client may send at the level of HTTP: how large a head, and how slowly.

uvicorn bounds neither: it waits for ever for the rest of a head, and for a body that nobody
reads any more. Its application sees a request when the head is whole, so it cannot help.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from training_backends.core.logging import get_logger

if TYPE_CHECKING:
    from asyncio import TimerHandle, Transport

    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

__all__ = ["Bounds", "bounded_protocol"]

log = get_logger()

_LINGER = 5.0
"""Seconds for which a refused client may go on sending, so that it reads why."""

_Stage = Literal["between", "head", "body"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What one connection may ask of the server.

    Attributes:
        headers: Most headers of a request.
        header_bytes: Largest head, and largest part of a message that is no body.
        header_timeout: Seconds in which a head must be here.
        body_timeout: Seconds for which the rest of a body is taken in that nobody waits for,
            so that the client gets to read why.
        answer_timeout: Seconds for which a client may leave an answer unread.
    """

    headers: int
    header_bytes: int
    header_timeout: float
    body_timeout: float
    answer_timeout: float


def bounded_protocol(bounds: Bounds) -> type[HttpToolsProtocol]:
    """Return the protocol class that keeps these bounds, as uvicorn takes it."""

    class Protocol(_BoundedProtocol):
        _bounds = bounds

    return Protocol


class _TooLarge(Exception):
    """Ends the parser; what it raises instead ends in `send_400_response`."""


class _Timer:
    """Calls once, some time after it was set; setting it again while it runs changes nothing."""

    def __init__(self, later: Callable[..., "TimerHandle"], call: Callable[[], None]) -> None:
        self._later = later
        self._call = call
        self._handle: TimerHandle | None = None

    def set(self, seconds: float) -> None:
        if self._handle is None:
            self._handle = self._later(seconds, self._fire)

    def clear(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _fire(self) -> None:
        self._handle = None
        self._call()


class _BoundedProtocol(HttpToolsProtocol):
    """One connection, with timers for what the application cannot time.

    - until a head is whole, from the connection or from the first byte after a request;
    - the rest of a body whose request was answered already;
    - an answer that the client does not take.

    Between requests uvicorn's own keep-alive applies, and while a body is read the
    application has its deadlines.
    """

    _bounds: ClassVar[Bounds]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stage: _Stage = "between"
        self._headers = 0
        self._head_bytes = 0
        self._beside_body = 0
        self._too_large = False
        self._refused = False
        self._head_timer = _Timer(self.loop.call_later, self._head_is_late)
        self._rest_timer = _Timer(self.loop.call_later, self._close)
        self._answer_timer = _Timer(self.loop.call_later, self._abort)

    def connection_made(self, transport: "Transport") -> None:  # type: ignore[override]  # so is its base
        super().connection_made(transport)
        # Every byte that the client has not taken counts, not only those above a mark.
        transport.set_write_buffer_limits(high=1, low=0)
        self._head_timer.set(self._bounds.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._rest_timer, self._answer_timer):
            timer.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._beside_body += len(data)
        super().data_received(data)
        # What is neither a whole head nor a body: a header, a trailer or a chunk's
        # extension without end.
        if self._beside_body > self._bounds.header_bytes and not self._refused:
            self._refuse_size()
        self._watch()

    def _watch(self) -> None:
        """Set the timer of what is waited for."""
        if self._refused:
            self._head_timer.clear()
            return
        answered = self._answered()
        if self._stage == "head" or (self._stage == "between" and answered):
            self._head_timer.set(self._bounds.header_timeout)
        else:
            self._head_timer.clear()
        if self._stage == "body" and answered:
            self._rest_timer.set(self._bounds.body_timeout)
        else:
            self._rest_timer.clear()

    def _answered(self) -> bool:
        """Whether no answer is under way; before the first request there is no cycle."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        return cycle is None or cycle.response_complete

    # Called by the parser, in this order.

    def on_message_begin(self) -> None:
        self._stage = "head"
        self._headers = self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers come here too, after the body, and count with the headers.
        self._headers += 1
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stage = "body"
        self._beside_body = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._beside_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._stage = "between"
        self._beside_body = 0
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._bounds.header_bytes or self._headers > self._bounds.headers:
            self._too_large = True
            raise _TooLarge

    # Refusals, in the form of all others.

    def send_400_response(self, msg: str) -> None:
        if self._too_large:
            self._refuse_size()
        else:
            self._refuse(400, msg)

    def _refuse_size(self) -> None:
        self._refuse(
            431,
            f"The request's head is too large; at most {self._bounds.headers} headers and "
            f"{self._bounds.header_bytes} bytes are accepted.",
        )

    def _head_is_late(self) -> None:
        if self.flow.read_paused:
            # It is us who do not read on: earlier requests come first.
            self._head_timer.set(self._bounds.header_timeout)
        elif self._stage == "head":
            seconds = self._bounds.header_timeout
            self._refuse(408, f"The request's head was not here within {seconds:g} s.")
        else:
            self._close()

    def _refuse(self, status: int, sentence: str) -> None:
        if not self._answered():
            # Within another answer nothing can be said.
            self._close()
            return
        log.info("request refused", status=status, reason=sentence)
        body = json.dumps({"detail": sentence}).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        # To close at once would take the answer from a client that is still sending.
        self._refused = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._rest_timer.set(_LINGER)

    def _close(self) -> None:
        self.transport.close()

    # Called by the transport.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answer_timer.set(self._bounds.answer_timeout)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._answer_timer.clear()

    def _abort(self) -> None:
        log.info("client left an answer unread")
        self.transport.abort()
