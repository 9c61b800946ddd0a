"""The local backend with real training processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from tests.backends.local.conftest import is_over, until_state
from tests.forking import Trainer
from training_backends.backends.local.backend import LocalBackend
from training_backends.core.errors import (
    ConfigError,
    DuplicateRun,
    RunNotFound,
    UnsupportedOperation,
)
from training_backends.core.run import LogRecord, TrainingRun
from training_backends.core.status import TrainingStatus
from training_backends.rundir.directory import RunDir
from training_backends.testing.journal import MemoryJournal

pytestmark = [pytest.mark.anyio, pytest.mark.engine]

MakeRun = Callable[..., TrainingRun]

CHILD = (sys.executable, str(Path(__file__).with_name("child.py")))

PARENT = """
import anyio, os, signal, sys
from pathlib import Path
from training_backends.backends.local.backend import LocalBackend
from training_backends.core.run import TrainingRun

class Journal:
    async def step(self, name, do, find=None, *, repeatable=False): return await do()
    async def record(self, state): pass

run = TrainingRun.model_validate_json(sys.argv[2])
backend = LocalBackend(Path(sys.argv[1]), program=sys.argv[3:])
anyio.run(backend.launch, run, Journal())
os.kill(os.getpid(), signal.SIGKILL)
"""


async def collect(
    backend: LocalBackend, run: TrainingRun, after: str | None = None, *, follow: bool = False
) -> list[LogRecord]:
    """Read a run's log."""
    async with aclosing(backend.logs(run, after=after, follow=follow)) as records:
        return [record async for record in records]


@pytest.fixture(scope="module")
def finished(
    make_run: MakeRun, trainer: Trainer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LocalBackend, TrainingRun, list[LogRecord]]:
    """A completed run, and its log as it was followed live."""
    backend = LocalBackend(tmp_path_factory.mktemp("home"), program=trainer.program)
    run = make_run(options={"device": "cpu", "sample_prompt": "3 plus 3?"})

    async def live() -> list[LogRecord]:
        journal = MemoryJournal(run)
        await backend.launch(run, journal)
        assert [state.remote_id for state in journal.states] == [run.id]
        return await collect(backend, run, follow=True)

    return backend, run, anyio.run(live)


Finished = tuple[LocalBackend, TrainingRun, list[LogRecord]]


async def test_a_finished_run_works_without_its_checkpoints_and_log(
    finished: Finished, tmp_path: Path
) -> None:
    """Its model stays, and what is known of it; a repetition changes nothing."""
    first, run, _ = finished
    shutil.copytree(first._home, tmp_path / "home")
    backend = LocalBackend(tmp_path / "home", program=[])
    before = await backend.status(run)
    seen = await backend.observe(run)
    for _ in range(2):
        await backend.remove_checkpoints(run, [10])
        await backend.remove_log(run)
    now = await backend.status(run)
    assert [c.path is None for c in now.checkpoints or ()] == [True, False]
    assert (now.status, now.result_model) == (before.status, before.result_model)
    assert not (await backend.observe(run, after=seen.cursor)).records
    left = {path.name for path in (tmp_path / "home" / "runs" / run.id).iterdir()}
    assert not left & {"log.txt", "trackers.txt", "metrics.jsonl"}
    assert (await backend.download(run, tmp_path / "model") / "config.json").is_file()
    with pytest.raises(ConfigError, match="no checkpoint"):
        await backend.download_checkpoint(run, "step-10", tmp_path / "point")
    await backend.delete(run)


async def test_a_run_completes_with_its_result_and_checkpoints(finished: Finished) -> None:
    """The state of a finished run says everything that is to be known of it."""
    backend, run, _ = finished
    state = await backend.status(run)
    assert state.status is TrainingStatus.COMPLETED
    assert (state.step, state.total_steps) == (20, 20)
    assert state.result_model is not None
    assert (Path(state.result_model) / "config.json").is_file()
    assert state.started_at is not None
    assert state.finished_at is not None
    assert state.started_at < state.finished_at
    assert state.metrics is not None
    assert {"train_loss", "learning_rate", "valid_loss", "tokens"} <= set(state.metrics)
    assert state.checkpoints is not None
    assert [c.step for c in state.checkpoints] == [10, 20]
    losses = [c.metrics["train_loss"] for c in state.checkpoints]
    assert losses[-1] < losses[0]
    assert all(c.path is not None for c in state.checkpoints)


async def test_a_followed_log_is_whole_and_in_order(finished: Finished) -> None:
    """Followed live, the log holds what a later reading holds, and ends with the end."""
    backend, run, live = finished
    assert await collect(backend, run) == live
    times = [r.at for r in live if r.at]
    assert len(times) == len(live)
    assert times == sorted(times)
    statuses = [r.fields["status"] for r in live if r.source == "status"]
    assert statuses == ["initializing", "running", "completed"]
    assert [r.step for r in live if r.source == "metrics"] == list(range(1, 21))
    assert len([r for r in live if r.source == "checkpoint"]) == 2
    assert [r.fields["stage"] for r in live if r.source == "output"] == ["before", "after"]


