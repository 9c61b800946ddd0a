"""A gateway whose runs, jobs, files and keys are in PostgreSQL."""

from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread
from openai import AsyncOpenAI

from tests.gateway.conftest import jsonl, openai_client, scripted, site
from tests.postgres import Postgres
from tests.waiting import until
from training_backends.client.leases import Leases
from training_backends.gateway import retention, runner
from training_backends.gateway.keys import open_keys
from training_backends.gateway.retention import Expired, Retention

pytestmark = pytest.mark.anyio

JOBS = "/v1/fine_tuning/jobs"


async def test_a_job_lives_from_upload_to_model_and_through_a_restart(
    tmp_path: Path, postgres: Postgres
) -> None:
    """With its events and checkpoints, also after its model and run were deleted."""
    url, backend = postgres.new_url(), scripted()
    async with site(tmp_path, backend, store_url=url) as here:
        file_id = await here.upload()
        assert await here.upload() == file_id
        job_id, remote = await here.started(files=[file_id], suffix="mine")
        await here.until(job_id, "RUNNING")
        backend.measure(remote, 10, train_loss=2.0)
    async with site(tmp_path, backend, store_url=url) as here:
        backend.measure(remote, 20, train_loss=1.5, valid_loss=1.6)
        backend.finish(remote)
        done = await here.until(job_id, "SUCCESS")
        words = [event["data"]["status"] for event in done["events"]]
        assert words == ["QUEUED", "VALIDATING", "VALIDATED", "RUNNING", "SUCCESS"]
        assert [point["step_number"] for point in done["checkpoints"]] == [20, 10]
        listed = (await here.http.get(f"{JOBS}?status=SUCCESS&suffix=mine")).json()
        assert (listed["total"], listed["data"][0]["id"]) == (1, job_id)
        files = (await here.http.get("/v1/files?search=TRAIN")).json()
        assert (files["total"], files["data"][0]["bytes"]) == (1, len(jsonl()))
        await here.http.delete(f"/v1/models/{done['fine_tuned_model']}")
        kept = await here.get(job_id)
        assert (kept["events"], kept["checkpoints"]) == (done["events"], done["checkpoints"])
    assert not list((tmp_path / "gateway").glob("*.db"))


async def test_a_job_moves_to_another_gateway_of_the_home(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them drives it at a time; the other goes on when that one ends."""
    monkeypatch.setattr(runner, "TAKE_OVER_EVERY", 0.05)
    url, backend = postgres.new_url(), scripted()
    backend.gate = anyio.Event()
    async with site(tmp_path, backend, store_url=url) as second:
        async with site(tmp_path, backend, store_url=url) as first:
            job = await first.create()
            await second.until(job["id"], "VALIDATING")
            leases = f"{url.rpartition('%3D')[2]}.leases"
            held = f"SELECT owner FROM {leases} WHERE name = 'job:{job['id']}'"
            assert len(postgres.execute(held)) == 1
        backend.gate.set()
        moved = await second.until(job["id"], "VALIDATED")
        words = [event["data"]["status"] for event in moved["events"]]
        assert words == ["QUEUED", "VALIDATING", "VALIDATED"]
        cancelled = await second.http.post(f"{JOBS}/{job['id']}/cancel")
        assert cancelled.json()["status"] == "CANCELLED"


async def test_keys_are_shared_with_the_command_line(tmp_path: Path, postgres: Postgres) -> None:
    """A revoked one is rejected from the next request on."""
    url = postgres.new_url()
    async with site(tmp_path, store_url=url) as here:
        keys = await to_thread.run_sync(open_keys, tmp_path, url)
        made = await to_thread.run_sync(keys.create, "ci")
        here.http.headers["authorization"] = f"Bearer {made.key.get_secret_value()}"
        assert (await here.http.get("/v1/models")).status_code == 200
        await to_thread.run_sync(keys.revoke, made.info.id)
        assert (await here.http.get("/v1/models")).status_code == 401


async def test_parts_of_an_upload_may_go_to_any_gateway(tmp_path: Path, postgres: Postgres) -> None:
    """Its completion, too: at two at once, both answer with the one file."""
    url, backend, content = postgres.new_url(), scripted(), jsonl()
    middle = len(content) // 2
    async with (
        site(tmp_path, backend, store_url=url) as first,
        site(tmp_path, backend, store_url=url) as second,
        openai_client(first) as one,
        openai_client(second) as other,
    ):
        made = await one.uploads.create(
            bytes=len(content), filename="a.jsonl", mime_type="text/jsonl", purpose="fine-tune"
        )
        end = await other.uploads.parts.create(made.id, data=content[middle:])
        start = await one.uploads.parts.create(made.id, data=content[:middle])
        found: list[Any] = []

        async def complete(client: AsyncOpenAI) -> None:
            found.append(await client.uploads.complete(made.id, part_ids=[start.id, end.id]))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(complete, one)
            tasks.start_soon(complete, other)
        assert [each.status for each in found] == ["completed"] * 2
        (file_id,) = {each.file.id for each in found}
        assert (await other.files.content(file_id)).read() == content
        assert not [*(tmp_path / "gateway" / "parts").iterdir()]


async def test_one_gateway_of_a_home_sweeps_until_it_ends(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then another one does."""
    gateways: list[Retention] = []
    sweeps: list[int] = []
    attempts, gate, run, try_hold = Counter[int](), anyio.Event(), Retention.run, Leases.try_hold

    async def begin(self: Retention, leases: Leases | None = None) -> None:
        gateways.append(self)
        if self is gateways[0]:
            await gate.wait()
        await run(self, leases)

    async def sweep(self: Retention, **_: Any) -> list[Expired]:
        sweeps.append(gateways.index(self))
        return []

    def attempt(self: Leases, name: str) -> Any:
        attempts[id(self)] += name.startswith("retention:")
        return try_hold(self, name)

    monkeypatch.setattr(Retention, "run", begin)
    monkeypatch.setattr(Retention, "sweep", sweep)
    monkeypatch.setattr(Leases, "try_hold", attempt)
    monkeypatch.setattr(retention, "TAKE_OVER_EVERY", 0.02)
    url, backend = postgres.new_url(), scripted()
    async with site(tmp_path, backend, store_url=url):
        await until(lambda: gateways)
        async with site(tmp_path, backend, store_url=url):
            await until(lambda: sweeps)
            gate.set()
            await until(lambda: max(attempts.values()) > 2)
            assert sweeps == [1]
        await until(lambda: len(sweeps) == 2)
    assert sweeps == [1, 0]
