"""Runs on a real cluster of two nodes that share an S3 server and no directory."""

import sys
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.backends.ray.conftest import Cluster
from tests.backends.ray.test_cluster import config, losses
from tests.buckets import KEYS, Bucket, bucket, s3_server
from tests.waiting import wait_until
from training_backends import AsyncTrainingClient, TrainingStatus
from training_backends.backends.local.backend import LocalBackend
from training_backends.backends.ray.backend import RayBackend
from training_backends.backends.ray.settings import RaySettings
from training_backends.core.backend import RemoteFilters
from training_backends.credentials.vault import CredentialVault

__all__ = ["bucket", "s3_server"]

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]

TWO = {"resources": {"workers": 2, "cpus": 1}}


@pytest.fixture(scope="module")
def nodes(s3_server: str) -> Iterator[Cluster]:
    """Two nodes with one CPU core each, and with the credentials of the store."""
    variables = KEYS | {
        "AWS_EC2_METADATA_DISABLED": "true",
        "TRAINING_BACKENDS_OBJECTS__OPTIONS__S3__ENDPOINT_URL": s3_server,
    }
    with TemporaryDirectory(prefix="ray-") as directory:
        cluster = Cluster(Path(directory), variables, cpus=1)
        try:
            cluster.start()
            cluster.join("second")
            yield cluster
        finally:
            cluster.kill()


def backend_at(home: Path, nodes: Cluster, bucket: Bucket) -> RayBackend:
    """Return the backend of a client with a home of its own."""
    settings = RaySettings(
        base_url=nodes.url,
        storage=f"{bucket.url}/runs of a team",
        python=sys.executable,
        poll_min=0.2,
        poll_max=0.5,
    )
    vault = CredentialVault(environ={"RAY_API_KEY": nodes.token})
    return RayBackend(home, credentials=vault, settings=settings)


@pytest.fixture
async def client(
    nodes: Cluster, bucket: Bucket, tmp_path: Path
) -> AsyncIterator[AsyncTrainingClient]:
    """A client of the cluster."""
    home = tmp_path / "home"
    backends = {"ray": backend_at(home, nodes, bucket), "local": LocalBackend(home)}
    async with AsyncTrainingClient(home=home, backends=backends) as client:
        yield client


def steps(bucket: Bucket, run_id: str) -> list[int]:
    """Return the steps of a run's complete checkpoints in the store."""
    names = [name.split("/") for name in bucket.names() if f"/{run_id}/checkpoints/" in name]
    return sorted(int(name[-2][5:]) for name in names if name[-1] == "state.json")


async def test_two_nodes_train_a_run_that_anyone_with_the_store_can_follow(
    client: AsyncTrainingClient, nodes: Cluster, bucket: Bucket, tmp_path: Path
) -> None:
    """Losses, log and model are those of this machine; the job shows no secret."""
    run = await client.launch(config(6, **TWO), backend="ray", run_id="apart")
    messages = [record.message async for record in client.logs(run.id, follow=True)]
    assert messages[-1] == "completed", messages
    here = await client.launch(config(6), backend="local", run_id="here")
    await client.wait(here.id)
    assert await losses(client, run) == pytest.approx(await losses(client, here), abs=2e-6)
    done = await client.status(run.id)
    assert done.result_model == f"{bucket.url}/runs of a team/runs/apart/result"
    exported = await client.download(run.id, tmp_path / "step", checkpoint="3")
    assert (exported / "config.json").is_file()
    assert (await client.sample(run.id, "3 plus 4?", max_tokens=4)).answer is not None
    shown = "".join(nodes.get(f"/api/jobs/apart{end}").text for end in ("", "/logs"))
    assert not [secret for secret in (nodes.token, *KEYS.values()) if secret in shown]
    other = backend_at(tmp_path / "elsewhere", nodes, bucket)
    [found] = await other.list_remote(RemoteFilters())
    await other.aclose()
    assert (found.run_id, found.state.status) == ("apart", TrainingStatus.COMPLETED)
    assert found.state.result_model == done.result_model
    await client.delete(run.id)
    assert not bucket.names()
    assert not [*(tmp_path / "home/ray-objects").rglob("*apart*")]


async def test_a_run_survives_what_can_happen_to_it(
    client: AsyncTrainingClient, nodes: Cluster, bucket: Bucket, tmp_path: Path
) -> None:
    """Stopped, without its driver and without a node, it goes on from the newest checkpoint."""
    total = 120
    here = await client.launch(config(total), backend="local", run_id="here")
    run = await client.launch(config(total, **TWO), backend="ray", run_id="first")
    wait_until(lambda: steps(bucket, "first"), patience=600)
    await client.stop(run.id)
    [stopped] = await client.wait(run.id)
    assert stopped.status is TrainingStatus.CANCELLED

    second = await client.resume(run.id, new_id="second")
    first_step = max(steps(bucket, "first"))
    wait_until(lambda: max(steps(bucket, "second"), default=0) > first_step, patience=600)
    [driver] = nodes.processes("training_backends.trainer ray")[-1:]
    driver.kill()
    [lost] = await client.wait(second.id)
    assert (lost.status, lost.failure and lost.failure.kind) == (TrainingStatus.FAILED, "lost")

    third = await client.resume(second.id, new_id="third")
    second_step = max(steps(bucket, "second"))
    wait_until(lambda: max(steps(bucket, "third"), default=0) > second_step, patience=600)
    nodes.lose("second")
    nodes.join("another")
    [done] = await client.wait(third.id)
    assert done.status is TrainingStatus.COMPLETED, done.failure

    await client.wait(here.id)
    expected, found = await losses(client, here), await losses(client, third)
    assert min(found) == second_step + 1
    assert max(found) == total
    assert found == pytest.approx({step: expected[step] for step in found}, abs=1e-4)
    target = await client.download(third.id, tmp_path / "model")
    assert (target / "config.json").is_file()
