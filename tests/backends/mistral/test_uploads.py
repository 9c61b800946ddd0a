"""Uploading: each content is at the provider once, and is there when it is trained on."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from training_backends import ProtocolError, TrainingConfig
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.core.backend import JSONValue
from training_backends.testing.journal import Killed, MemoryJournal
from training_backends.testing.provider import ScriptedProvider

pytestmark = pytest.mark.anyio
MakeJournal = Callable[..., MemoryJournal]


async def test_uploads_tell_their_progress(
    backend: MistralAPIBackend, make_journal: MakeJournal, train_file: Path
) -> None:
    """The journal hears of an upload up to its last byte."""
    journal = make_journal()
    await backend.launch(journal.run, journal)
    size = train_file.stat().st_size
    assert journal.sent[-1] == ("upload train.jsonl", size, size)


async def test_file_is_uploaded_once_for_all_runs(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A second run on the same data finds the file by its content's name."""
    for _ in range(2):
        journal = make_journal()
        await backend.launch(journal.run, journal)
        provider.set_status(str(journal.run.remote_id), "SUCCESS")
    assert len(provider.asked("POST", "/files")) == 1


async def test_other_content_under_the_same_name_is_uploaded(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_journal: MakeJournal,
    train_file: Path,
) -> None:
    """A file of the same name and size, changed since, is never mistaken for the old one."""
    first = make_journal()
    await backend.launch(first.run, first)
    provider.set_status(str(first.run.remote_id), "SUCCESS")
    train_file.write_bytes(train_file.read_bytes().replace(b"It is", b"It IS"))
    second = make_journal()
    await backend.launch(second.run, second)
    assert len(provider.files) == 2
    assert len({file.size for file in provider.files.values()}) == 1


async def test_vanished_upload_is_done_again(
    backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """A file remembered by the journal and deleted at the provider is uploaded again."""
    journal = make_journal(kill_at=4)
    with pytest.raises(Killed):
        await backend.launch(journal.run, journal)
    assert list(journal.rows) == [next(iter(journal.rows)), "before create"]
    provider.files.clear()
    journal.kill_at = None
    await backend.launch(journal.run, journal)
    assert len(provider.files) == len(provider.jobs) == 1


async def test_known_content_is_not_looked_for_by_name(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_journal: MakeJournal,
    train_file: Path,
    make_config: Callable[..., TrainingConfig],
) -> None:
    """A content that any run has uploaded is asked for by its id, whatever its file is called."""
    first = make_journal()
    await backend.launch(first.run, first)
    provider.set_status(str(first.run.remote_id), "SUCCESS")
    ((scope, _),) = first.uploads
    assert scope.startswith(provider.base_url)
    assert "test-key" not in scope
    other = train_file.rename(train_file.with_name("other.jsonl"))
    second = make_journal(make_config(model="open-mistral-7b", data={"train": other}))
    second.uploads = first.uploads
    provider.requests.clear()
    await backend.launch(second.run, second)
    (file_id,) = provider.files
    assert [request.path for request in provider.requests if "files" in request.path] == [
        f"/v1/files/{file_id}"
    ]


@pytest.mark.parametrize("loss", ["deleted", "gone", "another size"])
async def test_known_content_that_is_lost_is_uploaded_again(
    loss: str, backend: MistralAPIBackend, provider: ScriptedProvider, make_journal: MakeJournal
) -> None:
    """What the provider no longer has, or has otherwise, is not trained on."""
    first = make_journal()
    await backend.launch(first.run, first)
    provider.set_status(str(first.run.remote_id), "SUCCESS")
    (old,) = provider.files
    if loss == "gone":
        provider.files.clear()
    else:
        file = provider.files[old]
        file.filename = "renamed.jsonl"
        file.size += 1 if loss == "another size" else 0
        file.deleted = loss == "deleted"
    second = make_journal()
    second.uploads = first.uploads
    await backend.launch(second.run, second)
    new = list(provider.files)[-1]
    assert new != old
    assert provider.jobs[str(second.run.remote_id)].asked["training_files"][0]["file_id"] == new
    assert new in second.uploads.values()


async def test_killed_anywhere_uploads_once(
    make_backend: Callable[..., MistralAPIBackend],
    provider: ScriptedProvider,
    make_journal: MakeJournal,
) -> None:
    """Wherever a launch is killed, its content is uploaded once, and known from then on."""
    for point in range(4):
        provider.files.clear()
        provider.requests.clear()
        journal = make_journal(kill_at=point)
        for _ in range(2):
            backend = make_backend()
            with suppress(Killed):
                await backend.launch(journal.run, journal)
            await backend.aclose()
            journal.kill_at = None
        assert len(provider.asked("POST", "/files")) == 1
        assert list(journal.uploads.values()) == list(provider.files)
        provider.set_status(str(journal.run.remote_id), "SUCCESS")


async def test_server_that_keeps_losing_files_is_reported(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    make_journal: MakeJournal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that forgets each file is told as such, not uploaded to for ever."""
    journal = make_journal()
    step = journal.step

    async def remember(name: str, *args: Any, **kwargs: Any) -> JSONValue:
        if name.startswith("upload:"):
            return "0" * 36  # as if each had been uploaded by an earlier launch
        return await step(name, *args, **kwargs)

    journal.step = remember  # type: ignore[method-assign]
    with pytest.raises(ProtocolError, match="repeatedly lost"):
        await backend.launch(journal.run, journal)
    assert provider.jobs == {}
