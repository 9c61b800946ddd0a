"""The Together backend does what every backend must."""

from collections.abc import Callable, Sequence

import pytest

from training_backends import Dataset, TrainingConfig
from training_backends.backends.together.backend import TogetherBackend
from training_backends.testing.conformance import BackendConformance, Subject
from training_backends.testing.together_provider import ScriptedTogetherProvider

pytestmark = pytest.mark.anyio


class TogetherSubject(Subject):
    """The backend over the scripted server."""

    def __init__(
        self, make: Callable[..., TogetherBackend], provider: ScriptedTogetherProvider
    ) -> None:
        self._make = make
        self._provider = provider
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
        """Let the job fail."""
        self._provider.set_status(remote_id, "error", "out of GPUs")

    async def confirm_stop(self, remote_id: str) -> None:
        """Let the job be cancelled."""
        self._provider.set_status(remote_id, "cancelled")


@pytest.mark.parametrize("check", BackendConformance.checks())
async def test_conforms(
    check: str,
    make_backend: Callable[..., TogetherBackend],
    provider: ScriptedTogetherProvider,
    config: TrainingConfig,
    dataset: Dataset,
) -> None:
    """One check of the kit holds."""

    def make_subject() -> Subject:
        subject = TogetherSubject(make_backend, provider)
        subject.config, subject.dataset = config, dataset
        return subject

    await BackendConformance(make_subject).run(check)
