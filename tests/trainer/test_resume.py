"""Interrupted anywhere and continued, a run is the one that was never interrupted."""

import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.effort import is_thorough
from tests.forking import Trainer
from tests.trainer.continuing import (
    before_its_end,
    hashes,
    last_step,
    rows_by_step,
    train_to_continue,
)
from tests.trainer.plain import save_tiny
from tests.waiting import wait_until
from training_backends.rundir.directory import CheckpointState, RunDir, TrainerExitCode
from training_backends.trainer.checkpoint import newest_checkpoint, write_checkpoint
from training_backends.trainer.errors import TrainerError
from training_backends.trainer.process import train

pytestmark = pytest.mark.engine

MakeRun = Callable[..., RunDir]
Uninterrupted = tuple[RunDir, Callable[[Path], RunDir]]

KILLS = 10 if is_thorough() else 3
STEPS = 8 + 4 * KILLS
EVERY = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory to put adapters on."""
    return save_tiny(tmp_path_factory.mktemp("base"))


def changes_for(kind: str, base: Path) -> dict[str, Any]:
    """Say what to train."""
    length = {"training_steps": STEPS, "checkpoint_every": EVERY, "batch_size": 2}
    if kind == "full":
        return length
    tuning = {"kind": "lora", "rank": 4, "dropout": 0.2}
    return {**length, "model": str(base), "tuning": tuning}


@pytest.fixture(scope="module")
def uninterrupted(
    request: pytest.FixtureRequest,
    make_run: MakeRun,
    base: Path,
    trainer: Trainer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Uninterrupted:
    """A run from beginning to end, fully tuned or with dropout, and how to begin another."""
    changes = changes_for(request.param, base)
    run = make_run(tmp_path_factory.mktemp("runs") / "whole", **changes)
    trainer.start(run)
    assert trainer.end() == TrainerExitCode.DONE
    return run, lambda path: make_run(path, **changes)


def test_a_suspended_run_continues_in_place(
    make_run: MakeRun, trainer: Trainer, tmp_path: Path
) -> None:
    """Like a queued run whose process has died: without an end, from its checkpoint."""
    run = make_run(tmp_path / "r", training_steps=12, checkpoint_every=100)
    pid = trainer.start(run)
    wait_until(lambda: run.is_active() and last_step(run) >= 2)
    run.request_suspension()
    os.kill(pid, signal.SIGTERM)
    assert trainer.end() == TrainerExitCode.STOPPED
    ((_, state),) = run.read_checkpoints()
    assert run.read_exit() is None
    assert not run.stop.exists()
    last = run.read_events()[-1][0]
    assert (last.data["status"], last.data["step"]) == ("queued", state.step)
    trainer.start(run)
    assert trainer.end() == TrainerExitCode.DONE
    said = [event.message for event, _ in run.read_events()]
    assert any(text.startswith(f"Resuming at step {state.step}") for text in said)
    assert [*rows_by_step(run)] == [*range(1, 13)]


@pytest.mark.parametrize(
    ("uninterrupted", "number"),
    product(("full", "lora"), (signal.SIGKILL, signal.SIGTERM))
    if is_thorough()
    else [("full", signal.SIGTERM), ("lora", signal.SIGKILL)],
    indirect=["uninterrupted"],
)
def test_interrupted_at_random_steps_every_number_is_the_same(
    uninterrupted: Uninterrupted,
    number: signal.Signals,
    trainer: Trainer,
    tmp_path: Path,
) -> None:
    """Losses and gradient norms to the last digit, each time a step is done, and the weights."""
    whole, begin = uninterrupted
    run = begin(tmp_path / "r")
    for step in sorted(random.Random(f"{number}").sample(range(1, STEPS - 8), KILLS)):
        pid = trainer.start(run)
        wait_until(lambda step=step: run.is_active() and step <= last_step(run))
        os.kill(pid, number)
        code = trainer.end()
        reached = last_step(run)
        kept = max((state.step for _, state in run.read_checkpoints()), default=0)
        if number is signal.SIGKILL:
            assert code == -signal.SIGKILL
            assert run.read_exit() is None
            assert reached - kept <= EVERY
        else:
            assert code == TrainerExitCode.STOPPED
            assert kept == reached
    trainer.start(run)
    assert trainer.end() == TrainerExitCode.DONE
    assert rows_by_step(run) == rows_by_step(whole)
    assert hashes(run) == hashes(whole)
    assert len(run.read_checkpoints()) == 3
    assert not list(run.checkpoints.glob(".*"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [
        (truncate, "__0_0.distcp", "bytes, expected"),
        (flip, "__0_0.distcp", "has changed since"),
        (Path.unlink, ".metadata", "cannot be read"),
        (flip, "engine.json", "has changed since"),
        (truncate, "state.json", "state.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    trained: RunDir, tmp_path: Path, damage: Callable[[Path], object], name: str, said: str
) -> None:
    """The one before is taken and the damage is told; it is set aside, not counted as kept."""
    run = RunDir(shutil.copytree(trained.path, tmp_path / "r"))
    damage(run.checkpoints / "step-6" / name)
    found = newest_checkpoint(run)
    assert found is not None
    assert found.state.step == 4
    (event,) = [e for e, _ in run.read_events() if e.level == "warning"]
    assert "step-6 is damaged" in event.message
    assert said in event.message
    assert "Resuming from step-4" in event.message
    again = newest_checkpoint(run)
    assert again is not None
    assert again.state.step == 4
    assert [state.step for _, state in run.read_checkpoints()] == [2, 4]


@pytest.fixture(scope="module")
def trained(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with checkpoints at the steps 2, 4 and 6."""
    path = tmp_path_factory.mktemp("trained") / "r"
    run = make_run(path, training_steps=6, checkpoint_every=2, validation=[])
    assert train_to_continue(run) is TrainerExitCode.DONE
    return run


