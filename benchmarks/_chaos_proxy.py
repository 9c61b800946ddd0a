"""A proxy on loopback that knows where requests begin and end, and breaks what it is told to.

It also keeps the books: what reached the server, and what the server said to it. A server that
forgives a repeated request (the same file again, a job that is there already) hides what the
client did; the books do not.
"""

import hashlib
import json
import random
import socket
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import anyio
from anyio.abc import ByteStream, SocketAttribute, SocketStream
from anyio.streams.buffered import BufferedByteStream

__all__ = ["Fault", "Injection", "Proxy", "Seen", "in_row"]

When = Literal["before", "during", "after"]
"""The request is not forwarded; half of it is; it is, and its answer is here."""
Effect = Literal[
    "kill",  # SIGKILL for the client
    "stop server",  # SIGKILL for the server
    "reset",  # the connection is reset
    "silence",  # no answer until the client gives up
    "reply",  # another answer
    "halve",  # half of the answer's body, as if it were whole
    "cut",  # half of the answer's body, then a reset
    "drip",  # the answer in many small pieces
    "twice",  # the request is forwarded a second time, and the second answer passed on
    "late",  # no answer; forwarded some seconds after the client has given up
]

_BLOCK: Final = 16 * 1024
_PIECES: Final = 40
_PIECE_PAUSE: Final = 0.03
_LATE: Final = (0.0, 3.0)
"""Seconds; within them a client that has given up looks for what it did and tries again."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to break one request."""

    when: When
    effect: Effect
    reply: bytes = b""


@dataclass(frozen=True, slots=True)
class Injection:
    """Break requests.

    Attributes:
        skip: How many are let through before, counted from the injection before this one.
        only: Name of the requests that are meant and counted; None: all.
    """

    fault: Fault
    skip: int = 0
    only: str | None = None


def in_row(fault: Fault, skip: int, times: int) -> tuple[Injection, ...]:
    """Break several requests, one after the other."""
    return (Injection(fault, skip), *(Injection(fault) for _ in range(times - 1)))


@dataclass(slots=True)
class Seen:
    """A request.

    Attributes:
        fault: What was done to it.
        status: What the server answered, if it was asked; whether or not the client was told.
        content: SHA-256 of the file that was uploaded with it.
    """

    method: str
    target: str
    fault: Fault | None = None
    status: int | None = None
    content: str | None = None

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    @property
    def name(self) -> str:
        """What is asked, whichever job or file it is about."""
        words = self.path.removeprefix("/v1/").split("/")
        return f"{self.method} {'/'.join('ID' if len(word) == 36 else word for word in words)}"

    @property
    def is_upload(self) -> bool:
        """Whether a file comes with it."""
        return self.name == "POST files"

    def __str__(self) -> str:
        """Show it on one line."""
        broken = f"  <- {self.fault.effect} {self.fault.when}" if self.fault else ""
        return f"{self.method} {self.target} -> {self.status or 'not answered'}{broken}"


@dataclass(slots=True)
class _Request:
    head: bytes
    length: int
    seen: Seen
    body: bytearray = field(default_factory=bytearray)


class _Closed(Exception):
    """The connection is to be closed, or is."""


_GONE: Final = (
    _Closed,
    OSError,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    anyio.EndOfStream,
    anyio.IncompleteRead,
)


