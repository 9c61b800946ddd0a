"""The backend in docs/architecture.md is complete: it installs and passes the kit."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pages import code_blocks
from tests.plugins import Install
from training_backends import Dataset, TrainingBackend, TrainingConfig, backend_class
from training_backends.core.run import utc_now
from training_backends.testing.conformance import Subject

pytest_plugins = ["training_backends.testing.pytest"]


class DocumentedSubject(Subject):
    """The backend of the page; this is the cluster behind it."""

    def __init__(self, backend: type[TrainingBackend], jobs: Path, config: TrainingConfig) -> None:
        self._class, self._jobs = backend, jobs
        self.backend = self.reopen()
        self.config, self.dataset = config, Dataset(files=())

    def reopen(self) -> TrainingBackend:
        """Make another object over the same directory."""
        make: Callable[[Path], TrainingBackend] = self._class
        return make(self._jobs)

    def job_ids(self) -> list[str]:
        """Read the directory."""
        return [path.stem for path in self._jobs.glob("*.jsonl")]

    async def finish(self, remote_id: str) -> None:
        """Append what the cluster would."""
        self._append(remote_id, status="running")
        self._append(remote_id, status="completed", result_model="model-1")

    async def fail(self, remote_id: str) -> None:
        """Append what the cluster would."""
        failure = {"kind": "provider", "message": "node lost"}
        self._append(remote_id, status="failed", failure=failure)

    async def confirm_stop(self, remote_id: str) -> None:
        """Append what the cluster would."""
        self._append(remote_id, status="cancelled")

    def _append(self, remote_id: str, **event: object) -> None:
        line = json.dumps({"at": utc_now().isoformat(), "message": "event", **event})
        with (self._jobs / f"{remote_id}.jsonl").open("a") as file:
            file.write(line + "\n")


@pytest.fixture
def documented(install: Install) -> type[TrainingBackend]:
    blocks = [block.text for block in code_blocks("architecture.md", "python")]
    (snippet,) = [text for text in blocks if "class MyBackend" in text]
    install("my_package", "mine", snippet + "\n\nPlugin = MyBackend\n")
    importlib.invalidate_caches()
    return backend_class("mine")


@pytest.fixture
def conformance_subject(
    documented: type[TrainingBackend], make_config: Callable[..., TrainingConfig], tmp_path: Path
) -> Subject:
    return DocumentedSubject(documented, tmp_path / "jobs", make_config())


def test_the_documented_backend_conforms(conformance: Callable[[], None]) -> None:
    """Each check of the kit passes."""
    conformance()
