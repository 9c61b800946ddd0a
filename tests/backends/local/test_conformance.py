"""The local backend does what every backend must, with processes that train nothing."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import until
from training_backends.backends.local.backend import LocalBackend
from training_backends.core.run import TrainingRun
from training_backends.rundir.directory import RunDir
from training_backends.testing.conformance import Subject

pytest_plugins = ["training_backends.testing.pytest"]

PROGRAM = (sys.executable, str(Path(__file__).with_name("child.py")))


class LocalSubject(Subject):
    """The backend over real processes, each of which ends as its directory says."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.backend = self.reopen()

    def reopen(self) -> LocalBackend:
        """Make another object."""
        return LocalBackend(self._home, program=PROGRAM)

    def job_ids(self) -> Sequence[str]:
        """Snapshot for directories."""
        return [path.parent.name for path in self._home.glob("runs/*/spec.json")]

    async def finish(self, remote_id: str) -> None:
        """Let the process come to its end, and wait for that."""
        await self._end(remote_id, "finish")

    async def fail(self, remote_id: str) -> None:
        """Let the process fail, and wait for that."""
        await self._end(remote_id, "fail")

    async def _end(self, remote_id: str, word: str) -> None:
        directory = RunDir(self._home / "runs" / remote_id)
        (directory.path / word).touch()
        await until(lambda: directory.exit.exists() and not directory.is_active())

    def asked(self, remote_id: str) -> Mapping[str, Any]:
        """Read the specification that the process was started with."""
        spec: dict[str, Any] = json.loads(
            (self._home / "runs" / remote_id / "spec.json").read_text()
        )
        return spec

    async def aclose(self) -> None:
        try:
            await super().aclose()
        finally:
            for path in self._home.glob("runs/*"):  # also those that do not hold their lock yet
                (path / "fail").touch()


@pytest.fixture
def conformance_subject(
    home: Path, make_run: Callable[..., TrainingRun], inspected: Callable[..., Any]
) -> Subject:
    subject = LocalSubject(home)
    run = make_run()
    subject.config, subject.dataset = run.config, inspected(run)
    return subject


def test_conforms(conformance: Callable[[], None]) -> None:
    """One check of the kit holds."""
    conformance()