def test_behind_damage_the_run_is_the_same(trained: RunDir, tmp_path: Path) -> None:
    """Every checkpoint but the oldest is damaged: it goes on from that, to the same weights.

    A line of metrics that a crash tore does not count.
    """
    run = before_its_end(trained, tmp_path / "r")
    with run.metrics.open("ab") as file:
        file.write(b'{"step": 5, "trai')
    flip(run.checkpoints / "step-6" / "__0_0.distcp")
    flip(run.checkpoints / "step-4" / ".metadata")
    assert train(run.path) is TrainerExitCode.DONE
    assert rows_by_step(run) == rows_by_step(trained)
    assert hashes(run) == hashes(trained)
    assert [state.step for _, state in run.read_checkpoints()] == [2, 4, 6]
    assert not list(run.checkpoints.glob(".*")), "what was set aside has been made anew"


def test_a_checkpoint_of_an_earlier_version_is_not_resumed_from(
    trained: RunDir, tmp_path: Path
) -> None:
    """The failure names the checkpoint and says what to do."""
    run = before_its_end(trained, tmp_path / "r")
    checkpoint = run.checkpoints / "step-6"
    (checkpoint / ".metadata").rename(checkpoint / "model.safetensors")
    state = json.loads((checkpoint / "state.json").read_bytes())
    for numbers in (state["files"], state["checksums"]):
        numbers["model.safetensors"] = numbers.pop(".metadata")
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert train(run.path) is TrainerExitCode.BAD_INPUT
    record = run.read_exit()
    assert record is not None
    assert record.failure is not None
    assert "step-6 was saved by an earlier version" in record.failure.message


def put(size: int) -> Callable[[Path], None]:
    """Return what writes a checkpoint of one file."""

    def fill(directory: Path) -> None:
        (directory / "weights").write_bytes(b"w" * size)

    return fill


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Have the system refuse to write files beyond a size, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def saved(run: RunDir, step: int, fill: Callable[[Path], None], keep: int = 3) -> Path:
    return write_checkpoint(run, step, fill, metrics={}, scheduled=True, keep=keep)


def test_a_checkpoint_that_cannot_be_written_leaves_the_former_one(tmp_path: Path) -> None:
    """It says so, and takes none of the room that is missing."""
    run = RunDir(tmp_path)
    saved(run, 1, put(1000))
    with (
        largest_file(10_000),
        pytest.raises(TrainerError, match="Cannot write the checkpoint at step 2") as told,
    ):
        saved(run, 2, put(20_000))
    assert told.value.failure.retryable
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-1"]
    found = newest_checkpoint(run)
    assert found is not None
    assert found.state.step == 1


def test_a_run_without_room_fails_and_goes_on_later(
    trained: RunDir, make_run: MakeRun, tmp_path: Path
) -> None:
    """Torch's own writers are refused too; with room again, the end is the same."""
    run = make_run(tmp_path / "r", training_steps=6, checkpoint_every=2, validation=[])
    with largest_file(5_000_000):
        assert train(run.path) is TrainerExitCode.CRASHED
    record = run.read_exit()
    assert record is not None
    assert record.failure is not None
    assert (record.failure.kind, record.failure.retryable) == ("internal", True)
    assert "free some space" in record.failure.message
    assert run.read_checkpoints() == []
    assert train(run.path) is TrainerExitCode.DONE
    assert hashes(run) == hashes(trained)


@pytest.mark.parametrize("keep", [1, 2])
def test_as_many_are_kept_as_is_said(tmp_path: Path, keep: int) -> None:
    """The newest ones, whatever a crash has left between them."""
    run = RunDir(tmp_path)
    for step in range(1, 5):
        run.checkpoints.mkdir(exist_ok=True)
        (run.checkpoints / f".step-{step - 1}.tmp").mkdir()
        saved(run, step, put(10), keep=keep)
    expected = list(range(5 - keep, 5))
    assert [state.step for _, state in run.read_checkpoints()] == expected
    assert len(list(run.checkpoints.iterdir())) == keep


def test_a_checkpoint_of_before_there_were_checksums_is_taken(tmp_path: Path) -> None:
    """Its sizes are all that there is to go by."""
    run = RunDir(tmp_path)
    path = saved(run, 1, put(10)) / "state.json"
    state = CheckpointState.model_validate_json(path.read_bytes())
    path.write_text(state.model_dump_json(exclude={"checksums"}))
    assert newest_checkpoint(run) is not None


def test_files_in_folders_count_too(tmp_path: Path) -> None:
    """A model in parts may lie in folders of its own."""

    def fill(directory: Path) -> None:
        (directory / "rank-0").mkdir()
        (directory / "rank-0" / "part").write_bytes(b"part")

    run = RunDir(tmp_path)
    path = saved(run, 1, fill)
    assert newest_checkpoint(run) is not None
    (path / "rank-0" / "part").write_bytes(b"trap")
    assert newest_checkpoint(run) is None
