"""A gateway as users start it: the installed program, on loopback, in front of the engine."""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import training_backends
from tests.forking import Program, Trainer


@dataclass(frozen=True)
class Served:
    """Where a gateway answers, and with which key."""

    url: str
    key: str
    home: Path


@contextmanager
def serving(
    home: Path, python: Path = Path(sys.executable), /, **variables: str
) -> Iterator[Served]:
    """Run `training-backends serve --backend local` for the block, with more variables."""
    key = secrets.token_urlsafe(24)
    command = [str(python), "-m", "training_backends", "serve", "--port", "0", "--json"]
    environment = {
        **{name: text for name, text in os.environ.items() if "TRAINING_BACKENDS" not in name},
        "TRAINING_BACKENDS_HOME": str(home),
        "TRAINING_BACKENDS_GATEWAY__API_KEY": key,
        **variables,
    }
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            yield Served(json.loads(server.stdout.readline())["url"], key, home)
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 0


@pytest.fixture(scope="session")
def served(
    tmp_path_factory: pytest.TempPathFactory, program: Program, trainer: Trainer
) -> Iterator[Served]:
    """Run one gateway for all tests that drive one."""
    python = {"TRAINING_BACKENDS_LOCAL__PYTHON": str(trainer.python)}
    with serving(tmp_path_factory.mktemp("served"), program.python, **python) as found:
        yield found


@pytest.fixture
def samples(tmp_path: Path) -> tuple[Path, Path]:
    """Copy the package's sample data: training and validation."""
    source = Path(training_backends.__file__).parent / "samples"
    paths = (tmp_path / "train.jsonl", tmp_path / "validation.jsonl")
    for path in paths:
        path.write_bytes((source / path.name).read_bytes())
    return paths
