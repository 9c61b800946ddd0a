"""A backend, and the scripted provider behind it."""

import secrets as secrets_module
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from training_backends import CredentialNotFound, Dataset, TrainingConfig, TrainingRun
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.mistral.settings import MistralSettings
from training_backends.core.backend import CredentialSource
from training_backends.core.run import new_run_id
from training_backends.datasets.inspect import inspect
from training_backends.testing.journal import MemoryJournal
from training_backends.testing.provider import ScriptedProvider


class Secrets(CredentialSource):
    """Secrets by provider or provider/profile, which a test may change."""

    def __init__(self) -> None:
        self.values = {"mistral": "test-key"}

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
def provider() -> Iterator[ScriptedProvider]:
    """Serve the protocol."""
    with ScriptedProvider() as provider:
        yield provider


@pytest.fixture
def make_backend(provider: ScriptedProvider, secrets: Secrets) -> Callable[..., MistralAPIBackend]:
    """Make backends that look often and give up early."""

    def make(**settings: object) -> MistralAPIBackend:
        values = {
            "base_url": provider.base_url,
            "retry_pause": 0.01,
            "poll_min": 0.01,
            "poll_max": 0.02,
            "attempts": 3,
            "read_timeout": 5.0,
            "call_timeout": 10.0,
            "settle_timeout": 0.05,
            **settings,
        }
        chosen = MistralSettings.model_validate(values)
        return MistralAPIBackend(credentials=secrets, settings=chosen)

    return make


@pytest.fixture
async def backend(
    make_backend: Callable[..., MistralAPIBackend],
) -> AsyncGenerator[MistralAPIBackend, None]:
    """Make a backend, and close it in the end."""
    made = make_backend()
    yield made
    await made.aclose()


@pytest.fixture
def restart(
    make_backend: Callable[..., MistralAPIBackend], provider: ScriptedProvider, secrets: Secrets
) -> Callable[..., MistralAPIBackend]:
    """Make backends that remember nothing of the server's failures, as in another process."""

    def make(**settings: object) -> MistralAPIBackend:
        provider.key = None
        secrets.values["mistral"] = secrets_module.token_hex(8)
        return make_backend(**settings)

    return make


@pytest.fixture
def config(make_config: Callable[..., TrainingConfig]) -> TrainingConfig:
    """Make a configuration that the provider takes."""
    return make_config(model="open-mistral-7b", hyperparameters={"training_steps": 10})


@pytest.fixture
def dataset(config: TrainingConfig) -> Dataset:
    """Look into the data of the configuration."""
    return inspect(config)


@pytest.fixture
def make_journal(config: TrainingConfig) -> Callable[..., MemoryJournal]:
    """Make the journal of a new run."""

    def make(chosen: TrainingConfig | None = None, **kwargs: int) -> MemoryJournal:
        run = TrainingRun(id=new_run_id(), backend="mistral", config=chosen or config)
        return MemoryJournal(run, **kwargs)

    return make


@pytest.fixture
def one_file(tmp_path: Path) -> Path:
    """Write a file of one row."""
    path = tmp_path / "one.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    return path
