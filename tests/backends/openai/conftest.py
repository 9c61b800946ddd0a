"""A backend, and the scripted provider behind it."""

import json
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from training_backends import CredentialNotFound, Dataset, TrainingConfig, TrainingRun
from training_backends.backends.openai.backend import OpenAIBackend
from training_backends.backends.openai.settings import OpenAISettings
from training_backends.core.run import new_run_id
from training_backends.datasets.inspect import inspect
from training_backends.datasets.provider_formats import OPENAI
from training_backends.testing.journal import MemoryJournal
from training_backends.testing.openai_provider import ScriptedOpenAIProvider

KEY = "sk-proj-test-0123456789abcdef0123456789abcdef"
MODEL = "gpt-4o-mini-2024-07-18"


class Secrets:
    """Secrets by provider, which a test may change."""

    def __init__(self) -> None:
        self.values = {"openai": KEY}

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        """Return one, as the vault would."""
        del profile
        if provider not in self.values:
            raise CredentialNotFound(f"There is no key for {provider}.")
        return SecretStr(self.values[provider])

    async def get_all(self, provider: str, profile: str | None = None) -> dict[str, SecretStr]:
        """Return the only secret of a provider."""
        return {"": await self.get(provider, profile)}


@pytest.fixture
def secrets() -> Secrets:
    """Return secrets that hold the provider's key only."""
    return Secrets()


@pytest.fixture
def provider() -> Iterator[ScriptedOpenAIProvider]:
    """Serve the protocol."""
    with ScriptedOpenAIProvider() as provider:
        provider.key = KEY
        yield provider


@pytest.fixture
def make_backend(
    provider: ScriptedOpenAIProvider, secrets: Secrets
) -> Callable[..., OpenAIBackend]:
    """Make backends that poll often and give up early."""

    def make(**settings: object) -> OpenAIBackend:
        values = {
            "base_url": provider.url,
            "query": provider.query,
            "retry_pause": 0.01,
            "poll_min": 0.01,
            "poll_max": 0.02,
            "attempts": 2,
            "read_timeout": 5.0,
            "call_timeout": 10.0,
            "settle_timeout": 0.05,
            **settings,
        }
        chosen = OpenAISettings.model_validate(values)
        return OpenAIBackend(credentials=secrets, settings=chosen)

    return make


@pytest.fixture
async def backend(
    make_backend: Callable[..., OpenAIBackend],
) -> AsyncGenerator[OpenAIBackend, None]:
    """Make a backend, and close it in the end."""
    made = make_backend()
    yield made
    await made.aclose()


@pytest.fixture
def config(make_config: Callable[..., TrainingConfig]) -> TrainingConfig:
    """Make a configuration that the provider accepts."""
    return make_config(model=MODEL, hyperparameters={"epochs": 1, "batch_size": 10})


@pytest.fixture
def dataset(config: TrainingConfig) -> Dataset:
    """Inspect the data of the configuration."""
    return inspect(config, provider_format=OPENAI)


@pytest.fixture
def make_journal(config: TrainingConfig) -> Callable[..., MemoryJournal]:
    """Make the journal of a new run."""

    def make(chosen: TrainingConfig | None = None, **kwargs: int) -> MemoryJournal:
        run = TrainingRun(id=new_run_id(), backend="openai", config=chosen or config)
        return MemoryJournal(run, **kwargs)

    return make


@pytest.fixture
def preference_file(tmp_path: Path) -> Path:
    """Write a file of preference pairs."""
    path = tmp_path / "pairs.jsonl"
    pair = {
        "input": {"messages": [{"role": "user", "content": "Hi"}]},
        "preferred_output": [{"role": "assistant", "content": "Hello!"}],
        "non_preferred_output": [{"role": "assistant", "content": "What?"}],
    }
    path.write_text((json.dumps(pair) + "\n") * 12)
    return path
