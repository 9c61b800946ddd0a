"""A training file that is larger than the server takes goes there in parts, each once."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from training_backends import DatasetError, TrainingConfig
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.mistral.settings import MistralSettings
from training_backends.core.backend import JSONValue
from training_backends.protocols.mistral.wire import MAX_FILE_BYTES
from training_backends.testing.faults import LoseAnswer
from training_backends.testing.journal import Killed, MemoryJournal
from training_backends.testing.provider import ScriptedProvider
from training_backends.testing.stored import StoredJob

pytestmark = pytest.mark.anyio
MakeJournal = Callable[..., MemoryJournal]
MakeBackend = Callable[..., MistralAPIBackend]
LIMIT = 600
PARTS = 4
"""Of the 20 rows of the training file, which has about 2 kB."""


@pytest.fixture
def make_backend(make_backend: MakeBackend) -> MakeBackend:
    """Make backends for a server that takes small files only."""

    def make(**settings: object) -> MistralAPIBackend:
        return make_backend(**{"max_file_bytes": LIMIT, **settings})

    return make


def trained_on(provider: ScriptedProvider, job: StoredJob) -> list[tuple[bytes, float]]:
    """Return the content and weight of each file of a job."""
    return [
        (provider.files[file["file_id"]].content, file["weight"])
        for file in job.asked["training_files"]
    ]


def uploads(provider: ScriptedProvider) -> int:
    """Return how many uploads there were."""
    return len(provider.asked("POST", "/files"))


def write_rows(path: Path, numbers: Sequence[int], start: bytes = b"") -> Path:
    """Write a file of rows of about 100 bytes."""
    rows = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "x"}]}
        for n in numbers
    ]
    path.write_bytes(start + "".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def test_the_limit_is_the_services_own() -> None:
    """Where nothing is set, files up to 512 MB go whole."""
    assert MistralSettings().max_file_bytes == MAX_FILE_BYTES == 512_000_000


async def test_parts_make_up_the_file(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_config: Callable[..., TrainingConfig],
    make_journal: MakeJournal,
    train_file: Path,
) -> None:
    """Parts follow each other, end with a line, keep the limit and the weight of their file."""
    small = write_rows(train_file.with_name("small.jsonl"), range(100, 103))
    data = {"train": [{"path": train_file, "weight": 2}, small]}
    journal = make_journal(make_config(model="open-mistral-7b", data=data))
    await backend.launch(journal.run, journal)
    *parts, last = trained_on(provider, next(iter(provider.jobs.values())))
    assert last == (small.read_bytes(), 1.0)
    assert len(parts) == PARTS
    assert b"".join(content for content, _ in parts) == train_file.read_bytes()
    assert all(len(content) <= LIMIT and content.endswith(b"\n") for content, _ in parts)
    assert {weight for _, weight in parts} == {2.0}


async def test_nothing_is_copied(
    backend: MistralAPIBackend, make_journal: MakeJournal, tmp_path: Path
) -> None:
    """The parts are sent from where the file lies; no other file is written."""
    before = sorted(tmp_path.rglob("*"))
    journal = make_journal()
    await backend.launch(journal.run, journal)
    assert sorted(tmp_path.rglob("*")) == before


async def test_progress_is_that_of_the_file(
    backend: MistralAPIBackend, make_journal: MakeJournal, train_file: Path
) -> None:
    """Whoever watches sees one file grow to its end, whatever it is cut into."""
    journal = make_journal()
    await backend.launch(journal.run, journal)
    size = train_file.stat().st_size
    assert {(name, total) for name, _, total in journal.sent} == {("upload train.jsonl", size)}
    done = [sent for _, sent, _ in journal.sent]
    assert done == sorted(done)
    assert done[-1] == size


async def test_file_at_the_limit_goes_whole(
    make_backend: MakeBackend,
    provider: ScriptedProvider,
    make_journal: MakeJournal,
    train_file: Path,
) -> None:
    """Only what is larger than the limit is cut."""
    backend = make_backend(max_file_bytes=train_file.stat().st_size)
    journal = make_journal()
    await backend.launch(journal.run, journal)
    await backend.aclose()
    assert uploads(provider) == 1


async def test_byte_order_mark_stays_at_the_start(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_config: Callable[..., TrainingConfig],
    make_journal: MakeJournal,
    tmp_path: Path,
) -> None:
    """No part but the first begins with what the file begins with."""
    mark = "\ufeff".encode()
    path = write_rows(tmp_path / "marked.jsonl", range(20), start=mark)
    journal = make_journal(make_config(model="open-mistral-7b", data={"train": path}))
    await backend.launch(journal.run, journal)
    first, *others = [content for content, _ in trained_on(provider, *provider.jobs.values())]
    assert first.startswith(mark)
    assert not any(mark in content for content in others)


async def test_blank_end_is_no_part(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_journal: MakeJournal,
    train_file: Path,
) -> None:
    """Blank lines that would fill a part of their own are not sent: a server refuses such files."""
    content = train_file.read_bytes()
    train_file.write_bytes(content + b"\n" * 3 * LIMIT)
    journal = make_journal()
    await backend.launch(journal.run, journal)
    parts = [part for part, _ in trained_on(provider, *provider.jobs.values())]
    assert all(part.strip() for part in parts)
    assert b"".join(parts).strip() == content.strip()


async def test_killed_anywhere_uploads_each_part_once(
    make_backend: MakeBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """Wherever a launch is killed, each part is uploaded once, and one job trains on all."""
    survived = False
    point = 0
    while not survived:
        provider.files.clear()
        provider.jobs.clear()
        provider.requests.clear()
        journal = make_journal(kill_at=point)
        for _ in range(2):
            backend = make_backend()
            with suppress(Killed):
                await backend.launch(journal.run, journal)
                survived = journal.kill_at is not None
            await backend.aclose()
            if survived:
                break
            journal.kill_at = None
            journal.points = 0
        assert uploads(provider) == len(provider.files) == PARTS
        (job,) = provider.jobs.values()
        assert job.starts == 1
        assert [file["file_id"] for file in job.asked["training_files"]] == list(provider.files)
        provider.set_status(job.id, "SUCCESS")
        point += 1
    assert point > 4 * PARTS


async def test_lost_answers_upload_each_part_once(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A part whose answer is lost is found at the server, not sent again."""
    provider.fail(LoseAnswer(), method="POST", path="/files", times=PARTS)
    journal = make_journal()
    await backend.launch(journal.run, journal)
    assert uploads(provider) == len(provider.files) == PARTS


