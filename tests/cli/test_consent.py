"""What may cost money is launched and resumed only with consent."""

import os
import pty
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import read_until
from tests.commands import Run
from tests.forking import Program
from tests.plugins import Install

PLUGIN = """
import os
from training_backends import Observation, RunState, TrainingStatus
from training_backends.testing.backend import ScriptedBackend


class Plugin(ScriptedBackend):
    name = "unpriced"

    def __init__(self):
        super().__init__()
        self.price = None

    async def observe(self, run, *, after=None):
        return Observation(RunState(status=TrainingStatus(os.environ.get("STATUS", "running"))))

    async def pause(self, run):
        pass

    async def unpause(self, run):
        pass
"""


@pytest.fixture
def config(config_file: Path, install: Install) -> str:
    """Write a configuration for a backend of another package, whose prices are not known."""
    install("unpriced_package", "unpriced", PLUGIN)
    config_file.write_text(config_file.read_text().replace("local", "unpriced"))
    return config_file.name


LIMIT = "--set=budget.max_cost=0.01 USD"


@pytest.mark.parametrize("limit", [(), (LIMIT,)])
def test_an_unknown_price_needs_consent_whatever_the_budget(
    run: Run, config: str, limit: tuple[str, ...]
) -> None:
    """Without a terminal and --yes nothing is launched, and the message names --yes."""
    done = run("launch", config, "--id=mine", *limit)
    assert (done.code, run("list", "--json").document) == (2, [])
    assert "The price of this run is unknown" in done.err
    assert "Invalid value" not in done.err
    assert "--yes" in done.err
    assert ("budget.max_cost cannot be checked" in done.err) is bool(limit)
    assert run("launch", config, "--id=mine", *limit, "--yes").code == 0


def test_an_unknown_price_is_asked_about_on_a_terminal(
    run: Run, config: str, tmp_path: Path, program: Program
) -> None:
    """The question says that the budget cannot be checked; a no launches nothing."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*program.command, "launch", config, LIMIT],
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        cwd=tmp_path,
    )
    os.close(theirs)
    try:
        said = read_until(ours, "[y/N]")
        os.write(ours, b"n\n")
        assert process.wait(60) == 7
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert "is unknown, so budget.max_cost cannot be checked" in " ".join(said.split())
    assert run("list", "--json").document == []


def test_a_resumption_at_an_unknown_price_needs_consent(run: Run, config: str) -> None:
    """It trains again, and leaves no record where it is rejected."""
    assert run("launch", config, "--id=mine", LIMIT, "--yes").code == 0
    done = run("resume", "mine", STATUS="failed")
    assert (done.code, "--yes" in done.err) == (2, True)
    assert len(run("list", "--json").document) == 1
    assert run("resume", "mine", "--yes", STATUS="failed").code == 0


@pytest.mark.parametrize("status", ["completed", "running"])
def test_what_cannot_be_resumed_is_said_before_money(run: Run, config: str, status: str) -> None:
    """Nobody is asked to pay for what will not be done."""
    assert run("launch", config, "--id=mine", "--yes").code == 0
    done = run("resume", "mine", STATUS=status)
    assert (done.code, "--yes" in done.err) == (9, False)
    assert f"resume a run that is {status}" in done.err


def test_a_paused_run_is_resumed_in_place(run: Run, config: str) -> None:
    """`pause` and `resume` keep the run and its id, and cost nothing that needs consent."""
    assert run("launch", config, "--id=mine", "--yes").code == 0
    assert run("pause", "mine", "--json", STATUS="paused").document["status"] == "paused"
    assert run("wait", "mine", "--until=paused", STATUS="paused").out.startswith("mine  paused\n")
    assert run("resume", "mine", STATUS="paused").code == 0
    assert run("resume", "mine", "--id=other", STATUS="paused").code == 2
    assert [found["id"] for found in run("list", "--json").document] == ["mine"]


def test_a_wait_says_that_a_run_ended_otherwise(run: Run, config: str) -> None:
    """The exit code is that of the run; of a completed one it is 6."""
    assert run("launch", config, "--id=mine", "--yes").code == 0
    done = run("wait", "mine", "--until=paused", STATUS="completed")
    assert (done.code, done.out.splitlines()[0]) == (6, "mine  completed")
    assert "finished before it was in this status" in done.err
    assert "paused" in done.err
    assert run("wait", "mine", "--until=running").code == 0
    assert run("wait", "mine", "--until=over").code == 2


def test_a_repeated_launch_says_what_exists(run: Run, config: str, train_file: Path) -> None:
    """Nothing is launched, so no consent is needed; changed data is pointed out."""
    assert run("launch", config, "--id=mine", "--yes").code == 0
    assert run("status", "mine", STATUS="completed").code == 0
    again = run("launch", config, "--id=mine")
    train_file.write_text(train_file.read_text() * 2)
    changed = run("launch", config, "--id=mine", "--json")
    assert (again.code, changed.code) == (0, 0)
    assert "Run mine already exists (completed); nothing launched." in again.err
    assert "has changed" not in again.err
    assert f"{train_file} has changed since" in changed.err
    assert changed.document["status"] == "completed"


RETIRED = """
from training_backends import BackendRetired, Observation, RunState, TrainingStatus
from training_backends.testing.backend import ScriptedBackend


class Plugin(ScriptedBackend):
    name = "ended"

    async def observe(self, run, *, after=None):
        return Observation(RunState(status=TrainingStatus.FAILED))

    async def resume(self, *args, **kwargs):
        raise BackendRetired("It is over.", hint="Go elsewhere.")
"""


def test_a_resumption_at_a_retired_backend_names_the_ways_on(
    run: Run, config_file: Path, install: Install
) -> None:
    """The commands convert the configuration of the run."""
    install("ended_package", "ended", RETIRED)
    config_file.write_text(config_file.read_text().replace("local", "ended"))
    assert run("launch", config_file.name, "--id=mine").code == 0
    done = run("resume", "mine", "--yes", "--json")
    hint = done.document["error"]["hint"]
    assert done.code == 8
    assert hint.startswith("Go elsewhere. Convert it to another backend: ")
    assert "port mine --to local`" in hint
