"""Commands: what they get, what is said of them, and how they end."""

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import until
from training_backends import (
    AsyncTrainingClient,
    Dataset,
    DuplicateRun,
    TrainingConfig,
    TrainingRun,
    TrainingStatus,
    UnsupportedOperation,
)
from training_backends.backends.command.backend import CommandBackend
from training_backends.backends.command.state import CommandDir
from training_backends.core.run import Observation
from training_backends.testing.journal import MemoryJournal

pytestmark = pytest.mark.anyio
MakeRun = Callable[..., TrainingRun]
WAITING = 'mkfifo "$RUN_DIR/end"; read _ < "$RUN_DIR/end"'
"""Shell commands that wait until somebody opens and closes the pipe `end`."""


@pytest.fixture
def backend(tmp_path: Path) -> CommandBackend:
    return CommandBackend(tmp_path)


def shell(script: str, *, resources: Any = None, **options: Any) -> TrainingRun:
    """Return the record of a run of a shell script."""
    given = {"command": ["sh", "-c", script], **options}
    config = TrainingConfig.model_validate({"options": given, "resources": resources or {}})
    return TrainingRun(id="r", backend="command", config=config)


async def launched(backend: CommandBackend, run: TrainingRun) -> TrainingRun:
    """Launch a run, and return its record."""
    return run.updated(await backend.launch(run, MemoryJournal(run)))


async def ended(backend: CommandBackend, run: TrainingRun) -> Observation:
    """Wait until a run has finished, and observe it."""
    return await until(lambda: backend.observe(run), lambda seen: seen.state.status.is_terminal)


async def output(backend: CommandBackend, run: TrainingRun) -> list[str]:
    """Return the complete output of a run."""
    await launched(backend, run)
    return [record.message for record in (await ended(backend, run)).records]


async def test_failure_has_the_exit_code_and_the_last_lines(backend: CommandBackend) -> None:
    """Both streams are the log, also a last line without its end; cursors are byte offsets."""
    run = await launched(backend, shell("echo out; echo err >&2; printf last; exit 7"))
    seen = await ended(backend, run)
    assert [(r.message, r.source, r.cursor) for r in seen.records] == [
        ("out", "output", "4"),
        ("err", "output", "8"),
        ("last", "output", "12"),
    ]
    assert seen.state.status is TrainingStatus.FAILED
    assert seen.state.raw_status == "exit code 7"
    assert seen.state.failure is not None
    assert seen.state.failure.kind == "program"
    assert seen.state.failure.message == "exit code 7; last output: out | err | last"


async def test_progress_bar_is_shown_as_in_a_terminal(backend: CommandBackend) -> None:
    """Of a line that was overwritten, the last state counts."""
    assert await output(backend, shell(r"printf '10%%\r100%%\n'")) == ["100%"]


