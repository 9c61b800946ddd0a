"""Runs in an object store: the log, checkpoints of several processes, and what a cut leaves."""

import random
from pathlib import Path

import pytest

from tests.buckets import Bucket, bucket, s3_server
from training_backends.core.config import DataSource
from training_backends.core.errors import BackendUnavailable
from training_backends.rundir.checkpoints import STATE, describe_files
from training_backends.rundir.directory import (
    CheckpointState,
    Event,
    ExitRecord,
    RunDir,
    RunSpec,
)
from training_backends.rundir.stored import LogUpload, StoredRun

__all__ = ["bucket", "s3_server"]

SPEC = RunSpec(
    run_id="r",
    model="tiny-mistral",
    train=(DataSource(path=Path("data/train-0.jsonl")),),
    training_steps=9,
)


@pytest.fixture
def stored(bucket: Bucket) -> StoredRun:
    """A run without data."""
    found = StoredRun.at(f"{bucket.url}/team/runs/r")
    found.create(SPEC, {})
    return found


@pytest.fixture
def driver(tmp_path: Path) -> RunDir:
    """The directory of the driver."""
    (tmp_path / "driver").mkdir()
    return RunDir(tmp_path / "driver")


def copy_in(path: Path) -> RunDir:
    return RunDir(path / "copy")


def save(run: RunDir, step: int, rank: int, content: bytes = b"weights") -> Path:
    """Write what one process writes to a checkpoint."""
    path = run.checkpoints / f"step-{step}"
    (path / "optimizer").mkdir(parents=True)
    for name in (f"__{rank}_0.distcp", f"optimizer/__{rank}_0.distcp"):
        (path / name).write_bytes(content + name.encode())
    sizes, checksums = describe_files(path)
    state = CheckpointState(step=step, files=sizes, checksums=checksums)
    (path / STATE).write_text(state.model_dump_json())
    return path


@pytest.fixture
def checkpoint(stored: StoredRun, tmp_path: Path) -> int:
    """A complete checkpoint of two processes."""
    for rank in range(2):
        stored.store_share(path := save(RunDir(tmp_path / f"w{rank}"), 3, rank), rank)
    assert stored.complete_checkpoint(path, 2)
    return 3


# -- the log -----------------------------------------------------------------------------


def test_all_copies_of_a_log_have_the_same_bytes(
    stored: StoredRun, driver: RunDir, tmp_path: Path, bucket: Bucket
) -> None:
    """Whether made step by step or at once, so that a cursor is valid on every machine."""
    lengths = random.Random(0)
    log, steady = LogUpload(stored.store, driver.events), RunDir(tmp_path / "steady")
    for number in range(12):
        for _ in range(3):
            text = "x" * lengths.randrange(60_000)
            driver.add_event(Event(name="message", message=text, step=number))
        log.push()
        if number % 2:
            stored.update(steady)
    late = copy_in(tmp_path)
    stored.update(late)
    assert driver.events.read_bytes() == steady.events.read_bytes() == late.events.read_bytes()
    objects = [name for name in bucket.names() if "/events-" in name]
    assert 2 < len(objects) < 8
    assert all(bucket.get(name).endswith(b"\n") for name in objects)


def test_an_upload_whose_answer_was_lost_is_repeated_without_doubling_lines(
    stored: StoredRun, driver: RunDir, tmp_path: Path
) -> None:
    """Even if more lines have come since, and a copy was made in between."""
    driver.add_event(Event(name="message", message="one"))
    LogUpload(stored.store, driver.events).push()
    copy = copy_in(tmp_path)
    stored.update(copy)
    driver.add_event(Event(name="message", message="two"))
    LogUpload(stored.store, driver.events).push()  # knows nothing of the first
    stored.update(copy)
    assert [event.message for event, _ in copy.read_events()] == ["one", "two"]


def test_a_line_that_is_being_written_is_not_uploaded(
    stored: StoredRun, driver: RunDir, tmp_path: Path
) -> None:
    """It may be cut in a character."""
    driver.events.write_bytes(b'{"name": "message"}\n{"name": "mess')
    LogUpload(stored.store, driver.events).push()
    stored.update(copy := copy_in(tmp_path))
    assert copy.events.read_bytes() == b'{"name": "message"}\n'


# -- the state ---------------------------------------------------------------------------


def test_a_copy_shows_a_stop_request_until_it_is_served(stored: StoredRun, tmp_path: Path) -> None:
    """And then how the run ended."""
    copy = copy_in(tmp_path)
    stored.request_stop(save_checkpoint=False)
    stored.update(copy)
    assert copy.stop.read_text() == "discard"
    stored.finish(ExitRecord(status="stopped", code=3, step=4))
    stored.update(copy)
    found = copy.read_exit()
    assert (copy.stop.exists(), found and found.step) == (False, 4)


def test_the_driver_and_not_an_observer_says_how_a_run_ended(
    stored: StoredRun, tmp_path: Path
) -> None:
    """An observer that takes it for lost comes too late."""
    stored.finish(ExitRecord(status="completed", code=0))
    stored.finish(ExitRecord(status="failed", code=1), replace=False)
    stored.update(copy := copy_in(tmp_path))
    found = copy.read_exit()
    assert found is not None
    assert found.status == "completed"


