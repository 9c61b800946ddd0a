"""Run the command line as a user does: arguments, output and exit code."""

import json
import os
import select
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cli.answering import AnsweringBackend
from tests.commands import Done, Run, run_here
from tests.commands import run_process as run_in_process
from tests.forking import Program
from tests.waiting import wait_until


def read_until(terminal: int, text: str) -> str:
    """Return what a terminal shows from now on until a text is among it."""
    said = ""

    def read() -> str:
        nonlocal said
        if select.select([terminal], [], [], 0.1)[0]:
            said += os.read(terminal, 4096).decode(errors="replace")
        return said

    return wait_until(read, lambda said: text in said)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run `training-backends` in this process, in an empty directory with a home of its own."""

    def run(*arguments: str, stdin: str = "", **environment: str) -> Done:
        return run_here(arguments, tmp_path, stdin, {"HOME": str(tmp_path), **environment})

    return run


@pytest.fixture
def run_process(tmp_path: Path, program: Program) -> Run:
    """Run it in a process of its own: for several at once, and for what only a process has."""

    def run(*arguments: str, stdin: str = "", **environment: str) -> Done:
        home = {"HOME": str(tmp_path), **environment}
        return run_in_process(program, arguments, tmp_path, stdin, home)

    return run


def needs_torch() -> None:
    """Skip a test where only the client is installed."""
    if find_spec("torch") is None:
        pytest.skip("not installed: torch (extra local)")


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Write a hundred rows of twenty bytes."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n:03}"}) + "\n" for n in range(100)))
    return path


@pytest.fixture
def config_file(tmp_path: Path, train_file: Path) -> Path:
    """Write a configuration that the local backend can run."""
    needs_torch()
    path = tmp_path / "run.yaml"
    path.write_text(
        "backend: local\n"
        "model: tiny-mistral\n"
        "data:\n"
        f"  train: {train_file.name}\n"
        "hyperparameters:\n"
        "  training_steps: 4\n"
        "  batch_size: 2\n"
    )
    return path


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AnsweringBackend:
    """Install the backend `answering`, whose jobs outlive a command."""
    site = tmp_path / "site"
    about = site / "answering-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: answering\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[training_backends.backends]\nanswering = tests.cli.answering:AnsweringBackend\n"
    )
    monkeypatch.syspath_prepend(str(site))
    AnsweringBackend.shared = AnsweringBackend()
    return AnsweringBackend.shared
