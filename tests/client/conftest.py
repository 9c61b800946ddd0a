"""A scripted backend, places for stores, and clients over one store."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from itertools import count
from pathlib import Path

import pytest

from tests.postgres import Postgres
from training_backends import AsyncTrainingClient, LogRecord, TrainingConfig
from training_backends.testing.backend import ScriptedBackend

MakeConfig = Callable[..., TrainingConfig]
NewUrl = Callable[[], str]

both_stores = pytest.mark.parametrize("store_url", ["sqlite", "postgresql"], indirect=True)
"""For tests of what several clients on one store have to agree on."""


@pytest.fixture(params=["sqlite", "postgresql"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> NewUrl:
    """Name one place after the other where there is no store yet."""
    if request.param == "sqlite":
        numbers = count(1)
        return lambda: f"sqlite:///{tmp_path / 'state' / str(next(numbers)) / 'runs.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_url


@pytest.fixture
def url(new_url: NewUrl) -> str:
    return new_url()


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend()


@pytest.fixture
def store_url(request: pytest.FixtureRequest) -> str | None:
    """Return where the clients' store is, in tests that run on `both_stores`; None: at home."""
    if getattr(request, "param", None) != "postgresql":
        return None
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_url()


@pytest.fixture
async def client(
    tmp_path: Path, backend: ScriptedBackend, store_url: str | None
) -> AsyncIterator[AsyncTrainingClient]:
    async with AsyncTrainingClient(
        home=tmp_path / "home", store_url=store_url, backends={"scripted": backend}
    ) as client:
        yield client


@pytest.fixture
async def other(
    tmp_path: Path, backend: ScriptedBackend, store_url: str | None
) -> AsyncIterator[AsyncTrainingClient]:
    """A second client on the same home, as another process has it."""
    async with AsyncTrainingClient(
        home=tmp_path / "home", store_url=store_url, backends={"scripted": backend}
    ) as client:
        yield client


async def read_log(
    client: AsyncTrainingClient,
    run_id: str,
    *,
    after: str | None = None,
    tail: int | None = None,
    follow: bool = False,
) -> Sequence[LogRecord]:
    """Read a log to its end."""
    async with aclosing(client.logs(run_id, after=after, tail=tail, follow=follow)) as records:
        return [record async for record in records]
