"""The run directory: what its readers and writers promise each other."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from training_backends.core.files import append_line, hold_lock, is_locked, write_atomic
from training_backends.rundir.directory import (
    Event,
    MetricsRow,
    RunDir,
    RunSpec,
    rows_per_epoch,
)

HOLDER = """
import sys, time
from pathlib import Path
from training_backends.core.files import hold_lock
with hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """An empty run directory."""
    return RunDir(tmp_path)


def test_a_spec_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Writing creates the directory; reading gives an equal spec."""
    spec = RunSpec.model_validate(
        {"run_id": "r", "model": "m", "train": ["a.jsonl"], "training_steps": 3}
    )
    run = RunDir(tmp_path / "new")
    run.write_spec(spec)
    assert run.read_spec() == spec


@pytest.mark.parametrize("length", [{}, {"epochs": 1, "training_steps": 2}])
def test_a_spec_has_exactly_one_length(length: dict[str, int]) -> None:
    """Neither both nor none of epochs and training_steps."""
    with pytest.raises(ValidationError, match="either epochs or training_steps"):
        RunSpec.model_validate({"run_id": "r", "model": "m", "train": ["a"], **length})


def test_a_torn_last_line_is_left_alone_and_then_closed(run: RunDir) -> None:
    """Half a line is not read, and what is appended behind it is a line of its own."""
    run.add_event(Event(name="message", message="one"))
    with run.events.open("ab") as file:
        file.write(b'{"at": "2026-01-01T00:00')
    (first, offset), *others = run.read_events()
    assert (first.message, others) == ("one", [])
    run.add_event(Event(name="message", message="two"))
    assert [event.message for event, _ in run.read_events(offset)] == ["two"]


def test_reading_goes_on_behind_an_offset(run: RunDir) -> None:
    """Each event comes with the offset behind it, from which the rest is read."""
    for word in ("one", "two", "three"):
        run.add_event(Event(name="message", message=word))
    offset = run.read_events()[1][1]
    assert [event.message for event, _ in run.read_events(offset)] == ["three"]


def row(step: int) -> MetricsRow:
    """Make a row of metrics."""
    return MetricsRow(step=step, total_steps=9, epoch=0.1, train_loss=1.0, learning_rate=0.1)


def test_the_newest_metrics_are_the_end_of_all(run: RunDir) -> None:
    """They begin with a whole line and end with the last one, however long the file is."""
    assert run.read_newest_metrics() == []
    run.add_metrics(row(1))
    assert [found.step for found in run.read_newest_metrics()] == [1]
    line = run.metrics.read_bytes()
    for length in range(len(line) + 1):  # wherever in a line the end begins
        run.metrics.write_bytes(b"x" * length + b"\n" + line * 1000)
        run.add_metrics(row(2))
        newest = [found.step for found in run.read_newest_metrics()]
        assert newest == [1] * (len(newest) - 1) + [2]
        assert 10 < len(newest) < 1000


def test_a_lock_lives_as_long_as_its_holder(tmp_path: Path) -> None:
    """Others see it held, cannot take it, and get it once the holder is killed."""
    lock = tmp_path / "lock"
    assert not is_locked(lock)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert is_locked(lock)
        assert is_locked(lock), "looking must not take it"
        with pytest.raises(BlockingIOError), hold_lock(lock, patience=0):
            pass
        holder.kill()
        holder.wait()
    with hold_lock(lock):
        assert is_locked(lock)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """Nothing half-written is ever seen under the name, and no temporary file stays."""
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomic(folder, "renaming fails")
    assert sorted(tmp_path.iterdir()) == [path, folder]


def test_a_private_file_is_only_for_its_owner(tmp_path: Path) -> None:
    """Also if one that anyone may read is replaced."""
    path = tmp_path / "file"
    write_atomic(path, "for all")
    write_atomic(path, b"secret", private=True)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"secret", 0o600)


def test_lines_are_appended_whole(tmp_path: Path) -> None:
    """Each call adds one line."""
    path = tmp_path / "lines"
    append_line(path, "a")
    append_line(path, "b")
    assert path.read_bytes() == b"a\nb\n"


@pytest.mark.parametrize(
    ("rows", "weights", "expected"),
    [
        ((10, 10), (1.0, 1.0), (10, 10)),
        ((10, 10), (3.0, 3.0), (10, 10)),
        ((10, 10), (3.0, 1.0), (15, 5)),
        ((0, 0), (1.0, 1.0), (0, 0)),
    ],
)
def test_weights_are_relative(
    rows: tuple[int, ...], weights: tuple[float, ...], expected: tuple[int, ...]
) -> None:
    """An epoch is as long as all files together, shared out by weight."""
    assert rows_per_epoch(rows, weights) == expected


FULL_DISK = """
import errno, os, sys
from pathlib import Path
from training_backends.core.config import DataSource
from training_backends.rundir.directory import RunDir, RunSpec
from training_backends.trainer import process

run = RunDir(Path(sys.argv[1]) / "run")
train = (DataSource(path=Path("a.jsonl")),)
run.write_spec(RunSpec(run_id="r", model="m", train=train, training_steps=1))

def fill(*_):
    with open(Path(sys.argv[1]) / "rest", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass  # until the disk is full

process._train = fill
sys.stderr = open(Path(sys.argv[1]) / "log.txt", "w", buffering=1)
code = process.train(run.path)
record = run.read_exit()
print(int(code), record.failure.message, run.reserve.exists())
"""


def test_the_end_is_recorded_on_a_full_disk(tmp_path: Path) -> None:
    """A training that fails on it says why, instead of being lost."""
    mount = 'mount -t tmpfs -o size=1m tmpfs "$1" && shift && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("small file systems cannot be mounted here")
    done = subprocess.run(
        [*command, sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split(maxsplit=1)[0] == "1"
    assert "The disk is full" in done.stdout
    assert done.stdout.endswith("False\n")


def test_only_a_suspension_is_withdrawn(run: RunDir) -> None:
    """A stop that came in between stays as it was."""
    assert run.end_suspension()
    run.request_suspension()
    assert run.end_suspension()
    assert not run.stop.exists()
    run.request_stop(save_checkpoint=False)
    assert not run.end_suspension()
    assert run.stop.read_text() == "discard"
