"""Runs at Together: their state, log, end and result."""

from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from tests.backends.together.conftest import Secrets
from training_backends import (
    AsyncTrainingClient,
    ConfigError,
    RunNotFound,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
    UnsupportedOperation,
)
from training_backends.backends.together.backend import TogetherBackend
from training_backends.core.backend import RemoteFilters
from training_backends.testing.faults import LoseAnswer, OtherAnswer
from training_backends.testing.journal import MemoryJournal
from training_backends.testing.together_provider import ScriptedTogetherProvider

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("upper", [False, True])
async def test_run_is_followed_from_launch_to_download(
    *,
    upper: bool,
    secrets: Secrets,
    provider: ScriptedTogetherProvider,
    config: TrainingConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The client of the installed backend quotes, launches, follows, and downloads the adapter."""
    provider.upper_case_events = upper
    monkeypatch.setenv("TRAINING_BACKENDS_TOGETHER__BASE_URL", f"{provider.base_url}/v1/")
    monkeypatch.setenv("TRAINING_BACKENDS_TOGETHER__POLL_MIN", "0.01")
    async with AsyncTrainingClient(home=tmp_path / "home", credentials=secrets) as client:
        run = await client.launch(config, backend="together", run_id="mine")
        job = str(run.remote_id)
        assert run.estimate is not None
        assert (run.estimate.basis, run.cost) == ("quote", run.estimate.cost)
        provider.set_status(job, "running")
        provider.add_metrics(job, 1, loss=2.5, grad_norm=1.0)
        provider.add_metrics(job, 2, loss=1.5)
        provider.add_metrics(job, 2, part="eval", loss=1.75)
        provider.add_checkpoint(job, 2)
        provider.set_status(job, "completed")
        async with aclosing(client.logs("mine", follow=True)) as records:
            log = [record async for record in records if record.source != "status"]
        assert [(record.source, record.step) for record in log] == [
            ("event", None),
            ("event", None),
            ("metrics", 1),
            ("metrics", 2),
            ("metrics", 2),
            ("checkpoint", 2),
            ("event", None),
        ]
        assert log[1].fields["type"] == "training_start"
        seen = await client.get("mine")
        assert seen.status is TrainingStatus.COMPLETED
        assert seen.result_model == provider.jobs[job].output_name
        assert seen.metrics == {"train_loss": 1.5, "grad_norm": 1.0, "valid_loss": 1.75}
        (point,) = seen.checkpoints
        assert point.metrics == {"train_loss": 1.5, "valid_loss": 1.75}
        assert seen.cost == run.estimate.cost
        assert seen.usage == {"token_count": run.estimate.train_tokens}
        path = await client.download("mine", tmp_path / "result")
    assert path == tmp_path / "result" / "adapter.tar.zst"
    assert path.read_text() == f"{seen.result_model} adapter"


@pytest.mark.parametrize(
    ("word", "status"),
    [
        ("queued", TrainingStatus.PENDING),
        ("compressing", TrainingStatus.RUNNING),
        ("uploading", TrainingStatus.RUNNING),
        ("cancel_requested", TrainingStatus.STOPPING),
        ("user_error", TrainingStatus.FAILED),
        ("defragmenting", TrainingStatus.UNKNOWN),
    ],
)
async def test_words_of_the_provider_have_their_status(
    word: str,
    status: TrainingStatus,
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    launched: TrainingRun,
) -> None:
    """An unknown word is kept."""
    provider.set_status(str(launched.remote_id), word)
    state = await backend.status(launched)
    assert (state.status, state.raw_status) == (status, word)


@pytest.mark.parametrize(
    ("word", "events", "kind", "message"),
    [
        ("error", [], "provider", "out of GPUs"),
        ("user_error", [], "validation", "out of GPUs"),
        ("error", ["billing_limit"], "quota", "out of GPUs"),
    ],
)
async def test_failures_say_why(
    *,
    word: str,
    events: list[str],
    kind: str,
    message: str,
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    launched: TrainingRun,
) -> None:
    """The last error in the log is the reason."""
    job = str(launched.remote_id)
    for event in events:
        provider.add_event(job, event, "The limit was reached", level="warning")
    provider.set_status(job, word, message)
    failure = (await backend.status(launched)).failure
    assert failure is not None
    assert (failure.kind, failure.message) == (kind, message)


async def test_log_continues_while_the_run_trains(
    make_backend: Callable[..., TogetherBackend],
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    launched: TrainingRun,
) -> None:
    """Each observation has what is new, in another process too; a wrong cursor is rejected."""
    job = str(launched.remote_id)
    cursor, seen = None, []
    for step in range(3):
        provider.set_status(job, "running")
        provider.add_metrics(job, step, loss=1.0)
        other = make_backend()
        found = await other.observe(launched, after=cursor)
        await other.aclose()
        seen.append([(record.source, record.step) for record in found.records])
        cursor = found.cursor
    assert seen[0] == [("event", None), ("event", None), ("metrics", 0)]
    assert seen[1:] == [[("event", None), ("metrics", 1)], [("event", None), ("metrics", 2)]]
    assert (await backend.observe(launched, after=cursor)).cursor == cursor
    with pytest.raises(ConfigError, match="Invalid log cursor"):
        await backend.observe(launched, after="banana")


async def test_waiting_runs_are_looked_up_in_one_request(
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    make_journal: Callable[..., MemoryJournal],
) -> None:
    """A running one is left out: it has progressed."""
    runs = []
    for _ in range(3):
        journal = make_journal()
        runs.append(journal.run.updated(await backend.launch(journal.run, journal)))
    provider.set_status(str(runs[0].remote_id), "running")
    asked = len(provider.requests)
    found = await backend.statuses(runs)
    assert set(found) == {runs[1].id, runs[2].id}
    assert len(provider.requests) == asked + 1


async def test_stop_is_safe_to_repeat(
    backend: TogetherBackend, provider: ScriptedTogetherProvider, launched: TrainingRun
) -> None:
    """A lost answer, a stopping job and one that just ended are no errors; a rejection is."""
    job = str(launched.remote_id)
    provider.fail(LoseAnswer(), method="POST", path="/cancel")
    await backend.stop(launched)
    await backend.stop(launched)
    assert provider.jobs[job].status == "cancel_requested"
    provider.set_status(job, "running")
    provider.fail(OtherAnswer(status=400), method="POST", path="/cancel")
    with pytest.raises(ConfigError):
        await backend.stop(launched)
    provider.set_status(job, "completed")
    await backend.stop(launched)


async def test_resumed_run_continues_from_a_checkpoint(
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    make_journal: Callable[..., MemoryJournal],
    launched: TrainingRun,
) -> None:
    """A new job starts from the chosen or the newest checkpoint, once."""
    job = str(launched.remote_id)
    journal = make_journal()
    with pytest.raises(UnsupportedOperation, match="in progress"):
        await backend.resume(launched, journal.run, journal)
    provider.set_status(job, "error")
    with pytest.raises(UnsupportedOperation, match="without checkpoints"):
        await backend.resume(launched, journal.run, journal)
    for step in (5, 10):
        provider.add_checkpoint(job, step)
    with pytest.raises(ConfigError, match="no checkpoint '7'") as caught:
        await backend.resume(launched, journal.run, journal, checkpoint="7")
    assert caught.value.hint == "Choose one of: 5, 10."
    provider.fail(LoseAnswer(), method="POST", path="/v1/fine-tunes")
    state = await backend.resume(launched, journal.run, journal)
    assert (await backend.resume(launched, journal.run, journal)).remote_id == state.remote_id
    other = make_journal()
    second = await backend.resume(launched, other.run, other, checkpoint="step-5")
    asked = [provider.jobs[str(each.remote_id)].asked for each in (state, second)]
    assert [each["from_checkpoint"] for each in asked] == [f"{job}:10", f"{job}:5"]
    assert all("model" not in each for each in asked)
    assert len(provider.jobs) == 3


async def test_jobs_are_listed_and_deleted(
    backend: TogetherBackend, provider: ScriptedTogetherProvider, launched: TrainingRun
) -> None:
    """The list has everybody's jobs, by the user's own suffix; a deleted job is not found."""
    other = provider.add_job(model="org/other-model", suffix="yours")
    listed = await backend.list_remote(RemoteFilters())
    assert {each.remote_id for each in listed} == {other, launched.remote_id}
    for filters, wanted in (
        (RemoteFilters(suffix="mine"), [launched.remote_id]),
        (RemoteFilters(suffix="yours"), [other]),
        (RemoteFilters(model="org/other-model"), [other]),
        (RemoteFilters(status=TrainingStatus.RUNNING), []),
    ):
        assert [each.remote_id for each in await backend.list_remote(filters)] == wanted
    provider.set_status(str(launched.remote_id), "completed")
    provider.fail(LoseAnswer(), method="DELETE")
    await backend.delete(launched)
    with pytest.raises(RunNotFound):
        await backend.delete(launched)
    assert list(provider.jobs) == [other]


async def test_result_of_full_fine_tuning_is_a_model(
    backend: TogetherBackend,
    provider: ScriptedTogetherProvider,
    launched: TrainingRun,
    tmp_path: Path,
) -> None:
    """It is requested by another name; a broken download leaves nothing behind."""
    job = provider.jobs[str(launched.remote_id)]
    job.asked["training_type"] = {"type": "Full"}
    with pytest.raises(ConfigError):
        await backend.download(launched, tmp_path / "result")
    assert list(tmp_path.glob("result/*")) == []
    provider.set_status(job.id, "completed")
    path = await backend.download(launched, tmp_path / "result")
    assert path.read_text() == f"{job.output_name} model_output_path"


async def test_health_says_whether_a_key_is_stored_and_works(
    backend: TogetherBackend,
    make_backend: Callable[..., TogetherBackend],
    provider: ScriptedTogetherProvider,
    secrets: Secrets,
) -> None:
    """Without a key the backend is not configured."""
    assert (await backend.health()).ok
    provider.key = "another"
    rejected = await backend.health()
    assert (rejected.ok, rejected.configured) == (False, True)
    del secrets.values["together"]
    other = make_backend()
    missing = await other.health()
    await other.aclose()
    assert (missing.ok, missing.configured) == (False, False)
