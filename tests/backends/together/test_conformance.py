"""The Together backend does what every backend must."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest

from training_backends import Dataset, TrainingConfig
from training_backends.backends.together.backend import TogetherBackend
from training_backends.testing.conformance import LoopbackSubject, Subject
from training_backends.testing.together_provider import ScriptedTogetherProvider

pytest_plugins = ["training_backends.testing.pytest"]

KEY = "test-key"


class TogetherSubject(LoopbackSubject):
    """The backend over the scripted server."""

    key = KEY
    create_path = "/v1/fine-tunes"

    def __init__(
        self, make: Callable[[], TogetherBackend], provider: ScriptedTogetherProvider
    ) -> None:
        self._make = make
        self._provider = self.server = provider
        self._lost: list[str] = []
        self.backend = make()

    def reopen(self) -> TogetherBackend:
        """Make another object."""
        return self._make()

    def job_ids(self) -> Sequence[str]:
        """Return the jobs of the server."""
        return list(self._provider.jobs)

    async def finish(self, remote_id: str) -> None:
        """Let the job train and complete."""
        self._provider.set_status(remote_id, "running")
        for step in (1, 2):
            self._provider.add_metrics(remote_id, step, loss=3.0 - step)
        self._provider.add_checkpoint(remote_id, 2)
        self._provider.set_status(remote_id, "completed")

    async def fail(self, remote_id: str) -> None:
        """Let the job fail after its first checkpoint."""
        self._provider.add_checkpoint(remote_id, 1)
        self._provider.set_status(remote_id, "error", "out of GPUs")

    async def confirm_stop(self, remote_id: str) -> None:
        """Let the job be cancelled."""
        self._provider.set_status(remote_id, "cancelled")

    def uploads(self) -> Sequence[str]:
        return [*self._lost, *self._provider.files]

    def lose_uploads(self) -> None:
        self._lost += self._provider.files
        self._provider.files.clear()

    def starts(self, remote_id: str) -> int:
        return self.job_ids().count(remote_id)  # a job starts when it is created

    def asked(self, remote_id: str) -> Mapping[str, Any]:
        return self._provider.jobs[remote_id].asked

    def say(self, remote_id: str, word: str) -> None:
        self._provider.set_status(remote_id, word)

    def progress(self, remote_id: str, records: int) -> None:
        self._provider.jobs[remote_id].status = "running"
        for number in range(records):
            self._provider.add_event(remote_id, "epoch_complete", f"Epoch {number}")

    def connections(self) -> int:
        return self._provider.open_connections + self._provider.storage.open_connections

    def lag_lists(self, times: int) -> None:
        self._provider.lists_lag = times


@pytest.fixture
def conformance_subject(
    make_backend: Callable[..., TogetherBackend],
    provider: ScriptedTogetherProvider,
    config: TrainingConfig,
    dataset: Dataset,
) -> Subject:
    subject = TogetherSubject(partial(make_backend, read_timeout=0.2), provider)
    subject.config, subject.dataset = config, dataset
    return subject


def test_conforms(conformance: Callable[[], None]) -> None:
    """One check of the kit holds."""
    conformance()
