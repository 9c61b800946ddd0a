"""Logs: stored once, the same for every reader, from any place."""

from datetime import timedelta
from pathlib import Path

import anyio
import pytest

from tests.client.conftest import MakeConfig, read_log
from tests.waiting import until
from training_backends import (
    AsyncTrainingClient,
    BackendUnavailable,
    LogRecord,
    Observation,
    RunNotFound,
    TrainingRun,
    TrainingStatus,
)
from training_backends.core.run import utc_now
from training_backends.testing.backend import ScriptedBackend

pytestmark = pytest.mark.anyio


async def test_three_who_follow_see_the_same(
    client: AsyncTrainingClient,
    other: AsyncTrainingClient,
    tmp_path: Path,
    backend: ScriptedBackend,
    make_config: MakeConfig,
) -> None:
    """Each gets every record once, in one order, however late it came."""
    run = await client.launch(make_config(), backend="scripted")
    remote_id = str(run.remote_id)
    seen: list[list[LogRecord]] = []

    async def follow(reader: AsyncTrainingClient) -> None:
        seen.append(list(await read_log(reader, run.id, follow=True)))

    third = AsyncTrainingClient(home=tmp_path / "home", backends={"scripted": backend})
    async with third, anyio.create_task_group() as tasks:
        for reader in (client, other, third):
            tasks.start_soon(follow, reader)
        for step in range(1, 31):
            backend.measure(remote_id, step, train_loss=1 / step)
            await anyio.sleep(0.005)
        backend.tell(remote_id, TrainingStatus.COMPLETED)
    assert seen[0] == seen[1] == seen[2]
    assert [record.step for record in seen[0] if record.source == "metrics"] == [*range(1, 31)]
    assert [record.message for record in seen[0] if record.source == "status"] == [
        "running",
        "completed",
    ]