def test_a_copy_of_an_earlier_run_with_the_same_id_is_replaced(
    stored: StoredRun, driver: RunDir, tmp_path: Path
) -> None:
    """It may have been deleted and launched again from another machine."""
    copy = copy_in(tmp_path)
    driver.add_event(Event(name="message", message="of the earlier run"))
    LogUpload(stored.store, driver.events).push()
    stored.update(copy)
    stored.remove()
    stored.create(SPEC.model_copy(update={"training_steps": 8}), {})
    stored.update(copy)
    assert (copy.read_spec().training_steps, copy.read_events()) == (8, [])


def test_nothing_is_left_of_a_removed_run(
    stored: StoredRun, checkpoint: int, bucket: Bucket, tmp_path: Path
) -> None:
    """Neither in the store nor in a copy."""
    stored.update(copy := copy_in(tmp_path))
    stored.remove()
    stored.update(copy)
    assert (checkpoint, bucket.names(), copy.path.exists()) == (3, [], False)


# -- checkpoints -------------------------------------------------------------------------


def test_a_checkpoint_is_valid_once_all_processes_have_uploaded_their_share(
    stored: StoredRun, tmp_path: Path
) -> None:
    """Until then it is as if it did not exist."""
    first, second = (save(RunDir(tmp_path / f"w{rank}"), 3, rank) for rank in range(2))
    stored.store_share(first, 0)
    assert not stored.complete_checkpoint(first, 2)
    assert not stored.checkpoints()
    stored.store_share(second, 1)
    assert stored.complete_checkpoint(first, 2)
    [state] = stored.checkpoints().values()
    assert len(state.files) == len(state.checksums) == 4


def test_a_process_downloads_what_the_others_have_written(
    stored: StoredRun, checkpoint: int, tmp_path: Path
) -> None:
    """What it has itself stays as it is."""
    run = RunDir(tmp_path / "w0")
    own = run.checkpoints / "step-3/__0_0.distcp"
    before = own.stat().st_mtime_ns
    assert stored.fetch_shares(checkpoint, run) is None
    assert own.stat().st_mtime_ns == before
    assert (own.parent / "__1_0.distcp").read_bytes() == b"weights__1_0.distcp"


def test_a_checkpoint_whose_files_have_changed_is_not_taken(
    stored: StoredRun, checkpoint: int, bucket: Bucket, tmp_path: Path
) -> None:
    """Of the same size it is noticed by its checksum, of another size without a download."""
    name = "team/runs/r/checkpoints/step-3/__1_0.distcp"
    bucket.put(name, b"WEIGHTS__1_0.distcp")
    state = stored.checkpoints()[checkpoint]
    assert stored.fetch_checkpoint(checkpoint, state, run := copy_in(tmp_path)) == (
        "__1_0.distcp has changed since it was written"
    )
    assert not [*run.checkpoints.iterdir()]
    bucket.put(name, b"cut")
    assert not stored.checkpoints()


def test_a_checkpoint_is_copied_to_another_run_within_the_store(
    stored: StoredRun, checkpoint: int, bucket: Bucket, tmp_path: Path
) -> None:
    """The new run outlives the old one."""
    other = StoredRun.at(f"{bucket.url}/team/runs/other")
    other.copy_checkpoint(stored, checkpoint, stored.checkpoints()[checkpoint])
    stored.remove()
    state = other.checkpoints()[checkpoint]
    assert other.fetch_checkpoint(checkpoint, state, copy_in(tmp_path)) is None


def test_a_completed_run_keeps_what_exporting_a_checkpoint_needs(
    stored: StoredRun, checkpoint: int, bucket: Bucket, tmp_path: Path
) -> None:
    """The optimizer's state and the encoded rows are removed."""
    stored.reduce()
    state = stored.checkpoints()[checkpoint]
    assert stored.fetch_checkpoint(checkpoint, state, copy_in(tmp_path)) is None
    assert not [name for name in bucket.names() if "optimizer" in name]


# -- the result --------------------------------------------------------------------------


def test_an_interrupted_download_of_a_result_is_continued(
    stored: StoredRun, driver: RunDir, bucket: Bucket, tmp_path: Path
) -> None:
    """A file that differs from the manifest is not taken, and there is no partial result."""
    driver.result.mkdir()
    for name in ("a.bin", "b.bin"):
        (driver.result / name).write_bytes(name.encode())
    stored.store_result(driver)
    bucket.put("team/runs/r/result/b.bin", b"cut")
    stored.update(copy := copy_in(tmp_path))
    with pytest.raises(BackendUnavailable, match=r"b\.bin: differs from the manifest"):
        stored.fetch_result(copy)
    assert not copy.result.exists()
    bucket.put("team/runs/r/result/b.bin", b"b.bin")
    bucket.put("team/runs/r/result/a.bin", b"never read again")
    stored.fetch_result(copy)
    assert {path.name: path.read_bytes() for path in copy.result.iterdir()} == {
        "a.bin": b"a.bin",
        "b.bin": b"b.bin",
    }
