"""Lists that come in pages, by every scheme."""

import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest
from pydantic import BaseModel

from training_backends import ProtocolError
from training_backends.http.client import HttpClient
from training_backends.http.paging import (
    NextPage,
    after_last,
    first_match,
    next_cursor,
    next_link,
    next_number,
    paged,
)
from training_backends.testing.server import LoopbackServer, Received, StubReply

pytestmark = pytest.mark.anyio

AnswerBy = Callable[[Callable[[Received], StubReply]], None]
ENTRIES = [{"id": f"j{at}"} for at in range(7)]


@pytest.fixture
async def client(server: LoopbackServer) -> AsyncIterator[HttpClient]:
    made = HttpClient(server.base_url, query=[("v", "1")])
    yield made
    await made.aclose()


def listing(request: Received) -> StubReply:
    """Serve three entries a page, by any of the schemes."""
    query = dict(request.query)
    assert query["v"] == "1"
    assert query["kind"] == "x"
    ids = [entry["id"] for entry in ENTRIES]
    at = ids.index(query["after"]) + 1 if "after" in query else int(query.get("cursor", 0))
    at = at or 3 * int(query.get("page", 0))
    found, more = ENTRIES[at : at + 3], at + 3 < len(ENTRIES)
    document: Any = {"data": found, "has_more": more, "next_cursor": at + 3 if more else None}
    links = '</other>; rel="prev"'
    if more:
        links += f', <?kind=x&v=1&cursor={at + 3}>; title="a, b"; rel="last next"'
    return StubReply(content=json.dumps(document).encode(), headers={"Link": links})


@pytest.mark.parametrize(
    ("next_page", "requests"),
    [
        (after_last(), 3),
        (after_last(more=None), 4),
        (next_cursor(), 3),
        (next_number(), 4),
        (next_link(), 3),
        (None, 1),
    ],
)
async def test_every_entry_is_read_once(
    client: HttpClient,
    server: LoopbackServer,
    answer_by: AnswerBy,
    next_page: NextPage | None,
    requests: int,
) -> None:
    """All pages are asked for, with the query of the list, and none beyond the last."""
    answer_by(listing)
    found = paged(client, "/jobs", query=[("kind", "x")], next_page=next_page)
    assert [entry async for entry in found] == (ENTRIES if next_page else ENTRIES[:3])
    assert len(server.requests) == requests


async def test_a_list_that_does_not_advance_ends(
    client: HttpClient, server: LoopbackServer, answer_by: AnswerBy
) -> None:
    """A server that ignores the parameter repeats its page, which ends the list."""
    body = json.dumps({"data": ENTRIES[:2], "has_more": True}).encode()
    answer_by(lambda _: StubReply(content=body))
    found = [entry async for entry in paged(client, "/jobs", next_page=after_last())]
    assert (found, len(server.requests)) == (ENTRIES[:2], 2)


async def test_a_link_to_another_server_is_not_followed(
    client: HttpClient, server: LoopbackServer, answer_by: AnswerBy
) -> None:
    """The next page of a list is on the list's server."""
    link = '<https://evil.example/jobs?page=2>; rel="next"'
    answer_by(lambda _: StubReply(content=b'[{"id": "a"}]', headers={"Link": link}))
    with pytest.raises(ProtocolError, match="not on this server"):
        [entry async for entry in paged(client, "/jobs", items=None, next_page=next_link())]
    assert len(server.requests) == 1


async def test_what_is_no_list_is_an_error(client: HttpClient, answer_by: AnswerBy) -> None:
    """A response without the list is not an empty list."""
    answer_by(lambda _: StubReply(content=b'{"jobs": []}'))
    with pytest.raises(ProtocolError, match="no list 'data'"):
        [entry async for entry in paged(client, "/jobs")]


class Entry(BaseModel):
    id: str


async def test_the_first_match_ends_the_reading(
    client: HttpClient, answer_by: AnswerBy, server: LoopbackServer
) -> None:
    """Entries are parsed, and no page is read after that of the match."""
    answer_by(listing)
    listed = partial(
        paged, client, "/jobs", shape=Entry, query=[("kind", "x")], next_page=next_number()
    )
    assert await first_match(listed(), lambda entry: entry.id == "j1") == Entry(id="j1")
    assert len(server.requests) == 1
    assert await first_match(listed()) == Entry(id="j0")
    assert await first_match(listed(), lambda entry: entry.id == "j9") is None


async def test_an_entry_that_does_not_fit_is_an_error(
    client: HttpClient, answer_by: AnswerBy
) -> None:
    """The error names the request, the model and the field."""
    answer_by(lambda _: StubReply(content=b'{"data": [{"id": 7}]}'))
    with pytest.raises(ProtocolError, match=r"GET http.*/jobs: invalid Entry .* id: "):
        await first_match(paged(client, "/jobs", shape=Entry))
