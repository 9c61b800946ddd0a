"""Checkpoints without their optimizer state, as a completed run keeps them."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from training_backends.rundir.checkpoints import damage_of, describe_files, remove_optimizer_state
from training_backends.rundir.directory import CheckpointState, RunDir

WEIGHTS = "__0_0.distcp"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with two checkpoints that have optimizer state, and one of an earlier version."""
    made = RunDir(tmp_path)
    for step in (1, 2, 3):
        path = made.checkpoints / f"step-{step}"
        files = {WEIGHTS: b"weights"} | ({"optimizer/part": b"moments"} if step > 1 else {})
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        sizes, checksums = describe_files(path)
        state = CheckpointState(step=step, files=sizes, checksums=checksums)
        (path / "state.json").write_text(state.model_dump_json())
    return made


def stored(run: RunDir) -> dict[str, tuple[set[str], dict[str, int]]]:
    """Return the files of each intact checkpoint, and those that its state lists."""
    return {
        path.name: ({each.name for each in path.iterdir()}, state.files)
        for path, state in run.read_checkpoints()
        if damage_of(path) is None
    }


REDUCED = {f"step-{step}": ({WEIGHTS, "state.json"}, {WEIGHTS: 7}) for step in (1, 2, 3)}


def test_only_weights_are_left(run: RunDir) -> None:
    """Each checkpoint stays intact; a repetition changes nothing."""
    untouched = (run.checkpoints / "step-1" / "state.json").stat()
    for _ in range(2):
        remove_optimizer_state(run)
        assert stored(run) == REDUCED
    assert (run.checkpoints / "step-1" / "state.json").stat() == untouched


def fails(*_: object) -> None:
    raise OSError("killed here")


@pytest.mark.parametrize("last", ["write_atomic", "shutil.rmtree"])
def test_a_crash_leaves_intact_checkpoints(
    run: RunDir, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or after the state was written; repeated, it is completed."""
    with monkeypatch.context() as patched:
        patched.setattr(f"training_backends.rundir.checkpoints.{last}", fails)
        with pytest.raises(OSError, match="killed"):
            remove_optimizer_state(run)
    assert stored(run).keys() == REDUCED.keys()
    remove_optimizer_state(run)
    assert stored(run) == REDUCED


def test_a_link_of_another_run_stays_complete(run: RunDir, tmp_path: Path) -> None:
    """A resumed run shares the files of the checkpoint that it continues."""
    ours, theirs = run.checkpoints / "step-3", tmp_path / "other" / "step-3"
    (theirs / "optimizer").mkdir(parents=True)
    for path in ours.rglob("*"):
        if path.is_file():
            os.link(path, theirs / path.relative_to(ours))
    remove_optimizer_state(run)
    assert damage_of(theirs) is None
    assert (theirs / "optimizer" / "part").read_bytes() == b"moments"


def test_a_checkpoint_reduced_while_it_is_verified_is_not_damaged(run: RunDir) -> None:
    """As when a checkpoint is downloaded at the moment at which its run completes."""
    path = run.checkpoints / "step-3"
    weights = path / WEIGHTS
    weights.unlink()
    os.mkfifo(weights)  # its reader waits for a writer
    state = CheckpointState.model_validate_json((path / "state.json").read_bytes())
    state.files[WEIGHTS] = state.checksums[WEIGHTS] = 0
    (path / "state.json").write_text(state.model_dump_json())

    def complete() -> None:
        with weights.open("wb"):
            remove_optimizer_state(run)
            weights.unlink()
            weights.touch()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(complete)
        assert damage_of(path) is None
        done.result()
