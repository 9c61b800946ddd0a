"""Chunks of an inference server, rewritten for a client."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from training_backends.core.errors import ProtocolError
from training_backends.gateway.chat_stream import rewritten

pytestmark = pytest.mark.anyio

MODEL = 'ft:tiny:"odd"'
TEXTS = ["Hi", ' "model":"stub@main" ', "é\u2028\\n\n", '{"usage": 1, "delta": {}}', "", "[DONE]"]


def chunk(text: str, **fields: Any) -> dict[str, Any]:
    """Make a chunk with all that servers send."""
    return {
        "id": "c",
        "object": "chat.completion.chunk",
        "created": 5,
        "model": "stub@main",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
        **fields,
    }


def written(chunks: list[dict[str, Any]], *, compact: bool, ascii_only: bool, end: str) -> bytes:
    """Write a stream as one of many servers does."""
    separators = (",", ":") if compact else (", ", ": ")
    texts = [json.dumps(each, ensure_ascii=ascii_only, separators=separators) for each in chunks]
    return "".join(f"data: {text}{end}{end}" for text in texts).encode()


async def pieces(stream: bytes, size: int) -> AsyncIterator[bytes]:
    """Cut a stream as a network does."""
    for start in range(0, len(stream), size):
        yield stream[start : start + size]


async def read(stream: bytes, size: int = 7, usage: bytes | None = None) -> list[dict[str, Any]]:
    """Return the chunks that a client gets."""
    found = b""
    async for events in rewritten(
        pieces(stream, size), model=MODEL, adapt=lambda chunk: [chunk], usage=usage
    ):
        found += events
    return [json.loads(each.removeprefix(b"data: ")) for each in found.split(b"\n\n")[:-1]]


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("compact", [True, False])
async def test_only_the_name_of_the_model_changes(size: int, end: str, compact: bool) -> None:
    """Whatever the text is, and however the server writes and the network cuts."""
    chunks = [chunk(text) for text in TEXTS]
    stream = written(chunks, compact=compact, ascii_only=compact, end=end)
    expected = [{**each, "model": MODEL} for each in chunks]
    assert await read(stream + b"data: [DONE]\n\n" + stream, size) == expected


@pytest.mark.parametrize("compact", [True, False])
async def test_what_servers_leave_out_is_added(compact: bool) -> None:
    """A finish reason, the time, and a usage if there has to be one."""
    chunks = [chunk(text) for text in TEXTS]
    for each in chunks:
        del each["choices"][0]["finish_reason"]
    del chunks[3]["created"]
    stream = written(chunks, compact=compact, ascii_only=True, end="\n")
    found = await read(stream, usage=b'"usage":null,')
    assert all(each["choices"][0]["finish_reason"] is None for each in found)
    assert [each["created"] for each in found[:3]] == [5, 5, 5]
    assert found[3]["created"] > 5
    assert [each["choices"][0]["delta"]["content"] for each in found] == TEXTS
    assert all("usage" in each for each in found[1:3])


async def test_what_is_not_like_the_first_chunk_is_parsed() -> None:
    """Several choices, a usage, no choices, another name, several lines, and comments."""
    two = [{"index": n, "delta": {"content": str(n)}} for n in range(2)]
    odd = [
        chunk("a"),
        chunk("b", choices=two),
        chunk("c", usage={"total_tokens": 3}),
        chunk("", choices=[]),
        chunk("d", model="stub"),
        chunk("e", nested={"model": "stub@main"}),
    ]
    stream = written(odd, compact=True, ascii_only=True, end="\n")
    lines = json.dumps(chunk("f"), indent=1).replace("\n", "\ndata:")
    stream += b": ping\n\nevent: message\ndata: " + lines.encode() + b"\n\n"
    found = await read(stream)
    assert [len(each["choices"]) for each in found] == [1, 2, 1, 0, 1, 1, 1]
    assert {each["model"] for each in found} == {MODEL}
    assert found[1]["choices"][1]["finish_reason"] is None
    assert found[2]["usage"] == {"total_tokens": 3}
    assert found[5]["nested"] == {"model": "stub@main"}
    assert found[6]["choices"][0]["delta"]["content"] == "f"


@pytest.mark.parametrize(
    "event",
    [b"data: {", b"data: []", b'data: {"error": {"message": "x"}}', b'data: {"choices": [1]}'],
)
async def test_what_is_no_chunk_is_an_error(event: bytes) -> None:
    """Also in the middle of a stream."""
    start = written([chunk("a"), chunk("b")], compact=True, ascii_only=True, end="\n")
    with pytest.raises(ProtocolError, match="inference server sent"):
        await read(start + event + b"\n\n")


async def test_an_endless_event_is_an_error() -> None:
    """Rather than all of the memory."""
    with pytest.raises(ProtocolError, match="larger than"):
        await read(b"data: " + b"x" * 2**23, size=2**20)
