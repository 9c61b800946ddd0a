"""Starting runs and following them: what is printed where, exit codes and Ctrl-C."""

import json
import os
import pty
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import read_until
from tests.forking import Program
from tests.plugins import Install

Run = Any

PLUGIN = '''
import os
from pathlib import Path
from training_backends import Checkpoint, LogRecord, Observation, RunState, TrainingStatus
from training_backends.core.run import utc_now
from training_backends.testing.backend import ScriptedBackend


class Plugin(ScriptedBackend):
    """Each observation is one step; the fourth ends the run, unless HOLD is set."""

    name = "steps"

    async def observe(self, run, *, after=None):
        path = Path(os.environ["TRAINING_BACKENDS_HOME"]) / f"{run.id}.steps"
        step = min(int(path.read_text()) + 1 if path.exists() else 1, 4)
        path.write_text(str(step))
        ended = step == 4 and "HOLD" not in os.environ
        status = TrainingStatus(os.environ.get("END", "completed") if ended else "running")
        losses = {"train_loss": 2 / step}
        record = LogRecord(
            at=utc_now(), message=f"step {step}", source="metrics", step=step, fields=losses,
            cursor=str(step),
        )
        state = RunState(
            status=status, step=step, total_steps=4, metrics=losses,
            checkpoints=(Checkpoint(step=2, at=utc_now(), metrics={"train_loss": 1.5}),),
        )
        return Observation(state, (record,), str(step))
'''


@pytest.fixture(autouse=True)
def config(install: Install, tmp_path: Path, train_file: Path) -> None:
    """Write a configuration for a backend whose runs progress each time they are observed."""
    install("steps_plugin", "steps", PLUGIN)
    (tmp_path / "run.yaml").write_text(
        f"backend: steps\nmodel: tiny-mistral\ndata:\n  train: {train_file.name}\n"
    )


def test_launch_prints_the_id_and_the_next_commands(run: Run) -> None:
    """The id alone is the result on standard output; the commands are for people."""
    launched = run("launch", "run.yaml", "--id=mine")
    quiet = run("launch", "run.yaml", "--id=other", "--quiet")
    document = run("launch", "run.yaml", "--id=third", "--json")
    assert (launched.code, launched.out) == (0, "mine\n")
    assert "Run mine on steps" in launched.err
    for arguments in ("logs mine --follow", "status mine", "stop mine"):
        assert arguments in launched.err
    assert (quiet.out, quiet.err) == ("other\n", "")
    assert (document.document["id"], document.err) == ("third", "")


@pytest.mark.parametrize(("end", "code"), [("completed", 0), ("failed", 10), ("cancelled", 11)])
def test_a_launch_is_followed_to_its_end(run: Run, end: str, code: int) -> None:
    """The log goes to standard output, all else to standard error."""
    done = run("launch", "run.yaml", "--id=mine", "--follow", END=end)
    assert done.code == code
    assert [f"step {step}" in done.out for step in (1, 2, 3, 4)] == [True] * 4
    assert "stop mine" in done.err
    assert "stop mine" not in done.out


def test_a_resumed_run_is_followed_too(run: Run) -> None:
    """The new id is printed; with --json, one document of the finished run."""
    assert run("launch", "run.yaml", "--id=mine", "--follow", "--quiet", END="failed").code == 10
    resumed = run("resume", "mine", "--id=again", "--follow", "--json")
    assert (resumed.code, resumed.document["status"]) == (0, "completed")
    assert (resumed.document["id"], resumed.document["resumed_from"]) == ("again", "mine")
    assert run("resume", "mine", "--id=third", "--quiet").out == "third\n"


@pytest.mark.parametrize(("end", "code"), [("completed", 0), ("failed", 10), ("cancelled", 11)])
def test_wait_reports_progress_on_standard_error(run: Run, end: str, code: int) -> None:
    """One line for each change; the result is on standard output."""
    run("launch", "run.yaml", "--id=mine", END=end)
    waited = run("wait", "mine", END=end)
    assert waited.code == code
    first, *_, last = waited.err.splitlines()
    assert first.startswith("mine  running")
    assert last == f"mine  {end}, step 4/4, loss 0.5"
    assert end in waited.out


