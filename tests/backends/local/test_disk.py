"""The local backend on a disk that is full, or that has been moved; nothing is trained."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from training_backends.backends.local.backend import LocalBackend
from training_backends.backends.local.spec import build_spec
from training_backends.core.errors import StoreError, TrainingBackendError
from training_backends.core.run import TrainingRun
from training_backends.rundir.directory import ExitRecord, ResultRecord, RunDir
from training_backends.testing.journal import MemoryJournal

pytestmark = pytest.mark.anyio

MakeRun = Callable[..., TrainingRun]

HOLDER = """
import signal, sys
from pathlib import Path
from training_backends.core.files import hold_lock
with hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


def full(*_: object, **__: object) -> NoReturn:
    """Do what a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def prepared(home: Path, run: TrainingRun) -> RunDir:
    """Write what a launch writes before it starts a process."""
    directory = RunDir(home / "runs" / run.id)
    directory.write_spec(build_spec(run.id, run.config, home / "slots"))
    return directory


def completed(home: Path, run: TrainingRun) -> RunDir:
    """Write what a finished run leaves."""
    directory = prepared(home, run)
    directory.result.mkdir()
    (directory.result / "config.json").write_text("{}")
    result = ResultRecord(path="result", format="full", base_model="tiny-mistral")
    directory.write_exit(ExitRecord(status="completed", code=0, result=result))
    return directory


@pytest.fixture
def training(home: Path, make_run: MakeRun) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that lives in the directory of the run `r`, as one that trains does."""
    lock = prepared(home, make_run()).lock
    command = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


async def test_a_full_disk_is_said_at_the_start(
    backend: LocalBackend, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a sentence and a way on, and the same launch works once there is space."""
    run = make_run()
    monkeypatch.setattr(RunDir, "write_spec", full)
    with pytest.raises(StoreError, match="No space left") as caught:
        await backend.launch(run, MemoryJournal(run))
    assert (caught.value.run_id, "space" in str(caught.value.hint)) == ("r", True)


async def test_a_disk_with_hardly_any_space_is_full(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch, make_run: MakeRun
) -> None:
    """The training process could not write why it failed, so it is not started."""
    run = make_run()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StoreError, match="less than 32 MiB"):
        await backend.launch(run, MemoryJournal(run))


async def test_a_full_disk_keeps_no_run_going(
    backend: LocalBackend,
    make_run: MakeRun,
    training: "subprocess.Popen[bytes]",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The request cannot be written down, so the process is told by a signal only."""
    monkeypatch.setattr(RunDir, "request_stop", full)
    await backend.stop(make_run())
    assert training.wait(10) == -signal.SIGTERM


async def test_a_full_disk_leaves_no_part_of_a_model(
    backend: LocalBackend,
    home: Path,
    make_run: MakeRun,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was copied so far would take the space that is missing."""
    run = make_run()
    completed(home, run)
    target = tmp_path_factory.mktemp("elsewhere") / "model"
    monkeypatch.setattr("shutil.copy2", full)
    with pytest.raises(TrainingBackendError, match="No space left"):
        await backend.download(run, target)
    assert list(target.parent.iterdir()) == []


async def test_a_run_is_the_same_after_all_state_was_moved(
    home: Path, make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A repeated launch finds it, and its model, at the new place."""
    run = make_run()
    completed(home, run)
    moved = tmp_path_factory.mktemp("elsewhere") / "home"
    home.rename(moved)
    found = await LocalBackend(moved).launch(run, MemoryJournal(run))
    assert found.result_model == str(moved / "runs" / run.id / "result")
