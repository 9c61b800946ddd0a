"""The adapter of docs/plugins.md works, and keeps its key from the object store."""

import json
import re
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qs

import pytest
from pydantic import SecretStr

from tests.pages import DOCS, code_blocks
from training_backends import TrainingConfig, TrainingRun, TrainingStatus, plugins
from training_backends.core.run import LogSource
from training_backends.testing.faults import LoseAnswer, OtherAnswer
from training_backends.testing.journal import MemoryJournal
from training_backends.testing.server import LoopbackServer, Received, StubReply

pytestmark = pytest.mark.anyio

KEY = "key-of-the-account-0123456789"
SIGNATURE = "c2lnbmF0dXJl%2Fwith%2Fslashes"
NAMES: list[str] = vars(plugins)["__all__"]


class Account:
    """The one key of the tests."""

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        """Return it."""
        del provider, profile
        return SecretStr(KEY)


class ExampleProvider:
    """The server of the page, with its object store on another port."""

    def __init__(self) -> None:
        self.api = LoopbackServer(self.answer)
        self.store = LoopbackServer(self.keep)
        self.files: dict[str, bytes] = {}
        self.jobs: list[dict[str, Any]] = []

    def answer(self, request: Received) -> StubReply:
        """Serve the API."""
        assert request.headers["api-key"] == KEY
        assert ("api-version", "2026-11") in request.query
        if request.path == "/files":
            return self.register(parse_qs(request.body.decode()))
        if request.path.startswith("/files/"):
            known = request.path.removeprefix("/files/") in self.files
            return as_json({"status": "processed"} if known else {}, 200 if known else 404)
        if request.path == "/jobs" and request.method == "POST":
            self.jobs.append({"id": f"job-{len(self.jobs)}", **json.loads(request.body)})
            return as_json(self.jobs[-1], 201)
        if request.path == "/jobs":
            at = int(dict(request.query).get("at", "0"))
            link = f'</jobs?api-version=2026-11&at={at + 1}>; rel="next"'
            more = {"Link": link} if at + 1 < len(self.jobs) else {}
            return as_json(self.jobs[at : at + 1], headers=more)
        if request.path.endswith("/logs"):
            first = int(request.headers.get("last-event-id", "-1")) + 1
            text = "".join(f"id: {at}\ndata: line {at}\n\n" for at in range(first, 3))
            return StubReply(
                content=f": keep-alive\n\n{text}".encode(), content_type="text/event-stream"
            )
        return StubReply(
            status=302, headers={"Location": f"{self.store.base_url}/w?sig={SIGNATURE}"}
        )

    def register(self, form: dict[str, list[str]]) -> StubReply:
        """Return a presigned URL, or the id of the same content."""
        (file_id,) = form["checksum"]
        if file_id in self.files:
            return as_json({"file_id": file_id}, 409)
        place = f"{self.store.base_url}/{file_id}?sig={SIGNATURE}"
        return StubReply(status=302, headers={"Location": place, "X-File-Id": file_id})

    def keep(self, request: Received) -> StubReply:
        """Serve the object store."""
        assert request.target.endswith(f"?sig={SIGNATURE}")
        if request.method == "PUT":
            self.files[request.path[1:]] = request.body
        return StubReply(content=b"weights" if request.method == "GET" else b"")


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> StubReply:
    """Return a document."""
    return StubReply(status=status, content=json.dumps(value).encode(), headers=headers or {})


@pytest.fixture
def provider() -> Iterator[ExampleProvider]:
    made = ExampleProvider()
    with made.api, made.store:
        yield made


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """Execute the blocks of the page."""
    names: dict[str, Any] = {}
    for block in code_blocks("plugins.md", "python"):
        exec(compile(block.text, "plugins.md", "exec"), names)
    return names


@pytest.fixture
async def api(provider: ExampleProvider, page: dict[str, Any]) -> AsyncGenerator[Any, None]:
    made = page["ExampleAPI"](provider.api.base_url, Account())
    yield made
    await made.http.aclose()


