"""Runs on a real Ray cluster: what is trained, and what is left when parts of it die."""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from mistralai.client import Mistral

import training_backends
from tests.backends.ray.conftest import Cluster
from tests.waiting import wait_until
from training_backends import (
    AsyncTrainingClient,
    ConfigError,
    DuplicateRun,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
)
from training_backends.backends.local.backend import LocalBackend
from training_backends.backends.ray.backend import RayBackend
from training_backends.backends.ray.settings import RaySettings
from training_backends.credentials.vault import CredentialVault

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]

TERMINAL = {"SUCCESS", "FAILED", "FAILED_VALIDATION", "CANCELLED"}
SAMPLES = Path(training_backends.__file__).parent / "samples"


def config(steps: int, **changes: Any) -> TrainingConfig:
    """A run of the demo model with a checkpoint every third step."""
    values = {
        "model": "tiny-mistral",
        "data": {"train": SAMPLES / "train.jsonl"},
        "hyperparameters": {"training_steps": steps, "batch_size": 4},
        "options": {"checkpoint_every": 3},
    }
    return TrainingConfig.model_validate(values | changes)


@pytest.fixture
async def client(cluster: Cluster, tmp_path: Path) -> AsyncIterator[AsyncTrainingClient]:
    """A client of the cluster, and of this machine to compare with."""
    settings = RaySettings(base_url=cluster.url, python=sys.executable, poll_min=0.1, poll_max=0.5)
    vault = CredentialVault(environ={"RAY_API_KEY": cluster.token})
    ray = RayBackend(tmp_path, credentials=vault, settings=settings)
    backends = {"ray": ray, "local": LocalBackend(tmp_path)}
    async with AsyncTrainingClient(home=tmp_path, backends=backends) as client:
        yield client


async def losses(client: AsyncTrainingClient, run: TrainingRun) -> dict[int, float]:
    """Return the training loss of each step."""
    points = await client.metrics(run.id)
    return {point.step: point.value for point in points if point.name == "train_loss"}


def checkpoints(tmp_path: Path, run: TrainingRun) -> list[str]:
    """Return the names of the checkpoints on the storage."""
    return [path.name for path in (tmp_path / "ray/runs" / run.id / "checkpoints").glob("step-*")]


async def test_a_run_trains_as_on_this_machine_and_shows_no_token(
    client: AsyncTrainingClient, cluster: Cluster, tmp_path: Path
) -> None:
    """Losses are equal; the log is followed; the model answers; the job shows no secret."""
    run = await client.launch(config(4), backend="ray", run_id="first")
    messages = [record.message async for record in client.logs(run.id, follow=True)]
    assert messages[-1] == "completed"
    here = await client.launch(config(4), backend="local", run_id="here")
    await client.wait(here.id)
    assert await losses(client, run) == await losses(client, here)
    done = await client.status(run.id)
    assert (done.status, (Path(str(done.result_model)) / "config.json").is_file()) == (
        TrainingStatus.COMPLETED,
        True,
    )
    reply = await client.sample(run.id, "3 plus 4?", max_tokens=4)
    assert reply.answer is not None
    exported = await client.download(run.id, tmp_path / "step", checkpoint="3")
    assert (exported / "config.json").is_file()
    shown = [cluster.get(f"/api/jobs/{run.id}{end}").text for end in ("", "/logs")]
    assert cluster.token not in "".join(shown)


async def test_two_workers_train_as_one(client: AsyncTrainingClient) -> None:
    """They share each step's rows, and shard the model."""
    one = await client.launch(config(4), backend="local", run_id="one")
    two = await client.launch(config(4, resources={"workers": 2}), backend="ray", run_id="two")
    done = await client.wait(one.id, two.id)
    assert {run.status for run in done} == {TrainingStatus.COMPLETED}
    expected, found = await losses(client, one), await losses(client, two)
    assert found == pytest.approx(expected, abs=2e-6)


