"""Looks at runs that write what an engine would, but train nothing."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from training_backends.backends.local.backend import LocalBackend
from training_backends.backends.local.spec import build_spec
from training_backends.core.errors import ConfigError, RunNotFound
from training_backends.core.files import hold_lock
from training_backends.core.run import TrainingRun, utc_now
from training_backends.core.status import TrainingStatus
from training_backends.rundir.directory import Event, ExitRecord, RunDir

pytestmark = pytest.mark.anyio

MakeRun = Callable[..., TrainingRun]


@pytest.fixture
def run(make_run: MakeRun) -> TrainingRun:
    """The record of a run."""
    return make_run()


@pytest.fixture
def directory(home: Path, run: TrainingRun) -> RunDir:
    """What a launch of the run leaves before its process begins."""
    directory = RunDir(home / "runs" / run.id)
    directory.write_spec(build_spec(run.id, run.config, home / "slots"))
    return directory


def say(directory: RunDir, word: str, *, ago: float = 60.0) -> None:
    """Write a status event of some seconds ago."""
    at = utc_now() - timedelta(seconds=ago)
    directory.add_event(Event(at=at, name="status", message=word, data={"status": word}))


async def test_looks_go_on_where_the_last_one_ended(
    backend: LocalBackend, run: TrainingRun, directory: RunDir
) -> None:
    """Each tells the state of now and only what the log has gained."""
    with hold_lock(directory.lock):
        first = await backend.observe(run)
        assert (first.state.status, first.records, first.cursor) == ("pending", (), None)
        say(directory, "initializing", ago=50)
        say(directory, "running", ago=40)
        second = await backend.observe(run, after=first.cursor)
        assert second.state.status is TrainingStatus.RUNNING
        assert [record.message for record in second.records] == ["initializing", "running"]
        third = await backend.observe(run, after=second.cursor)
        assert (third.records, third.cursor) == ((), second.cursor)
        assert third.state == second.state
    directory.write_exit(ExitRecord(status="completed", code=0))
    say(directory, "completed", ago=0)
    last = await backend.observe(run, after=third.cursor)
    assert last.state.status is TrainingStatus.COMPLETED
    assert [record.message for record in last.records] == ["completed"]


async def test_the_log_of_a_lost_run_ends_once(
    backend: LocalBackend, run: TrainingRun, directory: RunDir
) -> None:
    """The process could not say its end: it is told in its place, and not again."""
    with hold_lock(directory.lock):
        say(directory, "running")
    seen = await backend.observe(run)
    assert seen.state.failure is not None
    assert seen.state.failure.kind == "lost"
    assert [record.fields["raw_status"] for record in seen.records] == ["running", "lost"]
    assert (await backend.observe(run, after=seen.cursor)).records == ()


async def test_a_look_at_nothing_is_refused(
    backend: LocalBackend, run: TrainingRun, directory: RunDir, make_run: MakeRun
) -> None:
    """Neither an unknown run nor a foreign cursor can be looked at."""
    with pytest.raises(ConfigError, match="Invalid log cursor"):
        await backend.observe(run, after="nonsense")
    with pytest.raises(RunNotFound):
        await backend.observe(make_run("nowhere"))


async def test_many_looks_leave_out_what_is_gone(
    backend: LocalBackend, run: TrainingRun, directory: RunDir, make_run: MakeRun
) -> None:
    """A run whose directory was removed is not told of, the others are."""
    told = await backend.statuses([make_run("gone"), run])
    assert list(told) == [run.id]
    assert told[run.id] == await backend.status(run)