async def test_a_log_is_read_again_without_the_provider(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """The log of a run that is over outlives its provider."""
    run = await client.launch(make_config(), backend="scripted")
    backend.log(str(run.remote_id), "hello")
    backend.finish(str(run.remote_id))
    first = await read_log(client, run.id)
    backend.lose(str(run.remote_id))
    assert await read_log(client, run.id) == first
    assert [record.message for record in first] == ["hello", "completed"]


async def test_what_is_stored_is_shown_before_a_provider_fails(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """The error comes at the end, when the reader has what there is."""
    run = await client.launch(make_config(), backend="scripted")
    backend.log(str(run.remote_id), "hello")
    await read_log(client, run.id)
    backend.trouble = BackendUnavailable("away")
    log = client.logs(run.id)
    assert [(await anext(log)).message for _ in range(2)] == ["running", "hello"]
    with pytest.raises(BackendUnavailable):
        await anext(log)


@pytest.mark.parametrize("follow", [False, True])
async def test_the_tail_of_a_log_ends_with_its_newest_record(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig, *, follow: bool
) -> None:
    """The provider is asked first, so that the last records are not those of the last look."""
    run = await client.launch(make_config(), backend="scripted")
    for number in range(5):
        backend.log(str(run.remote_id), f"line {number}")
    if follow:
        backend.finish(str(run.remote_id))
    last = await read_log(client, run.id, tail=2, follow=follow)
    expected = ["line 4", "completed"] if follow else ["line 3", "line 4"]
    assert [record.message for record in last] == expected
    assert len(await read_log(client, run.id, tail=100)) > len(last)


async def test_the_tail_is_shown_before_a_provider_fails(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """The stored records come first, then the error; `after` and `tail` exclude each other."""
    run = await client.launch(make_config(), backend="scripted")
    backend.log(str(run.remote_id), "hello")
    await read_log(client, run.id)
    backend.trouble = BackendUnavailable("away")
    log = client.logs(run.id, tail=1)
    assert (await anext(log)).message == "hello"
    with pytest.raises(BackendUnavailable):
        await anext(log)
    with pytest.raises(ValueError, match="tail"):
        await read_log(client, run.id, after="1", tail=1)


async def test_following_outlasts_a_provider_that_is_away(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Meanwhile the record says that it cannot be seen, and since when."""
    run = await client.launch(make_config(), backend="scripted")
    remote_id = str(run.remote_id)
    backend.trouble = BackendUnavailable("away")
    followed: list[LogRecord] = []

    async def follow() -> None:
        followed.extend(await read_log(client, run.id, follow=True))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        stale = (await until(lambda: client.get(run.id), lambda run: run.stale)).stale
        backend.trouble = None
        backend.tell(remote_id, TrainingStatus.COMPLETED)
    assert stale is not None
    assert stale.kind == "unreachable"
    assert [record.fields for record in followed] == [{"status": "completed"}]
    assert (await client.get(run.id)).stale is None


async def test_a_run_without_a_job_has_no_log(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """It says how to go on instead."""
    backend.before_create = backend.refusing(BackendUnavailable("away", sent=False))
    with pytest.raises(BackendUnavailable):
        await client.launch(make_config(), backend="scripted", run_id="mine")
    with pytest.raises(RunNotFound, match="no job") as caught:
        await read_log(client, "mine")
    assert "launch --id mine" in str(caught.value.hint)


async def test_metrics_are_kept_by_step(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """What was measured is there for every step, as numbers."""
    run = await client.launch(make_config(), backend="scripted")
    for step in (1, 2):
        backend.measure(str(run.remote_id), step, train_loss=2.0 / step)
    await read_log(client, run.id)
    points = await client.metrics(run.id)
    assert [(p.step, p.name, p.value) for p in points] == [
        (1, "train_loss", 2.0),
        (2, "train_loss", 1.0),
    ]


async def test_a_lost_run_is_reported_as_not_found(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Asking for it is an error, and its record says since when it is missing."""
    run = await client.launch(make_config(), backend="scripted")
    backend.lose(str(run.remote_id))
    before = utc_now()
    with pytest.raises(RunNotFound):
        await client.status(run.id)
    stale = (await client.get(run.id)).stale
    assert stale is not None
    assert stale.kind == "not_found"
    assert timedelta(0) <= stale.since - before < timedelta(minutes=1)


async def test_each_change_of_status_is_in_the_log_once(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Whether the client, the backend or both tell it; what else the backend says is kept."""
    run = await client.launch(make_config(), backend="scripted")
    remote_id = str(run.remote_id)
    backend.say(remote_id, TrainingStatus.STOPPING)
    await client.status(run.id)
    backend.tell(remote_id, TrainingStatus.STOPPING)
    backend._add(remote_id, "saves", "status", fields={"status": "stopping"})
    await client.status(run.id)
    backend.tell(remote_id, TrainingStatus.CANCELLED)
    await client.status(run.id)
    records = await read_log(client, run.id)
    assert [(record.source, record.message) for record in records] == [
        ("status", "stopping"),
        ("event", "saves"),
        ("status", "cancelled"),
    ]


async def test_the_history_that_a_backend_logs_is_kept(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """What was over before anybody looked is told by the backend alone."""
    run = await client.launch(make_config(), backend="scripted")
    for status in (TrainingStatus.INITIALIZING, TrainingStatus.RUNNING):
        backend.tell(str(run.remote_id), status)
    backend.finish(str(run.remote_id))
    messages = [record.message for record in await read_log(client, run.id)]
    assert messages == ["initializing", "running", "completed"]


async def test_a_run_that_was_never_launched_ends_in_its_log_too(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """No provider has a log of it, so all of it is here."""
    backend = ScriptedBackend()
    backend.before_create = backend.refusing(BackendUnavailable("away", sent=False))
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        with pytest.raises(BackendUnavailable):
            await client.launch(make_config(), backend="scripted", run_id="mine")
        await client.stop("mine")
        (record,) = await read_log(client, "mine", follow=True)
    assert (record.source, record.fields["status"]) == ("status", "cancelled")


async def test_a_log_in_parts_is_stored_before_the_end_of_the_run(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """One call reads all parts; the record of the end is the last one."""
    run = await client.launch(make_config(), backend="scripted")
    for number in range(20):
        backend.log(str(run.remote_id), str(number))
    backend.finish(str(run.remote_id))
    backend.page = 3
    assert (await client.status(run.id)).status is TrainingStatus.COMPLETED
    messages = [record.message for record in await read_log(client, run.id)]
    assert messages == [*map(str, range(20)), "completed"]


async def test_the_end_waits_for_a_log_of_very_many_parts(
    client: AsyncTrainingClient,
    backend: ScriptedBackend,
    make_config: MakeConfig,
) -> None:
    """Each observation reads a hundred parts, and the next one continues."""
    run = await client.launch(make_config(), backend="scripted")
    for number in range(250):
        backend.log(str(run.remote_id), str(number))
    backend.finish(str(run.remote_id))
    backend.page = 1
    seen = [(await client.status(run.id)).status.value for _ in range(3)]
    assert seen == ["running", "running", "completed"]
    assert len(backend.looks) == 250
    messages = [record.message for record in await read_log(client, run.id)]
    assert messages == [*map(str, range(250)), "completed"]


async def test_records_without_a_time_are_older_than_the_end_of_the_run(
    client: AsyncTrainingClient,
    backend: ScriptedBackend,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are stored before the record of the end, at its time at the latest."""
    run = await client.launch(make_config(), backend="scripted")
    ended = utc_now() - timedelta(minutes=5)
    job = str(run.remote_id)
    started = ended - timedelta(hours=1)
    backend.say(job, TrainingStatus.COMPLETED, started_at=started, finished_at=ended)
    lines = tuple(LogRecord(message=text, source="output", cursor=text) for text in "ab")
    state = await backend.status(run)

    async def late(asked: TrainingRun, *, after: str | None = None) -> Observation:
        return Observation(state, lines, cursor="b")

    monkeypatch.setattr(backend, "observe", late)
    done = await client.status(run.id)
    records = await read_log(client, run.id)
    assert [record.message for record in records] == ["a", "b", "completed"]
    assert {record.at for record in records} == {done.finished_at}
    assert not [record for record in records if "told_at" in record.fields]