def test_a_wait_that_times_out_says_how_many_runs_remain(run: Run) -> None:
    """Exit code 124."""
    run("launch", "run.yaml", "--id=mine", HOLD="1")
    waited = run("wait", "mine", "--timeout=0.1", "--json", HOLD="1")
    assert (waited.code, waited.document["error"]["exit_code"]) == (124, 124)
    assert "Timed out after 0.1 s; 1 run is still in progress." in waited.err


def test_status_is_watched_until_the_run_has_finished(run: Run) -> None:
    """A line or a JSON line for each change; exit codes are those of `wait`."""
    run("launch", "run.yaml", "--id=mine")
    watched = run("status", "mine", "--watch", "--json", END="failed")
    states = [json.loads(line) for line in watched.out.splitlines()]
    assert watched.code == 10
    assert states[-1]["status"] == "failed"
    assert len({json.dumps(state) for state in states}) == len(states)
    assert run("status", "mine", "--watch").out == "mine  failed, step 4/4, loss 0.5\n"
    assert run("status", "mine", "--watch", "--cached").code == 2


def test_logs_show_the_last_records(run: Run) -> None:
    """`--tail` counts from the end of the log."""
    run("launch", "run.yaml", "--id=mine", "--follow")
    tail = run("logs", "mine", "--tail=2", "--json")
    messages = [json.loads(line)["message"] for line in tail.out.splitlines()]
    assert messages == ["step 4", "completed"]
    assert run("logs", "mine", "--tail=1", "--after=1").code == 2


def test_checkpoints_are_listed_with_the_id_that_resume_takes(run: Run) -> None:
    """A run without any says so."""
    run("launch", "run.yaml", "--id=mine")
    assert "no checkpoints yet" in run("checkpoints", "mine", "--cached").err
    (found,) = run("checkpoints", "mine", "--json").document
    assert (found["id"], found["step"], found["metrics"]) == ("2", 2, {"train_loss": 1.5})
    assert "train_loss 1.5" in run("checkpoints", "mine").out


def test_a_terminal_shows_the_status_until_the_run_has_finished(
    run: Run, tmp_path: Path, program: Program
) -> None:
    """The view is redrawn in place and ends by itself."""
    run("launch", "run.yaml", "--id=mine")
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [*program.command, "status", "mine", "--watch"],
        stdout=theirs,
        stderr=theirs,
        cwd=tmp_path,
    )
    os.close(theirs)
    try:
        shown = read_until(terminal, "4/4")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert "running" in shown
    assert "\x1b[2K" in shown


@contextmanager
def started(
    program: Program, directory: Path, *arguments: str
) -> "Iterator[subprocess.Popen[str]]":
    """Start a command whose runs do not end."""
    process = subprocess.Popen(
        [*program.command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "command",
    [
        ("launch", "run.yaml", "--id=mine", "--follow"),
        ("logs", "mine", "--follow"),
        ("wait", "mine"),
    ],
)
def test_ctrl_c_says_how_to_follow_and_stop(
    run: Run,
    tmp_path: Path,
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
    command: Sequence[str],
) -> None:
    """Exit code 130; the run keeps running."""
    monkeypatch.setenv("HOLD", "1")
    if command[0] != "launch":
        run("launch", "run.yaml", "--id=mine")
    with started(program, tmp_path, *command) as process:
        stream = process.stderr if command[0] == "wait" else process.stdout
        assert stream is not None
        stream.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run mine keeps running" in errors
    assert "logs mine --follow" in errors
    assert "stop mine" in errors
    assert run("status", "mine", "--json").document["status"] == "running"


def test_a_list_is_watched_until_ctrl_c(run: Run, tmp_path: Path, program: Program) -> None:
    """Each run and each change is a JSON line."""
    run("launch", "run.yaml", "--id=mine")
    with started(program, tmp_path, "list", "--watch", "--json") as process:
        assert process.stdout is not None
        seen = [json.loads(process.stdout.readline())]
        while seen[-1]["status"] != "completed":
            seen.append(json.loads(process.stdout.readline()))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert {each["id"] for each in seen} == {"mine"}
