"""Bringing the view of live runs up to date; runs that only another home can observe."""

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path

import anyio
import pytest

from tests.client.conftest import MakeConfig, read_log
from tests.waiting import until
from training_backends import (
    AsyncTrainingClient,
    BackendUnavailable,
    Observation,
    RunNotFound,
    RunState,
    TrainingBackend,
    TrainingRun,
    TrainingStatus,
    UnsupportedOperation,
)
from training_backends.core.backend import Journal
from training_backends.core.run import Place
from training_backends.testing.backend import ScriptedBackend

pytestmark = pytest.mark.anyio


async def test_a_refresh_shows_what_ended_since(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """The list alone asks nobody; afterwards it says how every run stands, and what it measured."""
    runs = [await client.launch(make_config(), backend="scripted") for _ in range(3)]
    await client.refresh()
    for run in runs:
        backend.measure(str(run.remote_id), 1, train_loss=2.0)
        backend.finish(str(run.remote_id))
    backend.looks.clear()
    assert {run.status for run in await client.list()} == {TrainingStatus.RUNNING}
    assert backend.looks == []
    assert await client.refresh(timeout=60) == {}
    assert {run.status for run in await client.list()} == {TrainingStatus.COMPLETED}
    assert [point.value for point in await client.metrics(runs[0].id)] == [2.0]


async def test_only_the_runs_given_are_refreshed(
    client: AsyncTrainingClient, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Each at once, however short ago it was seen."""
    runs = [await client.launch(make_config(), backend="scripted") for _ in range(3)]
    backend.looks.clear()
    for _ in range(3):
        assert await client.refresh(runs[1].id) == {}
    assert backend.looks == [runs[1].id] * 3
    assert await client.refresh(backend="another") == {}
    assert len(backend.looks) == 3
    with pytest.raises(RunNotFound):
        await client.refresh(runs[1].id[:5])


class Silent(ScriptedBackend):
    """Accepts runs and never tells of them."""

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        await anyio.sleep_forever()
        return await super().observe(run, after=after)


async def test_a_backend_out_of_reach_is_no_error(
    tmp_path: Path, backend: ScriptedBackend, make_config: MakeConfig
) -> None:
    """Neither one that refuses nor one that hangs keeps the others from being refreshed."""
    away = ScriptedBackend()
    broken = ScriptedBackend()
    backends: Mapping[str, TrainingBackend] = {
        "scripted": backend,
        "away": away,
        "broken": broken,
        "silent": Silent(),
    }
    async with AsyncTrainingClient(home=tmp_path, backends=backends) as client:
        for name in backends:
            await client.launch(make_config(), backend=name, run_id=name)
        away.trouble = BackendUnavailable("the network is down", sent=False)
        broken.trouble = ZeroDivisionError("a bug")  # type: ignore[assignment]
        backend.finish(str((await client.get("scripted")).remote_id))
        missed = await client.refresh(timeout=3)
        runs = {run.id: run for run in await client.list()}
    assert sorted(missed) == ["away", "broken", "silent"]
    assert missed["away"] == "the network is down"
    assert "ZeroDivisionError" in missed["broken"]
    assert missed["silent"] == "silent did not answer within 3 s"
    assert {run.id for run in runs.values() if run.stale} == {"away", "broken", "silent"}
    assert runs["scripted"].status is TrainingStatus.COMPLETED


# -- runs of another home -----------------------------------------------------------------------


class Tied(ScriptedBackend):
    """Runs that only one machine can observe, as those of processes are."""

    def __init__(self, host: str) -> None:
        super().__init__()
        self.place = Place(id=f"id-{host}", host=host, path=Path("/state"))

    def sees(self, run: TrainingRun) -> bool:
        return run.place in {None, self.place}

    async def launch(self, run: TrainingRun, journal: Journal) -> RunState:
        await journal.record(RunState(status=TrainingStatus.PENDING, place=self.place))
        return await super().launch(run, journal)


@pytest.fixture
def machine_a() -> Tied:
    return Tied("machine-a")


@pytest.fixture
async def a(
    tmp_path: Path, machine_a: Tied, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[AsyncTrainingClient]:
    monkeypatch.setenv("TRAINING_BACKENDS_WATCH__LOST_AFTER", "0.05")
    async with AsyncTrainingClient(
        home=tmp_path / "a",
        store_url=f"sqlite:///{tmp_path / 'shared.db'}",
        backends={"tied": machine_a},
    ) as client:
        yield client


@pytest.fixture
async def b(tmp_path: Path, a: AsyncTrainingClient) -> AsyncIterator[AsyncTrainingClient]:
    """A client on the store of `a`, on a machine that has none of its runs."""
    async with AsyncTrainingClient(
        home=tmp_path / "b",
        store_url=f"sqlite:///{tmp_path / 'shared.db'}",
        backends={"tied": Tied("machine-b")},
    ) as client:
        yield client


async def test_a_run_of_another_home_is_not_judged(
    a: AsyncTrainingClient, b: AsyncTrainingClient, machine_a: Tied, make_config: MakeConfig
) -> None:
    """It is shown as last seen, with the reason; never as lost, and nothing is written."""
    run = await a.launch(make_config(), backend="tied", run_id="theirs")
    seen = await a.status(run.id)
    mine = await b.launch(make_config(), backend="tied", run_id="mine")
    watcher = b.watcher()
    for _ in range(5):  # takes longer than to be lost
        await until(watcher.sweep, lambda done: done.asked)
    missed = await b.refresh()
    shown = await b.status(run.id)
    assert await b.get(run.id) == seen
    assert list(missed) == ["theirs"]
    assert "it can only be observed from machine-a:/state" in missed["theirs"]
    assert shown.status is TrainingStatus.RUNNING
    assert shown.stale is not None
    assert (shown.stale.kind, shown.stale.since) == ("elsewhere", seen.last_seen_at)
    assert (await b.get(mine.id)).stale is None
    machine_a.finish(str(run.remote_id))
    assert (await a.status(run.id)).status is TrainingStatus.COMPLETED


async def test_verbs_that_need_the_other_home_say_so(
    a: AsyncTrainingClient, b: AsyncTrainingClient, machine_a: Tied, make_config: MakeConfig
) -> None:
    """A record is not deleted while its files stay behind, unless that is asked for."""
    run = await a.launch(make_config(), backend="tied", run_id="theirs")
    with pytest.raises(UnsupportedOperation, match="machine-a:/state"):
        await b.stop(run.id)
    with pytest.raises(UnsupportedOperation, match="machine-a:/state"):
        await read_log(b, run.id)
    machine_a.finish(str(run.remote_id))
    await a.status(run.id)
    for touch in (
        lambda: b.delete(run.id),
        lambda: b.resume(run.id),
        lambda: b.sample(run.id, "?"),
        lambda: b.download(run.id, Path("model")),
    ):
        with pytest.raises(UnsupportedOperation, match="machine-a:/state") as caught:
            await touch()
        assert "TRAINING_BACKENDS_HOME=/state" in str(caught.value.hint)
    await b.delete(run.id, record_only=True)
    assert await a.list() == []


async def test_the_other_home_s_run_can_be_waited_for(
    a: AsyncTrainingClient, b: AsyncTrainingClient, machine_a: Tied, make_config: MakeConfig
) -> None:
    """Its end, and its log, come through the store, written by whoever can observe it."""
    run = await a.launch(make_config(), backend="tied", run_id="theirs")
    over: list[TrainingRun] = []
    messages: set[str] = set()

    async def wait() -> None:
        over.extend(await b.wait(run.id))

    async def follow() -> None:
        async with aclosing(b.logs(run.id, follow=True)) as followed:
            async for record in followed:
                messages.add(record.message)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        tasks.start_soon(follow)
        machine_a.log(str(run.remote_id), "halfway")
        await a.refresh()
        await until(lambda: "halfway" in messages)
        machine_a.log(str(run.remote_id), "nearly there")
        machine_a.finish(str(run.remote_id))
        await a.refresh()
        await until(lambda: over)
    assert [each.status for each in over] == [TrainingStatus.COMPLETED]
    assert "nearly there" in messages


async def test_a_launch_cut_off_on_another_machine_is_not_repeated_here(
    a: AsyncTrainingClient, b: AsyncTrainingClient, machine_a: Tied, make_config: MakeConfig
) -> None:
    """Whether the process was started can only be found out there; here it would start twice."""
    machine_a.before_create = machine_a.refusing(BackendUnavailable("the answer was lost"))
    with pytest.raises(BackendUnavailable):
        await a.launch(make_config(), backend="tied", run_id="theirs")
    with pytest.raises(UnsupportedOperation, match="machine-a:/state"):
        await b.launch(make_config(), backend="tied", run_id="theirs")
