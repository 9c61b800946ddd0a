"""Small runs of the local backend."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.forking import Trainer
from tests.waiting import until
from training_backends.backends.local.backend import LocalBackend
from training_backends.core.config import TrainingConfig
from training_backends.core.dataset import DataFile, Dataset
from training_backends.core.run import RunState, TrainingRun
from training_backends.rundir.directory import RunDir


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with train.jsonl (40 rows) and valid.jsonl (5 rows)."""
    directory = tmp_path_factory.mktemp("data")
    for name, rows in (("train", 40), ("valid", 5)):
        chats = [
            {
                "messages": [
                    {"role": "user", "content": f"{n} plus {n}?"},
                    {"role": "assistant", "content": f"It is {n + n}."},
                ]
            }
            for n in range(rows)
        ]
        text = "".join(json.dumps(chat) + "\n" for chat in chats)
        (directory / f"{name}.jsonl").write_text(text)
    return directory


@pytest.fixture(scope="session")
def make_run(data: Path) -> Callable[..., TrainingRun]:
    """Return a function that makes a run's record; keywords change its configuration."""

    def make(run_id: str = "r", **changes: Any) -> TrainingRun:
        config = {
            "model": "tiny-mistral",
            "data": {"train": data / "train.jsonl", "validation": data / "valid.jsonl"},
            "hyperparameters": {"training_steps": 20, "batch_size": 4, "learning_rate": 3e-3},
            "options": {"device": "cpu"},
        }
        changed = TrainingConfig.model_validate({**config, **changes})
        return TrainingRun(id=run_id, backend="local", config=changed)

    return make


def inspected(run: TrainingRun, **changes: Any) -> Dataset:
    """Say of a run's files what an inspection would."""
    config = run.config
    files = [(source, "train") for source in config.data.train]
    files += [(source, "validation") for source in config.data.validation]
    return Dataset(
        files=tuple(
            DataFile.model_validate(
                {
                    "path": source.local_path,
                    "role": role,
                    "size": source.local_path.stat().st_size,
                    "sha256": "0" * 64,
                    "rows": len(source.local_path.read_bytes().splitlines()),
                    "sample_type": "instruct",
                    **changes,
                }
            )
            for source, role in files
        )
    )


@pytest.fixture(scope="session", name="inspected")
def inspected_fixture() -> Callable[..., Dataset]:
    """Return a function that says of a run's files what an inspection would."""
    return inspected


async def until_state(
    backend: LocalBackend, run: TrainingRun, reached: Callable[[RunState], object]
) -> RunState:
    """Ask for a run's state until it is as wanted."""
    return await until(lambda: backend.status(run), reached)


def is_over(state: RunState) -> bool:
    """Tell whether a run is over."""
    return state.status.is_terminal


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """The state of a machine; what trains in it is killed with the test."""
    yield tmp_path
    for path in tmp_path.glob("runs/*"):
        if pid := RunDir(path).active_pid():
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def backend(home: Path) -> LocalBackend:
    """A backend with no runs."""
    return LocalBackend(home)


@pytest.fixture
def quick(home: Path, trainer: Trainer) -> LocalBackend:
    """One whose training processes begin with torch loaded."""
    return LocalBackend(home, program=trainer.program)
