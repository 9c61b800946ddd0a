"""A gateway that ends in the middle goes on where it was."""

from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from tests.gateway.conftest import Site, scripted, site
from tests.waiting import until
from training_backends.client.client import AsyncTrainingClient
from training_backends.core.errors import BackendUnavailable
from training_backends.core.status import TrainingStatus
from training_backends.gateway import runner
from training_backends.gateway.keys import open_keys

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

JOBS = "/v1/fine_tuning/jobs"


async def test_a_running_job_is_followed_again_without_gap_or_repeat(tmp_path: Path) -> None:
    """What the backend said in the meantime is not missed, what was stored not repeated."""
    backend = scripted()
    async with site(tmp_path, backend) as here:
        job_id, remote = await here.started()
        await here.until(job_id, "RUNNING")
        backend.measure(remote, 10, train_loss=3.0)
        await until(lambda: here.get(job_id), lambda job: job["checkpoints"])
    backend.measure(remote, 20, train_loss=2.0)
    async with site(tmp_path, backend) as here:
        backend.measure(remote, 30, train_loss=1.0)
        backend.finish(remote)
        done = await here.until(job_id, "SUCCESS")
    assert [point["step_number"] for point in done["checkpoints"]] == [30, 20, 10]
    words = [event["data"]["status"] for event in done["events"]]
    assert words == ["QUEUED", "VALIDATING", "VALIDATED", "RUNNING", "SUCCESS"]
    assert len(backend.created) == 1


async def test_a_job_that_ended_while_the_gateway_was_away_is_seen_to_have(tmp_path: Path) -> None:
    """Its model is listed after the restart."""
    backend = scripted()
    async with site(tmp_path, backend) as here:
        job_id, remote = await here.started()
        await here.until(job_id, "RUNNING")
    backend.finish(remote)
    async with site(tmp_path, backend) as here:
        done = await here.until(job_id, "SUCCESS")
        assert (await here.http.get(f"/v1/models/{done['fine_tuned_model']}")).status_code == 200


async def test_a_validated_job_still_waits_for_its_start(tmp_path: Path) -> None:
    """Its quote is kept, and the start works."""
    backend = scripted()
    async with site(tmp_path, backend) as here:
        job = await here.create()
        quote = (await here.until(job["id"], "VALIDATED"))["metadata"]
    async with site(tmp_path, backend) as here:
        kept = await here.get(job["id"])
        assert (kept["status"], kept["metadata"]) == ("VALIDATED", quote)
        await here.http.post(f"{JOBS}/{job['id']}/start")
        await here.until(job["id"], "RUNNING")


async def test_a_validation_cut_off_is_done_again(tmp_path: Path) -> None:
    """VALIDATING is told once."""
    backend = scripted()
    backend.gate = anyio.Event()
    async with site(tmp_path, backend) as here:
        job = await here.create()
        await here.until(job["id"], "VALIDATING")
    backend.gate = None
    async with site(tmp_path, backend) as here:
        validated = await here.until(job["id"], "VALIDATED")
    words = [event["data"]["status"] for event in validated["events"]]
    assert words == ["QUEUED", "VALIDATING", "VALIDATED"]


@pytest.mark.parametrize("sent", [False, True])
async def test_a_start_that_was_accepted_is_carried_out_once(tmp_path: Path, sent: bool) -> None:
    """Whether or not the backend had made the run before the gateway ended."""
    backend = scripted()
    error = BackendUnavailable("away", sent=sent)
    tried = anyio.Event()

    def away() -> None:
        tried.set()
        raise error

    if sent:
        backend.after_create = away
    else:
        backend.before_create = away
    async with site(tmp_path, backend) as here:
        job = await here.create(auto_start=True)
        await tried.wait()
    backend.before_create = backend.after_create = lambda: None
    async with site(tmp_path, backend) as here:
        await here.until(job["id"], "RUNNING")
        assert len(backend.created) == 1
        backend.finish(backend.created[0])
        await here.until(job["id"], "SUCCESS")


async def test_a_cancellation_asked_for_is_carried_out_after_the_restart(tmp_path: Path) -> None:
    """The backend hears of it even if it was away before."""
    backend = scripted()
    stop = backend.stop

    async def away(*args: Any, **kwargs: Any) -> None:
        raise BackendUnavailable("away")

    backend.stop = away  # type: ignore[method-assign]
    async with site(tmp_path, backend) as here:
        job_id, remote = await here.started()
        await here.http.post(f"{JOBS}/{job_id}/cancel")
    backend.stop = stop  # type: ignore[method-assign]
    async with site(tmp_path, backend) as here:
        assert (await here.get(job_id))["status"] == "CANCELLATION_REQUESTED"
        await until(lambda: backend._jobs[remote].status is TrainingStatus.STOPPING)
        backend.say(remote, TrainingStatus.CANCELLED)
        await here.until(job_id, "CANCELLED")


async def test_files_and_links_outlive_a_restart(tmp_path: Path) -> None:
    """A signed link made before works after."""
    async with site(tmp_path) as here:
        file_id = await here.upload()
        url = (await here.http.get(f"/v1/files/{file_id}/url")).json()["url"]
        path = url.removeprefix(here.served.url)
    async with site(tmp_path) as here:
        del here.http.headers["authorization"]
        assert (await here.http.get(path)).status_code == 200


async def test_jobs_and_keys_survive_the_recovery_of_a_damaged_database(tmp_path: Path) -> None:
    """`doctor --recover` rebuilds the gateway's tables with the runs, as far as readable."""
    async with site(tmp_path) as here:
        job = await here.finished()
        made = await to_thread.run_sync(lambda: open_keys(tmp_path).create("ci"))
    root = tmp_path / "gateway"
    with (root / "runs.db").open("r+b") as file:
        file.write(b"x" * 100)
    async with AsyncTrainingClient(home=root, backends={"scripted": scripted()}) as client:
        assert job["id"] in (await client.recover_store()).saved
    async with site(tmp_path) as here:
        here.http.headers["authorization"] = f"Bearer {made.key.get_secret_value()}"
        kept = await here.get(job["id"])
        assert (kept["status"], kept["events"][-1]) == ("SUCCESS", job["events"][-1])
        assert (await here.http.get(f"/v1/models/{job['fine_tuned_model']}")).status_code == 200


async def test_a_job_whose_event_another_watcher_received_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each event is delivered once, so `training-backends watch` on this home takes some."""
    monkeypatch.setattr(runner, "CATCH_UP_EVERY", 0.05)

    async def deaf(*_: object) -> None:
        """Receive an event in the place of the gateway."""

    watcher = AsyncTrainingClient.watcher
    monkeypatch.setattr(
        AsyncTrainingClient, "watcher", lambda self, **_: watcher(self, on_event=deaf)
    )
    async with site(tmp_path) as here:
        job_id, remote = await here.started()
        await here.until(job_id, "RUNNING")
        here.backend.finish(remote)
        await here.until(job_id, "SUCCESS")


async def test_many_jobs_go_on_together(tmp_path: Path) -> None:
    """A restart takes up all of them, not only the first."""
    backend = scripted()
    async with site(tmp_path, backend) as here:
        made = [await here.started(suffix=f"n{n}") for n in range(5)]
    async with site(tmp_path, backend) as here:
        await _finish_all(here, made)


async def _finish_all(here: Site, made: list[tuple[str, str]]) -> None:
    for _, remote in made:
        here.backend.finish(remote)
    for job_id, _ in made:
        await here.until(job_id, "SUCCESS")
