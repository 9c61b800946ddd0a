"""Watchers: many runs in few requests, each event told once, nothing silently pending."""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path

import anyio
import pytest

from tests.client.conftest import MakeConfig, both_stores
from tests.waiting import until
from training_backends import (
    AsyncTrainingClient,
    BackendUnavailable,
    ConfigError,
    CredentialVault,
    LogRecord,
    Observation,
    PermissionDenied,
    ProtocolError,
    RunNotFound,
    RunState,
    TrainingBackend,
    TrainingBackendError,
    TrainingRun,
    TrainingStatus,
)
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.mistral.settings import MistralSettings
from training_backends.client import poller, watch
from training_backends.client.poller import PollResult
from training_backends.client.watch import OnEvent, Watcher
from training_backends.testing.backend import ScriptedBackend
from training_backends.testing.faults import OtherAnswer
from training_backends.testing.provider import ScriptedProvider

pytestmark = pytest.mark.anyio


class Listing(ScriptedBackend):
    """Tells of many runs at once."""

    def __init__(self) -> None:
        super().__init__()
        self.lists = 0

    async def statuses(self, runs: Sequence[TrainingRun]) -> Mapping[str, RunState]:
        """List every job that it has."""
        self.lists += 1
        return {run.id: self._jobs[run.remote_id] for run in runs if run.remote_id in self._jobs}


@pytest.fixture
def backend() -> Listing:
    return Listing()


class Interrupted(ScriptedBackend):
    """Has something happen between the answer of the provider and its arrival."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Callable[[], Awaitable[None]] | None = None

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        """Answer for `exp-1` as of before what happens meanwhile, once."""
        try:
            return await super().observe(run, after=after)
        finally:
            if run.id == "exp-1" and self.meanwhile is not None:
                meanwhile, self.meanwhile = self.meanwhile, None
                await meanwhile()


class Told:
    """Notes what watchers tell, except that a run has begun: they may come later than that."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.by: Counter[str] = Counter()

    def to(self, name: str) -> OnEvent:
        async def note(run: TrainingRun, record: LogRecord) -> None:
            if record.message != "running":
                self.events.append((run.id, record.message))
                self.by[name] += 1

        return note


@asynccontextmanager
async def watching(*watchers: Watcher) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        for watcher in watchers:
            tasks.start_soon(watcher.run)
        yield
        tasks.cancel_scope.cancel()


async def launch(client: AsyncTrainingClient, make: MakeConfig, count: int) -> list[TrainingRun]:
    return [
        await client.launch(make(), backend="scripted", run_id=f"run-{n:03}") for n in range(count)
    ]


async def swept(watcher: Watcher, count: int) -> list[PollResult]:
    """Sweep until so many runs were due and asked for."""
    done: list[PollResult] = []

    async def asked() -> int:
        done.append(await watcher.sweep())
        return sum(each.asked for each in done)

    await until(asked, lambda asked: asked >= count)
    return done


async def test_runs_that_stand_cost_no_request_of_their_own(
    client: AsyncTrainingClient, backend: Listing, make_config: MakeConfig
) -> None:
    """One list tells that ten stand; only the one that moved is asked for by itself."""
    runs = await launch(client, make_config, 10)
    watcher = client.watcher()
    await watcher.sweep()
    backend.looks.clear()
    backend.finish(str(runs[3].remote_id))
    done = await swept(watcher, 10)
    assert (sum(each.details for each in done), backend.looks) == (1, ["run-003"])
    assert (await client.get("run-003")).status is TrainingStatus.COMPLETED


async def test_a_sweep_says_that_runs_were_seen(
    client: AsyncTrainingClient, backend: Listing, make_config: MakeConfig
) -> None:
    """Runs that stand are seen all the same."""
    runs = await launch(client, make_config, 5)
    watcher = client.watcher()
    await watcher.sweep()
    first = [(await client.get(run.id)).last_seen_at for run in runs]

    async def seen_again() -> bool:
        await watcher.sweep()
        second = [(await client.get(run.id)).last_seen_at for run in runs]
        return all(a and b and a < b for a, b in zip(first, second, strict=True))

    await until(seen_again)


