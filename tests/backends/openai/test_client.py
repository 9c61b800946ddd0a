"""The backend under the real client and its store, and beside OpenAI's own client."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest
from blockbuster import blockbuster_ctx

from tests.backends.cancelled_launch import check_cancelled_launch
from tests.backends.openai.conftest import KEY
from training_backends import (
    AsyncTrainingClient,
    BackendUnavailable,
    TrainingConfig,
    TrainingStatus,
)
from training_backends.backends.openai.backend import OpenAIBackend
from training_backends.core.backend import CredentialSource
from training_backends.protocols.openai.requests import AzureFineTuningJobIn
from training_backends.testing.faults import LoseAnswer, OtherAnswer
from training_backends.testing.openai_provider import ScriptedOpenAIProvider
from training_backends.testing.server import Received, StubReply

pytestmark = pytest.mark.anyio
Open = Callable[[], AbstractAsyncContextManager[AsyncTrainingClient]]


@pytest.fixture
def open_client(make_backend: Callable[..., OpenAIBackend], tmp_path: Path) -> Open:
    """Open clients over one store, each as if in a process of its own."""

    @asynccontextmanager
    async def opened() -> AsyncGenerator[AsyncTrainingClient, None]:
        backend = make_backend(attempts=1)
        async with AsyncTrainingClient(
            home=tmp_path / "home", backends={"openai": backend}
        ) as client:
            yield client
        await backend.aclose()

    return opened


async def test_run_is_followed_from_another_process(
    open_client: Open, provider: ScriptedOpenAIProvider, config: TrainingConfig
) -> None:
    """A run launched by one client is followed to its end by another, and kept in the store."""
    provider.auto = "complete"
    async with open_client() as client:
        await client.launch(config, backend="openai", run_id="mine")
    async with open_client() as client:
        async with aclosing(client.logs("mine", follow=True)) as records:
            found = [record async for record in records]
        seen = await client.get("mine")
    assert "The job has successfully completed" in [record.message for record in found]
    assert [record.step for record in found if record.source == "metrics"] == [1, 2]
    assert seen.status is TrainingStatus.COMPLETED
    assert seen.result_model == provider.jobs[str(seen.remote_id)].fine_tuned_model


@pytest.mark.parametrize("version", [None, "preview", "2024-10-21", "2025-04-01-preview"])
async def test_run_at_azure(
    version: str | None,
    make_backend: Callable[..., OpenAIBackend],
    provider: ScriptedOpenAIProvider,
    config: TrainingConfig,
    tmp_path: Path,
) -> None:
    """Both surfaces: v1 with and without a version, and dated ones; launch, follow, stop."""
    openai = pytest.importorskip("openai")
    dated = version not in {None, "preview"}
    provider.base_path = "/openai" if dated else "/openai/v1"
    provider.query = {} if version is None else {"api-version": version}
    provider.created_status = 201 if dated else 200
    provider.error_style, provider.job_model = "azure", AzureFineTuningJobIn
    provider.result_coding, provider.result_layout = "plain", "azure"
    provider.new_file_status, provider.auto = "pending", "validate"
    backend = make_backend(base_url=provider.base_url, variant="azure", query=provider.query)
    endpoint = {"api_key": KEY, "max_retries": 0}
    if dated:
        theirs = openai.AsyncAzureOpenAI(
            azure_endpoint=provider.base_url, api_version=version, **endpoint
        )
    else:
        theirs = openai.AsyncOpenAI(base_url=provider.url, default_query=provider.query, **endpoint)
    async with (
        theirs,
        aclosing(backend),
        AsyncTrainingClient(home=tmp_path / "home", backends={"openai": backend}) as client,
    ):
        run = await client.launch(config, backend="openai", run_id="mine")
        job = provider.jobs[str(run.remote_id)]
        provider.set_status(job.id, "pending")
        assert (await client.status("mine")).status is TrainingStatus.PENDING
        provider.set_status(job.id, "queued")
        provider.run_to(job.id, "succeeded")
        (run,) = await client.wait("mine", timeout=10)
        assert (run.status, run.result_model) == (TrainingStatus.COMPLETED, job.fine_tuned_model)
        other = await client.launch(config, backend="openai", run_id="other")
        assert (await client.stop("other")).status is TrainingStatus.CANCELLED
        ours = [request for request in provider.requests if "api-key" in request.headers]
        assert len(ours) == len(provider.requests)
        shown = [entry.id async for entry in theirs.fine_tuning.jobs.list()]
        assert shown == [other.remote_id, run.remote_id]
    by_path = {request.path for request in ours}
    assert provider.requests[-1].path in by_path
    assert all(provider.query.items() <= dict(request.query).items() for request in ours)


async def test_no_step_blocks_the_loop(
    provider: ScriptedOpenAIProvider,
    secrets: CredentialSource,
    config: TrainingConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backend is found by its entry point and set up by its section of the settings."""
    monkeypatch.setenv("TRAINING_BACKENDS_OPENAI__BASE_URL", provider.url)
    monkeypatch.setenv("TRAINING_BACKENDS_OPENAI__POLL_MIN", "0.01")
    provider.auto = "complete"
    client = AsyncTrainingClient(home=tmp_path / "home", credentials=secrets)
    with blockbuster_ctx("training_backends"):
        async with client:
            run = await client.launch(config, backend="openai")
            (run,) = await client.wait(run.id, timeout=10)
    assert run.status is TrainingStatus.COMPLETED


