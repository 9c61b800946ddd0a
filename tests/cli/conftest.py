"""Run the command line as a user does: a process, its output and its exit code."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import wait_until


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on standard output."""
        return json.loads(self.out)


Run = Callable[..., Done]


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
    """Run `training-backends` in an empty directory with a home of its own."""

    def run(*arguments: str, stdin: str = "", **environment: str) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "training_backends", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path), **environment},
            timeout=100,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

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
