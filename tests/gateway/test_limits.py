"""What a client may ask of the server below the API: how much, and how slowly."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from anyio.abc import SocketStream, TaskStatus

from tests.gateway.conftest import KEY, Site, site, trickle
from tests.waiting import until

pytestmark = pytest.mark.anyio

GET = b"GET /health HTTP/1.1\r\nHost: here\r\n"
KEYED = f"Host: here\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n".encode()
POST = b"POST /v1/fine_tuning/jobs HTTP/1.1\r\n" + KEYED
PATIENCE = 20.0


@dataclass
class Answer:
    """One answer as it came over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def detail(self) -> str:
        """The reason, as every refusal gives it."""
        return str(json.loads(self.body)["detail"])


@dataclass
class Wire:
    """A connection on which a test says what it likes."""

    stream: SocketStream
    rest: bytes = field(default=b"")

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        await self.stream.send(data)

    async def answer(self) -> Answer:
        """Read one answer."""
        with anyio.fail_after(PATIENCE):
            while b"\r\n\r\n" not in self.rest:
                self.rest += await self.stream.receive()
            head, _, self.rest = self.rest.partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            size = int(headers["content-length"])
            while len(self.rest) < size:
                self.rest += await self.stream.receive()
        body, self.rest = self.rest[:size], self.rest[size:]
        return Answer(int(first.split()[1]), headers, body)

    async def ended(self) -> bool:
        """Wait for the server to end the connection; tell whether it said nothing more."""
        with anyio.fail_after(PATIENCE):
            try:
                while True:
                    self.rest += await self.stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return not self.rest


@asynccontextmanager
async def wire(here: Site) -> AsyncIterator[Wire]:
    """Connect to a gateway."""
    url = httpx.URL(here.served.url)
    async with await anyio.connect_tcp(url.host, url.port or 80) as stream:
        yield Wire(stream)


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(GET + b"".join(b"X-%d: y\r\n" % n for n in range(101)), id="too many"),
        pytest.param(GET + b"X: " + b"y" * 33_000 + b"\r\n", id="one too large"),
        pytest.param(GET + (b"X: " + b"y" * 1000 + b"\r\n") * 40, id="too large together"),
        pytest.param(GET + b"X: " + b"y" * 40_000, id="without end"),
        pytest.param(GET + b"y" * 40_000, id="a name without end"),
        pytest.param(b"GET /" + b"y" * 40_000, id="an address without end"),
    ],
)
async def test_a_head_has_a_bound(shared: Site, head: bytes) -> None:
    """431 in the form of every refusal, as soon as it is passed; then the connection ends."""
    async with wire(shared) as client:
        await client.send(head)
        answer = await client.answer()
        assert (answer.status, answer.headers["content-type"]) == (431, "application/json")
        assert "the limits are 100 headers and 32768 bytes" in answer.detail
        assert await client.ended()


async def test_who_goes_on_sending_a_large_head_still_reads_why(shared: Site) -> None:
    """The connection is not torn under a client that has not read the answer yet."""
    async with wire(shared) as client:
        await client.send(GET + b"X: ")
        for _ in range(20):
            await client.send(b"y" * 65536)
        assert (await client.answer()).status == 431


async def test_a_head_within_the_bounds_is_taken(shared: Site) -> None:
    """Up to the last header and nearly the last byte, in pieces or in one."""
    head = GET + b"".join(b"X-%02d: %s\r\n" % (n, b"y" * 300) for n in range(99)) + b"\r\n"
    async with wire(shared) as client:
        for piece in (head, *(head[n : n + 1000] for n in range(0, len(head), 1000))):
            await client.send(piece)
        assert (await client.answer()).status == 200
        assert (await client.answer()).status == 200