async def test_every_measure_of_a_step_is_told_once(finished: Finished) -> None:
    """A tracker fed from the log gets one point a step, and a checkpoint tells the same loss."""
    _, _, live = finished
    points = [
        (record.step, name)
        for record in live
        if record.source in {"metrics", "checkpoint"}
        for name, value in record.fields.items()
        if isinstance(value, float)
    ]
    assert len(points) == len(set(points))
    losses = {r.step: r.fields["train_loss"] for r in live if r.source == "metrics"}
    told = {r.step: r.fields["metrics"] for r in live if r.source == "checkpoint"}
    assert {step: each["train_loss"] for step, each in told.items()} == {
        step: losses[step] for step in (10, 20)
    }
    assert told[20]["mean_train_loss"] == pytest.approx(
        sum(losses[step] for step in range(11, 21)) / 10
    )


async def test_a_log_goes_on_behind_any_cursor(finished: Finished) -> None:
    """Each record's cursor gives exactly the records behind it."""
    backend, run, live = finished
    for index in range(0, len(live), 7):
        assert await collect(backend, run, live[index].cursor) == live[index + 1 :]
    with pytest.raises(ConfigError, match="Invalid log cursor"):
        await collect(backend, run, "nonsense")


async def test_a_result_is_copied_whole_or_not_at_all(finished: Finished, tmp_path: Path) -> None:
    """A new or an empty directory gets the model, any other is left alone."""
    backend, run, _ = finished
    target = await backend.download(run, tmp_path / "deep" / "model")
    assert json.loads((target / "config.json").read_text())["model_type"] == "mistral"
    with pytest.raises(ConfigError, match="not empty"):
        await backend.download(run, target)


async def test_an_estimate_counts_exactly_and_learns_the_speed(
    finished: Finished, inspected: Callable[..., Any]
) -> None:
    """Steps and tokens are those of the run; its speed gives the next one's duration."""
    backend, run, live = finished
    estimate = await backend.estimate(run.config, inspected(run))
    assert estimate.steps == 20
    assert estimate.data_tokens is not None
    read = next(r.fields["tokens"] for r in reversed(live) if r.source == "metrics")
    assert estimate.data_tokens * 2 == read, "twenty steps of four are two epochs of forty"
    assert estimate.train_tokens == read
    assert estimate.basis == "exact"
    assert estimate.cost is not None
    assert estimate.cost.amount == 0
    assert estimate.duration is not None
    assert 0 < estimate.duration.total_seconds() < 60


async def test_the_same_id_is_not_used_twice(finished: Finished, make_run: MakeRun) -> None:
    """A directory that another run left is neither continued nor overwritten."""
    backend, run, _ = finished
    other = make_run(run.id)
    with pytest.raises(DuplicateRun):
        await backend.launch(other, MemoryJournal(other))


async def test_a_stopped_run_is_continued_as_a_new_one(
    quick: LocalBackend, make_run: MakeRun
) -> None:
    """Stop saves what was learnt; resume goes on from there, or from a named checkpoint."""
    steps = {"training_steps": 400, "batch_size": 4, "learning_rate": 3e-3}
    options = {"device": "cpu", "checkpoint_every": 3}
    run = make_run(hyperparameters=steps, options=options)
    await quick.launch(run, MemoryJournal(run))
    await until_state(quick, run, lambda state: (state.step or 0) >= 4)
    early = make_run("early")
    with pytest.raises(DuplicateRun):
        await quick.resume(run, early, MemoryJournal(early))
    with pytest.raises(UnsupportedOperation):
        await quick.delete(run)
    await quick.stop(run)
    await quick.stop(run)
    state = await until_state(quick, run, is_over)
    assert state.status is TrainingStatus.CANCELLED
    assert state.checkpoints is not None
    last = state.checkpoints[-1].step
    assert last == state.step
    assert 4 <= last < 400

    shorter = {**steps, "training_steps": last + 2}
    again = make_run("again", hyperparameters=shorter, options=options)
    with pytest.raises(ConfigError, match="no checkpoint"):
        await quick.resume(run, again, MemoryJournal(again), checkpoint="399")
    await quick.resume(run, again, MemoryJournal(again), checkpoint=f"step-{last}")
    assert (await until_state(quick, again, is_over)).status is TrainingStatus.COMPLETED
    told = await collect(quick, again)
    assert [r.step for r in told if r.source == "metrics"] == [last + 1, last + 2]

    await quick.delete(run)
    with pytest.raises(RunNotFound):
        await quick.status(run)
    assert list(await quick.statuses([run, again])) == ["again"]