@both_stores
async def test_two_watchers_tell_each_event_once(
    client: AsyncTrainingClient,
    other: AsyncTrainingClient,
    backend: Listing,
    make_config: MakeConfig,
) -> None:
    """They share the work, and nobody hears anything twice."""
    runs = await launch(client, make_config, 20)
    told = Told()
    async with watching(
        client.watcher(on_event=told.to("a")), other.watcher(on_event=told.to("b"))
    ):
        for run in runs:
            backend.log(str(run.remote_id), "one")
            backend.tell(str(run.remote_id), TrainingStatus.COMPLETED)
        await until(lambda: len(told.events) >= 40)
    for each in (client, other):  # nothing is left to be told a second time
        await each.watcher(on_event=told.to("later")).sweep()
    assert Counter(told.events) == Counter(
        (run.id, message) for run in runs for message in ("one", "completed")
    )


async def test_what_happened_while_nobody_watched_is_told(
    client: AsyncTrainingClient, backend: Listing, make_config: MakeConfig
) -> None:
    """An event seen by `status` waits for the next watcher, though the run is over."""
    (run,) = await launch(client, make_config, 1)
    backend.tell(str(run.remote_id), TrainingStatus.COMPLETED)
    await client.status(run.id)
    told = Told()
    await client.watcher(on_event=told.to("a")).sweep()
    assert told.events == [(run.id, "completed")]


@both_stores
async def test_an_event_that_could_not_be_handled_is_told_again(
    client: AsyncTrainingClient, backend: Listing, make_config: MakeConfig
) -> None:
    """The handler's own error ends the watcher; the next one goes on with that event."""
    (run,) = await launch(client, make_config, 1)
    backend.tell(str(run.remote_id), TrainingStatus.COMPLETED)

    async def fail(run: TrainingRun, record: LogRecord) -> None:
        raise LookupError("the sink is full")

    with pytest.raises(LookupError, match="sink"):
        await client.watcher(on_event=fail).run()
    told = Told()
    await client.watcher(on_event=told.to("a")).sweep()
    assert told.events == [(run.id, "completed")]


async def test_an_event_that_was_handled_is_not_told_again_by_a_cancelled_watcher(
    client: AsyncTrainingClient, backend: Listing, make_config: MakeConfig
) -> None:
    """A program that stops watching at the event it waited for hears of it once."""
    (run,) = await launch(client, make_config, 1)
    backend.tell(str(run.remote_id), TrainingStatus.COMPLETED)
    told = Told()
    with anyio.CancelScope() as scope:

        async def stop(run: TrainingRun, record: LogRecord) -> None:
            await told.to("a")(run, record)
            if record.message == "completed":
                scope.cancel()

        await client.watcher(on_event=stop).run()
    await client.watcher(on_event=told.to("b")).sweep()
    assert told.by == {"a": 1}


@both_stores
async def test_a_new_run_is_taken_up(
    client: AsyncTrainingClient,
    other: AsyncTrainingClient,
    backend: Listing,
    make_config: MakeConfig,
) -> None:
    """One that another process launched, on a backend with no runs before."""
    told = Told()
    async with watching(client.watcher(on_event=told.to("a"))):
        (run,) = await launch(other, make_config, 1)
        backend.tell(str(run.remote_id), TrainingStatus.COMPLETED)
        await until(lambda: told.events)
    assert told.events == [(run.id, "completed")]


