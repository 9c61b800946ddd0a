"""The local backend does what every backend must, with processes that train nothing."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import until
from training_backends.backends.local.backend import LocalBackend
from training_backends.core.run import TrainingRun
from training_backends.rundir.directory import RunDir
from training_backends.testing.conformance import BackendConformance, Subject

pytestmark = pytest.mark.anyio

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


@pytest.mark.parametrize("check", BackendConformance.checks())
async def test_conforms(
    check: str, home: Path, make_run: Callable[..., TrainingRun], inspected: Callable[..., Any]
) -> None:
    """One check of the kit holds."""

    def make_subject() -> Subject:
        subject = LocalSubject(home)
        run = make_run()
        subject.config, subject.dataset = run.config, inspected(run)
        return subject

    try:
        await BackendConformance(make_subject).run(check)
    finally:
        for path in home.glob("runs/*"):  # also those that do not hold their lock yet
            (path / "fail").touch()