async def test_a_stopped_run_is_resumed_from_its_checkpoint(
    client: AsyncTrainingClient, tmp_path: Path
) -> None:
    """The job saves one before it ends, and the new one continues after it."""
    run = await client.launch(config(2000), backend="ray", run_id="long")
    wait_until(lambda: checkpoints(tmp_path, run), patience=300)
    await client.stop(run.id)
    [stopped] = await client.wait(run.id)
    assert stopped.status is TrainingStatus.CANCELLED
    step = max(int(name.removeprefix("step-")) for name in checkpoints(tmp_path, run))
    resumed = await client.resume(run.id, new_id="again")
    wait_until(lambda: len(checkpoints(tmp_path, resumed)) > 1, patience=300)
    await client.stop(resumed.id)
    await client.wait(resumed.id)
    assert min(await losses(client, resumed)) == step + 1


async def test_a_run_survives_its_worker_and_not_its_head(
    client: AsyncTrainingClient, cluster: Cluster, tmp_path: Path
) -> None:
    """Another worker continues by itself; what the head took with it is resumed on a new one."""
    run = await client.launch(config(5000), backend="ray", run_id="unlucky")
    wait_until(lambda: checkpoints(tmp_path, run), patience=300)
    [worker] = cluster.processes("ray::RayTrainWorker")
    program = "training_backends.trainer work"
    [trainer] = cluster.processes(program)
    worker.kill()
    wait_until(lambda: not trainer.is_running(), patience=60)
    [another] = wait_until(
        lambda: cluster.processes("training_backends.trainer work"), patience=300
    )
    assert another.pid != trainer.pid
    cluster.kill()
    cluster.start()
    lost = await client.status(run.id)
    assert (lost.status, lost.failure and lost.failure.kind) == (TrainingStatus.FAILED, "lost")
    resumed = await client.resume(run.id, new_id="lucky")
    wait_until(lambda: len(checkpoints(tmp_path, resumed)) > 1, patience=300)
    await client.stop(resumed.id)
    [stopped] = await client.wait(resumed.id)
    assert stopped.status is TrainingStatus.CANCELLED


async def test_what_the_cluster_cannot_have_is_refused(client: AsyncTrainingClient) -> None:
    """Ray itself would let the job wait forever."""
    with pytest.raises(ConfigError) as caught:
        await client.launch(config(4, resources={"gpus": 1}), backend="ray")
    assert "room for 0 of 1 workers" in json.dumps([i.message for i in caught.value.issues])


async def test_another_job_of_that_name_is_not_taken_over(
    client: AsyncTrainingClient, tmp_path: Path
) -> None:
    """Deleted here, a run is still a job of the cluster."""
    run = await client.launch(config(1), backend="ray", run_id="twice")
    await client.wait(run.id)
    await client.delete(run.id)
    with pytest.raises(DuplicateRun, match="another job twice"):
        await client.launch(config(1), backend="ray", run_id="twice")


def test_the_official_sdk_trains_on_the_cluster_through_the_gateway(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Code written for Mistral's jobs needs to know nothing about Ray."""
    key = secrets.token_urlsafe(24)
    environment = {name: text for name, text in os.environ.items() if "TRAINING_" not in name}
    environment |= {
        "TRAINING_BACKENDS_HOME": str(tmp_path),
        "TRAINING_BACKENDS_GATEWAY__API_KEY": key,
        "TRAINING_BACKENDS_RAY__BASE_URL": cluster.url,
        "TRAINING_BACKENDS_RAY__PYTHON": sys.executable,
        "RAY_API_KEY": cluster.token,
    }
    command = [sys.executable, "-m", "training_backends", "serve"]
    command += ["--port", "0", "--json", "--backend", "ray"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            client = Mistral(api_key=key, server_url=json.loads(server.stdout.readline())["url"])
            content = (SAMPLES / "train.jsonl").read_bytes()
            file = client.files.upload(file={"file_name": "train.jsonl", "content": content})
            job = client.fine_tuning.jobs.create(
                model="tiny-mistral",
                training_files=[{"file_id": file.id, "weight": 1}],
                hyperparameters={"training_steps": 2, "learning_rate": 1e-3},
                auto_start=True,
            )

            def status() -> str:
                return str(client.fine_tuning.jobs.get(job_id=job.id).status)

            assert wait_until(status, TERMINAL.__contains__, patience=400) == "SUCCESS"
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)
