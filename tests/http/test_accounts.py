"""What calls of one account have in common: the server's limits."""

import time
from collections.abc import AsyncGenerator, Callable
from threading import Event, Thread

import anyio
import anyio.to_thread
import pytest

from tests.waiting import until
from training_backends import (
    BackendUnavailable,
    RateLimited,
    TrainingBackendError,
)
from training_backends.http.client import HttpClient
from training_backends.testing.faults import OtherAnswer
from training_backends.testing.server import LoopbackServer, Received, StubReply

pytestmark = pytest.mark.anyio

MakeClient = Callable[..., HttpClient]
AnswerBy = Callable[[Callable[[Received], StubReply]], None]


def pause(seconds: float, status: int = 429) -> OtherAnswer:
    """Refuse one request and ask for a pause."""
    return OtherAnswer(status=status, body={}, headers={"Retry-After": str(seconds)})


@pytest.fixture
async def client(make_client: MakeClient) -> AsyncGenerator[HttpClient, None]:
    """Make a client that tries once, and close it in the end."""
    made = make_client(attempts=1)
    yield made
    await made.aclose()


@pytest.mark.parametrize("status", [429, 503])
async def test_a_pause_holds_for_other_clients_too(
    status: int, client: HttpClient, make_client: MakeClient, server: LoopbackServer
) -> None:
    """Another client with the same key waits for what the first was asked to."""
    server.fail(pause(0.5, status))
    other = make_client()
    with pytest.raises((RateLimited, BackendUnavailable)):
        await client.json("GET", "/a")
    asked_at = time.monotonic()
    assert await other.json("GET", "/b") == {"ok": True}
    await other.aclose()
    assert time.monotonic() - asked_at >= 0.4


async def test_a_pause_holds_in_other_threads_and_loops(
    client: HttpClient, make_client: MakeClient, server: LoopbackServer
) -> None:
    """So does a client in another thread with an event loop of its own."""
    server.fail(pause(0.5))
    with pytest.raises(RateLimited):
        await client.json("GET", "/a")
    asked_at = time.monotonic()

    async def ask() -> None:
        other = make_client()
        await other.json("GET", "/b")
        await other.aclose()

    threads = [Thread(target=anyio.run, args=[ask]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await anyio.to_thread.run_sync(thread.join)
    assert len(server.asked("GET", "/b")) == 3
    assert time.monotonic() - asked_at >= 0.4


async def test_a_longer_pause_holds_those_that_wait_for_a_shorter_one(
    client: HttpClient, make_client: MakeClient, server: LoopbackServer, answer_by: AnswerBy
) -> None:
    """A call that waits already goes on waiting when another one is told of more."""
    at: dict[str, float] = {}
    waiting = Event()

    def answer(request: Received) -> StubReply:
        if request.path == "/slow":
            assert waiting.wait(30)
        at[request.path] = time.monotonic()
        headers = {"/slow": {"Retry-After": "0.9"}, "/fast": {"Retry-After": "0.5"}}
        if request.path in headers:
            return StubReply(status=429, content=b"{}", headers=headers[request.path])
        return StubReply(content=b"{}")

    async def refused(path: str) -> None:
        with pytest.raises(RateLimited):
            await client.json("GET", path)

    answer_by(answer)
    other = make_client()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(refused, "/slow")
        await until(lambda: server.requests)
        await refused("/fast")
        tasks.start_soon(other.json, "GET", "/late")
        await anyio.wait_all_tasks_blocked()
        waiting.set()
    await other.aclose()
    assert at["/late"] - at["/slow"] >= 0.85


async def test_another_key_is_not_held_up(
    client: HttpClient, make_client: MakeClient, server: LoopbackServer, keys: object
) -> None:
    """A limit is the account's: who has another key at the same server goes on."""
    server.fail(pause(3600))
    with pytest.raises(RateLimited):
        await client.json("GET", "/a")
    keys.value = "other-key"  # type: ignore[attr-defined]
    other = make_client()
    assert await other.json("GET", "/b") == {"ok": True}
    await other.aclose()


async def test_a_server_at_the_port_of_an_earlier_one_has_no_limits(
    client: HttpClient, make_client: MakeClient, server: LoopbackServer
) -> None:
    """What one test's server asked for does not hold for the next one's, with the same key."""
    server.fail(pause(3600))
    with pytest.raises(RateLimited):
        await client.json("GET", "/a")
    port = server.port
    server.stop()
    server.start(port)
    other = make_client()
    assert await other.json("GET", "/b") == {"ok": True}
    await other.aclose()


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_no_call_waits_in_vain(
    method: str, client: HttpClient, server: LoopbackServer
) -> None:
    """A pause longer than a call may take ends it at once; nothing is sent."""
    server.fail(pause(3600))
    with pytest.raises(RateLimited):
        await client.json("GET", "/a")
    began = time.monotonic()
    with pytest.raises(RateLimited, match="not sent") as caught:
        await client.json(method, "/b")
    assert caught.value.retry_after is not None
    assert 3590 < caught.value.retry_after <= 3600
    assert time.monotonic() - began < 5
    assert len(server.requests) == 1


async def test_pause_of_a_failing_server_is_told_as_such(
    client: HttpClient, server: LoopbackServer
) -> None:
    """Where it was a 503 that asked for the pause, the server is not available."""
    server.fail(pause(3600, status=503))
    with pytest.raises(BackendUnavailable):
        await client.json("GET", "/a")
    with pytest.raises(BackendUnavailable, match="503") as caught:
        await client.json("POST", "/b")
    assert caught.value.sent is False
    assert len(server.requests) == 1


async def goes_through(client: HttpClient, refusal: type[TrainingBackendError]) -> bool:
    """Make a call that may be refused."""
    try:
        await client.json("GET", "/a")
    except refusal:
        return False
    return True


async def test_no_server_silences_us_for_a_year(
    make_client: MakeClient, server: LoopbackServer
) -> None:
    """After the time that a call may take, one asks again."""
    server.fail(pause(31_536_000))
    client = make_client(call_timeout=0.5)
    with pytest.raises(RateLimited) as caught:
        await client.json("GET", "/a")
    assert caught.value.retry_after == 31_536_000
    await until(lambda: goes_through(client, RateLimited))
    await client.aclose()
    assert len(server.requests) == 2


async def test_used_up_limit_is_known_beforehand(
    client: HttpClient, server: LoopbackServer, answer_by: AnswerBy
) -> None:
    """When an answer says that none is left, the next call is not sent into a refusal."""
    said = {"X-RateLimit-Limit-Req-Minute": "60", "X-RateLimit-Remaining-Req-Minute": "0"}
    answer_by(lambda _: StubReply(content=b"{}", headers=said))
    await client.json("GET", "/a")
    with pytest.raises(RateLimited) as caught:
        await client.json("GET", "/a")
    assert caught.value.retry_after is not None
    assert 50 < caught.value.retry_after <= 60
    assert len(server.requests) == 1


async def test_server_that_is_back_is_used_at_once(
    client: HttpClient, server: LoopbackServer
) -> None:
    """However many calls failed before, the next one asks."""
    port = server.port
    server.stop()
    for _ in range(7):
        with pytest.raises(BackendUnavailable):
            await client.json("GET", "/a")
    server.start(port)
    assert await client.json("GET", "/a") == {"ok": True}
