"""The Together backend, and the scripted server behind it."""

from collections.abc import AsyncGenerator, Callable, Iterator

import pytest
from pydantic import SecretStr

from training_backends import CredentialNotFound, Dataset, TrainingConfig, TrainingRun
from training_backends.backends.together.backend import TogetherBackend
from training_backends.backends.together.settings import TogetherSettings
from training_backends.core.backend import CredentialSource
from training_backends.core.run import new_run_id
from training_backends.datasets.inspect import inspect
from training_backends.testing.journal import MemoryJournal
from training_backends.testing.together_provider import ScriptedTogetherProvider


class Secrets(CredentialSource):
    """Secrets by provider or provider/profile, which a test may change."""

    def __init__(self) -> None:
        self.values = {"together": "test-key"}

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        """Return one, as the vault would."""
        name = f"{provider}/{profile}" if profile else provider
        if name not in self.values:
            raise CredentialNotFound(f"There is no key for {name}.")
        return SecretStr(self.values[name])


@pytest.fixture
def secrets() -> Secrets:
    """Return secrets that hold the provider's key only."""
    return Secrets()


@pytest.fixture
def provider() -> Iterator[ScriptedTogetherProvider]:
    """Serve the API."""
    with ScriptedTogetherProvider() as provider:
        yield provider


@pytest.fixture
def make_backend(
    provider: ScriptedTogetherProvider, secrets: Secrets
) -> Callable[..., TogetherBackend]:
    """Make backends that poll often and give up early."""

    def make(**settings: object) -> TogetherBackend:
        values = {
            "base_url": provider.base_url,
            "retry_pause": 0.01,
            "poll_min": 0.005,
            "poll_max": 0.01,
            "attempts": 2,
            "read_timeout": 5.0,
            "call_timeout": 10.0,
            "settle_timeout": 0.02,
            **settings,
        }
        chosen = TogetherSettings.model_validate(values)
        return TogetherBackend(credentials=secrets, settings=chosen)

    return make


@pytest.fixture
async def backend(
    make_backend: Callable[..., TogetherBackend],
) -> AsyncGenerator[TogetherBackend, None]:
    """Make a backend, and close it in the end."""
    made = make_backend()
    yield made
    await made.aclose()


@pytest.fixture
def config(
    make_config: Callable[..., TrainingConfig], provider: ScriptedTogetherProvider
) -> TrainingConfig:
    """Make a configuration that the provider accepts."""
    hyper = {"epochs": 2, "learning_rate": 1e-5, "batch_size": 8, "warmup_fraction": 0.1}
    return make_config(
        model=provider.models[0],
        tuning={"kind": "lora", "rank": 16},
        hyperparameters=hyper,
        suffix="mine",
    )


@pytest.fixture
def dataset(config: TrainingConfig) -> Dataset:
    """Inspect the data of the configuration."""
    return inspect(config)


@pytest.fixture
def make_journal(config: TrainingConfig) -> Callable[..., MemoryJournal]:
    """Make the journal of a new run."""

    def make(chosen: TrainingConfig | None = None, **kwargs: int) -> MemoryJournal:
        run = TrainingRun(id=new_run_id(), backend="together", config=chosen or config)
        return MemoryJournal(run, **kwargs)

    return make


@pytest.fixture
async def launched(
    backend: TogetherBackend, make_journal: Callable[..., MemoryJournal]
) -> TrainingRun:
    """Launch a run, and return its record."""
    journal = make_journal()
    return journal.run.updated(await backend.launch(journal.run, journal))
