"""What backends share that use one server: settings, client, health and closing; by the example."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from tiny_openai import TinyBackend, TinySettings

from training_backends import (
    BackendContext,
    ConfigError,
    CredentialNotFound,
    CredentialSource,
    plugins,
)
from training_backends.backends.mistral.backend import MistralAPIBackend
from training_backends.backends.openai.backend import OpenAIBackend
from training_backends.backends.together.backend import TogetherBackend
from training_backends.core.backend import TrainingBackend
from training_backends.testing.faults import OtherAnswer
from training_backends.testing.server import LoopbackServer

pytestmark = pytest.mark.anyio


class Account(CredentialSource):
    """Has the key of one profile of the provider."""

    async def get(self, provider: str, profile: str | None = None) -> SecretStr:
        if (provider, profile) != ("tiny", "work"):
            raise CredentialNotFound("no key", hint="set one")
        return SecretStr("key-of-the-profile")


Make = Callable[..., TinyBackend]


@pytest.fixture
def make(tmp_path: Path, server: LoopbackServer) -> Make:
    def make(**settings: Any) -> TinyBackend:
        chosen = TinySettings(**{"base_url": server.base_url, "profile": "work", **settings})
        context = BackendContext(home=tmp_path, credentials=Account(), settings=chosen)
        return TinyBackend.create(context)

    return make


async def test_the_server_gets_the_key_of_the_profile(make: Make, server: LoopbackServer) -> None:
    """Health is a request with the key; connections are opened on use and closed."""
    backend = make()
    assert server.connections == 0
    health = await backend.health()
    assert health.ok
    assert f"{server.base_url} responded in" in health.message
    (request,) = server.requests
    assert (request.method, request.path) == ("GET", "/models")
    assert request.headers["authorization"] == "Bearer key-of-the-profile"
    await backend.aclose()
    await backend.aclose()


async def test_health_tells_a_missing_key_from_a_failure(
    make: Make, server: LoopbackServer
) -> None:
    """Without a key the backend is not set up; a web page or a rejected key is a failure."""
    backend = make(profile="home", attempts=1)
    assert await backend.health() == plugins.Health(
        ok=False, message="no key", hint="set one", configured=False
    )
    assert not server.requests
    backend = make(attempts=1)
    for fault in (OtherAnswer(status=401), OtherAnswer(body="<p>Hello", status=200)):
        server.fail(fault)
        health = await backend.health()
        assert (health.ok, health.configured) == (False, True)
    await backend.aclose()


async def test_a_key_does_not_travel_unencrypted(make: Make) -> None:
    """An insecure URL does not keep the backend from being created; its health says so."""
    backend = make(base_url="http://example.org/v1")
    assert not (await backend.health()).ok
    with pytest.raises(ConfigError):
        await backend.http.json("GET", "/models")
    await backend.aclose()


def test_polling_is_as_the_settings_say(make: Make) -> None:
    """The longest interval is shorter on loopback, unless it is set."""
    assert make(poll_min=0.25).poll_interval == (timedelta(seconds=0.25), timedelta(seconds=2))
    assert make(poll_max=7.0).poll_interval[1] == timedelta(seconds=7)


def test_a_backend_without_settings_of_a_server_is_a_bug(tmp_path: Path) -> None:
    """The author of the backend learns what is missing."""
    context = BackendContext(home=tmp_path, credentials=Account())
    with pytest.raises(TypeError, match="settings_model must be a ServerSettings"):
        TinyBackend.create(context)


@pytest.mark.parametrize("kind", [OpenAIBackend, MistralAPIBackend, TogetherBackend])
@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({"base_url": "https://example.com/v1", "poll_max": None}, 10),
        ({"base_url": "http://127.0.0.1:9/v1", "poll_max": None}, 2),
        ({"poll_max": 33}, 33),
    ],
)
def test_runs_are_polled_as_the_settings_say(
    tmp_path: Path, kind: type[TrainingBackend], fields: dict[str, Any], longest: float
) -> None:
    """Every 10 seconds at the latest, 2 on this machine, or as set."""
    assert kind.settings_model is not None
    chosen = kind.settings_model.model_validate({"poll_min": 0.25, **fields})
    context = BackendContext(home=tmp_path, credentials=Account(), settings=chosen)
    expected = timedelta(seconds=0.25), timedelta(seconds=longest)
    assert kind.create(context).poll_interval == expected
