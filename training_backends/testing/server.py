"""A plain HTTP/1.1 server on loopback, in threads, with scripted faults."""

import re
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from tempfile import SpooledTemporaryFile
from threading import Event, Lock, Thread
from typing import IO, Any, ClassVar, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from training_backends.http.limits import forget_limits
from training_backends.testing.faults import (
    CutAnswer,
    DropRequest,
    Fault,
    HangAnswer,
    LoseAnswer,
    OtherAnswer,
    SlowAnswer,
)

__all__ = ["FormPart", "LoopbackServer", "Received", "StubReply"]

_IN_MEMORY = 1_000_000
_FORM_NAME = re.compile(r'[; ]name="([^"]*)"')
_FORM_FILENAME = re.compile(r'[; ]filename="([^"]*)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class FormPart:
    """A part of a multipart body.

    Attributes:
        filename: None for a plain field.
    """

    name: str
    filename: str | None
    content: bytes


@dataclass(slots=True, kw_only=True)
class Received:
    """A received request.

    Attributes:
        target: Path and query as sent.
        path: The decoded path.
        headers: Names in lower case.
        content: The body; on disk if large.
    """

    method: str
    target: str
    path: str
    query: list[tuple[str, str]]
    headers: dict[str, str]
    content: IO[bytes]

    @property
    def body(self) -> bytes:
        """The complete body."""
        self.content.seek(0)
        return self.content.read()

    def form(self) -> list[FormPart]:
        """Return the parts of a multipart body, in order; none if it is not one."""
        head = Message()
        head["content-type"] = self.headers.get("content-type", "")
        boundary = head.get_boundary()
        if boundary is None:
            return []
        parts = (b"\r\n" + self.body).split(b"\r\n--" + boundary.encode())[1:-1]
        return [_form_part(part) for part in parts]


def _form_part(part: bytes) -> FormPart:
    head, _, content = part.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    line = next((line for line in lines if "form-data" in line), "")
    name, filename = _FORM_NAME.search(line), _FORM_FILENAME.search(line)
    return FormPart(
        name=_unquoted(name[1]) if name else "",
        filename=_unquoted(filename[1]) if filename else None,
        content=content,
    )


def _unquoted(text: str) -> str:
    """Decode the three characters that clients encode in a form's names, and only these."""
    return text.replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class StubReply:
    """The response to send."""

    status: int = 200
    content: bytes = b""
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Planned:
    fault: Fault
    method: str | None
    path: str | None
    times: int
    skip: int


class LoopbackServer:
    """Serves `answer` at `base_url` while entered; synchronous, so usable from any test.

    Attributes:
        requests: All requests, in order.
        connections: Number of connections opened.
        largest_burst: Maximum number of concurrent requests.
    """

    def __init__(self, answer: Callable[[Received], StubReply]) -> None:
        self._answer = answer
        self._planned: list[_Planned] = []
        self._lock = Lock()
        self._working = 0
        self._server: ThreadingHTTPServer | None = None
        self._thread: Thread | None = None
        self._open: set[socket.socket] = set()
        self._healed = Event()
        self.requests: list[Received] = []
        self.connections: int = 0
        self.largest_burst: int = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self, port: int = 0) -> None:
        """Start serving; port 0 picks a free port."""
        # It may be the port of an earlier server, whose limits do not hold here.
        forget_limits()
        handler = type("_Bound", (_RequestHandler,), {"owner": self})
        self._server = _StubServer(("127.0.0.1", port), handler)
        self._thread = Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop and close every connection; can be started again."""
        if self._server is None or self._thread is None:
            return
        self.heal()
        self._server.shutdown()
        self._thread.join()
        with self._lock:
            opened, self._open = self._open, set()
        for connection in opened:
            _cut(connection)
        self._server.server_close()
        self._server = None

    @property
    def port(self) -> int:
        """The port it listens on.

        Raises:
            RuntimeError: The server is not started.
        """
        if self._server is None:
            raise RuntimeError("the server is not started")
        return int(self._server.server_address[1])

    @property
    def base_url(self) -> str:
        """The root URL, without a trailing slash."""
        return f"http://127.0.0.1:{self.port}"

    def fail(
        self,
        fault: Fault,
        *,
        method: str | None = None,
        path: str | None = None,
        times: int = 1,
        skip: int = 0,
    ) -> None:
        """Inject a fault into the next matching requests.

        Args:
            method: None matches any.
            path: End of the path; None matches any.
            times: Number of requests to affect.
            skip: Number of matching requests to let through first.
        """
        with self._lock:
            self._planned.append(_Planned(fault, method, path, times, skip))

    def heal(self) -> None:
        """Remove all planned faults, and close the connections that hang."""
        with self._lock:
            self._planned.clear()
            healed, self._healed = self._healed, Event()
        healed.set()

    def hang(self) -> None:
        """Block until the next `heal`."""
        with self._lock:
            healed = self._healed
        healed.wait()

    @property
    def open_connections(self) -> int:
        """Number of connections that are open now."""
        with self._lock:
            return len(self._open)

    def asked(self, method: str, path: str = "") -> list[Received]:
        """Return the requests with this method whose path ends with `path`."""
        return [r for r in self.requests if r.method == method and r.path.endswith(path)]

    def opened(self, connection: socket.socket) -> None:
        """Track an opened connection."""
        with self._lock:
            self.connections += 1
            self._open.add(connection)

    def closed(self, connection: socket.socket) -> None:
        """Stop tracking a connection."""
        with self._lock:
            self._open.discard(connection)

    @contextmanager
    def received(self, request: Received) -> Iterator[Fault | None]:
        """Record a request while it is processed; yield the fault planned for it."""
        with self._lock:
            self.requests.append(request)
            self._working += 1
            self.largest_burst = max(self.largest_burst, self._working)
            fault = self._next_fault(request)
        try:
            yield fault
        finally:
            with self._lock:
                self._working -= 1

    def _next_fault(self, request: Received) -> Fault | None:
        for plan in self._planned:
            fits = plan.method in {None, request.method} and request.path.endswith(plan.path or "")
            if fits and plan.skip:
                plan.skip -= 1
            elif fits and plan.times:
                plan.times -= 1
                return plan.fault
        return None

    def answer(self, request: Received) -> StubReply:
        """Process a request; an exception in the script is returned as the response."""
        try:
            return self._answer(request)
        except Exception:  # make any exception visible to the test
            return StubReply(
                status=500, content=traceback.format_exc().encode(), content_type="text/plain"
            )


class _StubServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore: clients that disconnect are part of the tests."""


