"""A server that answers what a test says, and clients for it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from pydantic import SecretStr

from training_backends.core.errors import TrainingBackendError
from training_backends.http.client import HttpClient
from training_backends.http.policy import HttpPolicy
from training_backends.protocols.mistral.errors import error_from_answer
from training_backends.testing.server import LoopbackServer, Received, StubReply


class Keys:
    """A key that can be changed, and how often it was asked for."""

    def __init__(self, value: str = "first-key") -> None:
        self.value = value
        self.asked = 0

    async def __call__(self) -> SecretStr:
        """Return the key of now."""
        self.asked += 1
        return SecretStr(self.value)


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Return a clock."""
    return Clock()


def decode(status: int, headers: Mapping[str, str], body: bytes) -> TrainingBackendError:
    """Read the errors of the Mistral protocol."""
    return error_from_answer(status, headers, body)


@pytest.fixture
def keys() -> Keys:
    """Return a key."""
    return Keys()


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    """Serve `{"ok": true}`."""
    with LoopbackServer(lambda _: StubReply(content=b'{"ok": true}')) as server:
        yield server


@pytest.fixture
def make_client(server: LoopbackServer, keys: Keys) -> Callable[..., HttpClient]:
    """Make clients with short patience."""

    def make(url: str | None = None, **policy: Any) -> HttpClient:
        short = {"read_timeout": 5.0, "call_timeout": 10.0, "attempts": 3, "retry_pause": 0.01}
        chosen = HttpPolicy(**{**short, **policy})
        return HttpClient(url or server.base_url, key=keys, decode_error=decode, policy=chosen)

    return make


@pytest.fixture
def answer_by(server: LoopbackServer) -> Callable[[Callable[[Received], StubReply]], None]:
    """Replace what the server answers."""

    def replace(answer: Callable[[Received], StubReply]) -> None:
        server._answer = answer

    return replace