@pytest.mark.parametrize("before", [2, 280, 290, 2960, 2990])
async def test_of_a_long_path_only_the_beginning_is_logged(
    shared: Site, logs: list[Any], before: int
) -> None:
    """Whoever asks decides what is in it; no half of a key remains where it is cut."""
    key = "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c"
    await shared.http.get(f"/v1/{'x/' * (before // 2)}{key}/{'y/' * 8000}")
    (line,) = [entry for entry in logs if entry["event"] == "request"]
    assert len(line["path"]) <= 300
    assert key[:20] not in line["path"]


async def test_the_bounds_of_a_head_are_settings(tmp_path: Path) -> None:
    """For clients with large tokens, or a stricter house."""
    async with site(tmp_path, max_headers=3, max_header_bytes=2048) as here:
        async with wire(here) as client:
            await client.send(GET + b"A: 1\r\nB: 2\r\n\r\n")
            assert (await client.answer()).status == 200
            await client.send(GET + b"A: 1\r\nB: 2\r\nC: 3\r\n\r\n")
            assert (await client.answer()).status == 431
        async with wire(here) as client:
            await client.send(GET + b"A: " + b"y" * 2048)
            assert (await client.answer()).status == 431


@pytest.mark.parametrize(
    "beginning",
    [b"0\r\nX: ", b"1;", b"0\r\n" + b"X: y\r\n" * 200],
    ids=["a trailer", "a chunk's extension", "many trailers"],
)
async def test_what_surrounds_a_body_has_the_same_bound(shared: Site, beginning: bytes) -> None:
    """A chunked body hides nothing without end."""
    async with wire(shared) as client:
        await client.send(POST + b"Transfer-Encoding: chunked\r\n\r\n" + beginning)
        with anyio.fail_after(PATIENCE), suppress(anyio.BrokenResourceError):
            while True:
                await client.send(b"y" * 65536)
        assert await client.ended()
    assert (await shared.http.get("/health")).status_code == 200


async def test_what_is_no_request_is_refused_as_all_else(shared: Site) -> None:
    """400 in JSON."""
    async with wire(shared) as client:
        await client.send(b"nonsense\r\n\r\n")
        answer = await client.answer()
        assert (answer.status, answer.headers["content-type"]) == (400, "application/json")
        assert answer.detail
        assert await client.ended()


async def test_requests_sent_at_once_are_answered_in_turn(shared: Site) -> None:
    """As many as fit into one packet, on one connection."""
    async with wire(shared) as client:
        await client.send((GET + b"\r\n") * 50)
        assert [(await client.answer()).status for _ in range(50)] == [200] * 50


async def test_an_upgrade_is_not_taken(shared: Site) -> None:
    """The gateway speaks no WebSocket; the request is answered as any other."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\n\r\n"
    async with wire(shared) as client:
        await client.send(GET + upgrade)
        assert (await client.answer()).status == 200
        await client.send(b"GET /v1/models HTTP/1.1\r\nHost: here\r\n" + upgrade)
        assert (await client.answer()).status == 401


@asynccontextmanager
async def trickling(client: Wire) -> AsyncIterator[None]:
    """Send a byte every now and then meanwhile."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(trickle, client.stream)
        yield
        tasks.cancel_scope.cancel()


async def test_a_head_that_only_trickles_is_not_waited_for(tmp_path: Path) -> None:
    """Bytes that keep coming do not move its deadline."""
    async with site(tmp_path, header_timeout=0.3) as here, wire(here) as client:
        await client.send(GET + b"X: ")
        async with trickling(client):
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (408, "close")
            assert "within 0.3 s" in answer.detail
            assert await client.ended()


@pytest.mark.parametrize("sent", [b"", b"\r\n"])
async def test_who_connects_and_asks_nothing_is_let_go(tmp_path: Path, sent: bytes) -> None:
    """Without a word: there is no request to answer."""
    async with site(tmp_path, header_timeout=0.2) as here, wire(here) as client:
        if sent:
            await client.send(sent)
        assert await client.ended()