async def test_a_run_outlives_its_parent(home: Path, make_run: MakeRun) -> None:
    """A new parent finds the child of one that was killed during the launch."""
    run = make_run()
    parent = await anyio.run_process(
        [sys.executable, "-c", PARENT, str(home), run.model_dump_json(), *CHILD],
        check=False,
        stderr=subprocess.PIPE,
    )
    assert parent.returncode == -signal.SIGKILL, parent.stderr.decode()

    # The journal of the killed parent knows only that the start was begun.
    journal = MemoryJournal(run)
    journal.rows["start"] = None
    backend = LocalBackend(home, program=CHILD)
    await until_state(backend, run, lambda state: state.status is TrainingStatus.RUNNING)
    await backend.launch(run, journal)
    assert json.loads(str(journal.rows["start"])) == {"found": True}
    (home / "runs" / run.id / "finish").touch()
    assert (await until_state(backend, run, is_over)).status is TrainingStatus.COMPLETED


async def test_a_kill_is_seen(quick: LocalBackend, home: Path, make_run: MakeRun) -> None:
    """A killed process is lost, and its run is resumed from its newest checkpoint."""
    steps = {"training_steps": 400, "batch_size": 4}
    run = make_run(hyperparameters=steps, options={"device": "cpu", "checkpoint_every": 2})
    await quick.launch(run, MemoryJournal(run))
    await until_state(quick, run, lambda state: state.checkpoints)
    pid = await to_thread.run_sync(RunDir(home / "runs" / run.id).active_pid)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    state = await until_state(quick, run, is_over)
    assert state.status is TrainingStatus.FAILED
    assert state.failure is not None
    assert (state.failure.kind, state.failure.retryable) == ("lost", True)
    told = await collect(quick, run, follow=True)
    assert told[-1].fields["raw_status"] == "lost"
    assert await collect(quick, run, told[-1].cursor) == []

    assert state.checkpoints is not None
    known = [c.step for c in state.checkpoints if c.path]
    longer = {**steps, "training_steps": max(known) + 1}
    again = make_run("again", hyperparameters=longer)
    await quick.resume(run, again, MemoryJournal(again))
    assert (await until_state(quick, again, is_over)).status is TrainingStatus.COMPLETED


async def test_the_child_gets_no_keys(
    home: Path,
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the parent's environment holds of secrets is not in the child's."""
    monkeypatch.setenv("MISTRAL_API_KEY", "secret-1")
    monkeypatch.setenv("HF_TOKEN", "secret-2")
    run = make_run()
    backend = LocalBackend(home, program=CHILD)
    await backend.launch(run, MemoryJournal(run))
    await until_state(backend, run, lambda state: state.raw_status == "running")
    pid = await to_thread.run_sync(RunDir(home / "runs" / run.id).active_pid)
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"PATH=" in environment
    assert b"secret" not in environment
    assert os.getsid(pid or 0) == pid
    await backend.stop(run, save_checkpoint=False)
    await until_state(backend, run, is_over)


async def test_an_unknown_run_is_said(backend: LocalBackend, make_run: MakeRun) -> None:
    """Every verb about a run that is not here says that it is not."""
    run = make_run("nowhere")
    with pytest.raises(RunNotFound):
        await backend.status(run)
    with pytest.raises(RunNotFound):
        await backend.stop(run)
    with pytest.raises(RunNotFound):
        await collect(backend, run)
    with pytest.raises(RunNotFound):
        await backend.delete(run)


async def test_a_client_alone_needs_no_training_libraries(
    backend: LocalBackend, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missing is optional, until part of it is installed or a run is here."""
    here = "training_backends.backends.local.interpreter.find_spec"
    monkeypatch.setattr(here, lambda name: None if name == "torch" else name)
    partly = await backend.health()
    assert (partly.ok, partly.configured, partly.message) == (False, True, "not installed: torch")
    monkeypatch.setattr(here, lambda _: None)
    health = await backend.health()
    assert (health.ok, health.configured) == (False, False)
    assert health.message.startswith("not installed (optional): torch, ")
    assert "training-backends[local]" in str(health.hint)
    (home / "runs" / "r").mkdir(parents=True)
    assert (await backend.health()).configured


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo no such library >> $0/log.txt; exit 1", "no such library"),
        ("rm $0/log.txt; exit 7", "exit 7"),
    ],
)
async def test_a_process_that_cannot_start_says_why(
    home: Path, make_run: Callable[..., TrainingRun], script: str, reason: str
) -> None:
    """By the last line of its log, if there is one."""
    backend, run = LocalBackend(home, program=("sh", "-c", script)), make_run()
    await backend.launch(run, MemoryJournal(run))
    state = await until_state(backend, run, is_over)
    assert state.failure is not None
    assert state.failure.message == f"The training process could not start: {reason}"
