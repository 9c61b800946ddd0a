"""Followers are woken by what another process stores, where the database can tell."""

from collections.abc import Iterator

import anyio
import pytest
from anyio import to_thread

from tests.client.conftest import NewUrl
from tests.postgres import PgBouncer, Postgres
from tests.store.conftest import MakeRun
from training_backends import TrainingRun
from training_backends.store import RunStore
from training_backends.store.changes import Changes

pytestmark = pytest.mark.anyio
NEVER = 1e9
"""Seconds: a test that polls does not end."""


@pytest.fixture
def new_url(postgres: Postgres) -> NewUrl:
    return postgres.new_url


@pytest.fixture
def other(url: str) -> Iterator[RunStore]:
    """What another process has."""
    store = RunStore(url)
    yield store
    store.close()


def moved(run: TrainingRun) -> TrainingRun:
    return run.model_copy(update={"step": (run.step or 0) + 1})


async def test_a_change_wakes_who_waits_for_its_run(
    url: str, store: RunStore, other: RunStore, make_run: MakeRun
) -> None:
    """Not those that wait for others; a change before the wait is not missed."""
    await to_thread.run_sync(store.insert, make_run("a"))
    await to_thread.run_sync(store.insert, make_run("b"))
    changes = Changes(store, url)
    woken: list[str] = []

    async def wait(run_id: str) -> None:
        async with changes.of([run_id]) as change:
            await change.wait(NEVER, longest=NEVER)
            woken.append(run_id)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, "b")
            async with changes.of(["a"]) as change:
                for _ in range(2):
                    await to_thread.run_sync(other.update, "a", moved)
                    await change.wait(NEVER, longest=NEVER)
            assert woken == []
            tasks.cancel_scope.cancel()
    assert woken == []


async def test_behind_a_pooler_the_store_is_polled(
    pgbouncer: PgBouncer, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes no notification on, which is found out first."""
    monkeypatch.setattr("training_backends.store.changes._PATIENCE", 0.5)
    url = pgbouncer.new_url()
    store = RunStore(url)
    await to_thread.run_sync(store.insert, make_run("a"))
    async with Changes(store, url).of(["a"]) as change:
        assert not change.can_tell
        await change.wait(0.01, longest=NEVER)
    store.close()
