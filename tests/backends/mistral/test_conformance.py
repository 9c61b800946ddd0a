"""The Mistral backend does what every backend must."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest

from training_backends import Dataset, TrainingConfig
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.testing.conformance import LoopbackSubject, Subject
from training_backends.testing.provider import ScriptedProvider

pytest_plugins = ["training_backends.testing.pytest"]
KEY = "test-key"


class MistralSubject(LoopbackSubject):
    """The backend over the scripted provider."""

    key = KEY
    create_path = "/v1/fine_tuning/jobs"

    def __init__(self, make: Callable[..., MistralAPIBackend], provider: ScriptedProvider) -> None:
        self._make = make
        self._provider = self.server = provider
        provider.auto = "validate"
        provider.refuses_similar = False  # the kit launches the same again and again
        self.backend = make()

    def reopen(self) -> MistralAPIBackend:
        """Make another object."""
        return self._make()

    def job_ids(self) -> Sequence[str]:
        """Look behind the counter."""
        return list(self._provider.jobs)

    async def finish(self, remote_id: str) -> None:
        """Let the job succeed."""
        self._provider.add_checkpoint(remote_id, 10, train_loss=1.0)
        self._provider.set_status(remote_id, "SUCCESS")

    async def fail(self, remote_id: str) -> None:
        """Let the job fail."""
        self._provider.set_status(remote_id, "FAILED", error="the node went away")

    def uploads(self) -> Sequence[str]:
        return list(self._provider.files)

    def lose_uploads(self) -> None:
        for file in self._provider.files.values():
            file.deleted = True

    def starts(self, remote_id: str) -> int:
        return self._provider.jobs[remote_id].starts

    def asked(self, remote_id: str) -> Mapping[str, Any]:
        return self._provider.jobs[remote_id].asked

    def say(self, remote_id: str, word: str) -> None:
        self._provider.set_status(remote_id, word, event=False)

    def progress(self, remote_id: str, records: int) -> None:
        job = self._provider.jobs[remote_id]
        for _ in range(records):
            step = job.latest_step + 1
            self._provider.add_checkpoint(remote_id, step, train_loss=1.0)

    def lag_lists(self, times: int) -> None:
        self._provider.lists_lag = times


@pytest.fixture
def conformance_subject(
    make_backend: Callable[..., MistralAPIBackend],
    provider: ScriptedProvider,
    config: TrainingConfig,
    dataset: Dataset,
) -> Subject:
    subject = MistralSubject(partial(make_backend, read_timeout=0.2, attempts=2), provider)
    subject.config, subject.dataset = config, dataset
    return subject


def test_conforms(conformance: Callable[[], None]) -> None:
    """One check of the kit holds."""
    conformance()
