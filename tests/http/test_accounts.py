"""What calls of one account have in common: the server's limits, and that it does not answer."""

import time
from collections.abc import AsyncGenerator, Callable
from threading import Event, Thread

import anyio
import anyio.to_thread
import pytest

from tests.waiting import until
from training_backends import (
    BackendRetired,
    BackendUnavailable,
    RateLimited,
    RunNotFound,
    TrainingBackendError,
)
from training_backends.http.client import HttpClient
from training_backends.testing.faults import OtherAnswer
from training_backends.testing.server import LoopbackServer, Received, StubReply

pytestmark = pytest.mark.anyio

MakeClient = Callable[..., HttpClient]
AnswerBy = Callable[[Callable[[Received], StubReply]], None]
FAILING = OtherAnswer(status=500, body={"detail": "broken"})


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

    def answer(request: Received) -> StubReply:
        if request.path == "/slow":
            time.sleep(0.3)
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
        await other.json("GET", "/late")
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


async def fail(client: HttpClient, times: int) -> None:
    """Make calls that fail."""
    for _ in range(times):
        with pytest.raises(BackendUnavailable):
            await client.json("GET", "/a")


async def test_failing_server_is_left_alone(
    client: HttpClient, make_client: MakeClient, server: LoopbackServer
) -> None:
    """After five failed calls in a row no client of the account asks it for a while."""
    server.fail(FAILING, times=99)
    await fail(client, times=5)
    other = make_client()
    with pytest.raises(
        BackendUnavailable, match=r"since \d\d:\d\d:\d\d UTC.*Next attempt"
    ) as caught:
        await other.json("POST", "/b")
    await other.aclose()
    assert "broken" in caught.value.message
    assert (caught.value.sent, caught.value.retryable) == (False, True)
    assert len(server.requests) == 5


async def test_server_that_is_back_is_used_again(
    client: HttpClient, server: LoopbackServer
) -> None:
    """One call tries it after the pause; once that is answered, all go."""
    port = server.port
    server.stop()
    await fail(client, times=6)
    server.start(port)
    await until(lambda: goes_through(client, BackendUnavailable))
    for _ in range(5):
        assert await client.json("GET", "/a") == {"ok": True}


@pytest.mark.parametrize(("status", "error"), [(404, RunNotFound), (410, BackendRetired)])
async def test_refusals_are_answers(
    status: int, error: type[TrainingBackendError], client: HttpClient, server: LoopbackServer
) -> None:
    """A server that says no is there: it is asked on, and failures before no longer count."""
    server.fail(FAILING, times=4)
    server.fail(OtherAnswer(status=status, body={}), times=10)
    server.fail(FAILING, times=4)
    await fail(client, times=4)
    for _ in range(10):
        with pytest.raises(error):
            await client.json("GET", "/a")
    await fail(client, times=4)
    assert await client.json("GET", "/a") == {"ok": True}


async def test_calls_under_way_go_on(
    client: HttpClient, make_client: MakeClient, server: LoopbackServer
) -> None:
    """A call that is between its attempts keeps trying, however many others failed."""
    port = server.port
    url = server.base_url
    server.stop()
    patient = make_client(url, attempts=50)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(patient.json, "GET", "/patient")
        await anyio.wait_all_tasks_blocked()
        dead = make_client(url, attempts=1)
        await fail(dead, times=6)
        await dead.aclose()
        await anyio.to_thread.run_sync(server.start, port)
    await patient.aclose()
    assert len(server.asked("GET", "/patient")) == 1


async def test_full_pool_is_no_failure_of_the_server(
    make_client: MakeClient, server: LoopbackServer, answer_by: AnswerBy
) -> None:
    """Calls that found no free connection here say nothing of the server."""
    over = Event()

    def answer(request: Received) -> StubReply:
        if request.path == "/long":
            over.wait(20)
        return StubReply(content=b"{}")

    answer_by(answer)
    client = make_client(attempts=1, max_connections=1, pool_timeout=0.05)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.json, "GET", "/long")
        await until(lambda: server.requests)
        for _ in range(7):
            with pytest.raises(BackendUnavailable, match=r"^GET http\S+ timed out waiting"):
                await client.json("GET", "/a")
        over.set()
    assert await client.json("GET", "/a") == {}
    await client.aclose()