class Proxy:
    """Forwards to a server; broken by `plan`.

    Attributes:
        plan: What is still to be broken.
        seen: Every request so far.
        injected: How many faults there were.
        kill_client: Ends the client at once; set while there is one.
        stop_server: Ends the server at once.
        lag: Seconds for which lists leave out what was just made.
    """

    def __init__(
        self, server: Callable[[], int], *, stop_server: Callable[[], None], seed: str
    ) -> None:
        """Forward to whatever port of loopback `server` returns."""
        self._server = server
        self._delay = random.Random(seed)
        self.plan: deque[Injection] = deque()
        self.seen: list[Seen] = []
        self.injected = 0
        self.lag = 0.0
        self._made_at: dict[str, float] = {}
        self._held = 0
        self._released = anyio.Event()
        self.kill_client: Callable[[], None] = lambda: None
        self.stop_server = stop_server
        self.url = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Listen for as long as the block lasts."""
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        raw = listener.extra(SocketAttribute.raw_socket)
        # A small buffer, so that half an upload is half an upload to its sender, too.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        self.url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, self._connected)
            yield
            tasks.cancel_scope.cancel()
        await listener.aclose()

    async def nothing_held(self) -> None:
        """Return once no request is kept back any more."""
        while self._held:
            await self._released.wait()

    async def _connected(self, client: SocketStream) -> None:
        buffered = BufferedByteStream(client)
        try:
            async with client:
                while True:
                    await self._exchange(client, buffered)
        except _GONE:
            pass  # one of both hung up; that is what this is for

    async def _exchange(self, client: SocketStream, buffered: BufferedByteStream) -> None:
        request = await _read_request(buffered)
        fault = self._next_fault(request.seen)
        request.seen.fault = fault
        self.seen.append(request.seen)
        if fault is not None and fault.when != "after":
            await self._read_body(buffered, request, share=0.5 if fault.when == "during" else 1.0)
            if fault.when == "during":
                await self._half_forwarded(request)
            await self._break(client, request, fault, b"")
            return
        answer = await self._forwarded(client, buffered, request)
        if fault is None:
            await client.send(answer)
        else:
            await self._break(client, request, fault, answer)

    def _next_fault(self, request: Seen) -> Fault | None:
        if not self.plan:
            return None
        first = self.plan[0]
        if first.only not in {None, request.name}:
            return None
        if first.skip:
            self.plan[0] = replace(first, skip=first.skip - 1)
            return None
        self.plan.popleft()
        self.injected += 1
        return first.fault

    async def _read_body(
        self, client: BufferedByteStream, request: _Request, *, share: float = 1.0
    ) -> None:
        wanted = int(request.length * share)
        while len(request.body) < wanted:
            request.body += await client.receive(min(_BLOCK, wanted - len(request.body)))

    async def _half_forwarded(self, request: _Request) -> None:
        """Send the server what is there of a request, and hang up."""
        async with await self._connect() as server:
            await server.send(request.head + request.body)

    async def _forwarded(
        self, client: SocketStream, buffered: BufferedByteStream, request: _Request
    ) -> bytes:
        """Return the server's whole answer; a server that is away resets the connection."""
        await self._read_body(buffered, request)
        try:
            return await self._ask(request)
        except _GONE:
            await _reset(client)
            raise _Closed from None

    async def _ask(self, request: _Request) -> bytes:
        """Return the server's whole answer and note it down."""
        async with await self._connect() as server:
            await server.send(request.head + request.body)
            buffered = BufferedByteStream(server)
            head = await buffered.receive_until(b"\r\n\r\n", 64 * 1024) + b"\r\n\r\n"
            answer = head + await buffered.receive_exactly(_length(head))
        request.seen.status = int(answer.split(b" ", 2)[1])
        if request.seen.is_upload:
            request.seen.content = _content(bytes(request.body))
        return self._lagging(request.seen, answer) if self.lag else answer

    def _lagging(self, seen: Seen, answer: bytes) -> bytes:
        """Leave out of a list what was made a short while ago."""
        head, _, body = answer.partition(b"\r\n\r\n")
        if seen.status != 200 or not seen.path.endswith(("/files", "/jobs")):
            return answer
        document = json.loads(body)
        if seen.method == "POST":
            self._made_at[document["id"]] = time.monotonic()
            return answer
        since = time.monotonic() - self.lag
        document["data"] = [
            entry for entry in document["data"] if self._made_at.get(entry["id"], since) <= since
        ]
        body = json.dumps(document).encode()
        return _with_length(head, len(body)) + body

    async def _connect(self) -> ByteStream:
        return await anyio.connect_tcp("127.0.0.1", self._server())

    async def _late(self, client: SocketStream, request: _Request) -> None:
        """Forward a request after its sender has given up waiting for the answer."""
        self._held += 1
        try:
            await _until_gone(client)
            await anyio.sleep(self._delay.uniform(*_LATE))
            await self._ask(request)
        finally:
            self._held -= 1
            self._released.set()
            self._released = anyio.Event()

    async def _break(
        self, client: SocketStream, request: _Request, fault: Fault, answer: bytes
    ) -> None:
        """Do to the client what the fault says; the connection does not outlive it."""
        head, _, body = answer.partition(b"\r\n\r\n")
        match fault.effect:
            case "kill":
                self.kill_client()
            case "stop server":
                self.stop_server()
                await _reset(client)
            case "reset":
                await _reset(client)
            case "silence":
                await _until_gone(client)
            case "twice":
                await client.send(await self._ask(request))
                return
            case "late":
                await self._late(client, request)
            case "reply":
                await client.send(fault.reply)
                if fault.when != "during":
                    return  # the connection is as good as before
            case "halve":
                await client.send(_with_length(head, len(body) // 2) + body[: len(body) // 2])
                return
            case "cut":
                await client.send(head + b"\r\n\r\n" + body[: len(body) // 2])
                await _reset(client)
            case "drip":
                await _drip(client, answer)
                return
        raise _Closed


async def _read_request(client: BufferedByteStream) -> _Request:
    try:
        head = await client.receive_until(b"\r\n\r\n", 64 * 1024) + b"\r\n\r\n"
    except anyio.IncompleteRead:
        raise _Closed from None
    method, target, _ = head.split(b" ", 2)
    return _Request(head, _length(head), Seen(method.decode(), target.decode()))


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return int(value)
    return 0


def _with_length(head: bytes, length: int) -> bytes:
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
    return b"\r\n".join([*lines, b"Content-Length: %d" % length, b"", b""])


def _content(form: bytes) -> str | None:
    """Return the digest of the file in a form."""
    boundary = form.partition(b"\r\n")[0]
    for part in form.split(b"\r\n" + boundary):
        head, _, content = part.partition(b"\r\n\r\n")
        if b"filename=" in head:
            return hashlib.sha256(content).hexdigest()
    return None


async def _reset(stream: SocketStream) -> None:
    """Close so that the other side is told of an error, not of an end."""
    linger = struct.pack("ii", 1, 0)
    raw = stream.extra(SocketAttribute.raw_socket)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    await anyio.aclose_forcefully(stream)


async def _until_gone(stream: SocketStream) -> None:
    """Say nothing until the other side hangs up."""
    try:
        while True:
            await stream.receive()
    except _GONE:
        return


async def _drip(stream: SocketStream, answer: bytes) -> None:
    size = max(1, len(answer) // _PIECES)
    for start in range(0, len(answer), size):
        await stream.send(answer[start : start + size])
        await anyio.sleep(_PIECE_PAUSE)
