"""Small data and run directories for the engine's tests."""

import gc
import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from training_backends.rundir.directory import RunDir, RunSpec

MakeRun = Callable[..., RunDir]


def write_chats(path: Path, count: int, seed: int) -> Path:
    """Write short sums, so that something can be learnt in seconds."""
    chance = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            a, b = chance.randint(0, 9), chance.randint(0, 9)
            chat = [
                {"role": "user", "content": f"{a} plus {b}?"},
                {"role": "assistant", "content": f"The sum is {a + b}."},
            ]
            file.write(json.dumps({"messages": chat}) + "\n")
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with train.jsonl (60 rows) and valid.jsonl (7 rows)."""
    directory = tmp_path_factory.mktemp("data")
    write_chats(directory / "train.jsonl", 60, seed=1)
    write_chats(directory / "valid.jsonl", 7, seed=2)
    return directory


@pytest.fixture(scope="session")
def make_run(data: Path) -> MakeRun:
    """Return a function that writes the spec of a small run into a directory."""
    import training_backends.trainer.run  # noqa: PLC0415, F401  # not for tests that train nothing

    gc.collect()
    gc.freeze()  # each training collects garbage, and need not search what it loaded

    def make(path: Path, **changes: Any) -> RunDir:
        values = {
            "run_id": path.name,
            "model": "tiny-mistral",
            "tuning": "full",
            "train": [data / "train.jsonl"],
            "validation": [data / "valid.jsonl"],
            "learning_rate": 3e-3,
            "training_steps": 30,
            "batch_size": 4,
            "seed": 3,
            "checkpoint_every": 5,
            "device": "cpu",
        }
        run = RunDir(path)
        run.write_spec(RunSpec.model_validate({**values, **changes}))
        return run

    return make


class Engine:
    """Starts the program as a child, as a backend does."""

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[str]] = []

    def start(self, *arguments: object) -> "subprocess.Popen[str]":
        """Start it and return at once."""
        child = subprocess.Popen(
            [sys.executable, "-m", "training_backends.trainer", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._children.append(child)
        return child

    def close(self) -> None:
        """Kill what still runs."""
        for child in self._children:
            child.kill()
            child.communicate()


@pytest.fixture
def engine() -> Iterator[Engine]:
    """The program, its children ended with the test."""
    started = Engine()
    yield started
    started.close()


@pytest.fixture(autouse=True)
def _signals_are_put_back() -> Iterator[None]:
    """Check that training in this process leaves no handler behind."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before
