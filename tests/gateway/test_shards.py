"""A data file that is larger than a gateway takes reaches it in parts."""

from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from pydantic import SecretStr

from tests.gateway.conftest import KEY, ROWS, Site, jsonl, site
from training_backends import TrainingConfig, TrainingRun
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.mistral.settings import MistralSettings
from training_backends.core.backend import CredentialSource
from training_backends.core.run import new_run_id
from training_backends.testing.journal import Killed, MemoryJournal

pytestmark = pytest.mark.anyio
LIMIT = 300
"""Bytes; a row has about 100."""


class Secrets(CredentialSource):
    """Holds the gateway's key."""

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        """Return it."""
        del provider, profile
        return SecretStr(KEY)


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[Site]:
    """A gateway that takes small files only."""
    async with site(tmp_path / "home", max_upload_bytes=LIMIT) as opened:
        yield opened


@pytest.fixture
def journal(tmp_path: Path) -> MemoryJournal:
    """The journal of a run on a file that is too large for the gateway."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(jsonl())
    config = TrainingConfig.model_validate(
        {
            "model": "tiny-mistral",
            "data": {"train": {"path": path, "weight": 3}},
            "hyperparameters": {"training_steps": 10},
        }
    )
    return MemoryJournal(TrainingRun(id=new_run_id(), backend="mistral", config=config))


def client_of(small: Site) -> MistralAPIBackend:
    """Make a backend that knows the gateway's limit."""
    settings = MistralSettings(
        base_url=small.served.url, max_file_bytes=LIMIT, poll_min=0.01, poll_max=0.02
    )
    return MistralAPIBackend(credentials=Secrets(), settings=settings)


async def files_of(small: Site) -> list[dict[str, object]]:
    """Return the files that the gateway has, oldest first."""
    listed = (await small.http.get("/v1/files")).json()["data"]
    return sorted(listed, key=lambda file: file["created_at"])


async def test_parts_are_trained_on_together(small: Site, journal: MemoryJournal) -> None:
    """The job has each part once and in order, and the rows are those of the file."""
    backend = client_of(small)
    state = await backend.launch(journal.run, journal)
    await backend.aclose()
    assert not state.status.is_terminal
    job = await small.get(str(state.remote_id))
    contents = [
        (await small.http.get(f"/v1/files/{file_id}/content")).content
        for file_id in job["training_files"]
    ]
    assert len(contents) > 2
    assert all(len(content) <= LIMIT for content in contents)
    assert b"".join(contents) == jsonl()
    lines = [file["num_lines"] for file in await files_of(small)]
    assert sum(int(str(number)) for number in lines) == len(ROWS)


@pytest.mark.parametrize("point", [0, 2, 4, 5, 9, 13])
async def test_killed_between_parts_goes_on(
    point: int, small: Site, journal: MemoryJournal
) -> None:
    """A launch that dies on the way is taken up by the next one: each part is there once."""
    journal.kill_at = point
    for _ in range(2):
        backend = client_of(small)
        with suppress(Killed):
            await backend.launch(journal.run, journal)
        await backend.aclose()
        journal.kill_at = None
    found = await files_of(small)
    assert sum(int(str(file["bytes"])) for file in found) == len(jsonl())
    jobs = (await small.http.get("/v1/fine_tuning/jobs")).json()["data"]
    assert [len(job["training_files"]) for job in jobs] == [len(found)]
