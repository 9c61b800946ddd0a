"""A key that is changed while a program runs: real vault, real backend, a server that checks."""

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from training_backends import AuthenticationFailed, TrainingConfig, TrainingRun
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.mistral.settings import MistralSettings
from training_backends.core.backend import RemoteFilters
from training_backends.credentials.choice import CredentialSettings
from training_backends.credentials.vault import CredentialVault
from training_backends.testing.provider import ScriptedProvider

pytestmark = pytest.mark.anyio


@pytest.fixture
def provider() -> Iterator[ScriptedProvider]:
    """Serve the protocol to whoever has the key of the day."""
    with ScriptedProvider() as provider:
        provider.key = "first-key"
        provider.auto = "none"
        yield provider


@pytest.fixture
def vault(tmp_path: Path, remembered_keys: None) -> Callable[[], CredentialVault]:
    """Make vaults on one encrypted file, as separate processes would."""
    path = tmp_path / "password"
    path.touch(mode=0o600)
    path.write_text("correct horse")
    chosen = CredentialSettings(keyring="file", password_file=path)
    return lambda: CredentialVault(home=tmp_path / "home", environ={}, settings=chosen)


@pytest.fixture
async def backend(
    provider: ScriptedProvider, vault: Callable[[], CredentialVault]
) -> AsyncGenerator[MistralAPIBackend, None]:
    """Make the backend that goes on running, over a vault of its own."""
    settings = MistralSettings(base_url=provider.base_url, attempts=1, poll_min=0.01, poll_max=0.02)
    made = MistralAPIBackend(credentials=vault(), settings=settings)
    yield made
    await made.aclose()


def keys_sent(provider: ScriptedProvider) -> list[str]:
    """Return the keys of all requests, each once, in order."""
    sent = [
        request.headers["authorization"].removeprefix("Bearer ") for request in provider.requests
    ]
    return list(dict.fromkeys(sent))


async def test_a_rotated_key_is_taken_up_without_a_restart(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    vault: Callable[[], CredentialVault],
    make_config: Callable[..., TrainingConfig],
) -> None:
    """Somebody follows a run; the key is stored anew and the old one ended; nothing is missed."""
    await vault().set("mistral", "first-key")
    job = provider.add_job(
        {
            "model": "open-mistral-7b",
            "training_files": [],
            "hyperparameters": {"training_steps": 9},
        }
    )
    run = TrainingRun(id="r", backend="mistral", config=make_config(), remote_id=job)
    steps = []
    provider.add_checkpoint(job, 1, train_loss=2.0)
    async with aclosing(backend.logs(run, follow=True)) as records:
        async for record in records:
            if record.source != "checkpoint":
                continue
            steps.append(record.step)
            if record.step == 1:
                await vault().set("mistral", "second-key")
                provider.key = "second-key"
                provider.add_checkpoint(job, 2, train_loss=1.0)
                provider.set_status(job, "SUCCESS")
    assert steps == [1, 2]
    assert keys_sent(provider) == ["first-key", "second-key"]
    assert (await backend.health()).ok


async def test_a_key_that_was_ended_before_it_was_stored_anew_is_no_dead_end(
    backend: MistralAPIBackend,
    provider: ScriptedProvider,
    vault: Callable[[], CredentialVault],
) -> None:
    """Refused while the vault still has the old one; as soon as it has the new one, it works."""
    await vault().set("mistral", "first-key")
    assert (await backend.health()).ok
    provider.key = "second-key"
    with pytest.raises(AuthenticationFailed):
        await backend.list_remote(RemoteFilters())
    assert not (await backend.health()).ok
    await vault().set("mistral", "second-key")
    assert (await backend.health()).ok
