"""A scripted backend and clients over one store."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path

import pytest

from training_backends import AsyncTrainingClient, LogRecord, TrainingConfig
from training_backends.testing.backend import ScriptedBackend

MakeConfig = Callable[..., TrainingConfig]


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
async def client(tmp_path: Path, backend: ScriptedBackend) -> AsyncIterator[AsyncTrainingClient]:
    async with AsyncTrainingClient(
        home=tmp_path / "home", backends={"scripted": backend}
    ) as client:
        yield client


@pytest.fixture
async def other(tmp_path: Path, backend: ScriptedBackend) -> AsyncIterator[AsyncTrainingClient]:
    """A second client on the same home, as another process has it."""
    async with AsyncTrainingClient(
        home=tmp_path / "home", backends={"scripted": backend}
    ) as client:
        yield client


async def read_log(
    client: AsyncTrainingClient, run_id: str, *, after: str | None = None, follow: bool = False
) -> Sequence[LogRecord]:
    """Read a log to its end."""
    async with aclosing(client.logs(run_id, after=after, follow=follow)) as records:
        return [record async for record in records]
