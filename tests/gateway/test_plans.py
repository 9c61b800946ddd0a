"""What each request costs, by the plans of its statements: pages of indexes, whatever there is."""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from anyio import to_thread

from tests.gateway.conftest import Site, site
from tests.gateway.costs import cost
from tests.gateway.filled import filled_gateway
from tests.gateway.filling import LIVE, analyze, fill
from tests.postgres import Postgres
from training_backends.gateway.files import _delete_expired
from training_backends.gateway.retention import Retention
from training_backends.gateway.runner import _behind
from training_backends.gateway.store import GatewayStore

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

COUNT = 3000
JOBS = "/v1/fine_tuning/jobs"
OPENAI = f"/openai{JOBS}"


@pytest.fixture(params=["sqlite", "postgresql"])
async def filled(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[tuple[Site, str, str]]:
    """A gateway with many finished jobs; the id of a job and of its file."""
    url = None
    if request.param == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        url = server.new_url()
    async with site(tmp_path, store_url=url) as here:
        file_id = await here.upload()
        await to_thread.run_sync(here.served.gateway.keys.create, "one")
        done = await here.finished(files=[file_id])
        store = here.served.gateway.store
        await to_thread.run_sync(fill, store, done["id"], COUNT)
        await to_thread.run_sync(analyze, store)
        yield here, done["id"], file_id


@contextmanager
def statements(store: GatewayStore) -> Iterator[list[tuple[str, Any]]]:
    """Collect what is asked of the database."""
    found: list[tuple[str, Any]] = []

    def note(_c: Any, _k: Any, statement: str, parameters: Any, *_: Any) -> None:
        found.append((statement, parameters))

    engine = store._reader  # to see the statements as they are sent
    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)


def unbounded(connection: sa.Connection, statement: str, parameters: Any) -> list[str]:
    """Return the steps of a plan whose cost grows with the number of rows in a table."""
    counts = "FROM gateway_job_counts" in statement  # a row for each day, whatever the jobs
    if counts or not statement.lstrip().upper().startswith(("SELECT", "UPDATE", "DELETE")):
        return []
    sqlite = connection.dialect.name == "sqlite"
    explain = "EXPLAIN QUERY PLAN " if sqlite else "EXPLAIN "
    rows = connection.exec_driver_sql(explain + statement, parameters).all()
    steps = [str(row[-1]) for row in rows]
    return [step for step in steps if _grows(step, statement)]


def _grows(step: str, statement: str) -> bool:
    if re.search(
        r"(SCAN (?!.*USING .*INDEX)|Seq Scan on )(gateway_(?!projects)|runs|documents|rec|met)",
        step,
    ):
        return True  # the order of an index is read up to a LIMIT, anything else to the end
    of_one_run = re.search(r"FROM (records|metrics|gateway_events)", statement)
    if of_one_run or "UNION" in step:
        return False
    sorted_rows = re.search(r"Sort .*rows=(\d+)", step)
    return "TEMP B-TREE" in step or bool(sorted_rows and int(sorted_rows[1]) > LIVE)


async def test_no_list_or_status_reads_more_than_its_page(
    filled: tuple[Site, str, str],
) -> None:
    """The first pages and the last, with and without filters, on both interfaces."""
    here, job_id, file_id = filled
    store = here.served.gateway.store
    paths = [
        *(
            JOBS,
            f"{JOBS}?page=400&page_size=5",
            f"{JOBS}?status=RUNNING",
            f"{JOBS}?status=SUCCESS&page=90&page_size=5",
        ),
        *(f"{JOBS}?model=tiny-mistral", f"{JOBS}?created_by_me=true", f"{JOBS}?suffix=none"),
        *(f"{JOBS}/{job_id}", OPENAI, f"{OPENAI}/{job_id}", f"{OPENAI}?after={job_id}"),
        *(f"{OPENAI}/{job_id}/events", f"{OPENAI}/{job_id}/checkpoints"),
        *("/v1/models/ft:m:00000002", "/v1/files?page=50&page_size=5"),
        *("/v1/files?purpose=fine-tune", "/openai/v1/files?limit=50", f"/v1/files/{file_id}"),
    ]
    made = await to_thread.run_sync(here.served.gateway.keys.create, "reader")
    for key in (here.http.headers["authorization"], f"Bearer {made.key.get_secret_value()}"):
        for path in paths:
            with statements(store) as found:
                answer = await here.http.get(path, headers={"authorization": key})
            assert answer.status_code == 200, (path, answer.text)
            for statement, parameters in found:
                steps = await store.aread(
                    lambda c, s=statement, p=parameters: unbounded(c, s, p)  # type: ignore[misc]
                )
                assert not steps, (path, statement, steps)


