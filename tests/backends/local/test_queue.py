"""Runs that wait on this machine, and go on waiting whatever ends their processes."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from operator import not_
from pathlib import Path

import pytest

from tests.backends.local.conftest import is_over, until_state
from tests.waiting import until
from training_backends.backends.local.backend import LocalBackend
from training_backends.core.files import hold_lock
from training_backends.core.run import TrainingRun
from training_backends.core.status import TrainingStatus
from training_backends.rundir.directory import Event, RunDir
from training_backends.testing.journal import MemoryJournal
from training_backends.trainer.queue import host_key

pytestmark = [pytest.mark.anyio, pytest.mark.engine]

MakeRun = Callable[..., TrainingRun]


@pytest.fixture
def occupied(home: Path) -> ExitStack:
    """The machine's only place, held until this is closed."""
    (home / "slots").mkdir()
    stack = ExitStack()
    stack.enter_context(hold_lock(home / "slots" / f"cpu-{host_key()}.0.lock"))
    return stack


async def queue(backend: LocalBackend, run: TrainingRun) -> None:
    """Launch a run that has to wait."""
    await backend.launch(run, MemoryJournal(run))
    await until_state(backend, run, lambda state: (state.raw_status or "").startswith("queued"))


def long_ago(directory: RunDir) -> None:
    """Have the process of a run started a minute ago."""
    then = time.time() - 60
    os.utime(directory.spec, (then, then))
    os.utime(directory.lock, (then + 1, then + 1))


async def test_a_run_that_waits_says_its_position(
    backend: LocalBackend, make_run: MakeRun, occupied: ExitStack
) -> None:
    """In its status and in its log; a higher priority goes before it."""
    low, high = make_run("low"), make_run("high", options={"device": "cpu", "priority": 5})
    await backend.launch(low, MemoryJournal(low))
    await until_state(backend, low, lambda state: state.raw_status == "queued, position 1")
    await backend.launch(high, MemoryJournal(high))
    await until_state(backend, high, lambda state: state.raw_status == "queued, position 1")
    state = await until_state(backend, low, lambda state: state.raw_status == "queued, position 2")
    assert state.status is TrainingStatus.PENDING
    # It is held back for the moment in which others may still write.
    (record,) = (await until(lambda: backend.observe(high), lambda seen: seen.records)).records
    assert record.message == "Queued (position 1)"
    assert record.fields["position"] == 1
    for run in (low, high):
        await backend.stop(run)
        state = await until_state(backend, run, is_over)
        assert state.status is TrainingStatus.CANCELLED
    occupied.close()


async def test_a_waiting_run_outlives_its_process(
    backend: LocalBackend, home: Path, make_run: MakeRun, occupied: ExitStack
) -> None:
    """As after a restart of the machine: whoever looks next starts it again, at its old place."""
    first, second = make_run("first"), make_run("second")
    for run in (first, second):
        await queue(backend, run)
    directory = RunDir(home / "runs" / "first")
    dead = directory.active_pid()
    assert dead is not None
    os.kill(dead, signal.SIGKILL)
    await until(lambda: not directory.is_active())
    state = await backend.status(first)
    assert state.status is TrainingStatus.PENDING, "nothing of it is lost"
    await until_state(backend, second, lambda state: state.raw_status == "queued, position 1")

    long_ago(directory)
    await backend.statuses([first, second])
    await until_state(backend, second, lambda state: state.raw_status == "queued, position 2")
    assert directory.active_pid() not in {None, dead}
    await backend.stop(second)
    await until_state(backend, second, is_over)
    occupied.close()
    await until_state(backend, first, lambda state: state.raw_status == "initializing")


async def test_a_stop_ends_a_wait_that_nobody_does(
    backend: LocalBackend, home: Path, make_run: MakeRun, occupied: ExitStack
) -> None:
    """No process is started only to be told that it is over."""
    run = make_run()
    await queue(backend, run)
    directory = RunDir(home / "runs" / run.id)
    pid = directory.active_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not directory.is_active())
    await backend.stop(run)
    assert (await backend.status(run)).status is TrainingStatus.CANCELLED
    occupied.close()


async def test_a_run_killed_while_it_was_suspended_continues(
    backend: LocalBackend, home: Path, make_run: MakeRun, occupied: ExitStack
) -> None:
    """Its container had no time left for the checkpoint; a stop meanwhile ends it, though."""
    first, second = make_run("first"), make_run("second")
    for run in (first, second):
        await queue(backend, run)
        directory = RunDir(home / "runs" / run.id)
        directory.add_event(Event(name="status", data={"status": "running"}))
        pid = directory.active_pid()
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # it notices nothing
        directory.request_suspension()
        os.kill(pid, signal.SIGKILL)
        await until(directory.is_active, not_)
        long_ago(directory)
    await backend.stop(second)
    states = await backend.statuses([first, second])
    assert states["second"].status is TrainingStatus.CANCELLED
    occupied.close()
    await until_state(backend, first, lambda state: state.status is TrainingStatus.INITIALIZING)
    assert not RunDir(home / "runs" / "first").stop.exists()
