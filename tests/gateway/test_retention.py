"""Runs of failed and cancelled jobs are deleted by age; their jobs stay."""

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from anyio import to_thread

from tests.gateway.conftest import Site, site
from tests.gateway.test_checkpoint_models import KeepsCheckpoints
from tests.waiting import until
from training_backends.core.errors import BackendUnavailable, RunNotFound
from training_backends.core.run import Checkpoint, utc_now
from training_backends.core.status import TrainingStatus
from training_backends.gateway.audit import AuditLog
from training_backends.gateway.jobstore import load_job, model_name
from training_backends.gateway.retention import Retention
from training_backends.store.gateway_schema import jobs

pytestmark = pytest.mark.anyio


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Site]:
    """A gateway whose backend keeps checkpoints."""
    async with site(tmp_path / "home", KeepsCheckpoints()) as opened:
        yield opened


async def sweep(here: Site, before: float) -> None:
    """Delete what ended before a time."""
    gateway = here.served.gateway
    await Retention(gateway.store, gateway.client, gateway.models).sweep(before)


async def ended(here: Site, job_id: str, status: str) -> dict[str, Any]:
    """Wait until a job has ended and is cleaned up."""
    mine = sa.select(jobs.c.cleaned_up).where(jobs.c.id == job_id)
    store = here.served.gateway.store
    await until(lambda: store.aread(lambda c: c.execute(mine).scalar()))
    job = await here.get(job_id)
    assert job["status"] == status
    return job


async def failed(here: Site, **fields: Any) -> dict[str, Any]:
    """Return a job that failed after its checkpoint at step 10."""
    job_id, remote = await here.started(**fields)
    here.backend.measure(remote, 10, train_loss=1.0)
    path = here.home / f"{remote}-step-10"
    path.mkdir()
    point = Checkpoint(step=10, at=utc_now(), metrics={}, path=path)
    here.backend.say(remote, TrainingStatus.RUNNING, checkpoints=(point,))
    here.backend.fail(remote)
    return await ended(here, job_id, "FAILED")


async def has_run(here: Site, job_id: str) -> bool:
    """Return whether the run of a job is still stored."""
    try:
        await here.served.gateway.client.get(job_id)
    except RunNotFound:
        return False
    return True


async def test_an_old_failure_loses_its_run_and_the_job_stays_as_it_was(here: Site) -> None:
    """Also at the backend; the audit log has one entry, however often it is repeated."""
    job = await failed(here)
    ends = job["modified_at"]
    await sweep(here, ends - 1)
    assert await has_run(here, job["id"])
    for _ in range(2):
        await sweep(here, ends + 1)
    assert not await has_run(here, job["id"])
    assert here.backend._jobs == {}
    assert await here.get(job["id"]) == job
    log = AuditLog(here.served.gateway.store)
    found = [
        e for e in await to_thread.run_sync(lambda: [*log.entries()]) if e["actor"] == "gateway"
    ]
    assert [(e["action"], e["target"], e["project"]) for e in found] == [
        ("job.expire", job["id"], "default")
    ]


async def test_what_succeeded_or_still_trains_is_kept(here: Site) -> None:
    """Cancelled jobs are not."""
    done = await here.finished()
    await ended(here, done["id"], "SUCCESS")
    live, _ = await here.started(suffix="live")
    cancelled, remote = await here.started(suffix="cancelled")
    await here.http.post(f"/v1/fine_tuning/jobs/{cancelled}/cancel")
    here.backend.say(remote, TrainingStatus.CANCELLED)
    await ended(here, cancelled, "CANCELLED")
    await sweep(here, time.time() + 1)
    kept = {job_id: await has_run(here, job_id) for job_id in (done["id"], live, cancelled)}
    assert kept == {done["id"]: True, live: True, cancelled: False}
    assert (await here.http.get(f"/v1/models/{done['fine_tuned_model']}")).status_code == 200


async def test_a_checkpoint_that_a_model_was_trained_from_keeps_its_run(here: Site) -> None:
    """Until that model is deleted: an adapter needs its base."""
    job = await failed(here)
    gateway = here.served.gateway
    row = await gateway.store.aread(lambda c: load_job(c, job["id"]))
    name = model_name(row, gateway.settings.organization_id, row.modified_at)
    derived = await here.finished(model=f"{name}:ckpt-step-10", suffix="more")
    await ended(here, derived["id"], "SUCCESS")
    (written,) = (here.home / "gateway" / "checkpoints").iterdir()
    await sweep(here, time.time() + 1)
    assert await has_run(here, job["id"])
    assert written.exists()
    await here.http.delete(f"/v1/models/{derived['fine_tuned_model']}")
    await sweep(here, time.time() + 1)
    assert not await has_run(here, job["id"])
    assert not written.exists()


async def test_a_deletion_that_failed_is_repeated(
    here: Site, logs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next sweep; the failure is logged."""
    job = await failed(here)

    async def away(_: Any) -> None:
        raise BackendUnavailable("away", backend="scripted")

    with monkeypatch.context() as patched:
        patched.setattr(here.backend, "delete", away)
        await sweep(here, time.time() + 1)
    assert await has_run(here, job["id"])
    assert any(entry["event"] == "run not deleted" for entry in logs)
    await sweep(here, time.time() + 1)
    assert not await has_run(here, job["id"])
    assert await here.get(job["id"]) == job


async def test_a_gateway_sweeps_what_is_older_than_its_setting(tmp_path: Path) -> None:
    """At its start, and every hour."""
    async with site(tmp_path / "home") as first:
        job_id, remote = await first.started()
        first.backend.fail(remote)
        await ended(first, job_id, "FAILED")
        backend = first.backend
    async with site(tmp_path / "home", backend, keep_days=1e-9) as again:
        await until(lambda: _gone(again, job_id))


async def _gone(here: Site, job_id: str) -> bool:
    return not await has_run(here, job_id)
