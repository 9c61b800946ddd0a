"""What the HTTP client promises: one pool, lawful retries, a private key, clear errors."""

import gzip
import json
import pickle
import random
import socket
import time
import tracemalloc
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Protocol

import anyio
import anyio.to_thread
import pytest
import structlog
from pydantic import SecretStr
from structlog.testing import capture_logs

from training_backends import (
    AuthenticationFailed,
    BackendUnavailable,
    ConfigError,
    ProtocolError,
    RateLimited,
    TrainingBackendError,
)
from training_backends.http.client import HttpClient
from training_backends.testing.faults import (
    CutAnswer,
    DropRequest,
    LoseAnswer,
    OtherAnswer,
    SlowAnswer,
)
from training_backends.testing.server import LoopbackServer, Received, StubReply

pytestmark = pytest.mark.anyio

MakeClient = Callable[..., HttpClient]
AnswerBy = Callable[[Callable[[Received], StubReply]], None]
SAFE = OtherAnswer(status=503, body={"detail": "busy"})


class Keys(Protocol):
    """The key source of the fixtures."""

    value: str
    asked: int


@pytest.fixture
async def client(make_client: MakeClient) -> AsyncGenerator[HttpClient, None]:
    """Make a client, and close it in the end."""
    made = make_client()
    yield made
    await made.aclose()


async def test_many_calls_use_one_connection(client: HttpClient, server: LoopbackServer) -> None:
    """Calls one after another share a single connection."""
    for _ in range(50):
        await client.json("GET", "/a")
    assert (len(server.requests), server.connections) == (50, 1)


async def test_few_requests_are_in_flight(client: HttpClient, server: LoopbackServer) -> None:
    """However many are asked for at once, at most five connections are open."""
    async with anyio.create_task_group() as tasks:
        for _ in range(40):
            tasks.start_soon(client.json, "GET", "/a")
    assert len(server.requests) == 40
    assert server.connections <= 5
    assert server.largest_burst <= 5


async def test_version_and_key_are_sent(client: HttpClient, server: LoopbackServer) -> None:
    """Each request says who asks, and carries the key as a bearer token."""
    await client.json("GET", "/a")
    headers = server.requests[0].headers
    assert headers["user-agent"].startswith("training-backends/")
    assert headers["authorization"] == "Bearer first-key"


async def test_query_repeats_keys(client: HttpClient, server: LoopbackServer) -> None:
    """A query goes out as given: a list repeats its key, values are escaped."""
    await client.json("GET", "/a", query=[("x", "1"), ("y", "a b&c+d"), ("x", "2")])
    assert server.requests[0].target == "/a?x=1&x=2&y=a+b%26c%2Bd"
    assert server.requests[0].query == [("x", "1"), ("x", "2"), ("y", "a b&c+d")]


async def test_body_is_json(client: HttpClient, server: LoopbackServer) -> None:
    """A body goes out as UTF-8 JSON with its length."""
    await client.json("POST", "/a", body={"name": "é"})
    request = server.requests[0]
    assert request.headers["content-type"] == "application/json"
    assert request.body == '{"name": "é"}'.encode()


async def test_post_without_body_is_empty(client: HttpClient, server: LoopbackServer) -> None:
    """A POST without a body announces that it has none."""
    await client.json("POST", "/a/start")
    assert server.requests[0].headers["content-length"] == "0"


async def test_safe_request_is_repeated(client: HttpClient, server: LoopbackServer) -> None:
    """A GET survives a busy server, a lost answer and a cut one."""
    for fault in (SAFE, LoseAnswer(), CutAnswer()):
        server.fail(fault)
        assert await client.json("GET", "/a") == {"ok": True}
    assert len(server.requests) == 6


async def test_attempts_are_bounded(client: HttpClient, server: LoopbackServer) -> None:
    """A server that stays broken is given up on after the set number of attempts."""
    server.fail(SAFE, times=99)
    with pytest.raises(BackendUnavailable, match="busy"):
        await client.json("GET", "/a")
    assert len(server.requests) == 3


@pytest.mark.parametrize("fault", [SAFE, LoseAnswer(), DropRequest(), CutAnswer()])
async def test_unsafe_request_is_sent_once(
    fault: OtherAnswer, client: HttpClient, server: LoopbackServer
) -> None:
    """A POST that may have arrived is not repeated, and the error says that it may have."""
    server.fail(fault, times=99)
    with pytest.raises(BackendUnavailable) as caught:
        await client.json("POST", "/jobs", body={})
    assert caught.value.sent is True
    assert len(server.requests) == 1


