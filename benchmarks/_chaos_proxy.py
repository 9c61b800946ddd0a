"""A loopback proxy that parses HTTP messages and injects faults.

It also records which requests reached the server and how the server responded. A server that
tolerates repeated requests (the same file again, an existing job) hides what the client did; the
proxy's record does not.
"""

import hashlib
import json
import random
import re
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
"""Before the request is forwarded; after half of it; after the response has arrived."""
Effect = Literal[
    "kill",  # SIGKILL to the client
    "stop server",  # SIGKILL to the server
    "reset",  # reset the connection
    "silence",  # no response until the client gives up
    "reply",  # a different response
    "halve",  # half of the response body, with a matching length
    "cut",  # half of the response body, then a reset
    "drip",  # the response in many small pieces
    "twice",  # forward the request twice and return the second response
    "late",  # no response; forward the request seconds after the client has given up
]

_BLOCK: Final = 16 * 1024
_PIECES: Final = 40
_PIECE_PAUSE: Final = 0.03
_BASE: Final = re.compile(r"^/(openai/)?(v1/)?")
_SHORTEST_ID: Final = 20
"""Characters; words of a path are shorter."""
_LISTS: Final = ("/files", "/jobs", "/fine-tunes")
_LATE: Final = (0.0, 3.0)
"""Delay range in seconds, in which a client that gave up searches for its job and retries."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault for one request."""

    when: When
    effect: Effect
    reply: bytes = b""


@dataclass(frozen=True, slots=True)
class Injection:
    """A fault and the request that it applies to.

    Attributes:
        skip: Requests to let through first, counted from the previous injection.
        only: Name of the requests to count and break; None for all.
    """

    fault: Fault
    skip: int = 0
    only: str | None = None


def in_row(fault: Fault, skip: int, times: int) -> tuple[Injection, ...]:
    """Return injections that break consecutive requests."""
    return (Injection(fault, skip), *(Injection(fault) for _ in range(times - 1)))


@dataclass(slots=True)
class Seen:
    """A request that the proxy received.

    Attributes:
        fault: The injected fault, if any.
        status: The server's response status, even if the client did not receive it; None if the
            request was not forwarded completely.
        content: SHA-256 of the file or part that it carries.
    """

    method: str
    target: str
    fault: Fault | None = None
    status: int | None = None
    content: str | None = None

    @property
    def path(self) -> str:
        """The target without the query string."""
        return self.target.partition("?")[0]

    @property
    def name(self) -> str:
        """Method and path, with ids replaced by `ID`."""
        words = _BASE.sub("", self.path).split("/")
        named = ("ID" if len(word) >= _SHORTEST_ID else word for word in words)
        return f"{self.method} {'/'.join(named)}"

    @property
    def is_upload(self) -> bool:
        """Whether this uploads a file or a part of one."""
        return self.content is not None

    def __str__(self) -> str:
        """Return one line for the log of a trial."""
        broken = f"  <- {self.fault.effect} {self.fault.when}" if self.fault else ""
        return f"{self.method} {self.target} -> {self.status or 'no response'}{broken}"


@dataclass(slots=True)
class _Request:
    head: bytes
    length: int
    seen: Seen
    body: bytearray = field(default_factory=bytearray)


class _Closed(Exception):
    """The connection is closed or must be closed."""


_GONE: Final = (
    _Closed,
    OSError,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    anyio.EndOfStream,
    anyio.IncompleteRead,
)


class Proxy:
    """Forwards to a server and injects the faults of `plan`.

    Attributes:
        plan: Injections still to come.
        seen: Every request so far.
        injected: Number of faults injected.
        kill_client: Kills the client; set while one is running.
        stop_server: Kills the server.
        lag: Seconds for which lists omit new objects.
    """

    def __init__(
        self, server: Callable[[], int], *, stop_server: Callable[[], None], seed: str
    ) -> None:
        """Forward to the loopback port that `server` returns."""
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
        """Listen while the block runs."""
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        raw = listener.extra(SocketAttribute.raw_socket)
        # A small buffer, so that the client notices that only half of its upload was received.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        self.url = f"http://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, self._connected)
            yield
            tasks.cancel_scope.cancel()
        await listener.aclose()

    async def nothing_held(self) -> None:
        """Return once no request is being delayed."""
        while self._held:
            await self._released.wait()

    async def _connected(self, client: SocketStream) -> None:
        buffered = BufferedByteStream(client)
        try:
            async with client:
                while True:
                    await self._exchange(client, buffered)
        except _GONE:
            pass  # one side hung up, as the trials intend

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
        """Send the server the partial request and hang up."""
        async with await self._connect() as server:
            await server.send(request.head + request.body)

    async def _forwarded(
        self, client: SocketStream, buffered: BufferedByteStream, request: _Request
    ) -> bytes:
        """Return the server's complete response; reset the client if the server is down."""
        await self._read_body(buffered, request)
        try:
            return await self._ask(request)
        except _GONE:
            await _reset(client)
            raise _Closed from None

    async def _ask(self, request: _Request) -> bytes:
        """Return the server's complete response and record it."""
        async with await self._connect() as server:
            await server.send(request.head + request.body)
            buffered = BufferedByteStream(server)
            head = await buffered.receive_until(b"\r\n\r\n", 64 * 1024) + b"\r\n\r\n"
            answer = head + await buffered.receive_exactly(_length(head))
        request.seen.status = int(answer.split(b" ", 2)[1])
        if request.body:
            request.seen.content = _content(request.seen.method, bytes(request.body))
        return self._lagging(request.seen, answer) if self.lag else answer

    def _lagging(self, seen: Seen, answer: bytes) -> bytes:
        """Omit recently created objects from a list."""
        head, _, body = answer.partition(b"\r\n\r\n")
        if seen.status not in {200, 201} or not seen.path.endswith(_LISTS):
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
        """Forward a request after the client has given up waiting for the response."""
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
        """Apply the fault; raise `_Closed` if the connection cannot be used afterwards."""
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
                    return  # the connection can still be used
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


def _content(method: str, form: bytes) -> str | None:
    """Return the SHA-256 of the file in a multipart form, or of one that is sent as it is."""
    if method == "PUT":
        return hashlib.sha256(form).hexdigest()
    boundary = form.partition(b"\r\n")[0]
    for part in form.split(b"\r\n" + boundary):
        head, _, content = part.partition(b"\r\n\r\n")
        if b"filename=" in head:
            return hashlib.sha256(content).hexdigest()
    return None


async def _reset(stream: SocketStream) -> None:
    """Close with RST, so that the other side gets an error instead of an end of stream."""
    linger = struct.pack("ii", 1, 0)
    raw = stream.extra(SocketAttribute.raw_socket)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    await anyio.aclose_forcefully(stream)


async def _until_gone(stream: SocketStream) -> None:
    """Read without responding until the other side hangs up."""
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
