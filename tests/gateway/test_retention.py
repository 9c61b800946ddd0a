"""What jobs and uploads have left is deleted by age; the jobs stay, and so does what is in use."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from anyio import to_thread

from tests.gateway.conftest import ROWS, Site, jsonl, site
from tests.gateway.test_chat import ASKED, answered
from tests.gateway.test_checkpoint_models import KeepsCheckpoints
from tests.waiting import until
from training_backends.core.errors import BackendUnavailable, RunNotFound
from training_backends.core.files import hold_lock
from training_backends.core.run import Checkpoint, utc_now
from training_backends.core.status import TrainingStatus
from training_backends.gateway.audit import AuditLog
from training_backends.gateway.gateway import open_retention
from training_backends.gateway.jobstore import load_job, model_name
from training_backends.gateway.keys import Principal, local_operator
from training_backends.gateway.projects import FOREVER, Kind, ProjectStore
from training_backends.gateway.retention import Expired, Retention
from training_backends.gateway.settings import GatewaySettings
from training_backends.store.gateway_schema import jobs
from training_backends.testing.server import LoopbackServer

pytestmark = pytest.mark.anyio


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Site]:
    """A gateway whose backend keeps checkpoints."""
    async with site(tmp_path / "home", KeepsCheckpoints()) as opened:
        yield opened


async def sweep(
    here: Site, kind: Kind = "failed", *, age: float = -1, **more: Any
) -> list[Expired]:
    """Delete what has been there for longer than `age` seconds."""
    gateway = here.served.gateway
    parts = gateway.store, gateway.client, gateway.models, gateway.files, gateway.settings
    return await Retention(*parts).sweep(kinds=[kind], older_than=age, **more)


async def unused(here: Site, *job_ids: str) -> None:
    """Let the models of jobs be ones that were not used for long."""
    mine = jobs.update().where(jobs.c.id.in_(job_ids)).values(used_at=None, used_steps=None)
    await here.served.gateway.store.awrite(lambda c: c.execute(mine))


async def audited(here: Site) -> list[tuple[str, str]]:
    """Return what the gateway itself has done, with the target."""
    log = AuditLog(here.served.gateway.store)
    found = await to_thread.run_sync(lambda: [*log.entries()])
    return [(e["action"], e["target"]) for e in found if e["actor"] == "gateway"]


async def completed(here: Site, *steps: int, **fields: Any) -> dict[str, Any]:
    """Return a job that succeeded, with checkpoints of 4096 bytes at these steps."""
    job_id, remote = await here.started(**fields)
    points = []
    for step in steps:
        path = here.home / f"{remote}-step-{step}"
        path.mkdir()
        (path / "weights").write_bytes(b"w" * 4096)
        points.append(Checkpoint(step=step, at=utc_now(), metrics={}, path=path))
        here.backend.measure(remote, step, train_loss=1 / step)
    done = TrainingStatus.COMPLETED
    model = str(here.home / "model")
    here.backend.say(remote, done, result_model=model, checkpoints=tuple(points))
    return await ended(here, job_id, "SUCCESS")


def steps_on_disk(here: Site) -> set[int]:
    """Return the steps of all checkpoints whose files are there."""
    return {int(path.name.rpartition("-")[2]) for path in here.home.glob("*-step-*")}


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
    await sweep(here, age=3600)
    assert await has_run(here, job["id"])
    for _ in range(2):
        await sweep(here)
    assert not await has_run(here, job["id"])
    assert here.backend._jobs == {}
    assert await here.get(job["id"]) == job
    assert await audited(here) == [("job.expire", job["id"])]


async def test_what_succeeded_or_still_trains_is_kept(here: Site) -> None:
    """Cancelled jobs are not."""
    done = await here.finished()
    await ended(here, done["id"], "SUCCESS")
    live, _ = await here.started(suffix="live")
    cancelled, remote = await here.started(suffix="cancelled")
    await here.http.post(f"/v1/fine_tuning/jobs/{cancelled}/cancel")
    here.backend.say(remote, TrainingStatus.CANCELLED)
    await ended(here, cancelled, "CANCELLED")
    await sweep(here)
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
    await sweep(here)
    assert await has_run(here, job["id"])
    assert written.exists()
    await here.http.delete(f"/v1/models/{derived['fine_tuned_model']}")
    await sweep(here)
    assert await has_run(here, job["id"])  # it was used just now
    await unused(here, job["id"])
    await sweep(here)
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
        await sweep(here)
    assert await has_run(here, job["id"])
    assert any(entry["event"] == "run not deleted" for entry in logs)
    await sweep(here)
    assert not await has_run(here, job["id"])
    assert await here.get(job["id"]) == job


async def test_a_gateway_sweeps_what_is_older_than_its_setting(tmp_path: Path) -> None:
    """At its start, and every hour."""
    async with site(tmp_path / "home") as first:
        job_id, remote = await first.started()
        first.backend.fail(remote)
        await ended(first, job_id, "FAILED")
        backend = first.backend
    async with site(tmp_path / "home", backend, keep_failed_days=1e-9) as again:
        await until(lambda: _gone(again, job_id))


async def _gone(here: Site, job_id: str) -> bool:
    return not await has_run(here, job_id)


async def test_an_old_model_that_nobody_uses_is_deleted(here: Site) -> None:
    """Not while it answers, is downloaded or is the base of another one."""
    job = await completed(here)
    name = job["fine_tuned_model"]
    await here.served.gateway.models.offer(name, Principal("k"))
    assert await sweep(here, "completed") == []
    derived = await completed(here, model=name, suffix="more")
    await unused(here, job["id"], derived["id"])
    for each in (derived, job):  # the base once nothing depends on it
        (gone,) = await sweep(here, "completed")
        assert gone.id == each["id"]
        model = each["fine_tuned_model"]
        assert (await here.http.get(f"/v1/models/{model}")).status_code == 404
        assert await here.get(each["id"]) == each
    assert await sweep(here, "completed") == []
    assert await audited(here) == [("job.expire", derived["id"]), ("job.expire", job["id"])]


async def test_a_chat_and_a_download_are_uses(tmp_path: Path) -> None:
    """The model is kept for as long again."""
    with LoopbackServer(answered) as upstream:
        url = f"{upstream.base_url}/v1"
        async with site(tmp_path / "home", KeepsCheckpoints(), inference_url=url) as here:
            (here.home / "model").mkdir()
            job = await completed(here)
            name = job["fine_tuned_model"]
            await here.http.post("/v1/chat/completions", json={**ASKED, "model": name})
            assert await sweep(here, "completed") == []
            await unused(here, job["id"])
            here.served.gateway.models._use._known.clear()  # an hour passes
            assert (await here.http.get(f"/v1/models/{name}/weights")).status_code == 200
            assert await sweep(here, "completed") == []
            await unused(here, job["id"])
            assert len(await sweep(here, "completed")) == 1


async def test_a_run_that_is_a_base_model_of_the_catalogue_is_kept(tmp_path: Path) -> None:
    """The operator offers its result under another name."""
    home, offers = tmp_path / "home", tmp_path / "catalogue.toml"
    async with site(home, KeepsCheckpoints()) as here:
        job = await completed(here)
        backend = here.backend
    result = home / "gateway" / "runs" / job["id"] / "result"
    offers.write_text(f'[models.ours]\ntarget = "{result}"\ncontext_length = 2048\n')
    async with site(home, backend, catalogue=offers) as again:
        assert await sweep(again, "completed") == []


async def test_checkpoints_that_nobody_uses_are_deleted(here: Site) -> None:
    """The model stays, and so do the checkpoints that are in use as models."""
    job = await completed(here, 10, 20, 30, 40)
    name = f"{job['fine_tuned_model']}:ckpt-step"
    derived = await completed(here, model=f"{name}-10", suffix="more")
    await unused(here, job["id"])
    await here.served.gateway.models.offer(f"{name}-20", Principal("k"))
    planned = await sweep(here, "checkpoints", dry_run=True)
    assert steps_on_disk(here) == {10, 20, 30, 40}
    assert planned == await sweep(here, "checkpoints") != []
    assert planned[0].bytes >= 2 * 4096
    assert steps_on_disk(here) == {10, 20}
    assert await here.get(job["id"]) == job
    assert (await here.http.get(f"/v1/models/{job['fine_tuned_model']}")).status_code == 200
    assert (await here.http.get(f"/v1/models/{name}-30")).status_code == 404
    await here.http.delete(f"/v1/models/{derived['fine_tuned_model']}")
    await unused(here, job["id"])
    await sweep(here, "checkpoints")
    assert steps_on_disk(here) == set()
    assert await audited(here) == [("checkpoints.expire", job["id"])] * 2


async def test_files_that_no_unfinished_job_uses_are_deleted(here: Site) -> None:
    """Content is kept as long as another file or a job needs it, and counted once."""
    alone, twice, again, busy = [
        await here.upload(jsonl([ROWS[n]]), name=name)
        for n, name in ((0, "a"), (1, "b"), (1, "c"), (2, "d"))
    ]
    live, remote = await here.started(files=[busy], suffix="live")
    assert await sweep(here, "files", age=3600) == []
    planned = await sweep(here, "files", dry_run=True)
    found = await sweep(here, "files")
    assert found == planned
    assert {each.id for each in found} == {alone, twice, again}
    size = sum(len(jsonl([ROWS[n]])) for n in (0, 1))
    assert sum(each.bytes for each in found) == size
    assert len([*(here.home / "gateway" / "files").iterdir()]) == 1
    assert (await here.http.get(f"/v1/files/{alone}")).status_code == 404
    here.backend.finish(remote)
    await ended(here, live, "SUCCESS")
    assert await sweep(here, "files", age=3600) == []
    assert [each.id for each in await sweep(here, "files")] == [busy]
    expired = {target for action, target in await audited(here) if action == "file.expire"}
    assert expired == {alone, twice, again, busy}


async def test_the_log_of_an_old_job_is_deleted_and_the_job_shows_the_same(here: Site) -> None:
    """The metrics of the steps between its checkpoints are gone as well."""
    job_id, remote = await here.started(hyperparameters={"training_steps": 40})
    for step in range(1, 41):
        here.backend.measure(remote, step, train_loss=1 / step)
    here.backend.finish(remote)
    job = await ended(here, job_id, "SUCCESS")
    client = here.served.gateway.client
    before = await client.metrics(job_id)
    (gone,) = await sweep(here, "logs")
    assert gone.bytes > 0
    assert await sweep(here, "logs") == []
    assert await here.get(job_id) == job
    sources = {record.source async for record in client.logs(job_id)}
    assert sources == {"status"}
    kept = {point["step_number"] for point in job["checkpoints"]}
    assert {point.step for point in await client.metrics(job_id)} == kept
    assert {point.step for point in before} == set(range(1, 41)) > kept


async def test_a_project_has_periods_of_its_own(tmp_path: Path) -> None:
    """Longer or shorter ones than those of the gateway."""
    settings: Any = {"keep_failed_days": 1.0, "keep_files_days": 1e-9}
    async with site(tmp_path / "home", KeepsCheckpoints(), **settings) as here:
        job = await failed(here)
        gateway = here.served.gateway
        parts = gateway.store, gateway.client, gateway.models, gateway.files, gateway.settings
        retention, projects = Retention(*parts), ProjectStore(gateway.store)
        keep: dict[str, Any] = {"files": FOREVER, "failed": None}
        await to_thread.run_sync(projects.set, "default", {}, keep)
        assert await retention.sweep() == []
        await to_thread.run_sync(projects.set, "default", {}, {"failed": 1e-9})
        assert [(each.kind, each.id) for each in await retention.sweep()] == [("failed", job["id"])]
        await to_thread.run_sync(projects.set, "default", {}, {"files": None})
        assert [each.kind for each in await retention.sweep(project="default")] == ["files"]


async def test_the_command_line_cleans_up_beside_a_running_gateway(here: Site) -> None:
    """The audit log names who did it."""
    job, keep = await failed(here), GatewaySettings()
    backends = {"scripted": here.backend}
    async with open_retention(keep, home=here.home, backends=backends) as retention:
        found = await retention.sweep(older_than=-1, kinds=["failed"], actor_of=local_operator)
    assert [each.id for each in found] == [job["id"]]
    assert not await has_run(here, job["id"])
    log = AuditLog(here.served.gateway.store)
    *_, entry = await to_thread.run_sync(lambda: [*log.entries()])
    assert entry["actor"].startswith("local:")


async def test_an_upload_waits_for_another_process_that_changes_files(here: Site) -> None:
    """It would remove the content between its check and the new row."""
    with hold_lock(here.home / "gateway" / "files.lock"), pytest.raises(httpx.ReadTimeout):
        await here.http.post("/v1/files", files={"file": ("a.jsonl", jsonl())}, timeout=0.3)
    await here.upload()
