"""The backend under the real client and its store."""

import os
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx

from tests.backends.cancelled_launch import check_cancelled_launch
from tests.readings import counted_readings
from training_backends import (
    AsyncTrainingClient,
    BackendRetired,
    BackendUnavailable,
    BudgetExceeded,
    TrainingConfig,
    TrainingStatus,
)
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.core.backend import CredentialSource
from training_backends.testing.faults import LoseAnswer, OtherAnswer
from training_backends.testing.provider import ScriptedProvider
from training_backends.testing.server import Received, StubReply

pytestmark = pytest.mark.anyio
Open = Callable[[], AbstractAsyncContextManager[AsyncTrainingClient]]


@pytest.fixture
def open_client(restart: Callable[..., MistralAPIBackend], tmp_path: Path) -> Open:
    """Open clients over one store, each as if in a process of its own."""

    @asynccontextmanager
    async def opened() -> AsyncGenerator[AsyncTrainingClient, None]:
        backend = restart(attempts=1)
        async with AsyncTrainingClient(
            home=tmp_path / "home", backends={"mistral": backend}
        ) as client:
            yield client
        await backend.aclose()

    return opened


async def test_run_is_seen_from_another_process(
    open_client: Open, provider: ScriptedProvider, config: TrainingConfig
) -> None:
    """A run launched by one client is followed to its end by another."""
    async with open_client() as client:
        run = await client.launch(config, backend="mistral", run_id="mine")
        assert run.estimate is not None
        assert run.estimate.basis == "quote"
        assert run.estimate.ours is not None
        assert run.estimate.ours.basis == "exact"
    async with open_client() as client:
        async with aclosing(client.logs("mine", follow=True)) as records:
            messages = [record.message async for record in records]
        seen = await client.get("mine")
    assert messages[-1] == "SUCCESS"
    assert seen.status is TrainingStatus.COMPLETED
    assert seen.result_model is not None
    assert [point.step for point in seen.checkpoints] == [1, 10]


