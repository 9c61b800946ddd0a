"""What clients ask of a gateway and what it repeats, below HTTP, to compare stores of any size."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import count as counter
from pathlib import Path
from typing import Any

from anyio import to_thread

from tests.gateway.filling import LIVE, copy_id
from training_backends.core.run import LogRecord, Observation, RunState, TrainingRun, utc_now
from training_backends.gateway.console_feed import ConsoleFeed
from training_backends.gateway.console_runs import RunQuery, list_runs
from training_backends.gateway.files import FileFilters
from training_backends.gateway.gateway import Gateway, open_gateway
from training_backends.gateway.jobs import JobQuery
from training_backends.gateway.jobstore import CHECKPOINT_MARK, JOB_DIGITS
from training_backends.gateway.keys import Principal
from training_backends.gateway.metrics import _read_jobs
from training_backends.gateway.openai_jobs import list_openai_jobs
from training_backends.gateway.projects import waiting_jobs
from training_backends.gateway.runner import _behind, _open, _pending
from training_backends.gateway.settings import GatewaySettings
from training_backends.gateway.store import GatewayStore, database_url
from training_backends.store.database import Database
from training_backends.store.store import RunStore
from training_backends.testing.backend import ScriptedBackend

__all__ = ["FilledGateway", "filled_gateway"]


class _QuietBackend(ScriptedBackend):
    """Looks at the filled runs once a day, and finds them as they are."""

    @property
    def poll_interval(self) -> tuple[timedelta, timedelta]:
        return timedelta(days=1), timedelta(days=1)

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        return Observation(RunState(status=run.status, remote_id=run.remote_id), (), after)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilledGateway:
    """A gateway whose store was filled.

    Attributes:
        stores: Those that the operations use.
        operations: By name.
    """

    stores: tuple[Database, Database]
    operations: Mapping[str, Callable[[], Awaitable[Any]]]


@asynccontextmanager
async def filled_gateway(
    home: Path, store_url: str | None, count: int
) -> AsyncIterator[FilledGateway]:
    """Open a gateway on a store filled with `count` jobs.

    Its services use connections of their own, so that only what they do is counted.
    """
    settings = GatewaySettings(store_url=store_url)
    backends = {"scripted": _QuietBackend()}
    async with open_gateway(
        settings, home=home, url="http://localhost", backend="scripted", backends=backends
    ) as gateway:
        url = database_url(gateway.home, store_url)
        store = await to_thread.run_sync(GatewayStore, url)
        runs = await to_thread.run_sync(RunStore, url)
        services: tuple[Any, ...] = (gateway.jobs, gateway.files, gateway.models)
        for service in (*services, gateway.checkpoints):
            service._store = store
        try:
            operations = _operations(gateway, store, runs, count)
            yield FilledGateway(stores=(store, runs), operations=operations)
        finally:
            await to_thread.run_sync(store.close)
            await to_thread.run_sync(runs.close)


def _operations(
    gateway: Gateway, store: GatewayStore, runs: RunStore, count: int
) -> Mapping[str, Callable[[], Awaitable[Any]]]:
    mine = Principal("bench", "default")
    numbers = counter(1)

    def page(number: int, **filters: Any) -> Callable[[], Awaitable[Any]]:
        return partial(gateway.jobs.list, JobQuery(**filters), mine, page=number, page_size=100)

    async def after() -> None:
        await store.aread(
            lambda connection: list_openai_jobs(
                connection, mine, "o", after=copy_id(count // 2), limit=100, metadata=None
            )
        )

    async def console() -> None:
        await store.aread(
            lambda connection: list_runs(connection, RunQuery(), mine, after=None, limit=50)
        )

    async def checkpoint() -> None:
        name = f"ft:tiny-mistral:o:20260101:{copy_id(count // 3)[:JOB_DIGITS]}{CHECKPOINT_MARK}10"
        await gateway.checkpoints.find(name, mine)

    async def listed_files() -> None:
        await gateway.files.list(FileFilters(), mine, page=0, page_size=100, include_total=True)

    async def listed_models() -> None:
        pages = gateway.models.pages(mine)
        await anext(pages)  # the base models
        await anext(pages)
        await pages.aclose()

    async def status() -> None:
        # Any job: those that were read lately would be in the cache.
        await gateway.jobs.get(copy_id(next(numbers) * 7919 % count + 1), mine)

    async def sweep() -> None:
        await to_thread.run_sync(runs.backends_to_watch)
        await to_thread.run_sync(partial(runs.live, backend="scripted"))
        await to_thread.run_sync(partial(runs.undelivered, backend="scripted", limit=1))
        for search in (_open, _behind, _pending, waiting_jobs):
            await store.aread(search)

    def append() -> None:
        number = next(numbers)
        job_id = copy_id(count - number % LIVE)
        before = runs.provider_cursor(job_id)
        record = LogRecord(at=utc_now(), message="m", source="event", cursor=f"bench-{number}")
        found = runs.observed(job_id, lambda run: run, [record], after=before, cursor=record.cursor)
        assert found is not None

    return {
        "first page of 100 jobs": page(0),
        "a page in the middle": page(count // 200),
        "last page": page(max(count // 100 - 1, 0)),
        "jobs by status": page(0, status="RUNNING"),
        "jobs after an id": after,
        "files": listed_files,
        "500 models": listed_models,
        "status of a job": status,
        "a checkpoint by its name": checkpoint,
        "runs in the console": console,
        "changes for the console": ConsoleFeed(store)._look,
        "sweep": sweep,
        "jobs for /metrics": partial(store.aread, _read_jobs),
        "append an event": partial(to_thread.run_sync, append),
    }