@pytest.fixture
def journal(make_config: Callable[..., TrainingConfig]) -> MemoryJournal:
    return MemoryJournal(TrainingRun(id="r1", backend="example", config=make_config()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "one"}\n' * 100)
    return path


async def test_a_run_is_launched_once(
    provider: ExampleProvider, api: Any, page: dict[str, Any], journal: MemoryJournal, data: Path
) -> None:
    """The file goes to the store without the key, and a lost answer makes no second job."""
    provider.jobs = [{"id": f"other-{at}", "labels": {}} for at in range(3)]
    provider.api.fail(LoseAnswer(), method="POST", path="/jobs")
    job = await page["launch"](api, "r1", data, journal)
    assert [each["labels"] for each in provider.jobs[3:]] == [{"run": "r1"}]
    assert job == "job-3"
    assert list(provider.files.values()) == [data.read_bytes()]
    (put,) = provider.store.requests
    assert KEY not in str(put.headers)
    assert "api-key" not in put.headers
    assert put.headers["content-length"] == "1600"


async def test_a_known_content_is_not_uploaded_again(
    provider: ExampleProvider, api: Any, journal: MemoryJournal, data: Path
) -> None:
    """Neither if we know its id, nor if only the provider does, which is no error."""
    first = await api.file_id(data, journal)
    assert await api.file_id(data, journal) == first
    journal.uploads.clear()
    journal.rows.clear()
    assert await api.file_id(data, journal) == first
    assert len(provider.store.requests) == 1
    provider.files.clear()
    assert await api.file_id(data, journal) == first
    assert len(provider.store.requests) == 2


async def test_logs_continue_after_an_event(provider: ExampleProvider, api: Any) -> None:
    """Events are read with their ids, with which the next reading begins."""
    async with aclosing(api.log("job-0", None)) as events:
        assert [(e.id, e.data) async for e in events] == [(str(n), f"line {n}") for n in range(3)]
    async with aclosing(api.log("job-0", "1")) as events:
        assert [event.data async for event in events] == ["line 2"]


async def test_the_key_does_not_follow_a_redirect(
    provider: ExampleProvider, api: Any, tmp_path: Path
) -> None:
    """A result is downloaded from the store, which does not get to see the key."""
    target = await api.download("job-0", tmp_path / "weights")
    assert target.read_bytes() == b"weights"
    (get,) = provider.store.requests
    assert KEY not in str(get.headers)


async def test_errors_of_the_store_show_no_signature(
    provider: ExampleProvider, api: Any, journal: MemoryJournal, data: Path
) -> None:
    """An expired URL says what to do, and repeats nothing secret."""
    body = f"<Error><Code>AccessDenied</Code><Message>{SIGNATURE} expired</Message></Error>"
    provider.store.fail(OtherAnswer(status=403, body=body, content_type="application/xml"))
    with pytest.raises(plugins.PermissionDenied, match="AccessDenied") as caught:
        await api.file_id(data, journal)
    assert "expired" in str(caught.value.hint)
    assert SIGNATURE not in f"{caught.value} {caught.value.__notes__}"


async def test_spent_quota_is_not_asked_for_again(provider: ExampleProvider, api: Any) -> None:
    """A code of the provider decides about the error's class and whether to retry."""
    body = {"error": {"code": "insufficient_quota", "message": "Pay first."}}
    provider.api.fail(OtherAnswer(status=429, body=body), times=9)
    with pytest.raises(plugins.RateLimited, match="Pay first"):
        await api.find("r1")
    assert len(provider.api.requests) == 1


def test_the_page_lists_every_name() -> None:
    """Each public name of the toolkit is on its page, and nothing else is in its tables."""
    text = (DOCS / "plugins.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in text] == []
    assert {*first_cells(text.partition("\n## HTTP\n")[2])} <= set(NAMES)


def test_the_page_explains_every_status_and_source() -> None:
    """The tables of statuses and of log sources are complete."""
    text = (DOCS / "plugins.md").read_text()
    statuses, _, sources = text.partition("\n## Log sources\n")
    assert first_cells(statuses) == [status.value for status in TrainingStatus]
    assert first_cells(sources.partition("\n## ")[0]) == list(get_args(LogSource))


def first_cells(text: str) -> list[str]:
    """Return the names in the first column of the tables."""
    cells = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
