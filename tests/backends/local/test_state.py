"""What a run directory says of its run, at the moments that are hard to catch live."""

import os
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from training_backends.backends.local.run_log import Cursor, read_records
from training_backends.backends.local.state import START_PATIENCE, Snapshot, read_state
from training_backends.core.files import hold_lock
from training_backends.core.run import Failure, utc_now
from training_backends.core.status import TrainingStatus
from training_backends.rundir.directory import Event, ExitRecord, MetricsRow, RunDir, RunSpec


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run directory whose process was started just now."""
    run = RunDir(tmp_path / "r")
    spec = {"run_id": "r", "model": "m", "train": ["a.jsonl"], "training_steps": 3}
    run.write_spec(RunSpec.model_validate(spec))
    return run


def say(run: RunDir, word: str) -> None:
    """Write a status event."""
    run.add_event(Event(name="status", data={"status": word}))


def test_a_process_has_time_to_take_its_lock(run: RunDir) -> None:
    """Just started it is pending; a minute later without a lock it is lost."""
    assert read_state(run).status is TrainingStatus.PENDING
    long_ago = time.time() - START_PATIENCE - 1
    os.utime(run.spec, (long_ago, long_ago))
    state = read_state(run)
    assert state.status is TrainingStatus.FAILED
    assert state.failure is not None
    assert state.failure.kind == "lost"


def test_a_process_that_has_opened_its_lock_but_does_not_hold_it_yet_is_not_lost(
    run: RunDir,
) -> None:
    """It may have to wait for a moment, for instance for somebody who looks at the lock."""
    run.lock.touch()
    assert read_state(run).status is TrainingStatus.PENDING


@pytest.mark.parametrize(
    ("word", "status"),
    [
        ("queued", TrainingStatus.PENDING),
        ("initializing", TrainingStatus.INITIALIZING),
        ("running", TrainingStatus.RUNNING),
        ("failed", TrainingStatus.RUNNING),
        ("a word of tomorrow", TrainingStatus.PENDING),
    ],
)
def test_a_living_process_is_never_over(run: RunDir, word: str, status: TrainingStatus) -> None:
    """While the lock is held, the last event says the state, and only exit.json an end."""
    with hold_lock(run.lock):
        say(run, word)
        state = read_state(run)
    assert (state.status, state.raw_status) == (status, word)


def test_a_stop_is_seen_until_it_is_obeyed(run: RunDir) -> None:
    """Stopping while it lives; cancelled if it died before it could hear."""
    run.request_stop()
    assert read_state(run).status is TrainingStatus.STOPPING
    with hold_lock(run.lock):
        say(run, "running")
        assert read_state(run).status is TrainingStatus.STOPPING
    assert read_state(run).status is TrainingStatus.CANCELLED


def test_a_suspension_is_no_stop(run: RunDir) -> None:
    """Whoever follows the run would take it for cancelled, and stop it for good."""
    run.request_suspension()
    with hold_lock(run.lock):
        say(run, "running")
        assert read_state(run).status is TrainingStatus.RUNNING
    assert read_state(run).status is TrainingStatus.PENDING, "killed before it had saved"
    run.request_stop()
    assert read_state(run).status is TrainingStatus.CANCELLED


def test_an_exit_record_says_the_end(run: RunDir) -> None:
    """Its failure, time and words are the run's."""
    failure = Failure(kind="out_of_memory", message="too big")
    record = ExitRecord(status="failed", code=1, failure=failure)
    run.write_exit(record)
    state = read_state(run)
    assert (state.status, state.failure) == (TrainingStatus.FAILED, failure)
    assert state.finished_at == record.at


def measured(step: int, *, at: datetime | None = None, **values: float) -> MetricsRow:
    """Make a row of metrics."""
    values = {"train_loss": 1.0, "learning_rate": 0.1, **values}
    return MetricsRow(at=at or utc_now(), step=step, total_steps=3, epoch=0.1, **values)


def test_the_last_row_of_a_step_counts(run: RunDir) -> None:
    """After a crash steps are done again; validation is kept from where it was measured."""
    run.add_metrics(measured(1, train_loss=9.0))
    run.add_metrics(measured(2, train_loss=8.0, valid_loss=7.0))
    run.add_metrics(measured(2, train_loss=6.0))
    run.add_metrics(measured(3, train_loss=5.0))
    state = read_state(run)
    assert (state.step, state.total_steps) == (3, 3)
    assert state.metrics is not None
    assert state.metrics["train_loss"] == 5.0
    assert state.metrics["valid_loss"] == 7.0


def test_a_long_run_is_read_from_its_end(run: RunDir) -> None:
    """A snapshot takes as long for a thousand million rows as for ten; checkpoints remember."""
    metrics = {"train_loss": 3.0, "valid_loss": 2.0}
    run.add_event(Event(name="checkpoint", step=1, data={"metrics": metrics}))
    with run.metrics.open("wb") as file:
        file.truncate(2**36)  # 64 GiB of nothing, which takes no room
    run.add_metrics(measured(9, train_loss=1.5))
    state = read_state(run)
    assert state.step == 9
    assert state.metrics is not None
    assert (state.metrics["train_loss"], state.metrics["valid_loss"]) == (1.5, 2.0)


def test_a_change_is_told_of_once_it_is_in_the_log(run: RunDir) -> None:
    """The time of the last change is that of the last row that a log would hold."""
    earlier = utc_now() - timedelta(minutes=1)
    with hold_lock(run.lock):
        assert read_state(run).changed_at is None
        run.add_event(Event(at=earlier, name="status", data={"status": "running"}))
        assert read_state(run).changed_at == earlier
        run.add_metrics(measured(1, at=earlier + timedelta(seconds=1)))
        assert read_state(run).changed_at == earlier + timedelta(seconds=1)
        run.add_metrics(measured(2, at=utc_now() + timedelta(minutes=1)))
        assert read_state(run).changed_at == earlier + timedelta(seconds=1)
    ended = ExitRecord(status="completed", code=0, at=utc_now() + timedelta(minutes=2))
    run.write_exit(ended)
    assert read_state(run).changed_at == ended.at


def test_what_is_too_young_waits_while_the_process_lives(run: RunDir) -> None:
    """A live log holds back the last moment, so that both files are merged in order."""
    with hold_lock(run.lock):
        say(run, "running")
        assert read_records(run, Cursor(), Snapshot.at(run)) == []
    run.write_exit(ExitRecord(status="completed", code=0))
    records = read_records(run, Cursor(), Snapshot.at(run))
    assert [record.fields["status"] for record in records] == ["running"]


@pytest.mark.parametrize("text", ["", "1", "a-b", "1-2-3", "1-2-end-end"])
def test_a_foreign_cursor_is_refused(text: str) -> None:
    """Only what we gave is taken back."""
    with pytest.raises(ValueError, match=r".*"):
        Cursor.parse(text)
    assert Cursor.parse("3-4-end") == Cursor(3, 4, ended=True)
