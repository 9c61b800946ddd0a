"""The Mistral backend does what every backend must."""

from collections.abc import Callable, Sequence

import pytest

from training_backends import Dataset, TrainingConfig
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.testing.conformance import BackendConformance, Subject
from training_backends.testing.provider import ScriptedProvider

pytestmark = pytest.mark.anyio


class MistralSubject(Subject):
    """The backend over the scripted provider."""

    def __init__(self, make: Callable[..., MistralAPIBackend], provider: ScriptedProvider) -> None:
        self._make = make
        self._provider = provider
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


@pytest.mark.parametrize("check", BackendConformance.checks())
async def test_conforms(
    check: str,
    make_backend: Callable[..., MistralAPIBackend],
    provider: ScriptedProvider,
    config: TrainingConfig,
    dataset: Dataset,
) -> None:
    """One check of the kit holds."""

    def make_subject() -> Subject:
        subject = MistralSubject(make_backend, provider)
        subject.config, subject.dataset = config, dataset
        return subject

    await BackendConformance(make_subject).run(check)