async def test_marked_request_is_repeated(client: HttpClient, server: LoopbackServer) -> None:
    """A POST that the caller marks as repeatable is repeated."""
    server.fail(LoseAnswer())
    assert await client.json("POST", "/cancel", repeatable=True) == {"ok": True}
    assert len(server.requests) == 2


async def test_what_may_have_arrived_is_not_forgotten(
    client: HttpClient, server: LoopbackServer, answer_by: AnswerBy
) -> None:
    """A request whose first answer was lost may have arrived, however the last attempt ended."""

    def stop(request: Received) -> StubReply:
        server.stop()
        return StubReply()

    answer_by(stop)
    with pytest.raises(BackendUnavailable) as caught:
        await client.json("POST", "/cancel", repeatable=True)
    assert len(server.requests) == 1
    assert caught.value.sent is True


async def test_refused_connection_was_not_sent(make_client: MakeClient) -> None:
    """Where nobody listens, even a POST is tried again, and the error says it never left."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        client = make_client(f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(BackendUnavailable) as caught:
            await client.json("POST", "/jobs", body={})
        await client.aclose()
    assert caught.value.sent is False
    assert caught.value.hint is not None


async def test_server_that_comes_back_gets_the_post_once(
    make_client: MakeClient, server: LoopbackServer
) -> None:
    """A POST to a server that is away for a moment arrives exactly once."""
    port = server.port
    server.stop()
    client = make_client(f"http://127.0.0.1:{port}", attempts=50)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.json, "POST", "/jobs")
        await anyio.wait_all_tasks_blocked()
        await anyio.to_thread.run_sync(server.start, port)
    await client.aclose()
    assert len(server.requests) == 1


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_rate_limit_is_waited_for(
    method: str, client: HttpClient, server: LoopbackServer
) -> None:
    """A refusal for the rate changed nothing, so any request is repeated after the pause."""
    server.fail(OtherAnswer(status=429, body={"message": "slow"}, headers={"Retry-After": "0.3"}))
    began = time.monotonic()
    assert await client.json(method, "/a") == {"ok": True}
    assert time.monotonic() - began >= 0.3


async def test_retry_after_may_be_a_date(client: HttpClient, server: LoopbackServer) -> None:
    """A Retry-After that is an HTTP date is honoured."""
    at = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    server.fail(OtherAnswer(status=503, headers={"Retry-After": at}))
    began = time.monotonic()
    await client.json("GET", "/a")
    assert time.monotonic() - began >= 0.9  # the date has whole seconds


async def test_long_pause_is_reported_at_once(client: HttpClient, server: LoopbackServer) -> None:
    """A pause beyond the call's time is told to the caller instead of waited for."""
    server.fail(OtherAnswer(status=429, headers={"Retry-After": "3600"}), times=9)
    began = time.monotonic()
    with pytest.raises(RateLimited) as caught:
        await client.json("GET", "/a")
    assert caught.value.retry_after == 3600
    assert time.monotonic() - began < 5


async def test_a_call_has_a_deadline(make_client: MakeClient, server: LoopbackServer) -> None:
    """An answer that trickles in, never silent for long, still ends at the deadline."""
    client = make_client(call_timeout=0.6)
    server.fail(SlowAnswer(pause=0.2), times=9)
    began = time.monotonic()
    with pytest.raises(BackendUnavailable, match=r"within 0\.6 s") as caught:
        await client.json("POST", "/a")
    await client.aclose()
    assert caught.value.sent is True
    assert time.monotonic() - began < 3


async def test_silence_ends_a_request(make_client: MakeClient, server: LoopbackServer) -> None:
    """A server that says nothing is given up on after the read timeout."""
    client = make_client(read_timeout=0.3, attempts=1)
    server.fail(SlowAnswer(pause=3.0))
    with pytest.raises(BackendUnavailable, match="timed out waiting"):
        await client.json("GET", "/a")
    await client.aclose()


