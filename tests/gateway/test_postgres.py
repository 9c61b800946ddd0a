"""A gateway whose runs, jobs, files and keys are in PostgreSQL."""

from pathlib import Path

import anyio
import pytest
from anyio import to_thread

from tests.gateway.conftest import jsonl, scripted, site
from tests.postgres import Postgres
from training_backends.gateway import runner
from training_backends.gateway.keys import open_keys

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
