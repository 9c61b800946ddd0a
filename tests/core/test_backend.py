"""What the base class of all backends builds on `observe`."""

from contextlib import aclosing, suppress
from datetime import timedelta
from typing import Literal

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training_backends import (
    BackendUnavailable,
    Capabilities,
    Observation,
    RemoteFilters,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
    UnsupportedOperation,
)
from training_backends.core.backend import TrainingBackend
from training_backends.testing.backend import ScriptedBackend
from training_backends.testing.journal import MemoryJournal

pytestmark = pytest.mark.anyio


class Growing(ScriptedBackend):
    """Before each observation the log gains the next number of records; the last one ends it."""

    def __init__(self, growth: list[int | None]) -> None:
        super().__init__()
        self.growth = growth

    @property
    def poll_interval(self) -> tuple[timedelta, timedelta]:
        """Poll as fast as possible."""
        return timedelta(0), timedelta(0)

    async def observe(self, run: TrainingRun, *, after: str | None = None) -> Observation:
        """Grow, or fail where the growth is None."""
        gain = self.growth.pop(0) if self.growth else 0
        for _ in range(gain or 0):
            self.log(str(run.remote_id), "record")
        if not self.growth:
            self.finish(str(run.remote_id))
        if gain is None:
            raise BackendUnavailable("away")
        return await super().observe(run, after=after)


def adopted(backend: ScriptedBackend) -> TrainingRun:
    """Return a run with a job."""
    config = TrainingConfig.model_validate({"model": "m", "data": {"train": "never-read.jsonl"}})
    backend.adopt("job")
    return TrainingRun(id="r", backend=backend.name, config=config, remote_id="job")


async def read(
    backend: ScriptedBackend, run: TrainingRun, after: str | None = None, *, follow: bool = False
) -> list[str]:
    """Return the cursors of a log."""
    async with aclosing(backend.logs(run, after=after, follow=follow)) as records:
        return [record.cursor async for record in records]


async def test_the_status_is_that_of_an_observation() -> None:
    """One observation gives the status, at the cost of one."""
    backend = ScriptedBackend()
    run = adopted(backend)
    backend.finish("job")
    assert (await backend.status(run)).status is TrainingStatus.COMPLETED
    assert backend.looks == ["r"]


async def test_a_log_that_is_not_followed_takes_one_observation() -> None:
    """It yields what there is after the cursor and ends, although the run has not."""
    backend = Growing([3, 0, 9])
    run = adopted(backend)
    assert await read(backend, run) == ["0", "1", "2"]
    assert await read(backend, run, after="0") == ["1", "2"]
    assert backend.growth == [9]


async def test_a_finished_run_is_not_polled_again() -> None:
    """The observation of the end has the rest of the log, so following stops with it."""
    backend = Growing([2, 0, 1])
    run = adopted(backend)
    assert await read(backend, run, follow=True) == ["0", "1", "2"]
    assert backend.growth == []
    assert len(backend.looks) == 3


@given(
    growth=st.lists(st.one_of(st.none(), st.integers(0, 4)), max_size=8),
    leaves=st.lists(st.integers(1, 3), max_size=6),
)
async def test_a_follower_that_comes_back_misses_and_repeats_nothing(
    growth: list[int | None], leaves: list[int]
) -> None:
    """Whatever fails and whenever the reader leaves, the cursor of the last record continues."""
    backend = Growing([*growth, 1, 0, 0])
    run = adopted(backend)
    found: list[str] = []
    ended = False
    while not ended:
        room = leaves.pop() if leaves else None
        with suppress(BackendUnavailable):
            ended = await _read_some(backend, run, found, room)
    log = [record.cursor for record in (await ScriptedBackend.observe(backend, run)).records]
    assert found == log


async def _read_some(
    backend: ScriptedBackend, run: TrainingRun, found: list[str], room: int | None
) -> bool:
    """Continue after the last record found, up to `room` more; return whether the log ended."""
    after = found[-1] if found else None
    async with aclosing(backend.logs(run, after=after, follow=True)) as records:
        async for record in records:
            found.append(record.cursor)
            room = None if room is None else room - 1
            if room == 0:
                return False
    return True


async def test_a_follower_waits_for_the_poll_interval() -> None:
    """While nothing is new, a run is not observed again before the shortest interval is over."""

    class Rare(ScriptedBackend):
        @property
        def poll_interval(self) -> tuple[timedelta, timedelta]:
            return timedelta(hours=1), timedelta(hours=1)

    backend = Rare()
    run = adopted(backend)
    with anyio.move_on_after(0.1) as scope:
        await read(backend, run, follow=True)
    assert scope.cancelled_caught
    assert backend.looks == ["r"]


async def test_a_log_in_parts_is_read_at_once() -> None:
    """Also without following, and to the end of a finished run; `more` without progress ends."""
    backend = ScriptedBackend()
    run = adopted(backend)
    for number in range(10):
        backend.log("job", str(number))
    backend.page = 4
    every = [str(number) for number in range(10)]
    assert await read(backend, run) == every
    assert len(backend.looks) == 3
    backend.finish("job")
    assert await read(backend, run, "5", follow=True) == every[6:]
    backend.page = 0  # says that there is more, and returns nothing
    assert await read(backend, run, "5") == []


@pytest.mark.parametrize("resumes", ["no", "anew", "checkpoint"])
async def test_a_backend_that_trains_anew_need_not_implement_resume(
    resumes: Literal["no", "anew", "checkpoint"],
) -> None:
    """The default launches the new run for `anew`, and is unsupported otherwise."""

    class Resuming(ScriptedBackend):
        resume = TrainingBackend.resume

        @property
        def capabilities(self) -> Capabilities:
            return super().capabilities.model_copy(update={"resumes": resumes})

    backend = Resuming()
    run = adopted(backend)
    new = run.model_copy(update={"id": "r2", "remote_id": None})
    if resumes == "anew":
        await backend.resume(run, new, MemoryJournal(new))
    else:
        with pytest.raises(UnsupportedOperation):
            await backend.resume(run, new, MemoryJournal(new))
    assert bool(backend.created) is (resumes == "anew")


@pytest.mark.parametrize(
    ("filters", "accepted"),
    [
        ({}, True),
        ({"status": "running", "model": "m", "suffix": "s"}, True),
        ({"status": "failed"}, False),
        ({"model": "n"}, False),
        ({"suffix": "t"}, False),
    ],
)
def test_filters_accept_a_job_that_passes_all(filters: dict[str, str], *, accepted: bool) -> None:
    """A filter that is not set accepts any job."""
    chosen = RemoteFilters.model_validate(filters)
    assert chosen.accept(status=TrainingStatus.RUNNING, model="m", suffix="s") is accepted