async def test_what_the_gateway_repeats_reads_what_is_live_only(
    filled: tuple[Site, str, str],
) -> None:
    """Its sweeps, and what it looks for when it starts and now and then."""
    here, _, _ = filled
    store, client = here.served.gateway.store, here.served.gateway.client
    runs = client._store  # the same database through its own connections
    live = await to_thread.run_sync(lambda: runs.live(backend="scripted"))
    assert len(live.versions) == LIVE
    with statements(store) as found:
        await store.aread(_behind)
        await store.aread(lambda c: _delete_expired(c) if c.dialect.name == "sqlite" else None)
        gateway = here.served.gateway
        sweeping = Retention(store, client, gateway.models, gateway.files, gateway.settings)
        assert await sweeping.sweep(older_than=1e10, dry_run=True) == []
    with statements(runs) as more:  # type: ignore[arg-type]
        await to_thread.run_sync(lambda: runs.live(backend="scripted"))
        await to_thread.run_sync(runs.backends_to_watch)
        await to_thread.run_sync(lambda: runs.list(limit=10))
        await to_thread.run_sync(lambda: runs.list(limit=10, backend="scripted"))
    for statement, parameters in [*found, *more]:
        steps = await store.aread(
            lambda c, s=statement, p=parameters: unbounded(c, s, p)  # type: ignore[misc]
        )
        assert not steps, (statement, steps)


async def test_pages_and_totals_are_those_of_the_jobs(filled: tuple[Site, str, str]) -> None:
    """Each job once, in order, up to the last page; a job that moves on is counted where it is."""
    here, _, _ = filled
    seen: list[str] = []
    for page in range(4):
        listed = (await here.http.get(f"{JOBS}?page={page}&page_size=1000")).json()
        assert listed["total"] == COUNT + 1
        seen += [job["id"] for job in listed["data"]]
    assert len(seen) == len(set(seen)) == COUNT + 1
    second = (await here.http.get(f"{JOBS}?page=1234&page_size=2")).json()["data"]
    assert [job["id"] for job in second] == seen[2468:2470]
    running = (await here.http.get(f"{JOBS}?status=RUNNING&page_size=1")).json()
    assert running["total"] == LIVE
    job = await here.create(auto_start=False, suffix="new")
    await here.until(job["id"], "VALIDATED")
    for status, total in (("VALIDATED", 1), ("QUEUED", 0), ("VALIDATING", 0)):
        listed = (await here.http.get(f"{JOBS}?status={status}")).json()
        assert (listed["total"], len(listed["data"])) == (total, total)
    late = (await here.http.get(f"{JOBS}?created_after=2000-01-01T00:00:00Z&page_size=1")).json()
    assert late["total"] == 1001  # one page, and as many as are counted ahead


async def test_a_long_list_of_models_is_complete_and_sent_in_parts(
    filled: tuple[Site, str, str],
) -> None:
    """Each model once, with the base models first."""
    here, _, _ = filled
    listed = (await here.http.get("/v1/models")).json()["data"]
    tuned = [model["id"] for model in listed if model["id"].startswith("ft:")]
    assert len(tuned) == len(set(tuned)) == COUNT // 2 + 1
    assert not listed[0]["id"].startswith("ft:")
    other = (await here.http.get("/openai/v1/models")).json()
    assert [model["id"] for model in other["data"]] == [model["id"] for model in listed]
    assert (other["first_id"], other["last_id"]) == (listed[0]["id"], listed[-1]["id"])


@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
async def test_ten_times_the_jobs_cost_no_more(
    store: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Of each request and of what the gateway repeats, in what the database does for it."""
    costs: dict[int, dict[str, int]] = {}
    for count in (1000, 10_000):
        url = request.getfixturevalue("postgres").new_url() if store == "postgresql" else None
        async with site(tmp_path / str(count), store_url=url) as here:
            job_id = (await here.finished())["id"]
            filling = here.served.gateway.store
        await to_thread.run_sync(fill, filling, job_id, count)
        await to_thread.run_sync(analyze, filling)
        async with filled_gateway(tmp_path / str(count), url, count) as filled:
            costs[count] = {
                name: await cost(filled.stores, work) for name, work in filled.operations.items()
            }
    few, many = costs.values()
    # An insertion may split pages; a scan of 9,000 more rows takes far more than 50.
    grown = {name: (few[name], many[name]) for name in few if many[name] > 1.5 * few[name] + 50}
    assert min(few.values()) > 0
    assert not grown
