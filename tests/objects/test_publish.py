"""Results copied to an object store."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from tests.buckets import Bucket, bucket, s3_server
from training_backends import AsyncTrainingClient, BackendUnavailable, ConfigError, TrainingRun
from training_backends.objects.store import ObjectStore
from training_backends.testing.backend import ScriptedBackend

__all__ = ["bucket", "s3_server"]

pytestmark = pytest.mark.anyio

FILES = {"config.json": b"{}", "adapter/weights.bin": b"weights" * 1000}


class Downloading(ScriptedBackend):
    """Has a model of two files."""

    async def download(self, run: TrainingRun, target: Path) -> Path:
        assert run.id
        for name, content in FILES.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)
        return target


async def finished(client: AsyncTrainingClient, backend: ScriptedBackend, data: Path) -> str:
    """Complete a run and return its id."""
    config = {"model": "tiny-mistral", "data": {"train": data}}
    run = await client.launch(config, backend="scripted")
    backend.finish(backend.created[-1])
    await client.wait(run.id)
    return run.id


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n")
    return path


def scripted() -> Downloading:
    declared = ScriptedBackend().capabilities
    return Downloading(capabilities=declared.model_copy(update={"downloads": True}))


async def test_a_result_is_copied_with_its_digests(
    bucket: Bucket, tmp_path: Path, data: Path
) -> None:
    """Repeating it changes nothing, and nothing is left on this machine."""
    backend = scripted()
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        run_id = await finished(client, backend, data)
        manifests = [await client.publish(run_id, f"{bucket.url}/bucket/a") for _ in range(2)]
    assert manifests == [f"{bucket.url}/bucket/a/manifest.json"] * 2
    manifest = json.loads(bucket.get("bucket/a/manifest.json"))
    assert manifest["run"] == run_id
    assert {each["name"]: each["sha256"] for each in manifest["files"]} == {
        name: sha256(content).hexdigest() for name, content in FILES.items()
    }
    assert {name: bucket.get(f"bucket/a/{name}") for name in FILES} == FILES
    assert not list((tmp_path / "cache").glob("publish-*"))


async def test_another_result_is_not_replaced(bucket: Bucket, tmp_path: Path, data: Path) -> None:
    bucket.put("models/a/manifest.json", b'{"files": []}')
    backend = scripted()
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        run_id = await finished(client, backend, data)
        with pytest.raises(ConfigError, match="another result"):
            await client.publish(run_id, f"{bucket.url}/models/a")
    assert bucket.names() == ["models/a/manifest.json"]


async def test_an_incomplete_copy_has_no_manifest(
    bucket: Bucket, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next attempt completes it."""
    put = ObjectStore.put

    def failing(self: ObjectStore, name: str, path: Path) -> None:
        if name == "config.json":
            raise BackendUnavailable("The connection was lost.")
        put(self, name, path)

    backend = scripted()
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        run_id = await finished(client, backend, data)
        with monkeypatch.context() as patch:
            patch.setattr(ObjectStore, "put", failing)
            with pytest.raises(BackendUnavailable):
                await client.publish(run_id, f"{bucket.url}/a")
        assert sorted(bucket.names()) == ["a/adapter/weights.bin", "a/manifest.begun.json"]
        await client.publish(run_id, f"{bucket.url}/a")
    assert "a/manifest.json" in bucket.names()


async def test_a_missing_bucket_is_known_before_the_download(
    bucket: Bucket, tmp_path: Path, data: Path
) -> None:
    backend = scripted()
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        run_id = await finished(client, backend, data)
        with pytest.raises(ConfigError, match="bucket"):
            await client.publish(run_id, "s3://no-such-bucket/a")