async def test_between_requests_a_connection_may_rest(tmp_path: Path) -> None:
    """The deadline of a head begins with its first byte."""
    async with site(tmp_path, header_timeout=0.2) as here, wire(here) as client:
        await client.send(GET + b"\r\n")
        assert (await client.answer()).status == 200
        async with wire(here) as other:  # for longer than a head may take
            assert await other.ended()
        await client.send(GET + b"\r\n")
        assert (await client.answer()).status == 200


@pytest.mark.parametrize("silent", [True, False])
async def test_a_body_that_does_not_come_is_not_waited_for(tmp_path: Path, silent: bool) -> None:
    """Neither from who falls silent nor from who sends a byte now and then."""
    async with site(tmp_path, body_timeout=0.3) as here, wire(here) as client:
        await client.send(POST + b"Content-Length: 100000\r\n\r\n{")
        if silent:
            answer = await client.answer()
        else:
            async with trickling(client):
                answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        assert "within 0.3 s" in answer.detail
        assert await client.ended()


async def test_a_refused_body_is_not_taken_in_for_ever(tmp_path: Path) -> None:
    """The client may finish sending so that it reads why, but not without end."""
    async with site(tmp_path, body_timeout=0.3) as here, wire(here) as client:
        await client.send(b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n")
        assert (await client.answer()).status == 401
        async with trickling(client):
            assert await client.ended()


async def test_a_refused_body_that_ends_leaves_the_connection_open(shared: Site) -> None:
    """The next request is answered on it."""
    async with wire(shared) as client:
        await client.send(b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n")
        assert (await client.answer()).status == 401
        await client.send(b"y" * 99999 + GET + b"\r\n")
        assert (await client.answer()).status == 200


async def test_an_answer_that_is_not_taken_is_given_up(tmp_path: Path, logs: list[Any]) -> None:
    """A client that stops reading does not hold a file open for ever."""
    size = 30_000_000
    async with site(tmp_path, answer_timeout=0.3) as here:
        file_id = await here.upload(b"y" * size, "scan.pdf", purpose="ocr")
        async with wire(here) as client:
            await client.send(b"GET /v1/files/%s/content HTTP/1.1\r\n" % file_id.encode())
            await client.send(KEYED + b"\r\n")
            await until(lambda: any("did not read" in entry["event"] for entry in logs))
            await client.ended()
            assert len(client.rest) < size


async def test_half_requests_keep_nobody_else_waiting(tmp_path: Path) -> None:
    """However many of them are open."""
    async with (
        site(tmp_path, header_timeout=PATIENCE) as here,
        anyio.create_task_group() as tasks,
    ):
        for _ in range(200):
            await tasks.start(_half, here)
        for _ in range(5):
            assert (await here.http.get("/v1/models")).status_code == 200
        tasks.cancel_scope.cancel()


async def _half(here: Site, *, task_status: TaskStatus[None]) -> None:
    async with wire(here) as client:
        await client.send(GET)
        task_status.started()
        await anyio.sleep_forever()


async def test_connections_have_a_limit_and_idle_ones_give_way(
    tmp_path: Path, logs: list[Any]
) -> None:
    """Those above it are closed at once, and the others when their time is up."""
    async with site(tmp_path, max_connections=8, header_timeout=1.0) as here:
        url = httpx.URL(here.served.url)
        async with AsyncExitStack() as stack:
            streams = [
                await stack.enter_async_context(await anyio.connect_tcp(url.host, url.port or 80))
                for _ in range(20)
            ]
            for stream in streams:
                with anyio.fail_after(PATIENCE), suppress(anyio.EndOfStream):
                    await stream.receive()
            assert await until(lambda: _answers(here))
    assert [entry["limit"] for entry in logs if "too many open" in entry["event"]] == [8]


async def _answers(here: Site) -> bool:
    try:
        return (await here.http.get("/health")).status_code == 200
    except httpx.TransportError:
        return False