async def test_environment_has_no_secrets(
    backend: CommandBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and settings of the launching process do not reach the command; `env` does."""
    for name in ("MISTRAL_API_KEY", "HF_TOKEN", "TRAINING_BACKENDS_TOGETHER__API_KEY", "OTHER"):
        monkeypatch.setenv(name, "sesame")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    lines = await output(backend, shell("env", env={"MINE": "1"}, resources={"workers": 2}))
    assert not [line for line in lines if "sesame" in line]
    assert {"MINE=1", "RUN_ID=r", "RUN_WORKERS=2"} <= set(lines)
    assert not [line for line in lines if line.startswith(("CUDA", "RUN_CPUS", "RUN_GPUS"))]


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"), [(None, 2, "0,1"), ("4,5,6", 2, "4,5"), (None, 0, "")]
)
async def test_gpus_are_those_that_are_visible(
    backend: CommandBackend,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    gpus: int,
    expected: str,
) -> None:
    """A number of GPUs becomes the first ones that the launching process sees."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    run = shell('echo "$CUDA_VISIBLE_DEVICES"', resources={"gpus": gpus})
    assert await output(backend, run) == [expected]


async def test_stop_kills_what_ignores_it(backend: CommandBackend, tmp_path: Path) -> None:
    """SIGTERM goes to the process group; what remains after `stop_timeout` is killed."""
    script = f"trap '' TERM; echo ready; {WAITING}; sleep 100"
    run = await launched(backend, shell(script, stop_timeout=0.05))
    await until((tmp_path / "commands/r/end").exists)
    await backend.stop(run)
    state = (await ended(backend, run)).state
    assert state.status is TrainingStatus.CANCELLED
    assert state.raw_status == "stopped, killed by SIGKILL"


async def test_command_ends_after_max_duration(backend: CommandBackend) -> None:
    """A time limit is enforced, and is the reason of the failure."""
    limit = timedelta(seconds=0.1)
    run = await launched(backend, shell(WAITING, resources={"max_duration": limit}))
    failure = (await ended(backend, run)).state.failure
    assert failure is not None
    assert failure.kind == "timeout"


async def test_run_without_supervisor_is_lost(backend: CommandBackend, tmp_path: Path) -> None:
    """Without its supervisor the end of a command is unknown; what it still prints is not read."""
    run = await launched(backend, shell(f"{WAITING}; echo late > $RUN_DIR/late"))
    directory = CommandDir(tmp_path / "commands/r")
    await until((directory.path / "end").exists)
    assert directory.signal_process(signal.SIGKILL)
    seen = await ended(backend, run)
    assert seen.state.failure is not None
    assert seen.state.failure.kind == "lost"
    with directory.log.open("a") as log:
        log.write("late\n")
    (directory.path / "end").write_text("\n")
    assert await backend.observe(run, after=seen.cursor) == seen


async def test_command_outlives_its_parent(backend: CommandBackend, tmp_path: Path) -> None:
    """A command has a session of its own, and another process than this one as its parent."""
    run = await launched(backend, shell(f"echo $PPID; {WAITING}"))
    directory = CommandDir(tmp_path / "commands/r")
    pid = directory.active_pid()
    assert pid is not None
    assert os.getsid(pid) != os.getsid(0)
    await until((directory.path / "end").exists)
    (directory.path / "end").write_text("\n")
    assert [r.message for r in (await ended(backend, run)).records] == [str(pid)]


@pytest.mark.parametrize(
    ("options", "code", "field"),
    [
        ({"command": "no-such-program"}, "command_not_found", "options.command"),
        ({"command": "true", "cwd": "/no/such/place"}, "no_directory", "options.cwd"),
        ({"command": "true", "env": {"MY_API_KEY": "x"}}, "secret_in_options", "options.env"),
    ],
)
async def test_validate_names_what_cannot_work(
    backend: CommandBackend, options: dict[str, Any], code: str, field: str
) -> None:
    """An option that would fail the run, or store a secret, is an error."""
    report = await backend.validate(TrainingConfig(options=options), Dataset(files=()))
    assert [(issue.code, issue.field) for issue in report.issues] == [(code, field)]


async def test_too_few_visible_gpus_are_an_issue(
    backend: CommandBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No command gets fewer GPUs than were asked for."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    config = shell("true", resources={"gpus": 2}).config
    report = await backend.validate(config, Dataset(files=()))
    assert [issue.code for issue in report.issues] == ["too_few_gpus"]


async def test_id_of_another_run_is_not_reused(backend: CommandBackend) -> None:
    """The directory of a run of another store is left alone."""
    await ended(backend, await launched(backend, shell("echo one")))
    run = shell("echo two")
    with pytest.raises(DuplicateRun):
        await backend.launch(run, MemoryJournal(run))
    assert [r.message for r in (await backend.observe(run)).records] == ["one"]


async def test_only_finished_runs_are_deleted(backend: CommandBackend, tmp_path: Path) -> None:
    """Deleting removes the directory, once nothing runs in it."""
    run = await launched(backend, shell(WAITING))
    with pytest.raises(UnsupportedOperation):
        await backend.delete(run)
    await backend.stop(run)
    await ended(backend, run)
    await backend.delete(run)
    assert not (tmp_path / "commands/r").exists()


async def test_client_runs_a_command_over_any_data(tmp_path: Path) -> None:
    """Neither model nor method is needed, and data may be a directory or a file of any content.

    The working directory is relative to the configuration file.
    """
    table = tmp_path / "table.csv"
    table.write_text("a;b\n")
    config = tmp_path / "run.yaml"
    config.write_text("data: {train: [table.csv, .]}\noptions: {command: cat table.csv, cwd: .}\n")
    home = tmp_path / "home"
    backend = CommandBackend(home)
    async with AsyncTrainingClient(home=home, backends={"command": backend}) as client:
        await client.launch(config, backend="command", run_id="r")
        [run] = await client.wait("r")
        log = [record.message async for record in client.logs("r")]
    assert run.status is TrainingStatus.COMPLETED
    assert "a;b" in log


async def test_a_long_output_is_read_in_parts(backend: CommandBackend) -> None:
    """Each observation returns a bounded number of lines, and says whether there are more."""
    run = await launched(backend, shell("seq 12000"))
    parts = [await ended(backend, run)]
    while parts[-1].more:
        parts.append(await backend.observe(run, after=parts[-1].cursor))
    assert [len(part.records) for part in parts] == [5000, 5000, 2000]
    lines = [record.message for part in parts for record in part.records]
    assert lines == [str(number + 1) for number in range(12000)]
