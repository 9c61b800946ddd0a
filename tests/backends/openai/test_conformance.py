"""The OpenAI backend does what every backend must, and launches so without metadata."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest

from tests.backends.openai.conftest import KEY
from training_backends import Dataset, TrainingConfig
from training_backends.backends.openai.backend import OpenAIBackend
from training_backends.protocols.openai.requests import NebiusFineTuningJobIn
from training_backends.testing.conformance import (
    BackendConformance,
    CheckSkipped,
    LoopbackSubject,
    Subject,
)
from training_backends.testing.launch_checks import LaunchChecks
from training_backends.testing.openai_provider import ScriptedOpenAIProvider

pytest_plugins = ["training_backends.testing.pytest"]


class OpenAISubject(LoopbackSubject):
    """The backend over the scripted provider."""

    key = KEY
    create_path = "/fine_tuning/jobs"

    def __init__(self, make: Callable[[], OpenAIBackend], provider: ScriptedOpenAIProvider) -> None:
        self._make = make
        self._provider = self.server = provider
        self.backend = make()

    def reopen(self) -> OpenAIBackend:
        """Make another object."""
        return self._make()

    def job_ids(self) -> Sequence[str]:
        """Read the server's state."""
        return list(self._provider.jobs)

    async def finish(self, remote_id: str) -> None:
        """Let the job succeed."""
        if self._provider.jobs[remote_id].status not in {"validating_files", "queued"}:
            self._provider.set_status(remote_id, "running")
        self._provider.run_to(remote_id, "succeeded")

    async def fail(self, remote_id: str) -> None:
        """Let the job fail."""
        self._provider.fail_job(remote_id, code="server_error", message="The node went away.")

    def uploads(self) -> Sequence[str]:
        return self._provider.training_files

    def lose_uploads(self) -> None:
        self._provider.files.clear()

    def starts(self, remote_id: str) -> int:
        return int(remote_id in self._provider.jobs)  # a job starts when it is created

    def asked(self, remote_id: str) -> Mapping[str, Any]:
        return self._provider.jobs[remote_id].asked

    def say(self, remote_id: str, word: str) -> None:
        self._provider.set_status(remote_id, word)

    def progress(self, remote_id: str, records: int) -> None:
        self._provider.set_status(remote_id, "running")
        for number in range(records):
            self._provider.add_event(remote_id, f"Event {number}")

    def lag_lists(self, times: int) -> None:
        self._provider.lists_lag = times


@pytest.fixture
def conformance_subject(
    make_backend: Callable[..., OpenAIBackend],
    provider: ScriptedOpenAIProvider,
    config: TrainingConfig,
    dataset: Dataset,
) -> Subject:
    subject = OpenAISubject(partial(make_backend, read_timeout=0.2), provider)
    subject.config, subject.dataset = config, dataset
    return subject


def test_conforms(conformance: Callable[[], None]) -> None:
    """One check of the kit holds."""
    conformance()


@pytest.mark.anyio
@pytest.mark.parametrize("check", [name for name in dir(LaunchChecks) if name[:6] == "check_"])
async def test_launches_without_metadata(
    check: str,
    *,
    make_backend: Callable[..., OpenAIBackend],
    provider: ScriptedOpenAIProvider,
    config: TrainingConfig,
    dataset: Dataset,
) -> None:
    """One check of launches holds for Nebius, where jobs are compared field by field."""
    provider.job_model = NebiusFineTuningJobIn
    make = partial(make_backend, variant="nebius", read_timeout=0.2)
    subject = OpenAISubject(make, provider)
    hyper = config.hyperparameters.model_copy(update={"seed": 7})
    subject.config = config.model_copy(update={"hyperparameters": hyper})
    subject.dataset = dataset
    try:
        await BackendConformance(lambda: subject).run(check)
    except CheckSkipped as skipped:
        pytest.skip(str(skipped))
