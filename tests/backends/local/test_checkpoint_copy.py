"""Which checkpoint a run is continued from, when some are damaged; nothing is trained."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from training_backends.backends.local.checkpoint_copy import copy_checkpoint
from training_backends.core.errors import ConfigError, DuplicateRun
from training_backends.core.run import TrainingRun
from training_backends.rundir.checkpoints import describe_files, find_newest
from training_backends.rundir.directory import CheckpointState, ExitRecord, RunDir


@pytest.fixture
def run(make_run: Callable[..., TrainingRun]) -> TrainingRun:
    return make_run()


@pytest.fixture
def source(tmp_path: Path) -> RunDir:
    """A run that was stopped, with checkpoints at the steps 2, 4 and 10."""
    made = RunDir(tmp_path / "source")
    for step in (2, 4, 10):
        path = made.checkpoints / f"step-{step}"
        path.mkdir(parents=True)
        (path / "weights").write_bytes(bytes([step]) * 1000)
        sizes, checksums = describe_files(path)
        state = CheckpointState(step=step, files=sizes, checksums=checksums)
        (path / "state.json").write_text(state.model_dump_json())
    made.write_exit(ExitRecord(status="stopped", code=3, step=10))
    return made


@pytest.fixture
def target(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "target")


def test_the_newest_whole_one_is_taken(run: TrainingRun, source: RunDir, target: RunDir) -> None:
    """What is newer and damaged stays behind, and the new run's log tells of it."""
    (source.checkpoints / "step-10" / "weights").write_bytes(b"x" * 1000)
    (source.checkpoints / "step-4" / "weights").unlink()
    assert copy_checkpoint(run, source, target, None) == 2
    intact, damaged = find_newest(target)
    assert intact is not None
    assert (intact.state.step, damaged) == (2, ())
    said = [event.message for event, _ in target.read_events()]
    assert [text.partition(":")[0] for text in said] == [
        "Checkpoint step-10 is damaged",
        "Checkpoint step-4 is damaged",
    ]
    assert len(list(source.checkpoints.iterdir())) == 3, "the old run is left as it is"


def test_the_best_one_is_taken_as_well(
    make_run: Callable[..., TrainingRun], source: RunDir, target: RunDir
) -> None:
    """Where it is to be the result, also of the run that continues."""
    for path, state in source.read_checkpoints():
        measured = state.model_copy(update={"metrics": {"valid_loss": abs(state.step - 4.0)}})
        (path / "state.json").write_text(measured.model_dump_json())
    run = make_run(result={"checkpoint": "best"})
    assert copy_checkpoint(run, source, target, None) == 10
    assert [state.step for _, state in target.read_checkpoints()] == [4, 10]
    newer = RunDir(target.path.with_name("newer"))
    assert copy_checkpoint(run, source, newer, "2") == 2, "what came later does not count"
    assert [state.step for _, state in newer.read_checkpoints()] == [2]


@pytest.mark.parametrize("requested", [None, "4"])
def test_encoded_rows_are_taken_along(
    run: TrainingRun, source: RunDir, target: RunDir, requested: str | None
) -> None:
    """As links, so that they take no space and each run can be deleted; for the owner only."""
    stored = source.tokens / "train-0" / "ids.bin"
    stored.parent.mkdir(parents=True)
    stored.write_bytes(b"ids")
    copy_checkpoint(run, source, target, requested)
    copied = target.tokens / "train-0" / "ids.bin"
    assert copied.stat().st_ino == stored.stat().st_ino
    assert target.path.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(source.path)
    assert copied.read_bytes() == b"ids"


def test_a_damaged_one_is_not_taken_by_name(
    run: TrainingRun, source: RunDir, target: RunDir
) -> None:
    """It was asked for, so no other is taken in its place."""
    (source.checkpoints / "step-4" / "weights").write_bytes(b"x" * 1000)
    with pytest.raises(ConfigError) as told:
        copy_checkpoint(run, source, target, "step-4")
    assert "has changed since it was written" in told.value.issues[0].message
    assert copy_checkpoint(run, source, target, "2") == 2
    with pytest.raises(ConfigError) as told:
        copy_checkpoint(run, source, target, "3")
    assert told.value.issues[0].fix == "available: 2, 4, 10"


def test_without_any_it_begins_anew(run: TrainingRun, source: RunDir, target: RunDir) -> None:
    """A run whose checkpoints are all gone is trained from the beginning."""
    for path in source.checkpoints.iterdir():
        (path / "state.json").unlink()
    assert copy_checkpoint(run, source, target, None) == 0
    assert len(target.read_events()) == 3


def test_a_run_that_goes_on_is_left_alone(
    run: TrainingRun, tmp_path: Path, source: RunDir, target: RunDir
) -> None:
    """It would write its checkpoints while they are copied."""
    source.exit.unlink()
    source.spec.touch()
    with pytest.raises(DuplicateRun):
        copy_checkpoint(run, source, target, None)