async def test_changed_key_is_read_again(
    client: HttpClient, server: LoopbackServer, keys: Keys, answer_by: AnswerBy
) -> None:
    """After a 401 the key is asked for again, and a new one is tried, even for a POST."""

    def answer(request: Received) -> StubReply:
        good = request.headers["authorization"] == "Bearer second-key"
        return StubReply(status=200 if good else 401, content=b"{}")

    answer_by(answer)
    client_calls = [("POST", "/jobs"), ("GET", "/a")]
    keys.value = "first-key"
    with pytest.raises(AuthenticationFailed):
        await client.json("GET", "/a")
    keys.value = "second-key"
    for method, path in client_calls:
        assert await client.json(method, path) == {}
    assert [r.headers["authorization"][7:] for r in server.requests[1:]] == [
        "first-key",
        "second-key",
        "second-key",
    ]


async def test_changed_key_serves_all_that_were_under_way(
    client: HttpClient, server: LoopbackServer, keys: Keys, answer_by: AnswerBy
) -> None:
    """Calls that were refused together for the old key all succeed with the new one."""

    def answer(request: Received) -> StubReply:
        good = request.headers["authorization"] == "Bearer second-key"
        return StubReply(status=200 if good else 401, content=b"{}")

    answer_by(answer)
    with pytest.raises(AuthenticationFailed):
        await client.json("GET", "/a")
    keys.value = "second-key"
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(client.json, "POST", "/a")


async def test_wrong_key_is_tried_once(
    client: HttpClient, server: LoopbackServer, keys: Keys
) -> None:
    """A key that has not changed is not sent a second time."""
    server.fail(OtherAnswer(status=401, body={"message": "Unauthorized"}), times=9)
    with pytest.raises(AuthenticationFailed):
        await client.json("GET", "/a")
    assert (len(server.requests), keys.asked) == (1, 2)


@pytest.mark.parametrize("value", ["", "  ", "two words", "tab\tkey", "line\nkey", "kéy", "k\x00"])
async def test_key_that_is_none_is_refused_unseen(
    value: str, client: HttpClient, server: LoopbackServer, keys: Keys
) -> None:
    """A key that no header can carry is an error that does not show it; nothing is sent."""
    keys.value = value
    with pytest.raises(AuthenticationFailed) as caught:
        await client.json("GET", "/a")
    assert not value.strip() or value not in repr(caught.value)
    assert server.requests == []


async def test_key_may_end_in_a_newline(
    client: HttpClient, server: LoopbackServer, keys: Keys
) -> None:
    """White space around a key, as files and pipes leave it, does no harm."""
    keys.value = "first-key\n"
    await client.json("GET", "/a")
    assert server.requests[0].headers["authorization"] == "Bearer first-key"


@pytest.mark.parametrize(
    "url", ["http://api.example.com", "http://10.0.0.1:8080", "http://127.evil.example"]
)
async def test_key_never_leaves_over_plain_http(url: str, make_client: MakeClient) -> None:
    """A client with a key for a remote plain http server cannot even be made."""
    with pytest.raises(ConfigError, match="plain HTTP") as caught:
        make_client(url)
    assert "https" in str(caught.value.hint)