async def test_only_the_lost_part_is_uploaded_again(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """What another run has uploaded is used again, part by part."""
    first = make_journal()
    await backend.launch(first.run, first)
    provider.set_status(str(first.run.remote_id), "SUCCESS")
    lost = list(provider.files)[1]
    content = provider.files.pop(lost).content
    provider.requests.clear()
    second = make_journal()
    second.uploads = first.uploads
    await backend.launch(second.run, second)
    assert uploads(provider) == 1
    assert list(provider.files.values())[-1].content == content
    parts = [part for part, _ in trained_on(provider, provider.jobs[str(second.run.remote_id)])]
    assert parts[1] == content


async def test_file_that_changes_between_parts_is_not_trained_on(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_journal: MakeJournal,
    train_file: Path,
) -> None:
    """Parts of different age are never put together: the launch ends, no job is made."""
    journal = make_journal()
    upload = journal.upload

    async def change(*args: Any, **kwargs: Any) -> str:
        found = await upload(*args, **kwargs)
        train_file.write_bytes(train_file.read_bytes().replace(b"It is", b"It IS"))
        return found

    journal.upload = change  # type: ignore[method-assign]
    with pytest.raises(DatasetError, match="changed during the upload"):
        await backend.launch(journal.run, journal)
    assert provider.jobs == {}


async def test_row_beyond_the_limit_is_named(
    make_backend: MakeBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A file that cannot be cut between lines is refused with the line, before any upload."""
    backend = make_backend(max_file_bytes=50)
    journal = make_journal()
    with pytest.raises(DatasetError) as caught:
        await backend.launch(journal.run, journal)
    await backend.aclose()
    assert [issue.line for issue in caught.value.issues] == [1]
    assert provider.files == {}


async def test_another_limit_does_not_disturb_a_create(
    make_backend: MakeBackend,
    provider: ScriptedProvider,
    make_journal: MakeJournal,
) -> None:
    """A launch that was cut off at its create goes on, though files are cut otherwise now."""
    journal = make_journal()
    step = journal.step

    async def die(name: str, *args: Any, **kwargs: Any) -> JSONValue:
        if name == "create":
            raise Killed
        return await step(name, *args, **kwargs)

    journal.step = die  # type: ignore[method-assign]
    backend = make_backend()
    with pytest.raises(Killed):
        await backend.launch(journal.run, journal)
    await backend.aclose()
    journal.step = step  # type: ignore[method-assign]
    other = make_backend(max_file_bytes=2 * LIMIT)
    await other.launch(journal.run, journal)
    await other.aclose()
    (job,) = provider.jobs.values()
    assert job.starts == 1


@pytest.mark.parametrize("weights", [(1, 1), (3, 3), (1, 2)])
async def test_resumed_run_trains_on_the_same_parts(
    weights: tuple[int, int],
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_config: Callable[..., TrainingConfig],
    make_journal: MakeJournal,
) -> None:
    """What was uploaded in parts is used again with its weights, and not sent again."""
    train_file = make_config().data.train[0].local_path
    other = write_rows(train_file.with_name("other.jsonl"), range(50))
    paths = zip((train_file, other), weights, strict=True)
    data = {"train": [{"path": path, "weight": weight} for path, weight in paths]}
    first = make_journal(make_config(model="open-mistral-7b", data=data))
    await backend.launch(first.run, first)
    provider.set_status(str(first.run.remote_id), "FAILED")
    run = first.run.updated(await backend.status(first.run))
    sent = uploads(provider)
    second = make_journal(run.config)
    await backend.resume(run, second.run, second)
    old, new = provider.jobs.values()
    assert new.asked["training_files"] == old.asked["training_files"]
    assert uploads(provider) == sent
