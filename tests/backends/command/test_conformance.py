"""The command backend does what every backend must, with a command that waits for its exit code."""

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import until, wait_until
from training_backends import Dataset, TrainingConfig
from training_backends.backends.command.backend import CommandBackend
from training_backends.backends.command.state import CommandDir
from training_backends.testing.conformance import Subject

pytest_plugins = ["training_backends.testing.pytest"]

SCRIPT = """
echo >> "$RUN_DIR/starts"
mkfifo "$RUN_DIR/end"
read code < "$RUN_DIR/end"
echo model > "$RUN_RESULT/model"
echo "ends with $code"
exit "$code"
"""


class CommandSubject(Subject):
    """The backend over real processes."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.backend = self.reopen()
        self.config = TrainingConfig(options={"command": ["sh", "-c", SCRIPT]})
        self.dataset = Dataset(files=())

    def reopen(self) -> CommandBackend:
        return CommandBackend(self._home)

    def job_ids(self) -> Sequence[str]:
        return [path.parent.name for path in self._home.glob("commands/*/command.json")]

    async def finish(self, remote_id: str) -> None:
        await self._end(remote_id, 0)

    async def fail(self, remote_id: str) -> None:
        await self._end(remote_id, 7)

    async def _end(self, remote_id: str, code: int) -> None:
        directory = self._directory(remote_id)
        await until((directory.path / "end").exists)
        (directory.path / "end").write_text(f"{code}\n")
        await until(lambda: directory.exit.exists() and not directory.is_active())

    def starts(self, remote_id: str) -> int:
        path = self._directory(remote_id).path
        wait_until((path / "end").exists)
        return len((path / "starts").read_text().splitlines())

    def asked(self, remote_id: str) -> Mapping[str, Any]:
        path = self._directory(remote_id).path
        config, spec = (path / name for name in ("config.json", "command.json"))
        return {"config": json.loads(config.read_text()), "spec": json.loads(spec.read_text())}

    def progress(self, remote_id: str, records: int) -> None:
        with self._directory(remote_id).log.open("ab") as log:  # as the command would
            log.writelines(b"line %d\n" % number for number in range(records))

    def _directory(self, remote_id: str) -> CommandDir:
        return CommandDir(self._home / "commands" / remote_id)

    async def aclose(self) -> None:
        await super().aclose()
        for remote_id in self.job_ids():
            directory = self._directory(remote_id)
            directory.request_stop()
            directory.signal_process(signal.SIGTERM)


@pytest.fixture
def conformance_subject(tmp_path: Path) -> Subject:
    return CommandSubject(tmp_path)


def test_conforms(conformance: Callable[[], None]) -> None:
    """One check of the kit holds."""
    conformance()
