"""Streams of lines and Server-Sent Events."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

import pytest

from training_backends import BackendUnavailable, ProtocolError
from training_backends.http.answer import ServerEvent, lines_of, server_events
from training_backends.http.client import HttpClient
from training_backends.testing.faults import CutAnswer, LoseAnswer, OtherAnswer, SlowAnswer
from training_backends.testing.server import LoopbackServer, Received, StubReply

pytestmark = pytest.mark.anyio

AnswerBy = Callable[[Callable[[Received], StubReply]], None]


async def in_pieces(content: bytes, size: int) -> AsyncIterator[bytes]:
    """Yield content as a network might."""
    for at in range(0, len(content), size):
        yield content[at : at + size]


async def until_error(lines: AsyncGenerator[str, None], why: str | None = None) -> list[str]:
    """Return the lines before the stream fails."""
    seen: list[str] = []

    async def read() -> None:
        async with aclosing(lines):
            async for line in lines:
                seen.append(line)  # noqa: PERF401  # kept when the stream fails

    with pytest.raises(BackendUnavailable, match=why):
        await read()
    return seen


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_lines_do_not_depend_on_pieces(size: int) -> None:
    """Line ends of both kinds, characters of several bytes and a last line without an end."""
    lines = [line async for line in lines_of(in_pieces("a\r\n\né\rb\nend".encode(), size))]
    assert lines == ["a", "", "é\rb", "end"]


async def test_a_line_without_end_is_limited() -> None:
    """A server cannot fill the memory."""
    with pytest.raises(ProtocolError, match="longer"):
        [line async for line in lines_of(in_pieces(b"x" * (2**20 + 9), 2**16))]


@pytest.mark.parametrize("size", [1, 5, 1000])
async def test_events_are_read_as_the_standard_says(size: int) -> None:
    """Comments, several data lines, ids that stay, unknown fields and an incomplete end."""
    text = (
        "\ufeff: hello\n\ndata: one\ndata:two\nid: 7\n\n"
        "event: end\r\ndata\r\nretry: 2500\r\nother: x\r\n\r\n"
        "id: 8\n\ndata: {}\n\ndata: cut"
    )
    events = server_events(lines_of(in_pieces(text.encode(), size)))
    assert [event async for event in events] == [
        ServerEvent(data="one\ntwo", id="7"),
        ServerEvent(data="", event="end", id="7", retry=2.5),
        ServerEvent(data="{}", id="8", retry=2.5),
    ]


async def test_opening_is_retried_and_a_cut_is_an_error(
    make_client: Callable[..., HttpClient], server: LoopbackServer, answer_by: AnswerBy
) -> None:
    """A busy server is asked again; a lost connection is told after the lines that arrived."""
    client = make_client()
    answer_by(lambda _: StubReply(content=b"one\ntwo\nthree\n"))
    server.fail(OtherAnswer(status=503))
    async with aclosing(client.lines("/log")) as lines:
        assert [line async for line in lines] == ["one", "two", "three"]
    server.fail(CutAnswer(after=5))
    assert await until_error(client.lines("/log")) == ["one"]
    assert len(server.requests) == 3
    await client.aclose()


async def test_lines_arrive_before_the_end_and_silence_is_an_error(
    make_client: Callable[..., HttpClient], server: LoopbackServer, answer_by: AnswerBy
) -> None:
    """A stream is read while it is sent, and given up on when nothing more comes."""
    client = make_client()
    answer_by(lambda _: StubReply(content=b"a\nb\n"))
    server.fail(SlowAnswer(pause=0.3))
    assert await until_error(client.lines("/log", silence=0.1), "timed out") == []
    server.fail(SlowAnswer(pause=0.01))
    async with aclosing(client.events("/log", last_id="3")) as events:
        assert [event async for event in events] == []
    assert server.requests[-1].headers["last-event-id"] == "3"
    assert server.requests[-1].headers["accept"] == "text/event-stream"
    await client.aclose()


async def test_a_stream_can_be_left_early(
    make_client: Callable[..., HttpClient], server: LoopbackServer, answer_by: AnswerBy
) -> None:
    """Leaving one frees its connection for the next call."""
    client = make_client(max_connections=1)
    answer_by(lambda _: StubReply(content=b"a\nb\nc\n" * 10_000))
    for _ in range(3):
        async with aclosing(client.lines("/log")) as lines:
            assert await anext(lines) == "a"
    assert len((await client.send("GET", "/log")).body) == 60_000
    await client.aclose()


async def test_events_of_a_post(
    make_client: Callable[..., HttpClient], server: LoopbackServer, answer_by: AnswerBy
) -> None:
    """A body makes it a POST, which is repeated only if it cannot have arrived."""
    client = make_client()
    answer_by(lambda _: StubReply(content=b"data: one\n\n", content_type="text/event-stream"))
    assert [each async for each in client.events("/chat", body={"a": 1})] == [
        ServerEvent(data="one")
    ]
    (request,) = server.asked("POST", "/chat")
    assert (request.body, request.headers["content-type"]) == (b'{"a": 1}', "application/json")
    server.fail(LoseAnswer())
    with pytest.raises(BackendUnavailable) as lost:
        [each async for each in client.events("/chat", body={})]
    assert lost.value.sent
    assert len(server.asked("POST", "/chat")) == 2
    await client.aclose()
