"""Files above the limit of a request are uploaded in parts, each content once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.backends.openai.conftest import KEY, MODEL
from training_backends import ConfigError, DatasetError, TrainingConfig
from training_backends.backends.openai.backend import OpenAIBackend
from training_backends.datasets.inspect import inspect
from training_backends.protocols.openai.wire import MAX_PART_BYTES
from training_backends.testing.faults import (
    CutAnswer,
    DropRequest,
    Fault,
    HangAnswer,
    LoseAnswer,
    OtherAnswer,
)
from training_backends.testing.journal import Killed, MemoryJournal
from training_backends.testing.openai_provider import ScriptedOpenAIProvider
from training_backends.testing.server import Received, StubReply

pytestmark = pytest.mark.anyio
NewJournal = Callable[..., MemoryJournal]
Make = Callable[..., OpenAIBackend]

PART = 1000


@pytest.fixture
def make_small(make_backend: Make) -> Make:
    """Make backends that upload everything in parts of 1,000 bytes."""

    def make(**settings: object) -> OpenAIBackend:
        return make_backend(max_request_bytes=PART, part_bytes=PART, **settings)

    return make


async def launch(backend: OpenAIBackend, journal: MemoryJournal) -> None:
    """Launch and close the backend."""
    try:
        await backend.launch(journal.run, journal)
    finally:
        await backend.aclose()


def stored(provider: ScriptedOpenAIProvider) -> bytes:
    """Return the content of the only file, which the only job uses."""
    (file,), (job,) = provider.files.values(), provider.jobs.values()
    assert job.asked["training_file"] == file.id
    return file.content


async def test_parts_are_joined_to_the_file(
    make_small: Make, provider: ScriptedOpenAIProvider, make_journal: NewJournal, train_file: Path
) -> None:
    """OpenAI's own client reads the content that was sent in parts, of which only one is small."""
    openai = pytest.importorskip("openai")
    journal = make_journal()
    await launch(make_small(), journal)
    content = train_file.read_bytes()
    assert stored(provider) == content
    (upload,) = provider.uploads.values()
    sizes = [len(part) for part in upload.parts.values()]
    assert sizes == [PART] * (len(content) // PART) + [len(content) % PART]
    assert not provider.asked("POST", "/files")
    assert [done for _, done, _ in journal.sent][-1] == len(content)
    assert {total for _, _, total in journal.sent} == {len(content)}
    async with openai.AsyncOpenAI(api_key=KEY, base_url=provider.url, max_retries=0) as theirs:
        (file,) = [file async for file in theirs.files.list(purpose="fine-tune")]
        assert (file.bytes, file.status) == (len(content), "processed")
        assert (await theirs.files.content(file.id)).read() == content


@pytest.mark.parametrize(
    "fault",
    [LoseAnswer(), DropRequest(), CutAnswer(), OtherAnswer(status=502), OtherAnswer(status=429)],
    ids=lambda fault: f"{type(fault).__name__}{getattr(fault, 'status', '')}",
)
@pytest.mark.parametrize("path", ["/uploads", "/parts", "/complete"])
async def test_lost_answer_makes_no_second_file(
    fault: Fault,
    path: str,
    *,
    make_small: Make,
    provider: ScriptedOpenAIProvider,
    make_journal: NewJournal,
    train_file: Path,
) -> None:
    """Each request may be lost; the upload continues, and there is one file."""
    provider.fail(fault, method="POST", path=path)
    await launch(make_small(), make_journal())
    assert stored(provider) == train_file.read_bytes()


async def test_complete_that_was_lost_before_the_list_shows_it(
    make_small: Make, provider: ScriptedOpenAIProvider, make_journal: NewJournal
) -> None:
    """A completed upload is looked for until its file is listed, not made again."""
    answer, hidden = provider.answer, 6

    def lag(request: Received) -> StubReply:
        nonlocal hidden
        if request.method == "GET" and request.path.endswith("/files") and provider.files:
            hidden -= 1
            if hidden > 0:
                return StubReply(content=b'{"object": "list", "data": [], "has_more": false}')
        return answer(request)

    provider.answer = lag  # type: ignore[method-assign]
    provider.fail(LoseAnswer(), method="POST", path="/complete")
    await launch(make_small(settle_timeout=5.0), make_journal())
    assert hidden <= 0
    assert len(provider.files) == len(provider.uploads) == 1


async def test_interrupted_upload_continues_with_the_missing_parts(
    make_small: Make, provider: ScriptedOpenAIProvider, make_journal: NewJournal, train_file: Path
) -> None:
    """Killed at any point, a launch sends at most one part again and leaves one file."""
    parts = -(-train_file.stat().st_size // PART)
    at = 0
    while True:
        journal = make_journal(kill_at=at)
        finished = True
        try:
            await launch(make_small(), journal)
        except Killed:
            finished = False
        journal.kill_at = None
        await launch(make_small(), journal)
        assert stored(provider) == train_file.read_bytes()
        assert len(provider.asked("POST", "/parts")) <= parts + 1
        assert len(provider.uploads) <= 2  # the first one may be unknown to us, and expires
        if finished:
            break
        at += 1
        for each in (provider.files, provider.jobs, provider.uploads, provider.requests):
            each.clear()
    assert at > 2 * parts


@pytest.mark.parametrize("says_so", ["clock", "server"])
async def test_expired_upload_is_made_again(
    says_so: str, make_small: Make, provider: ScriptedOpenAIProvider, make_journal: NewJournal
) -> None:
    """A launch that is repeated after an hour uploads all parts again."""
    if says_so == "clock":
        now = provider.clock
        provider.clock = lambda: now() - 4000
    provider.fail(OtherAnswer(status=500), path="/parts", skip=1, times=1000)
    journal = make_journal()
    with pytest.raises(Exception, match="500"):
        await launch(make_small(call_timeout=0.3), journal)
    provider.heal()
    (upload,) = provider.uploads.values()
    upload.status = "expired"
    await launch(make_small(), journal)
    assert [each.status for each in provider.uploads.values()] == ["expired", "completed"]
    assert len(provider.files) == 1


async def test_rejected_upload_is_cancelled(
    make_small: Make,
    provider: ScriptedOpenAIProvider,
    make_journal: NewJournal,
    train_file: Path,
) -> None:
    """The provider's own words are shown, and it keeps no parts."""
    train_file.write_text("no JSON\n" * 200)
    with pytest.raises((ConfigError, DatasetError), match="JSONL format"):
        await launch(make_small(), make_journal())
    (upload,) = provider.uploads.values()
    assert upload.status == "cancelled"
    assert not provider.files


async def test_file_that_changes_during_the_upload_is_not_completed(
    make_small: Make, provider: ScriptedOpenAIProvider, make_journal: NewJournal, train_file: Path
) -> None:
    """The upload is cancelled before its parts are joined."""
    answer = provider.answer

    def change(request: Received) -> StubReply:
        if request.path.endswith("/parts"):
            train_file.write_bytes(train_file.read_bytes().replace(b"plus", b"PLUS"))
        return answer(request)

    provider.answer = change  # type: ignore[method-assign]
    with pytest.raises(DatasetError, match="changed during the upload"):
        await launch(make_small(), make_journal())
    (upload,) = provider.uploads.values()
    assert (upload.status, provider.files) == ("cancelled", {})


async def test_server_without_uploads_in_parts_names_the_limit(
    make_small: Make, provider: ScriptedOpenAIProvider, make_journal: NewJournal
) -> None:
    """A server may have only the files API."""
    provider.fail(OtherAnswer(status=404), path="/uploads")
    with pytest.raises(DatasetError, match="limit for one request is 1,000"):
        await launch(make_small(), make_journal())


async def test_a_part_is_sent_in_pieces(
    make_small: Make, provider: ScriptedOpenAIProvider, make_journal: NewJournal
) -> None:
    """A hanging part neither ends nor repeats the parts before it."""
    provider.fail(HangAnswer(), path="/parts", skip=1)
    await launch(make_small(read_timeout=0.2, upload_timeout=0.2), make_journal())
    (upload,) = provider.uploads.values()
    assert len(set(upload.parts.values())) == len(upload.parts) - 1


@pytest.mark.parametrize(
    ("variant", "largest", "request_bytes"),
    [
        ("openai", 8 * 10**9, 512 * 10**6),
        ("azure", 9 * 10**9, 512 * 10**6),
        ("nebius", 5 * 10**9, 5 * 10**9),
    ],
)
def test_limits_follow_the_variant(
    variant: str, largest: int, request_bytes: int, make_backend: Make
) -> None:
    """Larger files are found invalid; a part has at most 64 MB."""
    backend = make_backend(variant=variant)
    assert backend.capabilities.provider_format.max_file_bytes == largest
    settings = backend._settings
    assert (settings.max_request_bytes, settings.part_bytes) == (request_bytes, MAX_PART_BYTES)


def test_file_above_the_limit_is_invalid(
    make_backend: Make, make_config: Callable[..., TrainingConfig]
) -> None:
    """One file is all that the protocol takes, so it is an error that names the limit."""
    rules = make_backend(max_file_bytes=100).capabilities.provider_format
    found = inspect(make_config(model=MODEL), provider_format=rules).issues
    (issue,) = [issue for issue in found if issue.code == "file_too_large"]
    assert issue.severity == "error"
    assert "openai allows 100" in issue.message