async def test_no_step_of_a_launch_blocks_the_loop(
    provider: ScriptedProvider,
    secrets: CredentialSource,
    config: TrainingConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the first import of the backend to the end of the run, the loop reads no file."""
    monkeypatch.setenv("TRAINING_BACKENDS_MISTRAL__BASE_URL", provider.base_url)
    monkeypatch.setenv("TRAINING_BACKENDS_MISTRAL__POLL_MIN", "0.01")
    client = AsyncTrainingClient(home=tmp_path / "home", credentials=secrets)
    with blockbuster_ctx("training_backends"):
        async with client:
            run = await client.launch(config, backend="mistral")
            assert [record async for record in client.logs(run.id, follow=True)]
            (run,) = await client.wait(run.id, timeout=10)
    assert run.status is TrainingStatus.COMPLETED


@pytest.mark.parametrize("path", ["/files", "/jobs", "/start"])
async def test_broken_launch_is_repeated_by_its_id(
    path: str, open_client: Open, provider: ScriptedProvider, config: TrainingConfig
) -> None:
    """After a launch that broke behind any request, its repetition gives one job, one start."""
    answer = provider.answer

    def and_be_away(request: Received) -> StubReply:
        if request.method == "POST" and request.path.endswith(path):
            provider.fail(OtherAnswer(status=500), times=10_000)
        return answer(request)

    provider.answer = and_be_away  # type: ignore[method-assign]
    provider.fail(LoseAnswer(), method="POST", path=path)
    async with open_client() as client:
        with pytest.raises(BackendUnavailable):
            await client.launch(config, backend="mistral", run_id="mine")
    provider.answer = answer  # type: ignore[method-assign]
    provider.heal()
    async with open_client() as client:
        await client.launch(config, backend="mistral", run_id="mine")
        (run,) = await client.wait("mine", timeout=10)
    assert run.status is TrainingStatus.COMPLETED
    assert len(provider.asked("POST", path)) == 1
    assert [job.starts for job in provider.jobs.values()] == [1]


@pytest.mark.parametrize("lost", [1, 2, 4])
async def test_launch_broken_between_parts_sends_each_once(
    lost: int,
    restart: Callable[..., MistralAPIBackend],
    provider: ScriptedProvider,
    config: TrainingConfig,
    tmp_path: Path,
) -> None:
    """A large file whose upload breaks at any part is there once, after the same command again."""
    answer = provider.answer

    def and_be_away(request: Received) -> StubReply:
        if request.method == "POST" and len(provider.asked("POST", "/files")) >= lost:
            provider.fail(LoseAnswer(), times=1)
            provider.fail(OtherAnswer(status=500), times=10_000)
        return answer(request)

    async def launch() -> None:
        backend = restart(attempts=1, max_file_bytes=600)
        backends = {"mistral": backend}
        async with AsyncTrainingClient(home=tmp_path / "home", backends=backends) as client:
            await client.launch(config, backend="mistral", run_id="mine")
            (run,) = await client.wait("mine", timeout=10)
        await backend.aclose()
        assert run.status is TrainingStatus.COMPLETED

    provider.answer = and_be_away  # type: ignore[method-assign]
    with pytest.raises(BackendUnavailable):
        await launch()
    provider.answer = answer  # type: ignore[method-assign]
    provider.heal()
    await launch()
    sent = b"".join(file.content for file in provider.files.values())
    assert sent == config.data.train[0].local_path.read_bytes()
    assert len(provider.asked("POST", "/files")) == len(provider.files) == 4
    assert [job.starts for job in provider.jobs.values()] == [1]


async def test_refused_price_ends_the_run(
    open_client: Open, provider: ScriptedProvider, config: TrainingConfig
) -> None:
    """Who says no to the quote has no job that runs or waits."""

    async def refuse(_: object) -> bool:
        return False

    async with open_client() as client:
        with pytest.raises(BudgetExceeded):
            await client.launch(config, backend="mistral", run_id="mine", confirm=refuse)
        run = await client.get("mine")
    assert run.status is TrainingStatus.CANCELLED
    assert [job.status for job in provider.jobs.values()] == ["CANCELLED"]


async def test_stopped_run_is_resumed_as_a_new_one(
    open_client: Open, provider: ScriptedProvider, config: TrainingConfig
) -> None:
    """Stop, wait for the provider's word, and resume: two jobs, one upload."""
    provider.auto = "validate"
    async with open_client() as client:
        run = await client.launch(config, backend="mistral", run_id="mine")
        await client.stop(run.id)
        (run,) = await client.wait(run.id, timeout=10)
        assert run.status is TrainingStatus.CANCELLED
        again = await client.resume(run.id, new_id="again")
    assert (again.resumed_from, again.remote_id) == ("mine", list(provider.jobs)[1])
    assert len(provider.asked("POST", "/files")) == 1


async def test_retired_service_leaves_no_run(
    open_client: Open, provider: ScriptedProvider, config: TrainingConfig
) -> None:
    """A service that has ended is told before there is a run."""
    provider.retired = True
    async with open_client() as client:
        with pytest.raises(BackendRetired):
            await client.launch(config, backend="mistral", run_id="mine")
        assert list(await client.list()) == []


async def test_a_launch_reads_a_file_once_to_check_and_once_to_send_it(
    open_client: Open, make_config: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    """Its rows, its digest and its tokens are known from one reading, and kept for later calls."""
    path = tmp_path / "rows.jsonl"
    row = (
        '{"messages": [{"role": "user", "content": "%d?"}, {"role": "assistant", "content": "%s"}]}'
    )
    path.write_text("".join(f"{row % (n, 'word ' * (n % 50 + 1))}\n" for n in range(2000)))
    config = make_config(
        model="open-mistral-7b", data={"train": path}, hyperparameters={"training_steps": 10}
    )
    with counted_readings() as readings:
        async with open_client() as client:
            assert (await client.validate(config, backend="mistral")).dataset is not None
            assert (await client.estimate(config, backend="mistral")).basis == "exact"
            await client.launch(config, backend="mistral")
        async with open_client() as client:
            await client.validate(config, backend="mistral")
            await client.estimate(config, backend="mistral")
    assert 1 < readings[str(path)] / path.stat().st_size <= 2


async def test_a_file_written_in_between_is_checked_again(
    open_client: Open, make_config: Callable[..., TrainingConfig], tmp_path: Path
) -> None:
    """A write that keeps size and modification time is noticed."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 2)
    config = make_config(data={"train": path})
    async with open_client() as client:
        before = await client.inspect(config, backend="mistral")
        times = path.stat()
        path.write_text(path.read_text().replace("content", "CONTENT"))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        after = await client.inspect(config, backend="mistral")
    assert before.files[0].size == after.files[0].size
    assert before.files[0].sha256 != after.files[0].sha256
    assert after.files[0].summary.findings != before.files[0].summary.findings


async def test_a_launch_cancelled_while_its_job_is_created_stops_that_job(
    tmp_path: Path, backend: MistralAPIBackend, provider: ScriptedProvider, config: TrainingConfig
) -> None:
    """Nothing trains on, though the id of the job never arrived."""
    await check_cancelled_launch(tmp_path, backend, provider, config, path="/fine_tuning/jobs")