@pytest.mark.parametrize("path", ["/files", "/jobs"])
async def test_broken_launch_is_repeated_by_its_id(
    path: str, open_client: Open, provider: ScriptedOpenAIProvider, config: TrainingConfig
) -> None:
    """After a launch that broke behind any request, its repetition makes one job of one upload."""
    answer = provider.answer

    def and_be_away(request: Received) -> StubReply:
        if request.method == "POST" and request.path.endswith(path):
            provider.fail(OtherAnswer(status=500), times=10_000)
        return answer(request)

    provider.answer = and_be_away  # type: ignore[method-assign]
    provider.fail(LoseAnswer(), method="POST", path=path)
    async with open_client() as client:
        with pytest.raises(BackendUnavailable):
            await client.launch(config, backend="openai", run_id="mine")
    provider.answer = answer  # type: ignore[method-assign]
    provider.heal()
    async with open_client() as client:
        await client.launch(config, backend="openai", run_id="mine")
        await client.launch(config, backend="openai", run_id="mine")
    assert len(provider.asked("POST", path)) == 1
    assert len(provider.jobs) == len(provider.files) == 1


async def test_launches_in_parallel_have_a_job_each(
    open_client: Open, provider: ScriptedOpenAIProvider, config: TrainingConfig
) -> None:
    """Runs of one store with the same data are not mixed, even with lost responses."""
    provider.fail(LoseAnswer(), method="POST", path="/jobs", times=2)
    async with open_client() as client, anyio.create_task_group() as group:
        for n in range(3):
            group.start_soon(partial(client.launch, config, backend="openai", run_id=f"r{n}"))
    async with open_client() as client:
        runs = await client.list()
    assert {run.remote_id for run in runs} == set(provider.jobs)
    assert len(provider.jobs) == 3


async def test_stopped_run_is_resumed_as_a_new_one(
    open_client: Open, provider: ScriptedOpenAIProvider, config: TrainingConfig
) -> None:
    """Stop and resume: two jobs, one upload."""
    async with open_client() as client:
        await client.launch(config, backend="openai", run_id="mine")
        run = await client.stop("mine")
        assert run.status is TrainingStatus.CANCELLED
        again = await client.resume("mine", new_id="again")
    assert (again.resumed_from, again.remote_id) == ("mine", list(provider.jobs)[1])
    assert len(provider.asked("POST", "/files")) == 1


async def test_official_client_sees_our_job(
    open_client: Open, provider: ScriptedOpenAIProvider, config: TrainingConfig, train_file: Path
) -> None:
    """OpenAI's own client retrieves, lists and ends what we launched, and we see that."""
    openai = pytest.importorskip("openai")
    async with open_client() as client:
        run = await client.launch(config, backend="openai", run_id="mine")
        async with openai.AsyncOpenAI(api_key=KEY, base_url=provider.url, max_retries=0) as theirs:
            jobs = theirs.fine_tuning.jobs
            job = await jobs.retrieve(run.remote_id)
            assert job.metadata["training_backends_run"] == "mine"
            assert job.method.supervised.hyperparameters.n_epochs == 1
            listed = [
                entry.id async for entry in jobs.list(metadata={"training_backends_run": "mine"})
            ]
            assert listed == [run.remote_id]
            content = await theirs.files.content(job.training_file)
            assert content.read() == train_file.read_bytes()
            await jobs.cancel(job.id)
        (run,) = await client.wait("mine", timeout=10)
    assert run.status is TrainingStatus.CANCELLED


async def test_a_launch_cancelled_while_its_job_is_created_stops_that_job(
    tmp_path: Path, backend: OpenAIBackend, provider: ScriptedOpenAIProvider, config: TrainingConfig
) -> None:
    """Nothing trains on, though the id of the job never arrived."""
    await check_cancelled_launch(tmp_path, backend, provider, config, path="/fine_tuning/jobs")