async def test_a_watcher_that_is_woken_looks_for_new_runs_at_once(
    client: AsyncTrainingClient,
    backend: Listing,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever launches a run in the same process need not wait for the next search."""
    monkeypatch.setattr(watch, "NEW_RUNS_INTERVAL", 3600.0)
    told: list[str] = []

    async def note(run: TrainingRun, _: LogRecord) -> None:
        told.append(run.id)

    watcher = client.watcher(on_event=note)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watcher.run)
        await client.launch(make_config(), backend="scripted", run_id="a")
        watcher.wake()
        await until(lambda: told)
        tasks.cancel_scope.cancel()


async def test_a_provider_that_is_away_makes_its_runs_stale_until_it_is_back(
    client: AsyncTrainingClient, backend: Listing, make_config: MakeConfig
) -> None:
    """All of them say so, whether or not they were asked for by themselves."""
    runs = await launch(client, make_config, 10)
    watcher = client.watcher()
    await watcher.sweep()
    backend.trouble = BackendUnavailable("away", sent=False)
    backend.finish(str(runs[0].remote_id))

    async def stale() -> set[str]:
        with suppress(BackendUnavailable):
            await watcher.sweep()
        return {run.stale.kind if run.stale else "" for run in await client.list()}

    await until(stale, lambda kinds: kinds == {"unreachable"})
    with pytest.raises(BackendUnavailable):
        await until(watcher.sweep, lambda _: False)
    backend.trouble = None
    await until(stale, lambda kinds: kinds == {""})


async def test_a_watcher_bears_with_a_provider_that_is_away(
    client: AsyncTrainingClient, backend: Listing, make_config: MakeConfig
) -> None:
    """It does not end, and goes on when the provider is back."""
    (run,) = await launch(client, make_config, 1)
    told = Told()
    backend.trouble = TrainingBackendError("the key was revoked")
    async with watching(client.watcher(on_event=told.to("a"))):
        await until(lambda: backend.looks)
        backend.trouble = None
        backend.tell(str(run.remote_id), TrainingStatus.COMPLETED)
        await until(lambda: told.events)
    assert told.events == [(run.id, "completed")]


async def test_a_run_missing_for_long_has_failed_as_lost(
    tmp_path: Path, backend: Listing, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first it is stale; after the stated time it is over, and says why."""
    monkeypatch.setenv("TRAINING_BACKENDS_WATCH__LOST_AFTER", "0.2")
    told = Told()
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        (run,) = await launch(client, make_config, 1)
        backend.lose(str(run.remote_id))
        async with watching(client.watcher(on_event=told.to("a"))):
            await until(lambda: len(told.events) == 2)
        run = await client.get(run.id)
    assert run.status is TrainingStatus.FAILED
    assert run.failure is not None
    assert run.failure.kind == "lost"
    assert "no longer has" in told.events[0][1]


async def test_a_run_that_does_not_move_is_said_to_be_still(
    tmp_path: Path, backend: Listing, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told once, and taken back when something changes."""
    monkeypatch.setenv("TRAINING_BACKENDS_WATCH__STALLED_AFTER", "0.2")
    told = Told()
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        (run,) = await launch(client, make_config, 1)
        async with watching(client.watcher(on_event=told.to("a"))):
            await until(lambda: told.events)
            assert [kind.stale and kind.stale.kind for kind in await client.list()] == ["stalled"]
            backend.tell(str(run.remote_id), TrainingStatus.COMPLETED)
            await until(lambda: len(told.events) == 2)
        run = await client.get(run.id)
    assert "no progress" in told.events[0][1]
    assert run.stale is None


async def test_a_run_that_outlives_its_budget_is_stopped(
    client: AsyncTrainingClient, backend: Listing, make_config: MakeConfig
) -> None:
    """Once it has trained for longer than it may; the record says why."""
    config = make_config(budget={"max_duration": "0.2"})
    run = await client.launch(config, backend="scripted")
    told = Told()
    async with watching(client.watcher(on_event=told.to("a"))):
        await until(lambda: told.events)
        backend.say(str(run.remote_id), TrainingStatus.CANCELLED)
        (run,) = await client.wait(run.id)
    assert run.status is TrainingStatus.CANCELLED
    assert run.failure is not None
    assert run.failure.kind == "timeout"
    assert "exceeds budget.max_duration" in run.failure.message
    assert [message for _, message in told.events].count(run.failure.message) == 1


async def test_waiting_stops_a_run_that_outlives_its_budget(
    client: AsyncTrainingClient, backend: Listing, make_config: MakeConfig
) -> None:
    """Whoever watches guards the budget, not the watcher alone."""
    config = make_config(budget={"max_duration": timedelta(milliseconds=200)})
    run = await client.launch(config, backend="scripted")

    async def confirm() -> None:
        await until(
            lambda: backend.status(run), lambda state: state.status is TrainingStatus.STOPPING
        )
        backend.say(str(run.remote_id), TrainingStatus.CANCELLED)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(confirm)
        (over,) = await client.wait(run.id)
    assert over.status is TrainingStatus.CANCELLED


@pytest.mark.parametrize(
    "trouble", [RunNotFound("gone"), ProtocolError("half of it"), BackendUnavailable("away")]
)
async def test_trouble_with_a_run_does_not_make_its_looks_more_frequent(
    tmp_path: Path, make_config: MakeConfig, trouble: TrainingBackendError
) -> None:
    """A run that cannot be seen is asked for no more often than one that can."""
    backend = Picky(trouble, bad=["run-000"])
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        await launch(client, make_config, 2)
        async with watching(client.watcher()):
            await until(lambda: backend.looks.count("run-001") > 8)
    assert backend.failed["run-000"] <= backend.looks.count("run-001") + 2


@both_stores
@pytest.mark.parametrize("found", ["completed", "missing"])
async def test_a_look_at_a_run_deleted_meanwhile_is_dropped(
    tmp_path: Path, store_url: str | None, make_config: MakeConfig, found: str
) -> None:
    """It is written into no other run, be its id longer or the same, and ends no watcher."""
    backend = Interrupted()
    async with AsyncTrainingClient(
        home=tmp_path, store_url=store_url, backends={"scripted": backend}
    ) as client:
        first = await client.launch(make_config(), backend="scripted", run_id="exp-1")
        longer = await client.launch(make_config(), backend="scripted", run_id="exp-10")
        told = Told()
        watcher = client.watcher(on_event=told.to("a"))
        await watcher.sweep()

        async def replace() -> None:
            backend.adopt(str(first.remote_id))
            backend.finish(str(first.remote_id))
            await client.delete("exp-1")
            await client.launch(make_config(), backend="scripted", run_id="exp-1")

        async def interrupted() -> bool:
            await watcher.sweep()
            return backend.meanwhile is None

        if found == "missing":
            backend.lose(str(first.remote_id))
        else:
            backend.tell(str(first.remote_id), TrainingStatus.COMPLETED, result_model="old")
        backend.meanwhile = replace
        await until(interrupted)
        second = await client.get("exp-1")
        await swept(watcher, 2)
        assert (second.status, second.stale) == (TrainingStatus.RUNNING, None)
        assert second.remote_id != first.remote_id
        assert (await client.get("exp-10")).remote_id == longer.remote_id
        backend.tell(str(second.remote_id), TrainingStatus.COMPLETED)
        await until(watcher.sweep, lambda _: told.events)
        assert told.events == [("exp-1", "completed")]


async def test_an_event_of_a_run_deleted_meanwhile_is_not_told(
    client: AsyncTrainingClient, backend: Listing, make_config: MakeConfig
) -> None:
    """The handler of one event may delete the run of the next."""
    runs = await launch(client, make_config, 2)
    for run in runs:
        backend.tell(str(run.remote_id), TrainingStatus.COMPLETED)
        await client.status(run.id)
    told: list[str] = []

    async def clean_up(run: TrainingRun, record: LogRecord) -> None:
        told.append(run.id)
        await client.delete("run-001")

    await client.watcher(on_event=clean_up).sweep()
    assert told == ["run-000"]


# -- trouble with one run, trouble with one backend ---------------------------------------------


class Picky(ScriptedBackend):
    """Fails for some runs, whichever way it is asked about them."""

    def __init__(self, outcome: BaseException | None = None, *, bad: Sequence[str] = ()) -> None:
        super().__init__()
        self.outcome = outcome
        self.bad = set(bad)
        self.failed: Counter[str] = Counter()

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        """Fail or hang for a bad run."""
        if run.id in self.bad:
            self.failed[run.id] += 1
            if self.outcome is None:
                await anyio.sleep_forever()
            else:
                raise self.outcome
        return await super().observe(run, after=after)


class PickyLists(Picky):
    """Fails as a whole when a list has a bad run in it."""

    async def statuses(self, runs: Sequence[TrainingRun]) -> Mapping[str, RunState]:
        if self.outcome is not None and any(run.id in self.bad for run in runs):
            raise self.outcome
        return {run.id: self._jobs[str(run.remote_id)] for run in runs if run.id not in self.bad}


OF_ONE_RUN = [
    PermissionDenied("not yours"),
    ConfigError("this is no cursor"),
    ProtocolError("half of it"),
    BackendUnavailable("500 for this one"),
    KeyError("a bug"),
    None,
]


@pytest.mark.parametrize("kind", [Picky, PickyLists])
@pytest.mark.parametrize("outcome", OF_ONE_RUN, ids=lambda it: type(it).__name__)
async def test_trouble_with_one_run_keeps_to_it(
    kind: type[Picky],
    outcome: BaseException | None,
    tmp_path: Path,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of forty runs, the ends of thirty-nine are told; the other one says what is wrong."""
    count = 40 if isinstance(outcome, PermissionDenied) else 8
    monkeypatch.setattr(poller, "PATIENCE", 0.05)
    backend = kind(outcome, bad=["run-007"])
    told = Told()
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        runs = await launch(client, make_config, count)
        async with watching(client.watcher(on_event=told.to("a"))):
            await until(lambda: backend.failed)
            for run in runs:
                backend.finish(str(run.remote_id))
            await until(lambda: len(told.events) >= count - 1)
        bad = await client.get("run-007")
    assert {run_id for run_id, _ in told.events} == {run.id for run in runs} - {"run-007"}
    assert bad.stale is not None
    assert (bad.stale.kind, bad.status) == ("unreachable", TrainingStatus.RUNNING)
    said = str(outcome.args[0]) if outcome is not None else "did not finish 'observe'"
    assert said in bad.stale.message


async def test_one_job_of_a_provider_keeps_its_trouble_to_itself(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """One answers 403, and the stored cursor of another cannot be read."""
    told = Told()
    with ScriptedProvider() as provider:
        backend = MistralAPIBackend(
            settings=MistralSettings(base_url=provider.base_url, poll_min=0.01, poll_max=0.05),
            credentials=CredentialVault({"mistral": str(provider.key)}),
        )
        async with AsyncTrainingClient(home=tmp_path, backends={"mistral": backend}) as client:
            provider.auto, provider.refuses_similar = "validate", False
            runs = [
                await client.launch(make_config(), backend="mistral", run_id=f"run-{n}")
                for n in range(6)
            ]
            refusal = OtherAnswer(status=403, body={"message": "no"})
            provider.fail(refusal, method="GET", path=f"/{runs[2].remote_id}", times=999)
            client._store.observed("run-4", lambda run: run, after=None, cursor="no cursor")
            async with watching(client.watcher(on_event=told.to("a"))):
                for run in runs:
                    provider.set_status(str(run.remote_id), "SUCCESS")
                await until(lambda: sum(message == "SUCCESS" for _, message in told.events) == 4)
                await until(lambda: client.get("run-2"), lambda run: run.stale)
                await until(lambda: client.get("run-4"), lambda run: run.stale)
        await backend.aclose()
    ended = {run_id for run_id, message in told.events if message == "SUCCESS"}
    assert ended == {"run-0", "run-1", "run-3", "run-5"}


async def test_a_run_in_trouble_is_asked_for_less_and_less_often(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """The pause doubles, from a second on, however often the other run is asked for."""
    backend = Picky(KeyError("a bug"), bad=["run-000"])
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        await launch(client, make_config, 2)
        began = anyio.current_time()
        async with watching(client.watcher()):
            await until(lambda: backend.failed["run-000"] == 3)
        assert anyio.current_time() - began >= 1 + 2
    assert len(backend.looks) > 1


async def test_a_run_that_recovers_is_seen_again(tmp_path: Path, make_config: MakeConfig) -> None:
    """Its record no longer says that it could not be."""
    backend = Picky(KeyError("a bug"), bad=["run-000"])
    told = Told()
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        runs = await launch(client, make_config, 2)
        async with watching(client.watcher(on_event=told.to("a"))):
            await until(lambda: client.get("run-000"), lambda run: run.stale)
            backend.bad.clear()
            backend.finish(str(runs[0].remote_id))
            await until(lambda: told.events)
        assert (await client.get("run-000")).stale is None


async def test_a_server_that_answers_for_none_is_not_asked_for_all(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """After a few, all of its runs say that it cannot be reached."""
    backend = Picky(BackendUnavailable("503"), bad=[f"run-{n:03}" for n in range(40)])
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        await launch(client, make_config, 40)
        with pytest.raises(BackendUnavailable):
            await client.watcher().sweep()
        kinds = Counter(run.stale and run.stale.kind for run in await client.list())
    assert kinds == {"unreachable": 40}
    assert backend.failed.total() < 12


async def test_one_broken_backend_stops_no_other(
    tmp_path: Path, backend: Listing, make_config: MakeConfig
) -> None:
    """A bug in its every verb ends neither the watcher nor the runs elsewhere."""
    bad = PickyLists(KeyError("a bug"), bad=["one", "two"])
    backends: dict[str, TrainingBackend] = {"scripted": backend, "bad": bad}
    told = Told()
    async with AsyncTrainingClient(home=tmp_path, backends=backends) as client:
        for run_id in ("one", "two"):
            await client.launch(make_config(), backend="bad", run_id=run_id)
        (run,) = await launch(client, make_config, 1)
        async with watching(client.watcher(on_event=told.to("a"))):
            await until(lambda: len(bad.failed) == 2)
            backend.finish(str(run.remote_id))
            await until(lambda: told.events)
        broken = await client.get("one")
    assert told.events == [(run.id, "completed")]
    assert broken.stale is not None
    assert "'bad' of tests failed in 'observe': KeyError" in broken.stale.message


async def test_a_run_that_cannot_be_seen_keeps_to_its_budget(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """When it began is on record, so it is stopped all the same."""
    backend = Picky(KeyError("a bug"), bad=["mine"])
    config = make_config(budget={"max_duration": "0.2"})
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        run = await client.launch(config, backend="scripted", run_id="mine")
        async with watching(client.watcher()):
            await until(
                lambda: ScriptedBackend.observe(backend, run),
                lambda seen: seen.state.status is TrainingStatus.STOPPING,
            )


async def test_waiting_ends_with_the_error_of_a_run(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """One that no later try would mend; otherwise nobody would learn of it."""
    backend = Picky(PermissionDenied("not yours"), bad=["run-001"])
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        runs = await launch(client, make_config, 3)
        with pytest.raises(PermissionDenied, match="not yours"):
            await client.wait(*(run.id for run in runs))


async def test_waiting_outlasts_an_answer_that_cannot_be_read(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    """A proxy may have answered in place of the server."""
    backend = Picky(ProtocolError("a web page"), bad=["run-000"])
    async with AsyncTrainingClient(home=tmp_path, backends={"scripted": backend}) as client:
        (run,) = await launch(client, make_config, 1)

        async def recover() -> None:
            await until(lambda: backend.failed)
            backend.bad.clear()
            backend.finish(str(run.remote_id))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(recover)
            (ended,) = await client.wait(run.id)
    assert ended.status is TrainingStatus.COMPLETED


# -- changes of status --------------------------------------------------------------------------


@both_stores
async def test_a_failure_that_no_log_tells_is_told(
    client: AsyncTrainingClient, backend: Listing, make_config: MakeConfig
) -> None:
    """The client has seen it, so it says so, once."""
    failed, completed = await launch(client, make_config, 2)
    told = Told()
    async with watching(client.watcher(on_event=told.to("a"))):
        backend.fail(str(failed.remote_id), "out of memory")
        backend.finish(str(completed.remote_id))
        await until(lambda: len(told.events) == 2)
    assert sorted(told.events) == [
        ("run-000", "failed: out of memory"),
        ("run-001", "completed"),
    ]
    assert [
        (record.source, record.level, record.fields["status"])
        async for record in client.logs(failed.id)
        if record.message.startswith("failed")
    ] == [("status", "error", "failed")]


async def test_a_watcher_may_take_events_of_some_sources_only(
    client: AsyncTrainingClient, backend: Listing, make_config: MakeConfig
) -> None:
    """The others are left to other watchers."""
    (run,) = await launch(client, make_config, 1)
    backend.log(str(run.remote_id), "one")
    backend.tell(str(run.remote_id), TrainingStatus.COMPLETED)
    some, rest = Told(), Told()
    await swept(client.watcher(on_event=some.to("some"), sources={"status"}), 1)
    await client.watcher(on_event=rest.to("rest")).sweep()
    assert (some.events, rest.events) == ([(run.id, "completed")], [(run.id, "one")])


async def test_a_source_that_is_not_delivered_is_refused(client: AsyncTrainingClient) -> None:
    """Nobody waits for events that never come."""
    with pytest.raises(ValueError, match="after_step"):
        client.watcher(sources={"metrics"})
