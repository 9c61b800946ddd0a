"""Limits of a project: jobs, bytes, requests and steps, in several gateways on one database."""

from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing
from pathlib import Path
from threading import Barrier
from typing import Any

import anyio
import httpx
import openai
import pytest
import sqlalchemy as sa
from anyio import to_thread

from tests.gateway.conftest import Site, jsonl, openai_client, site
from tests.waiting import until
from training_backends.gateway.projects import ProjectStore, admit_job, waiting_jobs
from training_backends.gateway.store import GatewayStore
from training_backends.store.gateway_schema import jobs

pytestmark = pytest.mark.anyio

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database that gateways can share."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'shared.db'}"
    return str(request.getfixturevalue("postgres").new_url())


@pytest.fixture
async def two(tmp_path: Path, url: str) -> AsyncIterator[list[Site]]:
    """Two gateways on one database."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(site(tmp_path / name, store_url=url))
            for name in ("one", "other")
        ]


async def limit(here: Site, **limits: float | None) -> None:
    """Set limits of the project of the static key."""
    projects = ProjectStore(here.served.gateway.store)
    await to_thread.run_sync(projects.set, "default", limits)


async def at_once(asks: list[Callable[[], Any]]) -> list[httpx.Response]:
    """Send requests at the same time."""
    answers: dict[int, httpx.Response] = {}

    async def ask(number: int, one: Callable[[], Any]) -> None:
        answers[number] = await one()

    async with anyio.create_task_group() as tasks:
        for number, one in enumerate(asks):
            tasks.start_soon(ask, number, one)
    return [answers[number] for number in range(len(asks))]


async def test_two_gateways_together_queue_no_more_jobs_than_a_project_may(
    two: list[Site],
) -> None:
    """The rest gets 429, with the time after which to try again; a cancelled job makes room."""
    await limit(two[0], jobs_queued=3)
    files = [await here.upload() for here in two]
    answers = await at_once(
        [
            lambda here=here, file_id=file_id, n=n: here.try_create(  # type: ignore[misc]
                files=[file_id], suffix=f"{n}", auto_start=False
            )
            for n, (here, file_id) in enumerate([*zip(two, files, strict=True)] * 4)
        ]
    )
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 5
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "60"
    assert "limit of 3 queued jobs" in refused.json()["detail"]
    made = next(answer for answer in answers if answer.status_code == 200)
    await two[0].http.post(f"{JOBS}/{made.json()['id']}/cancel")
    again = await two[1].try_create(files=[files[1]], suffix="more", auto_start=False)
    assert again.status_code == 200


async def test_two_gateways_together_store_no_more_bytes_than_a_project_may(
    two: list[Site],
) -> None:
    """A file that is there already is no further one; a deleted one makes room."""
    contents = [jsonl() + b" " * n + b"\n" for n in range(8)]
    await limit(two[0], bytes=len(contents[-1]) * 2)
    answers = await at_once(
        [
            lambda here=two[n % 2], content=content: here.http.post(  # type: ignore[misc]
                "/v1/files", files={"file": ("train.jsonl", content)}
            )
            for n, content in enumerate(contents)
        ]
    )
    assert sorted(answer.status_code for answer in answers) == [200, 200, *[429] * 6]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert "delete files first" in refused.json()["detail"]
    content, stored = next(
        (content, answer.json()["id"])
        for content, answer in zip(contents, answers, strict=True)
        if answer.status_code == 200
    )
    assert await two[0].upload(content) == stored
    assert (await two[1].http.delete(f"/v1/files/{stored}")).status_code == 200
    assert await two[1].upload(content) != stored


@pytest.fixture
def waiting(url: str) -> Iterator[tuple[GatewayStore, GatewayStore]]:
    """Two connections of processes to a database with ten jobs that wait to run."""
    with closing(GatewayStore(url)) as one, closing(GatewayStore(url)) as other:
        ProjectStore(one).set("p", {"jobs_running": 3})
        ids = [f"job-{n}" for n in range(10)]
        one.write(lambda c: c.execute(jobs.insert(), [_job(job_id) for job_id in ids]))
        yield one, other


def _job(job_id: str) -> dict[str, Any]:
    filled: dict[type, Any] = {str: "", float: 1.0, int: 1, bool: False, object: []}
    row = {
        column.name: filled[column.type.python_type]
        for column in jobs.c
        if not column.nullable and column.name != "id"
    }
    started_at = float(job_id.removeprefix("job-"))
    return row | {"id": job_id, "project": "p", "status": "QUEUED", "started_at": started_at}


def test_processes_together_run_no_more_jobs_than_a_project_may(
    waiting: tuple[GatewayStore, GatewayStore],
) -> None:
    """Whatever both find waiting at the same moment; one that ends lets one in."""
    barrier = Barrier(8)

    def admit(number: int) -> list[str]:
        store, mine = waiting[number % 2], []
        barrier.wait()
        for job_id in store.read(waiting_jobs):
            job = sa.select(jobs).where(jobs.c.id == job_id)
            if store.write(lambda c, job=job: admit_job(c, c.execute(job).one())):  # type: ignore[misc]
                mine.append(job_id)
        return mine

    with ThreadPoolExecutor(8) as threads:
        admitted = {job_id for mine in threads.map(admit, range(8)) for job_id in mine}
    assert len(admitted) == 3
    (project,) = ProjectStore(waiting[0]).list()
    assert (project.jobs_running, project.jobs_queued) == (3, 7)
    ended = jobs.update().where(jobs.c.id == min(admitted)).values(status="SUCCESS")
    waiting[1].write(lambda c: c.execute(ended))
    barrier.reset()
    with ThreadPoolExecutor(8) as threads:
        more = {job_id for mine in threads.map(admit, range(8)) for job_id in mine}
    assert len(more - admitted) == 1


async def test_a_job_beyond_the_limit_waits_until_another_ends(tmp_path: Path) -> None:
    """In the order of their start, shown as queued; a cancelled one is passed over."""
    async with site(tmp_path) as here:
        await limit(here, jobs_running=1)
        file_id = await here.upload()
        first, remote = await here.started(files=[file_id], suffix="a")
        later = []
        for suffix in "bcd":
            job = await here.create(files=[file_id], suffix=suffix, auto_start=True)
            later.append(job["id"])
            await until(
                lambda: to_thread.run_sync(here.served.gateway.store.read, _waits),
                lambda waiting: later[-1] in waiting,
            )
        waits = [await here.until(job_id, "QUEUED") for job_id in later]
        assert len(here.backend.created) == 1
        assert [event["data"]["status"] for event in waits[0]["events"]][-1] == "VALIDATED"
        await here.http.post(f"{JOBS}/{later[0]}/cancel")
        await here.until(later[0], "CANCELLED")
        here.backend.finish(remote)
        await here.until(first, "SUCCESS")
        await until(lambda: here.backend.created[1:])
        here.backend.finish(here.backend.created[1])
        await here.until(later[1], "SUCCESS")


def _waits(connection: sa.Connection) -> Any:
    return waiting_jobs(connection)


async def test_requests_beyond_the_rate_are_rejected_by_both_apis(here: Site) -> None:
    """With a time to wait, which the OpenAI client is told to use; other projects are not."""
    await limit(here, requests_per_second=2)
    answers = [await here.http.get("/v1/files?page_size=1") for _ in range(8)]
    codes = [answer.status_code for answer in answers]
    assert codes[:2] == [200, 200]
    assert 429 in codes
    refused = answers[codes.index(429)]
    assert refused.headers["retry-after"] == "1"
    assert refused.json() == {
        "detail": "This project has reached its limit of 2 requests per second."
    }
    await limit(here, requests_per_second=0.1)
    async with openai_client(here) as sdk:
        await here.http.get("/v1/models")
        with pytest.raises(openai.RateLimitError) as caught:
            await sdk.models.list()
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.response.headers["x-should-retry"] == "true"
    keys = here.served.gateway.keys
    made = await to_thread.run_sync(lambda: keys.create(project="other"))
    here.http.headers["authorization"] = f"Bearer {made.key.get_secret_value()}"
    for _ in range(5):
        assert (await here.http.get("/v1/models")).status_code == 200


async def test_the_openai_client_does_not_repeat_what_a_limit_rejects(here: Site) -> None:
    """Neither a file nor a job: waiting for seconds does not make room."""
    async with openai_client(here) as sdk:
        file = await sdk.files.create(file=("t.jsonl", jsonl()), purpose="fine-tune")
        await limit(here, jobs_queued=0, bytes=10)
        repeating = sdk.with_options(max_retries=2)
        for ask in (
            lambda: repeating.files.create(file=("u.jsonl", jsonl()), purpose="fine-tune"),
            lambda: repeating.fine_tuning.jobs.create(model="tiny-mistral", training_file=file.id),
        ):
            with pytest.raises(openai.RateLimitError) as caught:
                await ask()
            assert (caught.value.code, caught.value.type) == ("insufficient_quota",) * 2
            assert "x-stainless-retry-count" not in caught.value.response.request.headers or (
                caught.value.response.request.headers["x-stainless-retry-count"] == "0"
            )


async def test_a_job_trains_no_more_steps_than_a_project_allows(tmp_path: Path) -> None:
    """Asked for in steps, it is rejected; in epochs, once they are counted."""
    async with site(tmp_path) as here:
        await limit(here, steps=9)
        asked = await here.try_create(hyperparameters={"training_steps": 11})
        assert asked.status_code == 422
        assert "equal to 9, the limit of this project" in asked.text
        epochs = {"epochs": 3}  # which the backend estimates at 10 steps
        created = await here.create(hyperparameters=epochs)
        rejected = await here.until(created["id"], "FAILED_VALIDATION")
        told = "The job would train 10 steps; the limit is 9."
        assert rejected["events"][-1]["data"]["error"] == told
        await limit(here, steps=10)
        created = await here.create(hyperparameters=epochs)
        assert await here.until(created["id"], "VALIDATED")


async def test_a_lifted_limit_is_none(here: Site) -> None:
    """Like that of a project that never had one; what is used is shown meanwhile."""
    await limit(here, bytes=1)
    answer = await here.http.post("/v1/files", files={"file": ("train.jsonl", jsonl())})
    assert answer.status_code == 429
    await limit(here, bytes=None)
    await here.upload()
    (project,) = await to_thread.run_sync(ProjectStore(here.served.gateway.store).list)
    assert (project.name, project.bytes, project.limits.bytes) == ("default", len(jsonl()), None)
