"""The OpenAI backend does what every backend must, against each variant of the protocol."""

from collections.abc import Callable, Sequence

import pytest

from training_backends import Dataset, TrainingConfig
from training_backends.backends.openai.backend import OpenAIBackend
from training_backends.protocols.openai.requests import NebiusFineTuningJobIn
from training_backends.testing.conformance import BackendConformance, Subject
from training_backends.testing.openai_provider import ScriptedOpenAIProvider

pytestmark = pytest.mark.anyio


class OpenAISubject(Subject):
    """The backend over the scripted provider."""

    def __init__(self, make: Callable[[], OpenAIBackend], provider: ScriptedOpenAIProvider) -> None:
        self._make = make
        self._provider = provider
        self.backend = make()

    def reopen(self) -> OpenAIBackend:
        """Make another object."""
        return self._make()

    def job_ids(self) -> Sequence[str]:
        """Read the server's state."""
        return list(self._provider.jobs)

    async def finish(self, remote_id: str) -> None:
        """Let the job succeed."""
        self._provider.run_to(remote_id, "succeeded")

    async def fail(self, remote_id: str) -> None:
        """Let the job fail."""
        self._provider.fail_job(remote_id, code="server_error", message="The node went away.")


@pytest.mark.parametrize("check", BackendConformance.checks())
@pytest.mark.parametrize("variant", ["openai", "nebius"])
async def test_conforms(
    variant: str,
    check: str,
    *,
    make_backend: Callable[..., OpenAIBackend],
    provider: ScriptedOpenAIProvider,
    config: TrainingConfig,
    dataset: Dataset,
) -> None:
    """One check of the kit holds."""
    if variant == "nebius":
        provider.job_model = NebiusFineTuningJobIn

    def make_subject() -> Subject:
        subject = OpenAISubject(lambda: make_backend(variant=variant), provider)
        subject.config, subject.dataset = config, dataset
        return subject

    await BackendConformance(make_subject).run(check)