async def test_loopback_ignores_a_proxy(
    make_client: MakeClient, server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy from the environment does not get to see a key that stays on this machine."""
    with LoopbackServer(lambda _: StubReply()) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.base_url)
        client = make_client()
        await client.json("GET", "/a")
        await client.aclose()
        assert proxy.requests == []
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_redirect_is_not_followed(
    status: int, client: HttpClient, server: LoopbackServer
) -> None:
    """A redirect to another host is an error that names the place; nothing is sent there."""
    with LoopbackServer(lambda _: StubReply()) as other:
        server.fail(OtherAnswer(status=status, headers={"Location": f"{other.base_url}/v1"}))
        with pytest.raises(ProtocolError, match=str(other.port)) as caught:
            await client.json("GET", "/a")
        assert other.requests == []
    assert "base URL" in str(caught.value.hint)


@pytest.mark.parametrize(
    "fault",
    [
        OtherAnswer(status=200, body=b'{"id": "x", "sta'),
        OtherAnswer(status=200, body="<html>Sign in</html>", content_type="text/html"),
        OtherAnswer(status=200, body=[1, 2]),
        OtherAnswer(status=200, body=b""),
    ],
)
async def test_answer_that_is_no_object_breaks_the_protocol(
    fault: OtherAnswer, client: HttpClient, server: LoopbackServer
) -> None:
    """Half a JSON document, a web page, a list or nothing: an error with the beginning of it."""
    server.fail(fault)
    with pytest.raises(ProtocolError) as caught:
        await client.json("GET", "/a")
    assert caught.value.excerpt == fault.content().decode()


async def test_html_error_page_is_reported(client: HttpClient, server: LoopbackServer) -> None:
    """An error page of a proxy is a server that failed, with its words."""
    page = OtherAnswer(status=502, body="<html>Bad gateway</html>", content_type="text/html")
    server.fail(page, times=9)
    with pytest.raises(BackendUnavailable, match="Bad gateway"):
        await client.json("GET", "/a")


async def test_no_error_shows_the_key(client: HttpClient, server: LoopbackServer) -> None:
    """A server that repeats our secrets in its errors does not get them into ours."""
    said = {"detail": "bad key first-key and token gh-secret-1"}
    for status in (400, 401, 422, 500, 418):
        server.fail(OtherAnswer(status=status, body=said), times=1)
        with pytest.raises(Exception, match=r"redacted|protocol|status 418") as caught:
            await client.json("POST", "/a", body={}, secrets=[SecretStr("gh-secret-1")])
        shown = repr(pickle.loads(pickle.dumps(caught.value)).__dict__)
        assert "first-key" not in shown
        assert "gh-secret-1" not in shown


async def test_excerpt_hides_the_key_and_data_keeps_it(
    client: HttpClient, server: LoopbackServer
) -> None:
    """An unreadable answer is shown without the key; a readable one is left as it is."""
    server.fail(OtherAnswer(status=200, body="you sent first-key"))
    with pytest.raises(ProtocolError) as caught:
        await client.json("GET", "/a")
    assert "first-key" not in caught.value.excerpt
    server.fail(OtherAnswer(status=200, body={"name": "first-key"}))
    assert await client.json("GET", "/a") == {"name": "first-key"}


async def test_excerpt_hides_what_the_body_held(client: HttpClient, server: LoopbackServer) -> None:
    """A secret that a proxy's page repeats is not shown, not even the half at the cut."""
    secret = "gh-secret-" + "1" * 30
    page = f"you sent {secret} " + "x" * (2000 - 20 - len(secret)) + secret
    server.fail(OtherAnswer(status=200, body=page))
    with pytest.raises(ProtocolError) as caught:
        await client.json("POST", "/a", body={}, secrets=[SecretStr(secret)])
    assert "gh-secret" not in caught.value.excerpt


async def test_events_are_logged_without_the_key(
    client: HttpClient, server: LoopbackServer
) -> None:
    """A configured log is told of answers and failures, never of the key."""
    server.fail(SAFE)
    structlog.configure()
    try:
        with capture_logs() as events:
            await client.json("GET", "/a", query=[("q", "private")])
    finally:
        structlog.reset_defaults()
    ours = [event for event in events if event["event"].startswith("http.")]
    assert [(event["event"], event.get("status")) for event in ours] == [
        ("http.answered", 503),
        ("http.failed", None),
        ("http.retry", None),
        ("http.answered", 200),
    ]
    assert "first-key" not in str(events)


@pytest.mark.parametrize("name", ["X-Request-Id", "mistral-correlation-id"])
async def test_name_of_a_request_is_logged(
    name: str, client: HttpClient, server: LoopbackServer
) -> None:
    """What the server calls a request is said with it, so that its support finds it."""
    server.fail(OtherAnswer(status=503, headers={name: "abc-1"}))
    structlog.configure()
    try:
        with capture_logs() as events:
            await client.json("GET", "/a")
    finally:
        structlog.reset_defaults()
    assert [event.get("request_id") for event in events] == ["abc-1", "abc-1", "abc-1", None]


async def test_unconfigured_log_stays_silent(
    client: HttpClient, server: LoopbackServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program that uses the package as a library finds nothing on its output."""
    structlog.reset_defaults()
    server.fail(SAFE)
    await client.json("GET", "/a")
    assert len(server.requests) == 2
    assert capsys.readouterr() == ("", "")


async def test_closing_twice_is_fine(client: HttpClient) -> None:
    """Closing is safe to repeat, and safe before anything was asked."""
    await client.aclose()
    await client.json("GET", "/a")
    await client.aclose()
    await client.aclose()


# -- hostile answers ---------------------------------------------------------------------------


def coded(content: bytes, coding: str = "gzip", status: int = 200) -> StubReply:
    return StubReply(status=status, content=content, headers={"Content-Encoding": coding})


async def test_a_compressed_answer_is_read(
    client: HttpClient, server: LoopbackServer, answer_by: AnswerBy
) -> None:
    """A gzip coding is asked for and undone, however small the pieces are."""
    text = json.dumps({"text": "0" * 2_000_000, "more": random.Random(1).randbytes(9).hex()})
    answer_by(lambda _: coded(gzip.compress(text.encode())))
    assert await client.json("GET", "/a") == json.loads(text)
    assert server.requests[0].headers["accept-encoding"] == "gzip"


@pytest.mark.parametrize("status", [200, 502])
@pytest.mark.parametrize("coding", ["gzip, gzip", "gzip,gzip,gzip", "br", "deflate", "x" * 5000])
async def test_an_answer_of_another_coding_is_not_decompressed(
    client: HttpClient, answer_by: AnswerBy, coding: str, status: int
) -> None:
    """A few kilobytes that are compressed twice would become gigabytes."""
    bomb = gzip.compress(gzip.compress(bytes(2**26), compresslevel=1))
    answer_by(lambda _: coded(bomb, coding, status))
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="content encoding") as caught:
        await client.json("GET", "/a")
    assert len(caught.value.message) < 500
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


@pytest.mark.parametrize("status", [200, 502])
async def test_a_compressed_answer_is_bounded(
    client: HttpClient, answer_by: AnswerBy, status: int
) -> None:
    """No more of it is decompressed than an answer may have."""
    bomb = gzip.compress(b'{"message": "' + b"0" * 2**27, compresslevel=1)
    answer_by(lambda _: coded(bomb, status=status))
    kind = ProtocolError if status == 200 else BackendUnavailable
    with pytest.raises(kind, match="larger than 64 MiB" if status == 200 else "502"):
        await client.json("GET", "/a", repeatable=False)


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b'{"a": 1}', mtime=0)[:-9]], ids=["no gzip", "cut off"]
)
async def test_a_broken_coding_breaks_the_protocol(
    client: HttpClient, answer_by: AnswerBy, content: bytes
) -> None:
    """What cannot be decompressed, or ends too early."""
    answer_by(lambda _: coded(content))
    with pytest.raises(ProtocolError, match=r"response is (corrupt|truncated)"):
        await client.json("GET", "/a")


@pytest.mark.parametrize("status", [200, 422, 502])
@pytest.mark.parametrize("depth", [70, 500, 950, 60_000])
@pytest.mark.parametrize("form", ['{{"data": {}}}', '{{"detail": [{{"msg": {}}}]}}', "{}"])
async def test_a_deep_answer_is_an_error_of_ours(
    client: HttpClient, answer_by: AnswerBy, status: int, depth: int, form: str
) -> None:
    """Nested as deep as no document is, it raises no RecursionError, here or later."""
    content = form.format("[" * depth + "]" * depth).encode()
    answer_by(lambda _: StubReply(status=status, content=content))
    with pytest.raises(TrainingBackendError) as caught:
        await client.json("GET", "/a", repeatable=False)
    assert isinstance(caught.value, ProtocolError) or status != 200


@pytest.mark.parametrize("content", ['{"a": ' + "9" * 5000 + "}", '{"a": NaN, "b": 1e999}', "{"])
async def test_strange_numbers_are_no_bug(
    client: HttpClient, answer_by: AnswerBy, content: str
) -> None:
    """They are read or break the protocol."""
    answer_by(lambda _: StubReply(content=content.encode()))
    with suppress(ProtocolError):
        assert "a" in await client.json("GET", "/a")


@pytest.mark.parametrize("status", [200, 302, 429, 503])
@pytest.mark.parametrize(
    "value",
    [
        "Mon, 01 Jan 2024 00:00:00 +99999999979999",
        "Fri, 31 Dec 9999 23:59:59 -2359",
        "Mon, 01 Jan 0001 00:00:00 +2359",
        "9" * 400,
        "1e308",
        "nan",
        "-5",
        "\xb2",
    ],
)
async def test_strange_headers_are_no_bug(
    make_client: MakeClient, answer_by: AnswerBy, status: int, value: str
) -> None:
    """A date outside the calendar, or a number that is too large, is as good as none."""
    names = ("Date", "Retry-After", "X-RateLimit-Limit-Req-Minute", "Location", "X-Request-Id")
    answer_by(
        lambda _: StubReply(status=status, content=b"{}", headers=dict.fromkeys(names, value))
    )
    client = make_client(attempts=1)
    with suppress(TrainingBackendError):
        await client.json("GET", "/a")
    await client.aclose()
