"""Downloads: whole or not at all."""

import os
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from training_backends import BackendUnavailable, TrainingBackendError
from training_backends.net.client import HttpClient
from training_backends.testing.faults import CutAnswer, OtherAnswer
from training_backends.testing.server import LoopbackServer

pytestmark = pytest.mark.anyio
CONTENT = os.urandom(300_000)
FILE = OtherAnswer(status=200, body=CONTENT, content_type="application/octet-stream")


@pytest.fixture
async def client(make_client: Callable[..., HttpClient]) -> AsyncGenerator[HttpClient, None]:
    """Make a client, and close it in the end."""
    made = make_client()
    yield made
    await made.aclose()


async def test_content_arrives(client: HttpClient, server: LoopbackServer, tmp_path: Path) -> None:
    """The file holds what was sent, its folder is made, progress ends at the total."""
    server.fail(FILE)
    told: list[tuple[int, int]] = []
    target = tmp_path / "new" / "model.bin"
    assert (
        await client.download("/x", target, on_progress=lambda *step: told.append(step)) == target
    )
    assert target.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))


async def test_broken_download_leaves_nothing(
    client: HttpClient, server: LoopbackServer, tmp_path: Path
) -> None:
    """A download that breaks every time leaves neither a file nor a part of one."""
    server.fail(CutAnswer(after=5), times=9)
    with pytest.raises(BackendUnavailable):
        await client.download("/x", tmp_path / "model.bin")
    assert list(tmp_path.iterdir()) == []
    assert len(server.requests) == 3


async def test_old_file_stays_until_the_new_one_is_whole(
    client: HttpClient, server: LoopbackServer, tmp_path: Path
) -> None:
    """What lay there before is replaced by a whole download only."""
    target = tmp_path / "model.bin"
    target.write_bytes(b"old")
    server.fail(CutAnswer(after=5), times=3)
    with pytest.raises(BackendUnavailable):
        await client.download("/x", target)
    assert target.read_bytes() == b"old"
    server.fail(FILE)
    await client.download("/x", target)
    assert target.read_bytes() == CONTENT


async def test_unwritable_target_is_said(client: HttpClient, tmp_path: Path) -> None:
    """A target that cannot be written is an error that names it and the reason."""
    (tmp_path / "file").touch()
    with pytest.raises(TrainingBackendError, match=r"file/model\.bin cannot be written"):
        await client.download("/x", tmp_path / "file" / "model.bin")