class _RequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: ClassVar[LoopbackServer]
    # Send headers and body in one packet instead of 40 ms apart.
    wbufsize = -1
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.owner.opened(self.connection)

    def finish(self) -> None:
        self.owner.closed(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base's name
        """Log nothing."""

    def _serve(self) -> None:
        request = self._read()
        with self.owner.received(request) as fault:
            reply = self.owner.answer(request) if fault is None or fault.done else StubReply()
            if fault is None:
                self._send(reply)
            else:
                self._break(fault, reply)

    do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _serve  # noqa: N815  # the base's names

    def _read(self) -> Received:
        parts = urlsplit(self.path)
        content: IO[bytes] = SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115  # kept open
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            while size := int(self.rfile.readline().partition(b";")[0] or b"0", 16):
                self._copy(size, content)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass  # trailers
        else:
            self._copy(int(self.headers.get("content-length") or 0), content)
        return Received(
            method=self.command,
            target=self.path,
            path=unquote(parts.path),
            query=parse_qsl(parts.query, keep_blank_values=True),
            headers={name.lower(): value for name, value in self.headers.items()},
            content=content,
        )

    def _copy(self, left: int, content: IO[bytes]) -> None:
        while left > 0:
            chunk = self.rfile.read(min(left, 65_536))
            if not chunk:
                raise ConnectionResetError("the client disconnected")
            content.write(chunk)
            left -= len(chunk)

    def _break(self, fault: Fault, reply: StubReply) -> None:
        if isinstance(fault, LoseAnswer | DropRequest | HangAnswer):
            if isinstance(fault, HangAnswer):
                self.owner.hang()
            self._hang_up()
        elif isinstance(fault, OtherAnswer):
            self._send(
                StubReply(
                    status=fault.status,
                    content=fault.content(),
                    content_type=fault.content_type,
                    headers=dict(fault.headers),
                )
            )
        elif isinstance(fault, CutAnswer):
            self._head(reply)
            self.wfile.write(reply.content[: fault.after])
            self._hang_up()
        elif isinstance(fault, SlowAnswer):
            self._head(reply)
            for byte in reply.content:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(fault.pause)

    def _send(self, reply: StubReply) -> None:
        self._head(reply)
        self.wfile.write(reply.content)

    def _head(self, reply: StubReply) -> None:
        self.send_response(reply.status, HTTPStatus(reply.status).phrase)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(reply.content)))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        _cut(self.connection)


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # already closed
