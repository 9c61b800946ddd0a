"""Results that are copied to the destination of their run when it has completed."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.buckets import Bucket, bucket, s3_server
from tests.gateway.conftest import site
from tests.objects.test_publish import FILES, Downloading, data
from tests.waiting import until
from training_backends import AsyncTrainingClient, BackendUnavailable, ConfigError, TrainingRun
from training_backends.client import results
from training_backends.core.errors import RunNotFound
from training_backends.objects.store import ObjectStore
from training_backends.testing.backend import ScriptedBackend

__all__ = ["bucket", "data", "s3_server"]

pytestmark = pytest.mark.anyio


class Forgetful(Downloading):
    """Has its models until it is told to forget them."""

    forgets = False

    async def download(self, run: TrainingRun, target: Path) -> Path:
        if self.forgets:
            raise RunNotFound("gone", run_id=run.id)
        return await super().download(run, target)


@pytest.fixture
def backend() -> Forgetful:
    declared = ScriptedBackend().capabilities
    return Forgetful(capabilities=declared.model_copy(update={"downloads": True}))


@pytest.fixture
async def client(
    tmp_path: Path, backend: Forgetful, bucket: Bucket
) -> AsyncIterator[AsyncTrainingClient]:
    assert bucket.endpoint  # is in the environment
    async with AsyncTrainingClient(home=tmp_path / "home", backends={"scripted": backend}) as made:
        yield made


async def completed(
    client: AsyncTrainingClient, backend: Forgetful, data: Path, destination: str
) -> TrainingRun:
    """Complete a run with a destination and return it."""
    config = {
        "model": "tiny-mistral",
        "data": {"train": data},
        "result": {"destination": destination},
    }
    run = await client.launch(config, backend="scripted")
    backend.finish(backend.created[-1])
    (run,) = await client.wait(run.id)
    return run


async def notes(client: AsyncTrainingClient, run: TrainingRun) -> list[str]:
    """Return what the log says of the copy."""
    return [each.message async for each in client.logs(run.id) if each.source == "watch"]


async def test_a_completed_run_is_at_its_destination(
    client: AsyncTrainingClient, backend: Forgetful, data: Path, bucket: Bucket
) -> None:
    """Its record and its log say where; the manifest is there once all of it is."""
    run = await completed(client, backend, data, f"{bucket.url}/of the team/".replace(" ", "-"))
    assert run.result_uri == f"{bucket.url}/of-the-team/{run.id}"
    assert await client.get(run.id) == run
    assert await notes(client, run) == [f"The result is copied to {run.result_uri}"]
    place = f"of-the-team/{run.id}"
    assert {*bucket.names()} == {f"{place}/{name}" for name in (*FILES, "manifest.json")}
    assert json.loads(bucket.get(f"{place}/manifest.json"))["run"] == run.id


async def test_the_copy_is_downloaded_where_the_model_is_gone(
    client: AsyncTrainingClient, backend: Forgetful, data: Path, bucket: Bucket, tmp_path: Path
) -> None:
    """Every file has the digest in the manifest, or nothing is left."""
    run = await completed(client, backend, data, f"{bucket.url}/a")
    backend.forgets = True
    target = await client.download(run.id, tmp_path / "model")
    found = {name: (target / name).read_bytes() for name in FILES}
    assert found == FILES
    bucket.put(f"a/{run.id}/config.json", b"[]")
    with pytest.raises(BackendUnavailable, match="differs"):
        await client.download(run.id, tmp_path / "other")
    assert not (tmp_path / "other").exists()


async def test_a_copy_that_fails_is_repeated_where_it_was(
    client: AsyncTrainingClient,
    backend: Forgetful,
    data: Path,
    bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run is completed all the same, and its log says why there is no copy yet."""
    monkeypatch.setattr(results, "_FIRST_PAUSE", 0.0)
    put: list[str] = []
    send = ObjectStore.put

    def cut(self: ObjectStore, name: str, path: Path) -> None:
        put.append(name)
        if len(put) == 2:
            raise BackendUnavailable("the network is away")
        send(self, name, path)

    monkeypatch.setattr(ObjectStore, "put", cut)
    run = await completed(client, backend, data, f"{bucket.url}/a")
    assert (run.status, run.result_uri) == ("completed", None)
    (said,) = await notes(client, run)
    assert "the network is away" in said
    await client.watcher().sweep()
    run = await client.get(run.id)
    assert run.result_uri == f"{bucket.url}/a/{run.id}"
    first, second = FILES
    assert sorted(put) == sorted([first, second, second if put[0] == first else first])
    assert {*bucket.names()} == {f"a/{run.id}/{name}" for name in (*FILES, "manifest.json")}
    await client.watcher().sweep()
    assert len(put) == 3


async def test_a_destination_that_cannot_be_used_is_rejected_at_launch(
    tmp_path: Path, data: Path
) -> None:
    """A backend without downloads, and a URL of no object store."""
    config: dict[str, Any] = {"model": "m", "data": {"train": data}}
    declared = ScriptedBackend().capabilities.model_copy(update={"downloads": False})
    backends = {"s": ScriptedBackend(capabilities=declared)}
    async with AsyncTrainingClient(home=tmp_path, backends=backends) as client:
        for destination in ("s3://bucket/a", "https://example.org/a", "s3://", "s3://b/a\n"):
            config["result"] = {"destination": destination}
            with pytest.raises(ConfigError) as caught:
                await client.launch(config, backend="s")
            [issue] = caught.value.issues
            assert issue.field == "result.destination"
            assert destination == "s3://bucket/a" or "s3://bucket/prefix" in issue.message


async def test_a_gateway_copies_the_models_of_its_jobs_and_serves_them_from_there(
    tmp_path: Path, backend: Forgetful, bucket: Bucket
) -> None:
    """Its users see no difference."""
    async with site(tmp_path / "home", backend, results=f"{bucket.url}/models") as here:
        job = await here.finished()
        client = here.served.gateway.client
        uri = f"{bucket.url}/models/{job['id']}"
        await until(lambda: client.get(job["id"]), lambda run: run.result_uri == uri)
        backend.forgets = True
        answer = await here.http.get(f"/v1/models/{job['fine_tuned_model']}/weights")
        assert answer.status_code == 200
        assert all(content in answer.content for content in FILES.values())
